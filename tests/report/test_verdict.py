"""The verdict: what a student keeps of its teacher, where the rows can carry it, and what is said where they cannot."""

from typing import Any

import pytest

from promptkd.report import render_json, render_markdown, render_report, terminal_table, unified
from promptkd.report.verdict import running_table, verdict_of
from promptkd.results import BEFORE, Difference, Evaluation, Inference, Metric, ModelRecord, Results, Training


def inference(bytes_: int, speed: float, one: float, **more: Any) -> Inference:
    rounds = (1.0, 2.0, 4.0)  # the machine slowed down, for both
    fields = {"precision": "float32", "device": "cpu", "rows": 32, "prompt_tokens": 20, "new_tokens": 16} | more
    return Inference(
        weight_bytes=bytes_,
        tokens_per_second=[speed / each for each in rounds],
        tokens_per_second_one_row=[one / each for each in rounds],
        first_token_seconds=[0.01 * each for each in rounds],
        **fields,
    )


def record(*, rows: int = 121, ratio: Metric | None = None, teacher: float = 40.0, **fields: Any) -> Results:
    """A run's record: the teacher's ROUGE-L, 31 of the student, 20 before training."""
    values = {"teacher": teacher, BEFORE: 20.0, "student": 31.0}
    loss = {"metric": "loss", "better": "lower", "difference": Metric(value=0.3, low=0.2, high=0.4, rows=rows)}
    score = {"metric": "rouge_l", "better": "higher", "difference": Metric(value=-9, low=-13, high=-5, rows=rows)}
    pair = {"model": "student", "baseline": "teacher", "data": "validation"}
    return Results(
        kind="distill",
        models={
            name: ModelRecord(path=f"models/{name}", parameters=size, sha256=name, bytes_on_disk=4 * size)
            for name, size in (("teacher", 134_515_008), ("student", 113_274_432), (BEFORE, 113_274_432))
        },
        evaluations=[
            Evaluation(model=name, data="validation", metrics={"rouge_l": Metric(value=value, rows=rows)})
            for name, value in values.items()
        ],
        differences=[Difference(**pair, **loss), Difference(**pair, **score, ratio=ratio)],
        **fields,
    )


KEPT = Metric(value=0.765, low=0.702, high=0.841, rows=121)
SPEEDS = {"teacher": inference(538_060_032, 100, 10), "student": inference(453_097_728, 121, 13)}


def lead(made: Results) -> str:
    told = verdict_of([made])
    assert told is not None
    return told.lead


def test_what_is_kept_stands_with_size_and_speed() -> None:
    made = record(ratio=KEPT, inference=SPEEDS)
    assert lead(made) == (
        "student keeps 76 % [70, 84] of the teacher's ROUGE-L on validation (121 rows) at 84 % of its size and 1.21 "
        "times its speed (32 rows at a time; 1.30 times for a single row). Before training it had 50 %."
    )
    for text in (terminal_table([made], width=400), render_markdown([made]), render_report([made])):
        assert "keeps 76 %" in text
    assert '"keeps' not in render_json([made])
    assert "1.21 times" in render_json([made])


def test_without_speeds_the_size_is_that_of_the_parameters() -> None:
    assert "(121 rows) at 84 % of its size. Before" in lead(record(ratio=KEPT))


@pytest.mark.parametrize(("chosen_from", "told"), [(1, False), (5, True)])
def test_rows_that_chose_the_checkpoint_are_said_to_flatter_it(chosen_from: int, told: bool) -> None:
    cost = Training(method="kd", steps=9, seconds=1.0, peak_memory_bytes=1, chosen_from=chosen_from)
    made = record(ratio=KEPT, training={"run": cost})
    assert ("The same rows chose it out of 5 validations" in lead(made)) == told


@pytest.mark.parametrize("ratio", [KEPT, Metric(value=0.765, rows=19)])
def test_few_rows_carry_no_claim(ratio: Metric) -> None:
    told = lead(record(ratio=ratio, rows=19))
    assert told.startswith("student has 76 % of the teacher's ROUGE-L on validation, but 19 rows are too few")
    assert "[" not in told


@pytest.mark.parametrize("teacher", [0.0, 0.4, 1.9])
def test_a_share_of_nothing_is_not_told(teacher: float) -> None:
    told = lead(record(ratio=KEPT if teacher else None, teacher=teacher, inference=SPEEDS))
    assert told.startswith(f"ROUGE-L says nothing of student on validation: the teacher's own is {teacher:.1f} of 100.")
    assert "Its loss on the references is 0.30 [0.20, 0.40] nats/token above the teacher's." in told
    assert "student has 84 % of its size" in told
    assert "keeps" not in told


def test_the_loss_is_that_of_the_same_data_whatever_decoding_its_difference_names() -> None:
    made = record(teacher=0.4)
    of_score, of_loss = made.differences[1], made.differences[0].model_copy(update={"data": "validation, sampled"})
    easy = of_loss.model_copy(update={"data": "easy", "difference": Metric(value=-2.5)})
    of_score = of_score.model_copy(update={"data": "validation, greedy"})
    decoded = [each.model_copy(update={"decoding": {"temperature": t}}) for t in (0, 1) for each in made.evaluations]
    others = [each.model_copy(update={"data": "easy"}) for each in made.evaluations]
    held = {"differences": [easy, of_loss, of_score], "evaluations": [*others, *decoded]}
    assert "Its loss on the references is 0.30 [0.20, 0.40] nats/token above" in lead(made.model_copy(update=held))
    assert "loss on the references" not in lead(made.model_copy(update=held | {"differences": [easy, of_score]}))


@pytest.mark.parametrize("rows", [121, 8])
def test_a_teacher_whose_interval_holds_nothing_carries_no_share(rows: int) -> None:
    made = record(ratio=KEPT, rows=rows, teacher=5.0)
    made.evaluations[0].metrics["rouge_l"] = Metric(value=5.0, low=0.0, high=9.0, rows=rows)
    told = lead(made)
    assert told.startswith("ROUGE-L says nothing of student on validation: the teacher's own is 5.0 [0.0, 9.0] of 100.")
    assert "%" not in told.partition("student has")[0]


def evaluated(value: float, temperature: float) -> Results:
    """A record of the pair on one data set in one decoding: the student's ROUGE-L is `value`, the teacher's 40."""
    decoding = {"temperature": temperature, "seeds": [10]}
    each = [
        Evaluation(model=name, data="valid", decoding=decoding, metrics={"rouge_l": Metric(value=of, rows=121)})
        for name, of in (("student", value), ("teacher", 40.0))
    ]
    names = {"model": "student", "baseline": "teacher", "metric": "rouge_l", "better": "higher", "data": "valid"}
    difference = Metric(value=value - 40, low=value - 44, high=value - 36, rows=121)
    ratio = Metric(value=value / 40, low=value / 40 - 0.1, high=value / 40 + 0.1, rows=121)
    return Results(
        kind="evaluate", evaluations=each, differences=[Difference(**names, difference=difference, ratio=ratio)]
    )


def test_what_a_run_and_its_evaluation_measured_alike_is_told_once() -> None:
    text = render_markdown([evaluated(31.0, 1.0), evaluated(31.0, 1.0)])
    assert text.count("student keeps 78 %") == 1
    assert text.count("student has lower ROUGE-L by 9.0") == 1


def test_sampled_and_greedy_differences_of_two_records_are_told_apart() -> None:
    told = terminal_table([evaluated(31.0, 1.0), evaluated(35.0, 0.0)], width=400)
    assert "student keeps 78 % [68, 88] of the teacher's ROUGE-L on valid, sampled (121 rows)" in told
    assert "student keeps 88 % [78, 98] of the teacher's ROUGE-L on valid, greedy (121 rows)" in told
    assert "On valid, sampled: Compared with teacher, student has lower ROUGE-L by 9.0" in told
    assert "On valid, greedy: Compared with teacher, student has lower ROUGE-L by 5.0" in told


def test_two_seeds_of_one_pair_are_not_joined_in_one_sentence() -> None:
    told = terminal_table([evaluated(31.0, 1.0), evaluated(35.0, 1.0)], width=400)
    assert "by 9.0 [5.0, 13.0] points (a loss) and lower" not in told
    assert told.count("Compared with teacher, student has lower ROUGE-L by") == 2


def test_another_precision_of_the_teacher_is_told() -> None:
    quantized = inference(150_000_000, 100, 10, precision="float32, quantized")
    assert "; the teacher in float32, quantized)" in lead(record(ratio=KEPT, inference=SPEEDS | {"teacher": quantized}))


def test_without_a_teacher_the_way_to_one_is_told() -> None:
    assert "promptkd evaluate --model STUDENT --teacher TEACHER" in lead(Results(kind="distill"))
    assert verdict_of([Results(kind="sft")]) is None
    measured = record()  # a teacher whose ROUGE-L is not asked for
    measured.differences = measured.differences[:1]
    assert verdict_of([measured]) is None


def test_speeds_are_medians_with_their_range_and_follow_the_models_new_names() -> None:
    made = record(ratio=KEPT, inference=SPEEDS)
    heads, lines, how = running_table(unified([made]))
    assert heads[-1] == "Tokens/s, 32 rows"
    assert lines[0] == [
        *("teacher", "135 million", "–", "0.54 GB", "0.54 GB", "20.0 ms [10.0, 40.0]", "5.0 [2.5, 10.0]"),
        "50.0 [25.0, 100.0]",
    ]
    assert lines[1][:3] == ["student", "113 million", "84 %"]
    assert "3 rounds" in how
    assert running_table([Results(kind="sft")]) == ([], [], "")
