"""Coefficients that move: the schedules of TAID and Veto against loops, and what is kept of them."""

import math
from dataclasses import replace

import pytest
import torch

from helpers.loops import gradients, logits
from promptkd.objectives import Moving, Taid, Veto, forward_kl, reverse_kl, taid, veto
from promptkd.objectives.kernels import PLAIN_KERNELS, objective_kernel

LOSSES = [2.0, 1.5, 1.6, 0.8, 0.0, 0.4, 0.3]


def taid_by_hand(losses, steps, start, end, alpha, beta):
    """t at each step, as the paper's algorithm 1 counts it: n = 1 … N."""
    t, m, before, ts = start, 0.0, math.inf, []
    for n, loss in enumerate(losses, 1):
        ts.append(t)
        delta = 0.0
        if math.isfinite(before):
            m = beta * m + (1 - beta) * ((before - loss) / before if before else 0.0)
            delta = alpha / (1 + math.exp(-m)) * (1 - t)
        before = loss
        t = min(end, max(start + (end - start) * n / steps, t + delta))
    return ts


def run(objective, losses, steps, name):
    seen = []
    for step, loss in enumerate(losses):
        objective.before_step(step / steps)
        seen.append(objective.metrics()[name])
        objective.after_step(loss)
    return seen


@pytest.mark.parametrize("settings", [(0.4, 1.0, 5e-4, 0.99), (0.2, 0.9, 0.3, 0.5), (0, 1.0, 0, 0.9), (1, 1, 0.5, 0)])
@pytest.mark.parametrize("steps", [7, 1000])
def test_t_follows_the_papers_algorithm(settings, steps):
    found = run(Taid(*settings), LOSSES, steps, "taid_t")
    assert found == pytest.approx(taid_by_hand(LOSSES, steps, *settings), rel=1e-14)
    assert found[0] == settings[0]
    assert sorted(found) == found
    assert found[-1] <= settings[1]


def test_t_rises_faster_while_the_loss_falls():
    falling, rising = ([0.9**step for step in sign] for sign in (range(50), range(0, -50, -1)))
    ahead, behind = (run(Taid(alpha=0.01), losses, 10_000, "taid_t")[-1] for losses in (falling, rising))
    assert ahead > behind > 0.4 + 0.6 * 49 / 10_000


def test_without_alpha_t_is_linear_and_at_equal_ends_constant():
    assert run(Taid(alpha=0.0), LOSSES, 7, "taid_t") == pytest.approx([0.4 + 0.6 * k / 7 for k in range(7)])
    assert set(run(Taid(start=1.0), LOSSES, 7, "taid_t")) == {1.0}
    assert set(run(Taid(start=0.3, end=0.3), LOSSES, 7, "taid_t")) == {0.3}


def test_beta_falls_linearly():
    assert run(Veto(beta=0.8), LOSSES, 7, "veto_beta") == pytest.approx([0.8 * (1 - k / 7) for k in range(7)])
    assert run(Veto(beta=0.8, end=0.1), LOSSES, 7, "veto_beta") == pytest.approx([0.8 - 0.1 * k for k in range(7)])
    assert set(run(Veto(beta=0.5, end=0.5), LOSSES, 7, "veto_beta")) == {0.5}


def test_they_are_the_objectives_with_the_coefficient_of_the_step():
    student, teacher = logits(4, 9, seed=1), logits(4, 9, seed=2)
    moving = Taid()
    moving.before_step(0.5)
    assert torch.equal(moving(student, teacher), taid(student, teacher, t=0.7))
    for direction in ("forward", "reverse"):
        moving = Veto(direction=direction)
        moving.before_step(0.75)
        assert torch.equal(moving(student, teacher), veto(student, teacher, beta=0.2, direction=direction))
        moving.before_step(1.0)  # β = 0
        plain = forward_kl if direction == "forward" else reverse_kl
        assert torch.equal(gradients(moving, student, teacher)[0], gradients(plain, student, teacher)[0])


def test_a_resumed_schedule_goes_on_bit_for_bit():
    whole, first, second = Taid(), Taid(), Taid()
    expected = run(whole, LOSSES, 7, "taid_t")
    run(first, LOSSES[:3], 7, "taid_t")
    second.load_state_dict(first.state_dict())
    found = []
    for step, loss in list(enumerate(LOSSES))[3:]:
        second.before_step(step / 7)
        found.append(second.metrics()["taid_t"])
        second.after_step(loss)
    assert found == expected[3:]
    assert second.state_dict() == whole.state_dict()


def test_a_training_that_begins_anew_begins_at_the_start():
    objective = Taid(alpha=0.5)
    first = run(objective, LOSSES, 7, "taid_t")
    assert run(objective, LOSSES, 7, "taid_t") == first


def test_a_step_that_was_not_taken_leaves_the_trend_alone():
    with_skip, without = Taid(alpha=0.5), Taid(alpha=0.5)
    for step, loss in enumerate([2.0, None, 1.0]):
        with_skip.before_step(step / 9)
        if loss is not None:
            with_skip.after_step(loss)
    without.before_step(0.0)
    without.after_step(2.0)
    without.before_step(2 / 9)
    without.after_step(1.0)
    assert with_skip.state_dict() == without.state_dict()


def test_what_does_not_move_says_and_keeps_nothing():
    still = Moving()
    still.before_step(0.5)
    still.after_step(1.0)
    assert (still.metrics(), still.state_dict()) == ({}, {})
    still.load_state_dict({})


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda: Taid(start=-0.1), "`start`"),
        (lambda: Taid(momentum=1.1), "`momentum`"),
        (lambda: Taid(start=0.9, end=0.5), "start must not exceed its end"),
        (lambda: Veto(beta=1.2), "`beta`"),
        (lambda: Veto(direction="backward"), "direction"),
    ],
)
def test_settings_that_are_none_are_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        wrong()


@pytest.mark.parametrize(("objective", "called"), [(Taid(), "forward"), (Veto(direction="reverse"), "reverse")])
def test_the_written_kernels_serve_them_where_no_token_is_absent(objective, called):
    calls = []

    def noted(name, kernel):
        return lambda *tensors: (calls.append(name), kernel(*tensors))[1]

    kernels = replace(
        PLAIN_KERNELS,
        forward_kl=noted("forward", PLAIN_KERNELS.forward_kl),
        reverse_kl=noted("reverse", PLAIN_KERNELS.reverse_kl),
    )
    student, teacher = logits(4, 9, seed=1), logits(4, 9, seed=2)
    expected, (gradient,) = objective(student, teacher), gradients(lambda s: objective(s, teacher), student)
    for absent in (False, True):
        written, before = student.clone(), teacher.clone()
        values, metrics = objective_kernel(objective, kernels, absent_tokens=absent)(written, before)
        torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(written, gradient, rtol=1e-12, atol=1e-14)
        assert torch.equal(before, teacher)
        assert torch.equal(metrics["top_overlap"], (student.argmax(-1) == teacher.argmax(-1)).double().float())
    assert calls == [called]
