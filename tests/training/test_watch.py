"""Degenerate learning: each kind is found in a history planted with it, and nothing is found in a healthy one."""

import pytest
import torch

from helpers.commands import LIMITS, done, make_world
from helpers.tiny import END_ID, save_model, tiny_model, token_id
from helpers.trainers import log, trainer
from promptkd.methods import Method, named_method
from promptkd.objectives import forward_kl
from promptkd.responses import ResponseMix
from promptkd.results import Results
from promptkd.training.collapse import Limits, Watch, findings, findings_as_notes


def healthy(steps=120):
    """An on-policy run as they go: a student that rambles to the limit first, learns to stop, and loses entropy."""
    lines = []
    for k in range(steps):
        done = k / steps
        rambles = max(0.0, 0.9 - 2 * done)
        lines.append(
            {
                "step": k + 1,
                "loss": 2.0 - done,
                "entropy": 2.5 - 2.2 * done,
                "response_length": rambles * 256 + (1 - rambles) * (60 + 15 * (-1) ** k),
                "cut_share": 1.0 if k == 3 else rambles,
                "repetition": 0.02 + 0.05 * (k % 4) + 0.03 * done,  # of lists and tables, too
                "top_overlap": 0.6 + 0.2 * done + 0.08 * (-1) ** k,
                "prompt_norm": 5.0 + 15 * done,
                "prompt_distance": 15 * done,
                "prompt_regularizer": 0.05 + 0.1 * done if k != 7 else 4.0,
                "prompt_kl": 0.8 - 0.3 * done,
            }
        )
        if k % 20 == 19:
            lines.append({"step": k + 1, "eval_loss": 2.0, "eval_eos_share": 0.0 if k == 19 else 0.5})
    return lines


def planted(first, last=None, **changed):
    """The healthy history with figures changed from step `first` to step `last`."""
    lines = healthy()
    for line in lines:
        if line["step"] >= first and (last is None or line["step"] <= last):
            line |= {name: value for name, value in changed.items() if name in line}
    return lines


def test_a_healthy_run_is_left_in_peace():
    assert findings(healthy()) == []
    assert findings([]) == []
    assert findings([{"step": 1, "loss": 2.0, "grad_norm": None}, {"step": 1, "eval_loss": 2.0}]) == []


@pytest.mark.parametrize(
    ("kind", "changed", "step", "text"),
    [
        ("length", {"response_length": 6.0}, 89, "collapsed to 6.0 tokens, from"),
        ("length", {"response_length": 1.2, "cut_share": 0.0}, 89, "collapsed to 1.2 tokens, from"),
        ("cut", {"cut_share": 1.0}, 84, "every response of 5 steps was cut at the length limit"),
        ("entropy", {"entropy": 0.01}, 84, "entropy has fallen to 0.010 nats per token"),
        ("prompt norm", {"prompt_norm": 51.0}, 84, "its norm is 51, from 5 in the first step"),
        ("prompt KL", {"prompt_regularizer": 2.5}, 84, "is 2.50 nats per token from the plain one"),
        (
            "teacher drift",
            {"prompt_regularizer": 0.24, "prompt_kl": 0.4},
            85,
            "to the student: it is 0.24 nats per token from the plain one and 0.40 from the student",
        ),
        ("endless validation", {"eval_eos_share": 0.0}, 100, "ended by itself in two validations"),
        (
            "repetition",
            {"repetition": 0.4},
            88,
            "repeat themselves: 37% of their 4-grams are repeated, 9% in",
        ),
        ("repetition", {"repetition": 1.0}, 85, "repeat themselves: 65% of their 4-grams"),
        ("overlap", {"top_overlap": 0.3}, 89, "same most probable token at 30% of the response tokens, 61% in the"),
    ],
)
def test_each_kind_is_found_once(kind, changed, step, text):
    (found,) = findings(planted(80, **changed))
    assert (found.kind, found.step) == (kind, step)
    assert text in found.text


def run_of(steps=40, **metrics):
    """A history with these metrics, each a number or a function of the step."""
    return [
        {"step": k} | {name: value(k) if callable(value) else value for name, value in metrics.items()}
        for k in range(1, steps + 1)
    ]


def test_lengths_that_explode():
    """To the limit, where most responses are cut that ended before; or below it, to five times the start."""
    cut = run_of(response_length=lambda k: 200 if k > 20 else 60, cut_share=lambda k: 0.7 if k > 20 else 0.1)
    (found,) = findings(cut)
    assert (found.kind, found.step) == ("growth", 33)
    assert "grown to 200 tokens, 70% of them cut at the limit, from 60 tokens and 10% in the first" in found.text
    uncut = run_of(response_length=lambda k: 500 if k > 20 else 60, cut_share=0.0)
    assert [(each.kind, each.step) for each in findings(uncut)] == [("growth", 30)]
    for healthy_length in (lambda k: 60 + 4 * k, lambda k: 150 if k > 20 else 60):  # towards a teacher that says more
        assert findings(run_of(response_length=healthy_length, cut_share=0.1)) == []
    rambles = run_of(response_length=256, cut_share=lambda k: 0.9 if k < 20 else 0.95)
    assert findings(rambles) == []  # it did so from the start
    assert findings(run_of(8, response_length=lambda k: 10.0**k, cut_share=0.0)) == []  # too early to tell


def test_lengths_that_explode_from_a_start_in_which_many_responses_were_cut():
    """Such a start does not tell a length, and the text names none."""
    (found,) = findings(run_of(response_length=40, cut_share=lambda k: (0.2, 0.6)[k % 2] if k <= 15 else 0.95))
    assert found.kind == "growth"
    assert "grown to 40 tokens, 9" in found.text
    assert "of them cut at the limit, from 40% in the first steps" in found.text


def test_an_adapted_teacher_that_drifts_to_the_student_is_told_once():
    for wave in (lambda k: 0.0, lambda k: 0.1 * (-1) ** k, lambda k: 0.4 * (k % 10 == 0)):
        (found,) = findings(run_of(prompt_regularizer=lambda k, wave=wave: 0.02 + 0.008 * k + wave(k), prompt_kl=0.5))
        assert found.kind == "teacher drift"
        assert 22 <= found.step <= 32  # when more than half of ten lines have a third of 0.5


@pytest.mark.parametrize(
    ("regularizer", "kl"),
    [
        (0.2, 0.8),  # far from the student
        (0.06, 0.1),  # a student that has learned
        (0.15, 0.3),  # a start that is far from the plain teacher, and stays
        (lambda k: 0.15 if k < 8 else 0.2, 0.3),
        (lambda k: 0.3 if k % 5 == 0 else 0.05, 0.5),  # single batches
    ],
)
def test_an_adapted_teacher_that_stays_where_it_was_or_far_from_the_student(regularizer, kl):
    assert findings(run_of(prompt_regularizer=regularizer, prompt_kl=kl)) == []


def test_repetition_from_the_start_and_in_texts_that_repeat():
    assert [each.step for each in findings(run_of(repetition=0.6))] == [14]
    assert findings(run_of(repetition=lambda k: 0.2 if k < 20 else 0.35)) == []  # code and tables
    assert findings(run_of(repetition=lambda k: 0.01 if k < 20 else 0.15)) == []
    assert findings(run_of(repetition=lambda k: 1.0 if k == 20 else 0.05)) == []  # one batch


def test_an_overlap_that_stays_or_rises_is_healthy():
    for overlap in (0.2, lambda k: 0.3 + 0.015 * k, lambda k: 0.6 + 0.15 * (-1) ** k):
        assert findings(run_of(top_overlap=overlap)) == []


def test_a_length_that_is_short_from_the_start():
    """There is no fall then; a bare end token for most rows is degenerate all the same."""
    lines = [{"step": k + 1, "response_length": 1.1, "cut_share": 0.0} for k in range(30)]
    (found,) = findings(lines)
    assert (found.kind, found.step) == ("length", 14)
    assert "from" not in found.text
    short = [line | {"response_length": 2.0} for line in lines]  # a word and its end
    assert findings(short) == []


def test_an_end_that_is_never_learnt():
    found = findings(planted(20, cut_share=1.0, response_length=256.0))
    assert [(each.kind, each.step) for each in found] == [("cut", 24), ("endless", 69)]


def validated(*shares: float, every: int = 25) -> list[dict]:
    """Lines of the loss every 10 steps, and of a validation every `every` steps."""
    lines = [{"step": step, "loss": 2.0} for step in range(10, every * len(shares) + 1, 10)]
    lines += [{"step": at * every, "eval_eos_share": share} for at, share in enumerate(shares, 1)]
    return sorted(lines, key=lambda line: line["step"])


@pytest.mark.parametrize(
    ("shares", "steps"),
    [
        ((0.0,), []),
        ((0.5, 0.0), []),
        ((0.0, 0.5, 0.0), []),
        ((0.0, 0.0), [50]),
        ((0.0, 0.0, 0.0), [50]),
        ((0.0, 0.0, 0.5, 0.0, 0.0), [50, 125]),
    ],
)
def test_one_validation_without_an_end_is_none_too_many(shares, steps):
    assert [(each.kind, each.step) for each in findings(validated(*shares))] == [
        ("endless validation", step) for step in steps
    ]
    again = [line for line in validated(*shares) for _ in range(2)]  # the same weights are validated twice
    assert [each.step for each in findings(again)] == steps


def test_a_validation_on_several_sets_is_endless_where_no_response_of_any_set_ends():
    def on_sets(of_a, of_b):
        shares = [{"step": at, f"eval_{name}_eos_share": share} for at in (25, 50) for name, share in (of_a, of_b)]
        return [each.step for each in findings([{"step": 10, "loss": 2.0}, *shares])]

    assert on_sets(("a", 0.0), ("b", 0.0)) == [50]
    assert on_sets(("a", 0.0), ("b", 0.5)) == on_sets(("a", 0.5), ("b", 0.0)) == []


def test_one_short_batch_is_no_collapse():
    for k in range(30, 34):
        assert findings(planted(k, k + 3, response_length=1.0)) == []


def test_an_episode_is_told_once_and_the_next_one_again():
    twice = planted(30, 50, entropy=0.0)
    for line in twice:
        if line["step"] >= 80 and "entropy" in line:
            line["entropy"] = 0.0
    assert [each.step for each in findings(twice)] == [34, 84]
    assert findings_as_notes(twice) == [
        "Warning at step 34, the first of 2: the entropy has fallen to 0.000 nats per token: the model has one thing "
        "to say. Lower the learning rate, stop earlier, or take an objective that keeps to the data."
    ]


@pytest.mark.parametrize("every", [1, 2, 10])
def test_steps_are_counted_whatever_is_logged(every):
    lines = [line for line in planted(61, entropy=0.0) if line["step"] % every == 0]
    assert [each.step for each in findings(lines)] == [{1: 65, 2: 66, 10: 70}[every]]


def test_limits_can_be_others():
    assert findings(healthy(), Limits(prompt_growth=2.0))[0].kind == "prompt norm"


def test_lines_may_come_one_by_one():
    watch, lines = Watch(), planted(80, entropy=0.0)
    assert [found for line in lines for found in watch.see(line)] == findings(lines)


# ------------------------------------------------------------------------------------------------------- in tiny runs


def silent():
    """A student that writes its end token and nothing else."""
    student = tiny_model("gpt2", layers=2, hidden=16, seed=1, tied=False)
    student.lm_head.bias = torch.nn.Parameter(torch.zeros(student.config.vocab_size))
    with torch.no_grad():
        student.lm_head.weight.zero_()
        student.lm_head.bias[END_ID] = 20.0
    return student


def warned(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "promptkd"]


def favoring(seed=1, **logits):
    """A random GPT-2 with these logits added to those of single tokens, END the end token."""
    model = tiny_model("gpt2", layers=2, hidden=16, seed=seed, tied=False)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
    with torch.no_grad():
        model.lm_head.weight.mul_(0.3)
        for token, logit in logits.items():
            model.lm_head.bias[END_ID if token == "END" else token_id(token)] = logit
    return model


SLOWLY = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 200}
TINY_RUNS = {
    "healthy": ((favoring(END=3.5), favoring(2, END=3.0)), {"max_steps": 20, "learning_rate": 3e-3}),
    "growth": ((favoring(END=6.0), favoring(2, END=-20.0)), {"max_steps": 40, "learning_rate": 0.03, **SLOWLY}),
    "repetition": ((favoring(), favoring(2, a=20.0, END=-20.0)), {"max_steps": 16, "learning_rate": 0.05}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TINY_RUNS)
def test_tiny_runs_that_go_wrong_or_well(tmp_path, caplog, kind):
    models, settings = TINY_RUNS[kind]
    ran = trainer(tmp_path, models=models, method=named_method("promptkd"), max_completion_length=24, **settings)
    ran.train()
    kinds = {each.kind for each in findings(log(ran))}
    assert kinds - {"cut", "entropy"} == ({kind} - {"healthy"})
    assert kinds or not warned(caplog)


@pytest.mark.slow
def test_a_student_that_is_driven_from_its_teacher(tmp_path):
    student, teacher = (tiny_model("gpt2", layers=3, hidden=24, seed=2) for _ in range(2))
    settings = {"max_steps": 30, "per_device_train_batch_size": 8, "learning_rate": 4e-4}
    away = Method(ResponseMix(1.0), lambda student, teacher: -forward_kl(student, teacher))
    ran = trainer(tmp_path, models=(student, teacher), method=away, **settings)
    ran.train()
    assert log(ran)[0]["top_overlap"] == 1  # they begin alike
    assert "overlap" in {each.kind for each in findings(log(ran))}


@pytest.mark.slow
def test_a_student_of_end_tokens_is_warned_of_once(tmp_path, caplog):
    settings = {
        "models": (silent(), tiny_model("llama", layers=3, hidden=24, seed=2)),
        "method": named_method("promptkd"),
        "learning_rate": 0.0,
        "regularizer_coefficient": 5.0,
        "prompt_learning_rate": 0.0,
        "save_strategy": "steps",
        "save_steps": 18,
    }
    whole = trainer(tmp_path, max_steps=20, **settings)
    whole.train()
    assert [text.partition(":")[0] for text in warned(caplog)] == ["Step 5", "Step 14"]
    assert "entropy has fallen to 0.000" in caplog.text
    assert "collapsed to 1.0 tokens" in caplog.text
    assert [each.kind for each in findings(log(whole))] == ["entropy", "length"]
    caplog.clear()
    trainer(tmp_path / "resumed", max_steps=20, **settings).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-18")
    )
    assert warned(caplog) == []  # they were told before


@pytest.mark.slow
def test_a_student_that_never_ends_is_in_the_record_and_on_the_page(tmp_path, capsys):
    world = make_world(tmp_path)
    student = tiny_model("llama", layers=2, hidden=16, seed=1, tied=False)
    with torch.no_grad():
        student.lm_head.weight[END_ID] = 0.0
        student.model.norm.weight.mul_(4)  # so that a logit of 0 is never drawn
    ran = done(
        capsys,
        *("distill", "--student", save_model(tmp_path / "endless", student), "--teacher", world.teacher),
        *("--data", world.train, "--out", tmp_path / "run", *LIMITS, "--max_steps", 6, "--learning_rate", 0),
        *("--prompt_learning_rate", 0, "--per_device_train_batch_size", 4, "--use_cpu"),
    )
    record = Results.read(tmp_path / "run" / "results.json")
    cut = [line["cut_share"] for line in record.history[0].points]
    assert cut == [1.0] * 6
    note = "Warning at step 5: every response of 5 steps was cut at the length limit."
    assert [each for each in record.notes if each.startswith(note)]
    assert note in (tmp_path / "run" / "report.html").read_text()
    assert ran.status == 0
