"""Plots as files: every one as SVG and PDF, with labels as text, and what is refused before any is drawn."""

import re
import sys
from xml.etree import ElementTree

import pytest

from helpers.commands import done, run
from helpers.records import biased, distilled, explained, runs_of_two_methods
from promptkd.report.figures import count_plots, write_figures
from promptkd.results import Evaluation, Metric, Results

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'promptkd[figures]'")
SVG = "{http://www.w3.org/2000/svg}"


def words(path) -> list[str]:
    return ["".join(each.itertext()) for each in ElementTree.parse(path).iter(f"{SVG}text")]


@pytest.mark.slow
def test_every_plot_is_a_file_of_both_kinds(tmp_path):
    trained = [short(distilled(student)) for student in ("kd", "gkd")]
    records = [*trained, measured("kd", rouge_l=Metric(value=3, low=2, high=4)), biased("kd", 6)]
    written = write_figures(records, tmp_path / "one")
    stems = {"distill-loss", "exposure-bias-dolly-test", "metric-rouge-l-d"}
    assert {path.name for path in written} == {f"{stem}.{kind}" for stem in stems for kind in ("svg", "pdf")}
    assert {path.name for path in (tmp_path / "one").iterdir()} == {path.name for path in written}
    assert all(path.read_bytes().startswith(b"%PDF") for path in written if path.suffix == ".pdf")
    more = write_figures(trained[:1], tmp_path / "all", every=True)
    assert {path.stem for path in more} == {"distill-loss", "distill-grad-norm"}
    again = write_figures(trained, tmp_path / "two")
    write_figures(trained, tmp_path / "three")
    assert {"kd", "gkd", "Training loss (nats/token)"} <= set(words(tmp_path / "two" / "distill-loss.svg"))
    for path in again:
        assert path.read_bytes() == (tmp_path / "three" / path.name).read_bytes()


def short(record: Results) -> Results:
    """A run's record with its loss, and a norm."""
    (series,) = record.history
    points = [
        {name: point[name] for name in ("step", "loss")} | {"grad_norm": 1.0 + at}
        for at, point in enumerate(series.points[:9])
    ]
    return record.model_copy(update={"history": [series.model_copy(update={"points": points})]})


def measured(label: str, data: str = "d", **metrics: Metric) -> Results:
    return Results(kind="evaluate", evaluations=[Evaluation(model=label, data=data, metrics=metrics)])


@pytest.mark.slow
def test_a_study_has_bands_between_its_seeds(tmp_path):
    """From the least to the largest; a line of a single run has none."""
    study, *runs = runs_of_two_methods()
    write_figures([study, *runs], tmp_path / "study")
    write_figures(runs, tmp_path / "runs")
    drawn = ElementTree.parse(tmp_path / "study" / "distill-loss.svg")
    assert {"kd", "gkd"} <= set(words(tmp_path / "study" / "distill-loss.svg"))
    bands = [each for each in drawn.iter(f"{SVG}g") if each.get("id", "").startswith("FillBetween")]
    heights = [
        {float(y) for path in band.iter() for y in re.findall(r"[ML] \S+ (\S+)", path.get("d", ""))} for band in bands
    ]
    kd, gkd = heights  # losses of 4 and 2, then 1 alone; 5 and 7, then 3 alone
    unit = (max(gkd) - min(gkd)) / 4
    assert max(kd) - min(kd) == pytest.approx(3 * unit, rel=1e-4)
    assert "FillBetween" not in (tmp_path / "runs" / "distill-loss.svg").read_text()


@pytest.mark.slow
def test_kls_of_an_explained_prompt_are_a_figure(tmp_path):
    drawn: list[int] = []
    written = write_figures([explained(), explained(kl=False)], tmp_path, on_plot=drawn.append)
    assert drawn == [1] == [count_plots([explained()])]
    assert {path.name for path in written} == {"prompt-kl-0.svg", "prompt-kl-0.pdf"}
    assert {"prompted || plain", "plain || student", "KL (nats per token)"} <= set(words(tmp_path / "prompt-kl-0.svg"))


@pytest.mark.slow
def test_labels_stay_text_and_values_without_interval_are_drawn(tmp_path):
    label = "$\\frac$ <b>&\x1b"
    record = measured(label, "../d", rouge_l=Metric(value=3.0), loss=Metric(value=float("nan")))
    written = write_figures([record], tmp_path / "out")
    assert {path.name for path in written} == {"metric-rouge-l-..-d.svg", "metric-rouge-l-..-d.pdf"}
    assert "$\\frac$ <b>&␛" in words(tmp_path / "out" / "metric-rouge-l-..-d.svg")


@pytest.mark.slow
def test_the_command_draws_them_and_replaces_none_unasked(tmp_path, capsys):
    record, out = tmp_path / "kd.json", tmp_path / "page.md"
    measured("a", loss=Metric(value=1)).write(record)
    ran = done(capsys, "report", record, "--out", out, "--figures", tmp_path / "figures")
    assert f"2 figures are in {tmp_path}/figures." in ran.err
    ran = run(capsys, "report", record, "--out", tmp_path / "other.md", "--figures", tmp_path / "figures")
    assert ran.status == 2
    assert "holds metric-loss-d" in ran.err
    assert not (tmp_path / "other.md").exists()
    ran = run(capsys, "report", record, "--out", tmp_path / "other.md", "--figures", record)
    assert "--figures must be a folder" in ran.err


def test_a_missing_library_is_told_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    record = tmp_path / "kd.json"
    Results(kind="evaluate").write(record)
    ran = run(capsys, "report", record, "--out", tmp_path / "page.md", "--figures", tmp_path / "figures")
    assert ran.status == 2
    assert "pip install 'promptkd[figures]'" in ran.err
    assert not (tmp_path / "page.md").exists()
