"""The report in headless Chromium: nothing is complained of, nothing asked for, and hostile text does nothing."""

import re
from pathlib import Path
from typing import Any

import pytest

from helpers.demo_record import HOSTILE, record
from helpers.pages import browser
from helpers.records import answered_by, biased, explained, made_up_rows, runs_of_two_methods, study
from promptkd.report import render_report
from promptkd.results import Results

__all__ = ["browser"]

pytestmark = pytest.mark.slow
LIMIT = 6_000_000
HOSTILE_LABEL = "<b>bold</b><a href='javascript:window.owned = 1'>x</a> &lt;i&gt; </script>"


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five models x 500 rows x two seeds and greedy."""
    file = tmp_path_factory.mktemp("report") / "full.html"
    file.write_text(render_report(study(made_up_rows(500))), encoding="utf-8")
    return file


class Opened:
    """A page, what its console said, and what it asked for."""

    def __init__(self, browser: Any, file: Path, **context: Any):
        self.page = browser.new_context(**context).new_page()
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.page.on(
            "console", lambda said: self.complaints.append(said.text) if said.type in ("error", "warning") else None
        )
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())
        self.until("document.documentElement.classList.contains('scripted') && Boolean(window.Plotly)")

    def until(self, condition: str) -> None:
        """Playwright's own wait_for_function evaluates a text inside the page, which the page's policy forbids."""
        for _ in range(200):
            if self.page.evaluate(condition):
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"never: {condition}")

    def draw_every_chart(self) -> int:
        """Open what is folded, scroll to every chart, and wait for all; how many there are."""
        self.page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true })")
        boxes = self.page.locator(".chart").all()
        for box in boxes:
            box.scroll_into_view_if_needed()
        self.until(f"document.querySelectorAll('.chart .main-svg .scatterlayer').length >= {len(boxes)}")
        return len(boxes)

    def close(self) -> None:
        self.page.context.close()


def written(folder: Path, records: list[Results]) -> Path:
    file = folder / "report.html"
    file.write_text(render_report(records), encoding="utf-8")
    return file


def test_five_models_and_500_rows_are_under_6_mb(full: Path) -> None:
    assert 2_000_000 < full.stat().st_size < LIMIT


def test_nothing_is_complained_of_and_nothing_asked_for(browser: Any, full: Path) -> None:
    opened = Opened(browser, full, viewport={"width": 1440, "height": 900})
    assert opened.draw_every_chart() == 1 + 8 + 5  # exposure bias, distributions, training
    assert opened.page.locator("#bias .scatterlayer .trace").count() == 2 * 4  # a band and a line each
    drawn = opened.page.locator("#bias .scatterlayer .trace").last.locator("path.js-line")
    assert sum(line.get_attribute("d").count("M") for line in drawn.all()) == 2  # nothing is drawn across length 40
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 1440
    assert opened.complaints == []
    assert opened.asked == [full.as_uri()]
    opened.close()


def test_search_sort_and_pages(browser: Any, full: Path) -> None:
    opened = Opened(browser, full)
    page = opened.page
    status, rows = page.locator("#rows-status"), page.locator("#rows-list article .where")
    assert status.text_content() == "500 of 500 requests, page 1 of 50."
    assert rows.all_text_contents() == [f"Row {row}" for row in range(10)]

    page.locator(".pager .next").last.click()
    assert status.text_content() == "500 of 500 requests, page 2 of 50."
    assert rows.first.text_content() == "Row 10"

    page.get_by_label("Search").fill("QUESTION 12:")
    assert status.text_content() == "1 of 500 requests with “QUESTION 12:”, page 1 of 1."
    assert rows.all_text_contents() == ["Row 12"]
    page.get_by_label("Search").fill("")

    gains = {}
    for order in ("gain", "loss"):
        page.locator("#rows-form [name=order]").select_option(order)
        texts = page.locator("#rows-list article .verdict").all_text_contents()
        gains[order] = [float(re.search(r"promptkd ([+−]?[\d.]+)", text)[1].replace("−", "-")) for text in texts]
    assert gains["gain"] == sorted(gains["gain"], reverse=True)
    assert gains["loss"] == sorted(gains["loss"])
    assert gains["gain"][-1] > 20 > -20 > gains["loss"][-1]

    page.locator("#rows-form [name=metric]").select_option(label="Loss on references")
    text = page.locator("#rows-list article .verdict").first.text_content()
    assert page.locator("#rows-list article .verdict").first.get_attribute("class") == "verdict worse"
    assert "Loss on references: promptkd +" in text  # a higher loss is the largest loss
    page.locator("#rows-form [name=other]").select_option(label="kd")
    assert "against kd" in page.locator("#rows-list article .verdict").first.text_content()
    page.locator("#rows-form [name=view]").select_option(label="greedy, up to 256 tokens")
    assert page.locator("#rows-list article").first.locator(".answer .label").all_text_contents() == [
        *("promptkd", "kd", "teacher", "sft", "gkd"),
    ]
    assert opened.complaints == []
    opened.close()


def test_differing_words_are_marked(browser: Any, tmp_path: Path) -> None:
    answers = {"27": "The cat sat on the mat.", "25": "A cat sat on that mat."}

    def answer(draw: Any, reference: str, share: float) -> str:
        return answers.get(f"{share * 40:.0f}", answered_by(draw, reference, share))

    opened = Opened(browser, written(tmp_path, study(made_up_rows(1), answer)))
    cards = opened.page.locator("#rows-list article .answer")
    assert cards.nth(0).locator("mark").all_text_contents() == ["A", "that"]
    assert cards.nth(1).locator("mark").all_text_contents() == ["The", "the"]
    assert cards.nth(0).locator("pre").text_content() == "A cat sat on that mat."
    assert cards.nth(2).locator("mark").count() == 0
    opened.page.get_by_label("Mark the words").uncheck()
    assert opened.page.locator("#rows-list mark").count() == 0
    opened.close()


def test_figures_are_files_made_in_the_page(browser: Any, tmp_path: Path) -> None:
    opened = Opened(browser, written(tmp_path, study(made_up_rows(2))), color_scheme="dark", accept_downloads=True)
    page, found = opened.page, {}
    for place, button in (("#curves", 0), ("#curves", 1), ("#bias", 1), ("#distributions", 1)):
        with page.expect_download() as download:
            page.locator(f"{place} .figure-files button").nth(button).click()
        found[place, button] = Path(download.value.path()).read_text(encoding="utf-8")
        assert download.value.suggested_filename.endswith((".svg", ".csv"))
    svg = found["#curves", 0]
    assert svg.startswith("<svg")
    assert "rgb(255, 255, 255)" in svg  # on white, in the light palette, also where the page is dark
    assert "rgb(227, 231, 234)" not in svg
    assert page.evaluate("document.documentElement.className") == "scripted"
    lines = found["#curves", 1].splitlines()
    assert lines[0].startswith("run,step,")
    assert len(lines) == 1 + 4 * 100  # four runs of a hundred logged steps
    assert found["#bias", 1].startswith('model,length,"ExAccErr, %",low,high\n')
    assert found["#distributions", 1].startswith("model,Loss on references\n")
    assert opened.complaints == []
    assert len([each for each in opened.asked if not each.startswith("blob:")]) == 1
    opened.close()


def test_methods_of_a_study_are_chosen_in_the_legend(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "study.html"
    file.write_text(render_report(runs_of_two_methods()), encoding="utf-8")
    opened = Opened(browser, file)
    assert opened.draw_every_chart() == 1
    drawn = "document.querySelector('.chart').data.filter((trace) => trace.name).map((trace) => trace.name).join()"
    assert opened.page.evaluate(drawn) == "kd,gkd"
    opened.page.locator(".choice", has_text="gkd").click()
    assert opened.page.evaluate(drawn) == "gkd"
    opened.page.locator(".choice", has_text="gkd").click()
    assert opened.page.evaluate(drawn) == "kd,gkd"
    assert opened.complaints == []


def test_hostile_text_does_nothing(browser: Any, tmp_path: Path) -> None:
    """In answers, in prompts, in the names of models, and so in the texts that Plotly draws."""
    nasty = record()
    nasty.evaluations[-1] = nasty.evaluations[-1].model_copy(update={"model": HOSTILE_LABEL})
    curves = biased("kd")
    curves.curves[0].model = HOSTILE_LABEL
    opened = Opened(browser, written(tmp_path, [nasty, curves]), viewport={"width": 390, "height": 844})
    page = opened.page
    opened.draw_every_chart()
    page.locator("#bias .chart").scroll_into_view_if_needed()
    page.locator("#bias .chart .nsewdrag").first.hover()
    hover = page.locator("#bias .hoverlayer")
    hover.locator("text").first.wait_for()
    assert "<b>bold</b><a href" in hover.text_content()
    assert page.locator("svg a, main img, main iframe, main a[href^=javascript], #rows-list b").count() == 0
    shown = page.locator("#rows-list .answer pre").all_text_contents()
    for text in HOSTILE[:3]:
        assert text in shown
    assert page.locator("#rows-list .answer .label").first.text_content() == HOSTILE_LABEL
    page.get_by_label("Search").fill("<img src=x")
    assert page.locator("#rows-status").text_content().startswith("2 of 12 requests with “<img src=x”")
    assert page.evaluate("window.owned") is None
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert opened.complaints == []
    assert len(opened.asked) == 1
    opened.close()


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1440, "light")])
def test_an_explained_prompt_has_a_section(browser: Any, tmp_path: Path, width: int, scheme: Any) -> None:
    file = written(tmp_path, [record(), explained(token=HOSTILE_LABEL, answer=HOSTILE[0])])
    opened = Opened(browser, file, viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = opened.page
    section = page.locator("#prompt")
    section.locator(".chart").scroll_into_view_if_needed()
    section.locator(".chart .main-svg .scatterlayer").first.wait_for()
    assert section.locator(".scatterlayer .trace").count() == 2 * 3  # a band and a line each
    assert "</script>" in section.locator("code").first.text_content()
    assert section.locator(".near .none").count() == 2 * 2  # two of each vector's five are as near as random ones
    assert section.locator(".answer .label").all_text_contents() == ["teacher", "teacher with the prompt", "student"]
    assert section.locator(".answer .empty").text_content() == "empty answer"
    assert page.locator("nav a[href='#prompt']").is_visible()
    assert page.evaluate("window.owned") is None
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.complaints == []
    opened.close()


def test_a_script_that_slipped_in_would_not_run(browser: Any, tmp_path: Path) -> None:
    page = render_report([record()]).replace("</main>", "<script>window.owned = 1</script></main>")
    (tmp_path / "changed.html").write_text(page, encoding="utf-8")
    opened = Opened(browser, tmp_path / "changed.html")
    assert opened.page.evaluate("window.owned") is None
    assert any("Content Security Policy" in complaint for complaint in opened.complaints)
    opened.close()


def test_on_a_phone_by_keyboard_in_the_dark(browser: Any, full: Path) -> None:
    look = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark", "has_touch": True, "is_mobile": True}
    opened = Opened(browser, full, **look)
    page = opened.page
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 27)"
    unlabelled = "[...document.querySelectorAll('input, select')].filter((each) => !each.labels.length).length"
    assert page.evaluate(unlabelled) == 0
    heights = page.evaluate("[...document.querySelectorAll('#answers select')].map((each) => each.offsetHeight)")
    assert min(height for height in heights if height) >= 36  # a thumb's reach; what is hidden has none
    page.locator("#rows-form [name=search]").focus()
    names = []
    while len(names) < 12 and "next" not in names:
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.name || document.activeElement.className"))
    assert names == ["view", "model", "other", "metric", "order", "mark", "scores", "next"]
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "rows-status"
    assert page.locator("#rows-status").text_content() == "500 of 500 requests, page 2 of 50."
    opened.close()


def test_a_printed_page_is_light_whole_and_without_controls(browser: Any, tmp_path: Path) -> None:
    opened = Opened(browser, written(tmp_path, study(made_up_rows(2))), color_scheme="dark")
    page = opened.page
    page.emulate_media(media="print", color_scheme="dark")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("details:not([open])").count() == 0
    assert page.locator("#rows-form").is_hidden()
    assert page.locator(".chart .main-svg .scatterlayer").count() == page.locator(".chart").count()
    assert page.pdf(format="A4").startswith(b"%PDF")
    opened.close()


def test_page_without_scripts(browser: Any, tmp_path: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(written(tmp_path, study(made_up_rows(12))).as_uri())
    assert page.get_by_text("The curves are drawn by a script").is_visible()
    assert page.locator(".lead").is_visible()
    assert page.locator("table.metrics").first.is_visible()
    assert page.locator("#bias table").is_visible()
    assert page.locator("article").count() == 10
    assert page.locator("form").first.is_hidden()
    context.close()
