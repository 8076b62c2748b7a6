"""The advice before training: one sentence for what is off, by the flag that mends it, and none for a healthy pair."""

import pytest

from promptkd.record_parts import Preflight
from promptkd.report.preflight import preflight_advice, preflight_lines

HEALTHY = Preflight(
    **{"rows": "990 rows", "template": "chat", "turns": "last", "ends": ["<|im_end|>"], "teacher_ends": ["<|im_end|>"]},
    **{"limit": 256, "vocabulary": 49152, "measured_rows": 8, "seconds": 3.2, "reference_length": 80.0},
    **{"student_loss": 3.3, "teacher_loss": 2.6, "kl_to_teacher": 0.67, "kl_per_response": 20.0, "top_overlap": 0.6},
    **{"response_length": 30.0, "teacher_answers": 8, "teacher_cut": 1, "teacher_length": 70.0},
)


def advice(**changed):
    return preflight_advice(HEALTHY.model_copy(update=changed))


def test_a_healthy_pair_needs_no_advice():
    assert advice() == []
    assert advice(student_loss=None, teacher_loss=None, reference_length=None) == []  # rows without references
    assert advice(teacher_ends=["<|endoftext|>", "<|im_end|>"]) == []  # one of them is enough
    assert advice(teacher_ends=[]) == []
    assert advice(teacher_control="<|im_start|>", teacher_control_answers=1) == []  # in a single cut answer


@pytest.mark.parametrize(
    ("changed", "told", "remedy"),
    [
        ({"teacher_loss": 3.4}, "3.40 nats/token, is not below the student's", "promptkd sft --model TEACHER"),
        ({"teacher_loss": 6.0, "student_loss": 7.0}, "6.00 nats/token, is high", "--template"),
        (
            {"teacher_cut": 6, "reference_length": 200.0},
            "6 of the teacher's 8 answers",
            "--max_completion_length, to 512",
        ),
        ({"teacher_cut": 8}, "while references take 80: it does not end its answers", "promptkd sft"),
        ({"teacher_cut": 8, "reference_length": None}, "no end within 256 tokens", "--max_completion_length"),
        ({"teacher_ends": ["</s>"]}, "The teacher ends with </s>, but <|im_end|> ends", "--template"),
        (
            {"teacher_cut": 8, "teacher_control": "<|im_start|>", "teacher_control_answers": 7},
            "7 of the teacher's 8 answers hold <|im_start|>",
            "eos_token",
        ),
        ({"kl_to_teacher": 0.001, "teacher_loss": 3.3}, "nearly equal already (KL 0.001", "--teacher"),
    ],
)
def test_what_is_off_is_told_once_with_its_remedy(changed, told, remedy):
    (sentence,) = advice(**changed)
    assert told in sentence
    assert remedy in sentence


def test_an_untrained_pair_that_is_nearly_equal_gets_both_pieces_of_advice():
    untrained = {"student_loss": 5.54, "teacher_loss": 5.53, "vocabulary": 260, "kl_to_teacher": 0.004}
    high, equal = advice(**untrained)
    assert "5.53 nats/token, is high" in high
    assert "promptkd sft --model TEACHER" in high
    assert "nearly equal already" in equal
    assert "not below the student's" in advice(**untrained | {"teacher_loss": 5.55})[0]


def test_the_screen():
    lines = dict(preflight_lines(HEALTHY))
    assert lines["training data"] == "990 rows"
    assert lines["a response ends with"] == "<|im_end|>"
    assert lines["loss on the references"] == "student 3.30, teacher 2.60 nats/token"
    assert lines["the teacher's answers"] == "1 of 8 cut at 256 tokens, 70 tokens on average"
    assert lines["KL(student || teacher)"] == "0.67 nats/token, 20.0 nats a response"
    other = dict(preflight_lines(HEALTHY.model_copy(update={"teacher_ends": ["</s>"]})))
    assert other["a response ends with"] == "<|im_end|>; the teacher's: </s>"


def test_models_whose_weights_are_spread_are_not_measured():
    names = {"rows", "template", "turns", "ends", "teacher_ends", "limit", "vocabulary"}
    sharded = Preflight(**HEALTHY.model_dump(include=names))
    assert preflight_lines(sharded)[-1] == ("models", "not measured: spread over processes, or of no shared vocabulary")
    told = sharded.model_copy(update={"unmeasured": "no teacher is in memory"})
    assert preflight_lines(told)[-1] == ("models", "not measured: no teacher is in memory")
    assert preflight_advice(sharded) == []


def test_a_teacher_that_is_the_student_is_not_to_be_tuned_apart_from_it():
    own = {"own_teacher": True, "student_loss": 3.0, "teacher_loss": 3.1}
    assert advice(**own) == []
    (told,) = advice(**own | {"teacher_loss": 8.0})
    assert "promptkd sft --model STUDENT" in told
