"""What the page says of a study: methods over their seeds, in place of its many runs."""

from helpers.pages import Page
from helpers.records import runs_of_two_methods
from promptkd.report import render_report
from promptkd.report.labels import unified
from promptkd.report.plots import stages


def test_training_of_a_study_is_a_line_per_method_with_the_range_of_its_seeds():
    (stage,) = stages(unified(runs_of_two_methods()))
    assert (stage.runs, stage.seeds) == (["kd", "gkd"], 2)
    (chart,) = stage.groups["Losses"]
    kd, gkd = chart.lines
    assert (kd.name, kd.x, kd.y, kd.low, kd.high) == ("kd", [1, 2], [3.0, 1.0], [2.0, 1.0], [4.0, 1.0])
    assert (gkd.y, gkd.low, gkd.high) == ([6.0, 3.0], [5.0, 3.0], [7.0, 3.0])
    assert chart.not_finite == [("kd-seed-2", 1, 2)], "a seed that diverged is told, though the mean is finite"
    assert "kd-seed-2 : 1 of 2 logged values are not finite." in Page(render_report(runs_of_two_methods())).text


def test_runs_that_are_no_study_keep_a_line_each():
    _, *runs = runs_of_two_methods()
    (stage,) = stages(unified(runs))
    assert (len(stage.runs), stage.seeds) == (4, 0)
    assert all(len(line.low) == 0 for line in stage.groups["Losses"][0].lines)
