"""The report for papers: Markdown, CSV and JSON; hostile labels stay text in each."""

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from helpers.commands import done, run
from helpers.demo_record import HOSTILE, record
from helpers.records import made_up_rows, study
from promptkd.report import render_csv, render_json, render_markdown
from promptkd.report.text import csv_text, markdown_text
from promptkd.results import Difference, Evaluation, Metric, Results

STUDY = study(made_up_rows(12))
FORMULAS = ("＝1", "=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", '=HYPERLINK("http://x")')


def lines(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_is_one_line_a_model_data_set_decoding_and_metric() -> None:
    found = lines(render_csv(STUDY))
    keys = [(line["model"], line["data"], line["decoding"], line["metric"]) for line in found]
    assert len(set(keys)) == len(keys) == 5 * 2 * 11 - 2  # the teacher has no KL to itself
    kept = ("promptkd", "dolly_test", "sampled at temperature 1, 2 seeds, up to 256 tokens", "eos_share")
    line = found[keys.index(kept)]
    (measured,) = (
        each.metrics["eos_share"]
        for each in STUDY[11].evaluations
        if each.model == "promptkd" and "seeds" in each.decoding
    )
    assert measured.low is not None
    assert measured.deviation is not None
    assert (line["unit"], line["rows"]) == ("%", "12")
    assert float(line["value"]) == pytest.approx(100 * measured.value)
    assert float(line["low"]) == pytest.approx(100 * measured.low)
    assert float(line["deviation"]) == pytest.approx(100 * measured.deviation)
    greedy = found[keys.index((*kept[:2], "greedy, up to 256 tokens", "rouge_l"))]
    assert greedy["deviation"] == ""


@pytest.mark.parametrize("text", FORMULAS)
def test_no_cell_of_csv_is_a_formula(text: str) -> None:
    assert csv_text(text)[0] not in "=+-@＝\t\r\n"
    measured = Evaluation(model=text, data=text, metrics={text: Metric(value=-1.5)})
    (line,) = lines(render_csv([Results(kind="evaluate", evaluations=[measured])]))
    assert {line[name] for name in ("model", "data", "metric")} == {csv_text(text)}
    assert line["value"] == "-1.5"  # a number stays one


def test_json_holds_metrics_differences_curves_costs_and_sources() -> None:
    found = json.loads(render_json(STUDY))
    measured = ["metrics", "differences", "curves", "prompts", "verdict", "inference", "costs"]
    assert list(found) == [*measured, "sources", "figures"]
    assert len(found["metrics"]) == 108
    assert found["figures"] == found["metrics"]  # by their old name, for one version
    assert found["differences"][4]["verdict"] == "better"
    assert [curve["model"] for curve in found["curves"]] == ["sft", "kd", "gkd", "promptkd"]
    assert found["costs"][-1]["training"]["method"] == "promptkd"
    assert [source["kind"] for source in found["sources"]] == [each.kind for each in STUDY]
    assert made_up_rows(12)[0][1][0] not in render_json(STUDY)  # no answers, no rows


def test_json_writes_what_is_not_finite_as_words() -> None:
    metrics = {"loss": Metric(value=math.nan, low=-math.inf, high=math.inf)}
    broken = Results(kind="evaluate", evaluations=[Evaluation(model="m", data="d", metrics=metrics)])
    (metric,) = json.loads(render_json([broken]))["metrics"]
    assert (metric["value"], metric["low"], metric["high"]) == ("NaN", "-Infinity", "Infinity")


def test_markdown_tables_are_ready_for_a_paper() -> None:
    text = render_markdown(STUDY, title="A study")
    assert text.startswith("# A study\n\npromptkd (124 million parameters), a student with 8 %")
    assert "## dolly\\_test, greedy, up to 256 tokens" in text
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({row.count("|") for row in table.splitlines()}) == 1
    row = next(line for line in text.splitlines() if line.startswith("| promptkd |"))
    assert re.search(r"\| \*{0,2}\d\.\d\d\*{0,2} ± 0\.\d\d? \[\d\.\d\d, \d\.\d\d\] \|", row)
    assert "| promptkd | kd | ROUGE-L | +3.3 [+1.9, +4.7] points | < 0.001 | 0.005 | +0.24 | higher, better |" in text
    assert "| promptkd | 124 million | 8 % | promptkd | 300 | 1 h 20 min | 2100 | 12.0 GiB |" in text


def test_hostile_labels_stay_text_in_markdown() -> None:
    nasty = record()
    tricks = (*HOSTILE, "a | b", "`code` *bold* [link](javascript:1)", "![x](y)", "$x$", "# head")
    for text in tricks:
        nasty.evaluations.append(Evaluation(model=text, data="test", metrics={text: Metric(value=1)}))
        nasty.differences.append(
            Difference(model=text, baseline=text, metric=text, difference=Metric(value=1), better="lower")
        )
    written = render_markdown([nasty], title=HOSTILE[1])
    for unescaped in ("<img", "<a ", "<script", "<style", "<!--", "[link](", "`code`", "![", " $x$"):
        assert unescaped not in written
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]", written)
    for table in re.findall(r"(?:^\|.*\n)+", written, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1
    assert markdown_text("a | b\nc") == "a \\| b c"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("out", "form", "start"),
    [
        ("a.html", None, "<!doctype html>"),
        ("a.md", None, "promptkd (124 million parameters)"),
        ("a.json", None, '{\n "metrics"'),
        ("a.csv", None, "model,data,decoding"),
        ("figures.txt", "csv", "model,data,decoding"),
    ],
)
def test_the_suffix_says_the_form(tmp_path: Path, capsys: Any, out: str, form: str | None, start: str) -> None:
    names = []
    for at, each in enumerate(STUDY):
        names.append(tmp_path / f"record-{at}.json")
        each.write(names[-1])
    target = tmp_path / "made" / out
    ran = done(capsys, "report", *names, "--out", target, *(["--format", form] if form else []))
    assert [path.name for path in target.parent.iterdir()] == [out]
    assert target.read_text(encoding="utf-8").startswith(start)
    assert "promptkd and gkd cannot be told apart" in ran.out


def test_a_suffix_of_no_form_is_refused(tmp_path: Path, capsys: Any) -> None:
    STUDY[0].write(tmp_path / "results.json")
    ran = run(capsys, "report", tmp_path, "--out", tmp_path / "report.pdf")
    assert ran.status == 2
    assert "--format html, markdown, json or csv" in ran.err
    assert run(capsys, "report", tmp_path, "--out", tmp_path / "a.html", "--format", "pdf").status == 2
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
