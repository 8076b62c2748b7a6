"""All pairs of a study's methods, tested by metric and data set."""

import pytest

from promptkd.evaluation.pairing import Candidate
from promptkd.report.tables import comparison_table, groups
from promptkd.results import Evaluation, Results, RowResult
from promptkd.study.pooling import compare_groups

BETTER = {"rouge_l": "higher", "loss": "lower", "response_length": None}.get
LEVELS = {"weak": 10.0, "same": 10.1, "strong": 20.0}


def measured(group: str, seed: int, *, decodings: tuple[float, ...] = (1.0,)) -> Candidate:
    """A run whose rows differ by more than the seeds do, and more than `weak` and `same` do."""
    noise = ((seed * 7 + len(group) * 3) % 5 - 2) / 10
    made = []
    for temperature in decodings:
        samples = [
            RowResult(
                row=row, seed=None, prompt=str(row), references=[], response="",
                scores={"rouge_l": LEVELS[group] + row + noise, "loss": 5 - LEVELS[group] / 10 - noise / 10,
                        "response_length": 3.0},
                tokens={"loss": 4},
            )
            for row in range(4)
        ]  # fmt: skip
        decoding = {"temperature": temperature, "max_new_tokens": 8}
        made.append(Evaluation(model="m", data="test", decoding=decoding, metrics={}, samples=samples))
    return Candidate(f"{group}-{seed}", Results(kind="evaluate", evaluations=made), "m")


def study(**seeds: int) -> dict[str, dict[int, Candidate]]:
    return {group: {seed: measured(group, seed) for seed in range(1, count + 1)} for group, count in seeds.items()}


def test_all_pairs_of_methods_are_tested_the_better_one_named_first():
    found = {
        each.metric: each
        for each in compare_groups(study(weak=4, same=4, strong=4), BETTER, baseline="weak").told_apart
    }
    assert found.keys() == {"rouge_l", "loss"}, "no pair is tested where neither direction is better"
    for each in found.values():
        assert (each.data, each.models) == ("test", ["weak", "same", "strong"])
        assert each.pairs == [("strong", "weak"), ("strong", "same")], "and not weak from same, whose test also counts"


def test_a_method_that_shares_less_than_two_seeds_waits():
    made = compare_groups(study(weak=3, strong=3, same=1), BETTER, baseline="weak")
    assert {tuple(each.models) for each in made.told_apart} == {("weak", "strong")}


def test_the_report_marks_by_them_and_lets_no_reference_lead():
    made = compare_groups(study(weak=4, same=4, strong=4), BETTER, baseline="weak", references=[measured("strong", 9)])
    record = Results(kind="study", evaluations=made.evaluations, told_apart=made.told_apart)
    rows = comparison_table([record])
    assert {row.model: row.cells["rouge_l"].best for row in rows} == {
        **{"weak": False, "same": False, "strong": True},
        "strong-9": False,
    }
    assert [[row.model for row in group] for group in groups("rouge_l", rows)] == [["strong"], ["same", "weak"]]


def test_what_is_measured_on_the_references_is_tested_once():
    runs = {group: {seed: measured(group, seed, decodings=(0.0, 1.0)) for seed in (1, 2, 3)} for group in LEVELS}
    made = compare_groups(runs, BETTER, baseline="weak")
    tested = [(each.metric, each.model) for each in made.differences]
    assert tested.count(("loss", "strong")) == 1
    assert tested.count(("rouge_l", "strong")) == 2
    assert all("loss" in each.metrics for each in made.evaluations), "and is shown with both decodings"


@pytest.mark.parametrize("group", ["weak", "strong"])
def test_a_single_method_has_no_pair(group):
    assert compare_groups(study(**{group: 3}), BETTER, baseline=group).told_apart == []
