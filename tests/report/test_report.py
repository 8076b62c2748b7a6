"""The report on a synthetic record: what it claims, what it shows, and that hostile text stays text."""

import json
import math
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs
from rich.cells import cell_len

import promptkd.report
from helpers.demo_record import EVALUATED, FIGURES, HOSTILE, LOGGED, MODELS, record
from helpers.pages import Page, unpacked
from promptkd.errors import RequestError
from promptkd.report import comparison_table, difference_table, render_report, terminal_table, unified
from promptkd.report.formatting import estimate, score
from promptkd.report.metrics import metric_info
from promptkd.report.page import packed_json
from promptkd.report.plots import stages
from promptkd.report.text import render_markdown, text_table
from promptkd.results import DataRecord, Difference, Evaluation, Metric, ModelRecord, Results, Series
from promptkd.visible import visible


def test_summary_claims_what_the_interval_excludes_and_nothing_else() -> None:
    page = Page(render_report([record()])).text
    assert (
        "Compared with recovered, promptkd has lower KL to the teacher by 0.30 [0.25, 0.36] nats/token (a gain)" in page
    )
    assert (
        "The two cannot be told apart on loss on the references (−0.02 [−0.06, +0.02]) and ROUGE-L (+0.6 [−1.9, +3.0])"
        in page
    )
    assert "No usable interval was recorded for exact match (0.0), so nothing is claimed there" in page
    assert (
        "Compared with teacher, promptkd has higher loss on the references by 0.25 [0.19, 0.31] nats/token (a loss)"
        in page
    )
    assert (
        "promptkd (111 million parameters), a student with 82 % of the parameters of its teacher (135 million" in page
    )
    assert "beside pruned and recovered, on test (50 rows)" in page


@pytest.mark.parametrize(
    ("value", "low", "high", "better", "expected"),
    [
        (-0.3, -0.36, -0.25, "lower", "better"),
        (-0.3, -0.36, -0.25, "higher", "worse"),
        (0.3, 0.25, 0.36, "higher", "better"),
        (0.3, 0.25, 0.36, "lower", "worse"),
        (0.3, -0.01, 0.6, "higher", "tied"),
        (0.3, 0.0, 0.6, "higher", "tied"),
        (-0.3, -0.6, 0.0, "lower", "tied"),
        (0.0, 0.0, 0.0, "higher", "tied"),
        (0.3, None, None, "higher", "open"),
        (0.3, 0.2, None, "higher", "open"),
        (0.3, math.nan, 0.4, "higher", "open"),
        (math.nan, 0.2, 0.4, "higher", "open"),
        (0.3, 0.4, 0.2, "higher", "open"),
        (-0.3, 0.2, 0.4, "higher", "open"),
    ],
)
def test_verdict(value: float, low: float | None, high: float | None, better: Any, expected: str) -> None:
    found = Difference(
        model="a", baseline="b", metric="rouge_l", difference=Metric(value=value, low=low, high=high), better=better
    )
    (row,) = difference_table([Results(kind="evaluate", differences=[found])])
    assert row.verdict == expected
    assert bool(row.change) == (expected in ("better", "worse"))


def test_an_interval_that_excludes_zero_never_reads_as_holding_it() -> None:
    loss = metric_info("loss")
    assert estimate(loss, Metric(value=0.2, low=0.0004, high=0.4), signed=True) == ("+0.2000", "[+0.0004, +0.4000]")
    assert estimate(loss, Metric(value=0.2, low=1e-9, high=0.4))[1] == "[1.0×10⁻⁹, 0.400000]"
    assert estimate(loss, Metric(value=2.682, low=2.681, high=2.684)) == ("2.682", "[2.681, 2.684]")
    assert estimate(loss, Metric(value=-0.3, low=-0.36, high=-0.25), flip=True) == ("0.30", "[0.25, 0.36]")


def test_table_holds_every_evaluation_with_its_numbers() -> None:
    rows = comparison_table([record()])
    assert [row.model for row in rows] == list(MODELS)
    assert {row.data for row in rows} == {"test"}
    student = rows[-1].cells
    assert (student["loss"].value, student["loss"].interval) == ("2.66", "[2.55, 2.78]")
    assert (student["rouge_l"].value, student["rouge_l"].interval) == ("26.7", "[23.1, 30.4]")
    assert (student["eos_share"].value, student["eos_share"].interval) == ("94", "[86, 100]")
    assert (student["novelty"].value, student["novelty"].interval) == ("0.123", None)
    assert "kl_to_teacher" not in rows[0].cells
    text = Page(render_report([record()])).text
    assert "KL to the teacher nats/token" in text
    assert "26.7 (leading) [23.1, 30.4]" in text


def test_best_marks_need_a_student_that_stands_out() -> None:
    rows = comparison_table([record()])
    best = {name: [row.model for row in rows if name in row.cells and row.cells[name].best] for name in FIGURES}
    assert best["kl_to_teacher"] == ["promptkd"]  # the paired difference tells it from the recovered student
    assert best["loss"] == ["recovered", "promptkd"]  # not told apart; the teacher's lower loss takes no part
    assert best["exact_match"] == []  # overlapping intervals everywhere
    assert best["response_length"] == []  # no direction is better
    assert [row.model for row in rows if row.cells["novelty"].best] == []


def test_best_marks_do_not_cross_data_of_another_content() -> None:
    first, second = record(), record()
    second.data["test"].sha256 = "f" * 64
    second.differences = []
    second.evaluations[-1].metrics["loss"] = Metric(value=1.0, low=0.9, high=1.1, rows=50)
    rows = comparison_table(unified([first, second]))
    assert [(row.data, row.model) for row in rows if row.cells["loss"].best] == [
        ("test (bbbbbbbb)", "recovered"),
        ("test (bbbbbbbb)", "promptkd"),
        ("test (ffffffff)", "promptkd"),
    ]


@pytest.mark.slow
def test_hostile_text_stays_text() -> None:
    nasty = record()
    for text in HOSTILE:
        nasty.notes.append(text)
        nasty.config[text] = text
        nasty.command.append(text)
        nasty.history.append(Series(name=text, points=[{"step": 1, text: 1.0}, {"step": 2, text: 2.0, "word": text}]))
        nasty.evaluations.append(Evaluation(model=text, data=text, metrics={text: Metric(value=1)}))
        nasty.differences.append(
            Difference(model=text, baseline=text, metric=text, difference=Metric(value=1), better="lower")
        )
        nasty.models[text] = ModelRecord(path=text, parameters=1, sha256=text)
        nasty.data[text] = DataRecord(path=text, rows=1, sha256=text)
        nasty.machine[text] = text
        nasty.code[text] = text
        nasty.timings[text] = 1.0
        nasty.metrics[text] = Metric(value=1)
    source = render_report([nasty], title=HOSTILE[0])
    page = Page(source)
    assert page.tags["script"] == 3, "the data, Plotly and the page's own script"
    assert {"img", "iframe", "a href=javascript:", "base", "object"}.isdisjoint(page.tags)
    assert page.tags["style"] == 1
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.title == HOSTILE[0]
    for text in HOSTILE:
        assert " ".join(visible(text).split()) in page.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", source)
    assert not any(text in script for script in page.scripts for text in ("owned", "drawkcab", "<img"))
    assert page.data["models"][-1]["label"] == visible(HOSTILE[-1])


def test_data_for_scripts_cannot_end_the_script() -> None:
    value = [*HOSTILE, "<!--", "]]>"]
    text = str(packed_json(value))
    assert re.fullmatch(r"[A-Za-z0-9+/=]+", text)
    assert json.loads(unpacked(text)) == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        packed_json([math.nan])


def test_page_asks_the_network_for_nothing() -> None:
    page = Page(render_report([record()]))
    loads = [
        value for _, name, value in page.attributes if name in ("src", "href", "srcset", "data", "action", "poster")
    ]
    assert all(value.startswith("#") or value == "data:," for value in loads)
    policy = next(
        value for tag, name, value in page.attributes if (tag, name) == ("meta", "content") and "src" in value
    )
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "http" not in policy
    assert "@import" not in page.style
    assert "url(" not in page.style


@pytest.mark.slow
def test_same_records_give_the_same_page() -> None:
    source = render_report([record()])
    assert source == render_report([record()])
    scripts = Page(source).scripts
    assert unpacked(scripts[1]) == get_plotlyjs()
    assert len(source) < 2_300_000
    bare = [each.model_copy(update={"samples": []}) for each in record().evaluations]
    without = render_report([record().model_copy(update={"history": [], "evaluations": bare})])
    assert "<script" not in without


def test_no_record_is_refused() -> None:
    with pytest.raises(RequestError, match="at least one results record"):
        render_report([])


@pytest.mark.parametrize("kind", ["prune", "sft", "distill", "generate", "evaluate", "demo"])
def test_a_bare_record_makes_a_page(kind: Any) -> None:
    text = Page(render_report([Results(kind=kind)])).text
    assert f"This {kind} run holds no evaluation." in text


def test_single_model_is_reported_with_its_figures() -> None:
    only = Evaluation(model="m", data="test", metrics={"rouge_l": Metric(value=26, low=22, high=30, rows=50)})
    text = Page(render_report([Results(kind="evaluate", evaluations=[only])])).text
    assert "One model, m, was measured on test (50 rows). Measured: ROUGE-L 26.0 [22.0, 30.0] of 100." in text


def test_every_logged_figure_has_a_chart() -> None:
    recovery, distillation = stages([record()])
    drawn = {chart.info.name: chart for group in distillation.groups.values() for chart in group}
    assert set(drawn) == {*LOGGED, *EVALUATED, "made_up"}
    assert drawn["cut_share"].lines[0].y[0] == pytest.approx(50)  # in %
    assert drawn["eval_loss"].lines[0].x == [10, 20, 30]
    assert drawn["eval_loss"].info.label == "Validation loss"
    assert drawn["eval_rouge_l"].info.label == "Validation ROUGE-L"
    assert (drawn["grad_norm"].lines[0].y.count(None), drawn["grad_norm"].lines[0].y[3]) == (1, None)
    assert drawn["made_up"].info.label == "made_up"
    assert recovery.once == [("train_runtime", "95.2")]
    assert recovery.not_numbers == ["phase"]


def test_answers_are_ten_requests_with_every_model_side_by_side() -> None:
    page = Page(render_report([record()]))
    assert page.tags["article"] == 10 + 1, "and a template for the page's script"
    assert "The first 10 of 12 recorded requests, in the order of the data" in page.text
    assert "ROUGE-L 31.2" in page.text
    assert "Ends by itself: no" in page.text
    assert "empty answer" in page.text
    assert score("response_length", 12) == "Answer length 12 tokens"


def test_an_answer_that_starts_with_a_line_break_keeps_it() -> None:
    changed = record()
    changed.evaluations[-1].samples[0].response = "\n  indented"
    # A parser drops the first line break inside <pre>, so the page writes one of its own before the text.
    assert '<pre dir="auto">\n\n  indented</pre>' in render_report([changed])


@pytest.mark.slow
def test_an_answer_never_stands_under_a_prompt_it_was_not_given() -> None:
    changed = record()
    changed.evaluations[-1].samples[0].prompt = "Another template: explain photosynthesis."
    assert Page(render_report([changed])).text.count("Another template") == 1
    assert "recorded requests" in Page(render_report([changed])).text


def test_terminal_table_is_plain_and_fits() -> None:
    text = terminal_table([record()], width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"promptkd +\*?2\.66 +\*0\.61 +\*26\.7", text)
    assert "lower KL to the teacher by 0.30 [0.25, 0.36]" in " ".join(text.split())
    nasty = record()
    nasty.evaluations[0].model = HOSTILE[3]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]", terminal_table([nasty], width=120))


def test_no_cell_of_a_table_is_cut_wrapped_or_obeyed(monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    lines = [["", "a wide heading\nof two lines"], ["模型", "1\n[2, 3]"], ["[red]x[/red] " * 20, "\x1b[31m−1\n"]]
    first, second, third, fourth, fifth, _ = text_table(lines).split("\n")
    assert (first.strip(), second.strip()) == ("a wide heading", "of two lines")
    assert third.split() == ["模型", "1"]
    assert fourth.split() == ["[2,", "3]"]
    assert fifth.startswith("[red]x[/red] " * 19)
    assert fifth.endswith("␛[31m-1")
    assert {cell_len(line) for line in (first, second, third, fourth, fifth)} == {cell_len(fifth)}


def test_files_beside_the_code_are_packaged() -> None:
    root = Path(__file__).parents[2]
    folder = Path(promptkd.report.__file__).parent
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packaged = {path for pattern in patterns["promptkd.report"] for path in folder.glob(pattern)}
    beside = {path for path in folder.rglob("*.*") if path.suffix in (".html", ".css", ".js")}
    assert beside == packaged


def test_no_mark_where_students_read_other_prompts() -> None:
    alike, apart = record(), record()
    (*_, last) = [each for each in apart.evaluations if each.samples]
    other = [sample.model_copy(update={"prompt": f"### {sample.prompt}"}) for sample in last.samples]
    last.samples[:] = other
    marked, unmarked = (
        [name for row in comparison_table([each]) for name, cell in row.cells.items() if cell.best]
        for each in (alike, apart)
    )
    assert marked
    assert not unmarked
    told = "the models read other prompts (by another template), so that no value is marked as the best."
    for each, times in ((alike, 0), (apart, 1)):
        assert render_report([each]).count(told) == times
        assert render_markdown([each]).replace("\\", "").count(told) == times
        assert " ".join(terminal_table([each]).split()).count(told) == times
