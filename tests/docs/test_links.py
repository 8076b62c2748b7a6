"""Links of the README and the pages lead somewhere; the README, which is the page on PyPI too, has absolute ones."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
HOME = "https://github.com/promptkd/promptkd"
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)|^\[[^\]^]+\]: (\S+)$", re.MULTILINE)
CODE = re.compile(r"^```.*?^```$|^ {4}.*$|`[^`\n]*`", re.DOTALL | re.MULTILINE)


def links(text: str) -> list[str]:
    return [first or second for first, second in LINK.findall(CODE.sub("", text))]


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_titles(page):
    for link in links(page.read_text(encoding="utf-8")):
        if link.startswith(f"{HOME}/blob/main/"):
            target = ROOT / link.removeprefix(f"{HOME}/blob/main/")
        elif link.startswith(("https://", "mailto:")):
            continue
        else:
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert not anchor or anchor in anchors(target), link
        assert target.exists(), link


def test_the_readmes_links_are_absolute_and_used():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(link.startswith("https://") for link in links(text))
    defined = set(re.findall(r"^\[([^\]]+)\]: ", text, re.MULTILINE))
    assert defined == set(re.findall(r"\]\[([^\]]+)\]", text))


def test_the_readme_tells_in_this_order():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    titles = ["The result", "Two commands", "Your own model", "Python", "More"]
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == titles


def test_every_page_has_its_place_on_the_site():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = [page for part in site["nav"] for pages in part.values() for page in pages]
    listed = [page if isinstance(page, str) else next(iter(page.values())) for page in pages]
    held = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert set(listed) == held
    assert len(listed) == len(held)
    assert site["strict"]
    assert site["theme"]["font"] is False


def test_the_project_says_where_it_lives():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert project["urls"]["Homepage"] == citation["repository-code"] == HOME
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["Kim", "Jang", "Yang"]
    assert project["urls"]["Paper"] == paper["url"] == "https://arxiv.org/abs/2402.12842"


def test_workflows_run_what_the_makefile_has():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for file in (ROOT / ".github" / "workflows").glob("*.yml"):
        text = file.read_text(encoding="utf-8")
        assert yaml.safe_load(text)["jobs"].keys() >= {"lint", "tests", "docs", "wheel"}
        assert set(re.findall(r"make ([a-z-]+)", text)) <= targets
        assert all(re.search(r"@v\d+\.\d+\.\d+$", use) for use in re.findall(r"uses: (\S+)", text))
