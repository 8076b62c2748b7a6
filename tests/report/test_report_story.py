"""Several records read as one story: one label a model and a data set, one row for what was measured alike."""

import pytest

from helpers.pages import Page
from helpers.records import STUDENTS, biased, compared, distilled, evaluated, made_up_rows, study
from promptkd.report import comparison_table, difference_table, render_report, unified
from promptkd.report.answers import answering_models, browser_data, row_sets
from promptkd.report.differences import compared_sentences
from promptkd.report.formatting import curve_words, decoding_words
from promptkd.report.labels import run_labels
from promptkd.report.plots import bias_plots
from promptkd.report.summary import summarize
from promptkd.report.tables import costs
from promptkd.results import Difference, Evaluation, Metric, ModelRecord, Results, RowResult, Training

ROWS = made_up_rows(12)


def test_a_model_has_one_label_wherever_it_is_spoken_of() -> None:
    story = unified(
        [distilled("promptkd"), evaluated("promptkd", ROWS), biased("promptkd"), evaluated("gpt2-xl", ROWS)]
    )
    assert [list(record.models) for record in story] == [["promptkd", "teacher"]] * 3 + [["teacher"]]
    assert {each.model for record in story for each in record.evaluations} == {"promptkd", "teacher"}
    assert story[2].curves[0].model == "promptkd"
    assert run_labels(story) == [
        "distill · promptkd",
        "evaluate · promptkd · dolly_test",
        "exposure-bias · promptkd",
        "evaluate · teacher · dolly_test",
    ]


def test_runs_of_one_word_take_the_names_of_their_folders() -> None:
    story = unified([distilled("kd"), distilled("promptkd")])
    assert [list(record.models) for record in story] == [["kd", "teacher"], ["promptkd", "teacher"]]
    assert list(unified([distilled("kd")])[0].models) == ["student", "teacher"]


def test_models_of_one_name_and_other_weights_stay_two() -> None:
    def run(folder: str, sha256: str) -> Results:
        return Results(kind="evaluate", models={"a": ModelRecord(path=f"{folder}/a", parameters=1, sha256=sha256)})

    assert [list(record.models) for record in unified([run("x", "1" * 64), run("y", "2" * 64)])] == [["x/a"], ["y/a"]]
    again = unified([run("x", "1" * 64), run("x", "2" * 64)])
    assert [list(record.models) for record in again] == [["a (11111111)"], ["a (22222222)"]]


def test_a_cost_that_stands_under_the_name_of_its_run_is_that_of_its_model() -> None:
    run = distilled("kd")
    run.training["kd"] = Training(method="kd", steps=3, seconds=4, peak_memory_bytes=5)
    (story,) = unified([run])
    assert [(cost.model, cost.training is not None) for cost in costs([story])] == [("teacher", False), ("kd", True)]


def test_two_teachers_are_told_apart_and_a_teacher_that_was_a_student_is_none() -> None:
    first, second = distilled("kd"), distilled("gkd")
    second.models["teacher"] = ModelRecord(path="runs/opt", parameters=9, sha256="9" * 64)
    assert [list(each.models)[1] for each in unified([first, second])] == ["teacher gpt2-xl", "teacher opt"]
    second.models["teacher"] = first.models["student"].model_copy(update={"path": "runs/kd"})
    assert [list(each.models) for each in unified([first, second])] == [["kd", "teacher"], ["gkd", "kd"]]


def test_fewer_rows_of_a_file_are_another_data_set() -> None:
    story = unified([evaluated("kd", ROWS), evaluated("gkd", ROWS[:5])])
    assert [list(record.data) for record in story] == [["dolly_test"], ["dolly_test (5 rows)"]]
    rows = comparison_table(story)
    assert {(row.model, row.data) for row in rows} == {("kd", "dolly_test"), ("gkd", "dolly_test (5 rows)")}


def test_what_two_records_measured_alike_stands_in_one_row() -> None:
    measured = evaluated("kd", ROWS)
    judged = measured.model_copy(deep=True)
    for each in judged.evaluations:
        each.metrics = {"judge_ratio": Metric(value=70)}
    rows = comparison_table(unified([measured, judged]))
    assert len(rows) == 2
    assert all({"rouge_l", "judge_ratio"} <= row.cells.keys() and row.run == "" for row in rows)
    judged.evaluations[0].metrics["rouge_l"] = Metric(value=1)
    runs = [row.run for row in comparison_table(unified([measured, judged]))]
    when = "evaluate · kd · dolly_test · 2026-03-01T09:30:00+00:00"
    assert runs == [f"{when} (1)", f"{when} (2)", ""]


def test_a_comparison_of_two_decodings_is_read_beside_what_it_compared() -> None:
    """`compare` calls one data set "dolly_test, sampled" and "dolly_test, greedy"."""
    records = [evaluated("kd", ROWS), evaluated("promptkd", ROWS)]
    copies = []
    for record in records:
        for each in record.evaluations:
            manner = "sampled" if each.decoding["temperature"] else "greedy"
            copies.append(each.model_copy(update={"data": f"dolly_test, {manner}", "samples": []}))
    data = records[0].data["dolly_test"]
    difference = Difference(
        model="promptkd",
        baseline="kd",
        metric="kl_to_teacher",
        better="lower",
        data="dolly_test, greedy",
        difference=Metric(value=-0.4, low=-0.5, high=-0.3, rows=12),
    )
    comparison = Results(
        kind="compare",
        models={label: record.models[label] for label, record in zip(("kd", "promptkd"), records, strict=True)},
        data={"dolly_test, sampled": data, "dolly_test, greedy": data},
        evaluations=copies,
        differences=[difference],
    )
    story = unified([*records, comparison])
    rows = comparison_table(story)
    assert [(row.model, row.data, row.decoding, row.run) for row in rows] == [
        ("kd", "dolly_test", "sampled at temperature 1, 2 seeds, up to 256 tokens", ""),
        ("promptkd", "dolly_test", "sampled at temperature 1, 2 seeds, up to 256 tokens", ""),
        ("kd", "dolly_test", "greedy, up to 256 tokens", ""),
        ("promptkd", "dolly_test", "greedy, up to 256 tokens", ""),
    ]
    assert difference_table(story)[0].pair.data == "dolly_test, greedy, up to 256 tokens"
    assert rows[3].cells["kl_to_teacher"].best  # told apart by the difference
    assert not rows[2].cells["kl_to_teacher"].best
    assert {each.data for each in unified([comparison])[0].evaluations} == {"dolly_test"}


def test_deviation_between_seeds_stands_beside_the_value() -> None:
    measured = Metric(value=26.04, low=25, high=27, rows=5, deviation=0.42)
    sampled = Evaluation(model="m", data="d", metrics={"rouge_l": measured})
    (row,) = comparison_table(unified([Results(kind="evaluate", evaluations=[sampled])]))
    assert row.cells["rouge_l"].deviation == "± 0.4"


def test_decoding_in_words() -> None:
    sampled = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 256, "batch_size": 8}
    assert decoding_words(sampled | {"seeds": [10, 20]}) == "sampled at temperature 1, 2 seeds, up to 256 tokens"
    assert decoding_words(sampled | {"seed": 10}) == "sampled at temperature 1, seed 10, up to 256 tokens"
    cut = {"temperature": 0.7, "top_p": 0.9, "top_k": 50}
    assert decoding_words(cut) == "sampled at temperature 0.7, top-p 0.9, top-k 50"
    assert decoding_words({"temperature": 0.0, "top_p": 0.9, "seeds": [10]}) == "greedy"
    assert decoding_words({"strategy": "greedy", "max_new_tokens": 48}) == "greedy, up to 48 tokens"
    assert decoding_words({"judge": "gpt-4o", "temperature": 0, "seed": None}) == "judged by gpt-4o, temperature 0"
    assert decoding_words({"repetition_penalty": 1.2}) == "repetition penalty 1.2"
    assert decoding_words({}) == ""
    settings = {"teacher": "runs/t", "prompt": None, "ended": "leave", "temperature": 1.0, "seeds": [1, 2]}
    assert curve_words(settings) == "teacher runs/t, ended leave, sampled at temperature 1, 2 seeds"
    assert curve_words({"prompt": "runs/promptkd/prompt"}) == "prompted teacher"


def test_several_students_share_one_plot_of_exposure_bias() -> None:
    (plot,) = bias_plots(unified([biased(student) for student in STUDENTS]))
    assert [curve.model for curve in plot.curves] == list(STUDENTS)
    cells = plot.cells(plot.curves[-1])
    assert len(plot.lengths) == len(cells) == 6
    assert cells[0][1].startswith("[")
    other = biased("kd")
    other.curves[0].settings["ended"] = "zero"
    assert len(bias_plots(unified([biased("kd"), other]))) == 2


def test_summary_of_several_records_is_one() -> None:
    summary = summarize(unified(study(ROWS)))
    assert summary.introduction == (
        "promptkd (124 million parameters), a student with 8 % of the parameters of its teacher (1.56 billion "
        "parameters), was measured, beside sft, kd and gkd, on dolly_test (12 rows)."
    )
    assert summary.lead.startswith("promptkd and gkd cannot be told apart on ROUGE-L (+1.2 [−0.2, +2.6])")
    assert len(summary.others) == 2
    alone = summarize(unified([evaluated(label, ROWS) for label in ("gpt2-xl", "kd", "gkd")]))
    assert alone.lead.startswith("On dolly_test, sampled at temperature 1, 2 seeds, up to 256 tokens, ROUGE-L is ")
    assert alone.lead.endswith("No differences were recorded, so this page claims none.")


@pytest.mark.slow
def test_every_answer_is_in_the_browser_and_every_prompt_once() -> None:
    story = unified(study(ROWS))
    sets = row_sets(story)
    data = browser_data(story, sets, answering_models(story, sets))
    (found,) = data["sets"]
    assert [text for ((_, text),) in found["asked"]] == [prompt for prompt, _ in ROWS]
    assert found["references"] == [references for _, references in ROWS]
    assert [view["label"] for view in found["views"]] == [
        "seed 10, sampled at temperature 1, up to 256 tokens",
        "seed 20, sampled at temperature 1, up to 256 tokens",
        "greedy, up to 256 tokens",
    ]
    for view in found["views"]:
        assert [answer["model"] for answer in view["answers"]] == [0, 1, 2, 3, 4]
        assert all(len(answer["text"]) == 12 for answer in view["answers"])
    text = str(Page(render_report(study(ROWS))).data)
    assert text.count(ROWS[3][0].splitlines()[3]) == 1


def test_another_answer_to_the_same_request_stands_under_its_run() -> None:
    first, second = evaluated("kd", ROWS[:1]), evaluated("kd", ROWS[:1])
    second.evaluations[0].samples[0].response = "something else"
    second.created = "2026-03-02T09:30:00+00:00"
    story = unified([first, second])
    labels = answering_models(story, row_sets(story))
    assert labels == ["kd", "kd, evaluate · kd · dolly_test · 2026-03-02T09:30:00+00:00"]


def test_scores_of_one_answer_from_two_records_are_joined() -> None:
    first, second = evaluated("kd", ROWS[:1]), evaluated("kd", ROWS[:1])
    for each in second.evaluations:
        each.metrics = {}
        each.samples = [row.model_copy(update={"scores": {"judge_score": 7.0}}) for row in each.samples]
    (rows,) = row_sets(unified([first, second]))
    joined = next(iter(rows.views.values())).answers["kd"][0, ROWS[0][0]]
    assert joined.scores["judge_score"] == 7
    assert "rouge_l" in joined.scores


def test_scores_that_are_no_numbers_are_none_in_the_browser() -> None:
    row = RowResult(row=0, prompt="p", references=[], response="r", scores={"loss": float("nan"), "eos_share": 1.0})
    record = Results(kind="evaluate", evaluations=[Evaluation(model="m", data="d", metrics={}, samples=[row])])
    story = unified([record])
    (answer,) = browser_data(story, row_sets(story), ["m"])["sets"][0]["views"][0]["answers"]
    assert answer["scores"] == {0: [None], 1: [100]}


def test_what_a_comparison_says_is_said_once() -> None:
    record = compared(12)
    record.notes = [*compared_sentences(record), "Compared although the limits differ."]
    text = Page(render_report([record])).text
    assert text.count("promptkd is better on") == 0
    assert text.count("Compared although the limits differ.") == 1


def test_compared_labels_need_no_hash() -> None:
    """A record that names a model without a hash speaks of the one that others call so."""
    record = compared(12)
    record.models = {}
    story = unified([evaluated("promptkd", ROWS), evaluated("kd", ROWS), record])
    assert {each.model for each in story[2].differences} == {"promptkd"}
