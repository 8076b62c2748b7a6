"""The direction of imports: a part of the package may import itself and what stands below it in `ROWS`."""

import ast
from pathlib import Path

import pytest

import promptkd

ROOT = Path(promptkd.__file__).parent
ROWS = (
    ("cli",),
    ("demo",),
    ("study", "judge"),
    ("training",),
    ("evaluation", "report"),
    ("methods", "generation"),
    ("responses",),
    ("models",),
    ("engine",),
    ("data", "objectives"),
    ("results",),
    ("io", "memory"),
    ("precision", "visible"),
    ("errors",),
)
DEPTH = {part: depth for depth, row in enumerate(ROWS) for part in row}
FACES = {"__init__", "__main__"}  # the package's own, which stand above everything
NARROWER = {
    "report": {"results", "errors", "visible"},
    "engine": {"data", "objectives", "errors"},
    "objectives": {"errors"},
}
"""Parts that may import less than what stands below them: a report reads records, an engine runs models on batches of
tokens, objectives know tensors."""


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[tuple[int, str]]:
    """Every module of promptkd that a file imports, wherever in the file, with the line."""
    package = ["promptkd", *path.relative_to(ROOT).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(node.lineno, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "promptkd" else [module]
            found |= {(node.lineno, name) for name in names}
    return {(line, name) for line, name in found if name.split(".")[0] == "promptkd"}


def violations(path: Path) -> list[str]:
    part, wrong = part_of(path), []
    for line, name in sorted(imported(path)):
        other = name.split(".")[1] if "." in name else ""
        below = {each for each in DEPTH if DEPTH[each] > DEPTH[part]} & NARROWER.get(part, set(DEPTH))
        if other != part and other not in below:
            wrong.append(f"{path.relative_to(ROOT)}:{line}: {part} may not import {name}")
    return wrong


FILES = sorted(path for path in ROOT.rglob("*.py") if part_of(path) not in FACES)


def test_every_part_has_its_place():
    assert {part_of(path) for path in ROOT.rglob("*.py")} - FACES == set(DEPTH)


@pytest.mark.parametrize("part", sorted(DEPTH))
def test_imports_point_down(part):
    wrong = [each for path in FILES if part_of(path) == part for each in violations(path)]
    assert not wrong, "\n".join(wrong)


def test_the_test_sees_what_it_forbids(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "report").mkdir()
    file = tmp_path / "report" / "page.py"
    lines = (
        "import os",
        "import promptkd.models.load",
        "from promptkd import DistillConfig",
        "from promptkd.results import Results",
        "def late():",
        "    from ..evaluation import rouge",
        "    from . import html",
        "    from promptkd.data.rows import Example",
    )
    file.write_text("\n".join(lines))
    assert [each.split(": ")[0] for each in violations(file)] == [f"report/page.py:{line}" for line in (2, 3, 6, 8)]
