"""The first screen of a study: which method leads, which cannot be told apart from it, and at which cost."""

from helpers.pages import Page
from helpers.records import run_cost
from promptkd.report import render_report, terminal_table
from promptkd.report.labels import unified
from promptkd.report.overview import INTERIM, overview_of
from promptkd.report.tables import comparison_table, groups
from promptkd.results import DataRecord, Difference, Evaluation, Metric, Results, ToldApart

VALUES = {"kd": (20.0, 30.0), "gkd": (24.0, 33.0), "promptkd": (24.5, 32.9), "sft": (19.0, 30.5)}
DATA = ("test, sampled", "test, greedy")


def study(*, apart: tuple[tuple[str, str], ...] = (), models: tuple[str, ...] = tuple(VALUES), **fields) -> Results:
    """Four methods on one data set decoded in two ways; `apart` are told apart in both."""
    temperatures = dict(zip(DATA, (1.0, 0.0), strict=True))
    evaluations = [
        Evaluation(
            model=model,
            data=data,
            decoding={"temperature": temperatures[data], "max_new_tokens": 8},
            metrics={
                "rouge_l": Metric(value=values[at], low=values[at] - 4, high=values[at] + 4, rows=9, deviation=0.5)
            },
        )
        for at, data in enumerate(DATA)
        for model, values in [("teacher", (28.0, 35.0)), *VALUES.items()]
    ]
    differences = [
        Difference(model=model, baseline="kd", metric="rouge_l", better="higher", data=data, p_adjusted=0.5,
                   difference=Metric(value=1, low=-1, high=3))
        for model in ("gkd", "promptkd", "sft") for data in DATA
    ]  # fmt: skip
    return Results(
        kind="study",
        data={data: DataRecord(path="test.jsonl", rows=9, sha256="ab") for data in DATA},
        evaluations=evaluations,
        differences=differences,
        told_apart=[ToldApart(metric="rouge_l", data=data, models=list(models), pairs=list(apart)) for data in DATA],
        training={name: run_cost(name).model_copy(update={"seconds": 60.0 * at}) for at, name in enumerate(VALUES, 1)},
        **fields,
    )


BOTH_BEAT = (("gkd", "sft"), ("promptkd", "sft"), ("promptkd", "kd"), ("gkd", "kd"))


def overview(*records: Results):
    return overview_of(unified(list(records)))


def test_who_leads_who_is_the_fastest_of_them_and_who_is_behind():
    found = overview(study(apart=BOTH_BEAT))
    assert [line.model for line in found.lines] == ["teacher", "promptkd", "gkd", "kd", "sft"], "the best mean first"
    assert [manner for _, manner in found.columns] == ["sampled", "greedy"]
    assert found.sentences == [
        "On ROUGE-L, promptkd and gkd are the best or cannot be told apart from the best in both columns.",
        "The fastest of them to train is gkd: 2 min 0 s and 1.0 GiB a run.",
        "Behind in columns: kd (2) and sft (2).",
    ]
    best = {line.model: [cell.best for cell in line.cells] for line in found.lines}
    assert best == {
        "teacher": [False] * 2,
        "promptkd": [True] * 2,
        "gkd": [True] * 2,
        "kd": [False] * 2,
        "sft": [False] * 2,
    }


def test_where_nothing_is_told_apart_no_method_is_named():
    assert overview(study()).sentences == ["On ROUGE-L, no method can be told apart from the best."]


def test_no_method_leads_everywhere():
    record = study(apart=BOTH_BEAT)
    record.told_apart[0].pairs.append(("promptkd", "gkd"))
    record.told_apart[1].pairs.append(("gkd", "promptkd"))
    assert overview(record).sentences[0] == (
        "On ROUGE-L, no method is among the best in both columns: promptkd and gkd fell behind in 1, the fewest."
    )


def test_a_method_that_was_not_tested_takes_no_part():
    found = overview(
        study(apart=(("promptkd", "kd"), ("gkd", "kd")), models=("kd", "gkd", "promptkd"), notes=[f"{INTERIM}3 of 4."])
    )
    assert found.interim == ["Interim: 3 of 4."]
    assert not any("sft" in sentence for sentence in found.sentences)
    assert "sft" in [line.model for line in found.lines]


def test_the_page_begins_with_it_and_the_terminal_ends_with_it():
    record = study(apart=BOTH_BEAT, notes=[f"{INTERIM}3 of 4."])
    text = Page(render_report([record])).text
    assert text.index("Which method Interim: 3 of 4. On ROUGE-L, promptkd and gkd") < text.index("Summary Five models")
    assert "promptkd and gkd are the best" in " ".join(terminal_table([record]).split())


def test_no_study_has_none():
    assert overview(study(apart=BOTH_BEAT).model_copy(update={"kind": "compare"})) is None


def evaluated(model: str, value: float, data: str = "other") -> Results:
    """A single evaluation that is given beside a study."""
    metric = Metric(value=value, low=value - 1, high=value + 1, rows=9)
    made = Evaluation(model=model, data=data, decoding={"temperature": 1.0}, metrics={"rouge_l": metric})
    return Results(kind="evaluate", evaluations=[made])


def test_what_was_measured_beside_a_study_changes_nothing_of_what_is_said_of_its_methods():
    alone = overview(study(apart=BOTH_BEAT))
    assert overview(study(apart=BOTH_BEAT), evaluated("z", 99.0)) == alone
    assert overview(evaluated("kd", 99.0), study(apart=BOTH_BEAT)) == alone


def of_another_study() -> Results:
    """Two methods far above those of `study`, told apart by the test of their own study."""
    other = study(apart=(("taid", "akl"),), models=("akl", "taid"))
    known = {"kd": "akl", "gkd": "taid"}
    for each in (own := [each for each in other.evaluations if each.model in known]):
        each.model = known[each.model]
        metric = each.metrics["rouge_l"]
        shift = 40.0 if each.model == "akl" else 70.0
        each.metrics["rouge_l"] = metric.model_copy(
            update={name: getattr(metric, name) + shift for name in ("value", "low", "high")}
        )
    training = {name: run_cost(name) for name in known.values()}
    return other.model_copy(update={"evaluations": own, "differences": [], "training": training})


def test_methods_of_two_studies_were_not_tested_against_each_other():
    records = unified([study(apart=BOTH_BEAT), of_another_study()])
    rows = [row for row in comparison_table(records) if row.decoding.startswith("sampled")]
    assert [row.model for row in rows if row.cells["rouge_l"].best] == ["taid"]
    found = [[row.model for row in group] for group in groups("rouge_l", rows)]
    assert found == [["taid"], ["akl"], ["promptkd", "gkd"], ["kd", "sft"]]
    assert overview_of(records) is None
