"""The teacher's step by itself, against a loop that spells it out."""

import copy
import math

import pytest
import torch

from helpers.parts import parts, window
from helpers.trainers import pair, rows
from minimal_loop import kl, response_log_probs
from promptkd.training.window import Window

RATE, DECAY, CLIP, STEPS = 0.05, 0.1, 0.5, 4


def literal_steps(student, teacher, prompt, batches, *, coefficient=1.0):
    """AdamW on the prompt loss, written out; λ falls from c. Returns the metrics and the prompt of each step."""
    first, second = torch.zeros_like(prompt), torch.zeros_like(prompt)
    kept = []
    for k, examples in enumerate(batches):
        weight = coefficient * (1 - k / STEPS)
        tokens = sum(len(row.response_ids) for row in examples)
        prompt = prompt.detach().requires_grad_()
        to_student = to_plain = torch.tensor(0.0)
        for row in examples:
            adapted = response_log_probs(teacher, row.prompt_ids, row.response_ids, prompt)
            with torch.no_grad():
                plain = response_log_probs(teacher, row.prompt_ids, row.response_ids)
                target = response_log_probs(student, row.prompt_ids, row.response_ids)
            to_student = to_student + kl(adapted, target) / tokens
            to_plain = to_plain + kl(adapted, plain) / tokens
        (gradient,) = torch.autograd.grad(to_student + weight * to_plain, prompt)
        norm = gradient.norm()
        gradient = gradient * min(1.0, CLIP / (float(norm) + 1e-6))
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        mean, square = first / (1 - 0.9 ** (k + 1)), second / (1 - 0.999 ** (k + 1))
        rate = RATE * min(1.0, k / 2)  # two steps of warm-up, from 0
        prompt = prompt.detach() * (1 - rate * DECAY) - rate * mean / (square.sqrt() + 1e-8)
        kept.append((prompt, float(to_student), float(to_plain), weight, float(norm), rate))
    return kept


SETTINGS = {
    "prompt_learning_rate": RATE,
    "prompt_weight_decay": DECAY,
    "prompt_max_grad_norm": CLIP,
    "prompt_warmup_steps": 2,
}


def take(part, tuner, student_loss, made: Window, *, step, logs=True):
    with part.phases("prompt"):
        tuner.step(made, part.student, student_loss.hidden_for_tuner, step=step, logs=logs)
    return part.metrics.means(made, part.accelerator, {})


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_steps_equal_a_loop_that_spells_them_out(tmp_path, float64_inside, pieces):
    student, teacher = pair(torch.float64)
    part = parts(tmp_path, models=(student, teacher), **SETTINGS)
    tuner, student_loss = part.tuner(), part.student_loss()
    tuner.start(STEPS)
    examples = rows(12).examples
    batches = [examples[:4], examples[4:8], examples[8:]]
    expected = literal_steps(student, teacher, part.teacher.adapter.parameters()[0].detach(), batches)
    before = [each.detach().clone() for each in (*student.parameters(), *teacher.parameters())]
    for k, (batch, (prompt, to_student, to_plain, weight, norm, rate)) in enumerate(
        zip(batches, expected, strict=True)
    ):
        size = 4 // pieces
        made = window(*(batch[start : start + size] for start in range(0, 4, size)))
        logged = take(part, tuner, student_loss, made, step=k)
        assert logged["prompt_kl"] == pytest.approx(to_student, rel=1e-10)
        assert logged["prompt_regularizer"] == pytest.approx(to_plain, rel=1e-10, abs=1e-12)
        assert logged["lambda"] == weight
        assert logged["prompt_grad_norm"] == pytest.approx(norm, rel=1e-9)
        assert logged["prompt_learning_rate"] == rate
        torch.testing.assert_close(part.teacher.adapter.parameters()[0].detach(), prompt, rtol=0, atol=1e-11)
    after = [each.detach() for each in (*student.parameters(), *teacher.parameters())]
    assert all(torch.equal(*each) for each in zip(before, after, strict=True))
    assert all(each.grad is None for each in (*student.parameters(), *teacher.parameters()))


def test_the_plain_teacher_is_read_where_its_weight_or_a_log_asks_for_it(tmp_path):
    for schedule, logs, reads in (("linear", False, True), ("none", True, True), ("none", False, False)):
        part = parts(tmp_path, regularizer_schedule=schedule)
        tuner = part.tuner()
        tuner.start(1)
        plain, asked = part.teacher.plain_hidden, []
        part.teacher.plain_hidden = lambda batch, plain=plain, asked=asked: (asked.append(1), plain(batch))[1]
        logged = take(part, tuner, part.student_loss(), window(rows(4).examples), step=0, logs=logs)
        assert bool(asked) == reads == ("prompt_regularizer" in logged)


def test_a_stale_target_is_that_of_before_the_step(tmp_path):
    part = parts(tmp_path, prompt_refresh="stale")
    tuner, examples = part.tuner(), rows(4).examples
    tuner.start(1)
    made = window(examples[:2], examples[2:])
    before = [part.teacher.adapted_hidden(each.batch) for each in made.micro_batches]
    take(part, tuner, part.student_loss(), made, step=0)
    for micro_batch, hidden in zip(made.micro_batches, before, strict=True):
        torch.testing.assert_close(micro_batch.teacher_hidden, hidden)
        assert not micro_batch.teacher_hidden.requires_grad
        assert not torch.allclose(part.teacher.adapted_hidden(micro_batch.batch), hidden)


def state(tuner):
    adapter, optimizer = tuner.adapter.state_dict(), tuner.optimizer.state_dict()["state"]
    return [
        each.clone() for each in (*adapter.values(), *(value for held in optimizer.values() for value in held.values()))
    ]


def test_a_rollback_restores_the_adapter_and_its_optimizer_but_not_the_schedule(tmp_path):
    part = parts(tmp_path, on_nan="skip", **SETTINGS)
    tuner, student_loss = part.tuner(), part.student_loss()
    tuner.start(STEPS)
    states, rates = [], []
    for k in range(3):
        take(part, tuner, student_loss, window(rows(4, seed=k).examples), step=k)
        states.append(state(tuner))
        rates.append(tuner.scheduler.get_last_lr()[0])
    assert not torch.equal(states[1][0], states[2][0])
    tuner.rollback()
    assert all(torch.equal(old, new) for old, new in zip(states[1], state(tuner), strict=True))
    assert tuner.scheduler.get_last_lr()[0] == tuner.optimizer.param_groups[0]["lr"] == rates[2] == RATE


def test_only_where_steps_are_skipped_is_a_copy_held(tmp_path):
    part = parts(tmp_path)
    tuner = part.tuner()
    tuner.start(1)
    take(part, tuner, part.student_loss(), window(rows(4).examples), step=0)
    moved = state(tuner)
    tuner.rollback()
    assert all(torch.equal(*each) for each in zip(moved, state(tuner), strict=True))


def test_a_gradient_that_is_not_finite_moves_nothing_and_the_schedule_goes_on(tmp_path):
    part = parts(tmp_path, **SETTINGS)
    tuner, student_loss = part.tuner(), part.student_loss()
    tuner.start(STEPS)
    for k in range(2):
        take(part, tuner, student_loss, window(rows(4).examples), step=k)
    before = state(tuner)

    def broken(model, micro_batch):
        return student_loss.hidden_for_tuner(model, micro_batch) * math.nan

    with part.phases("prompt"):
        tuner.step(window(rows(4).examples), part.student, broken, step=2, logs=True)
    assert all(torch.equal(*each) for each in zip(before, state(tuner), strict=True))
    assert tuner.scheduler.last_epoch == 3
    assert math.isnan(part.metrics.means(window(rows(4).examples), part.accelerator, {})["prompt_grad_norm"])
    assert {what for what, value, _ in part.guard._noted if not value.isfinite()} == {"prompt loss", "prompt gradient"}


def test_a_tuner_resumes_bit_for_bit(tmp_path):
    whole, resumed = parts(tmp_path, **SETTINGS), parts(tmp_path, **SETTINGS)
    tuners = [part.tuner() for part in (whole, resumed)]
    for tuner in tuners:
        tuner.start(STEPS)
    student_losses = [part.student_loss() for part in (whole, resumed)]
    states = []
    for k in range(3):
        take(whole, tuners[0], student_losses[0], window(rows(4, seed=k).examples), step=k)
        states.append(state(tuners[0]))
        if k == 1:
            tuners[1].load_state_dict(copy.deepcopy(tuners[0].state_dict()))
    assert not torch.equal(states[1][0], states[2][0])
    take(resumed, tuners[1], student_losses[1], window(rows(4, seed=2).examples), step=2)
    assert all(torch.equal(*each) for each in zip(states[2], state(tuners[1]), strict=True))
