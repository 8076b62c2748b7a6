"""The objectives of 2024-2026, values and gradients, against loops written from the papers alone (`paper_loops.py`)."""

import math
from functools import partial

import pytest
import torch

from helpers import paper_loops as paper
from promptkd.objectives import (
    Taid,
    Veto,
    alpha_beta,
    concrete_score,
    entropy_aware_kl,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    taid,
    todi,
    veto,
)
from promptkd.objectives.sequence import contrast_weight, on_policy_gradient, skew_coefficients

ABSENT = -math.inf
TOKEN = 4  # the one that was sampled

# An objective of (student, teacher), and its loop of (student, teacher, frozen student).
CASES = {
    **{f"taid t={t}": (partial(taid, t=t), partial(paper.taid, t=t)) for t in (0.0, 0.4, 0.75, 1.0)},
    **{
        f"veto {way} β={beta}": (
            partial(veto, beta=beta, direction=way),
            partial(paper.veto, beta=beta, direction=way),
        )
        for way in ("forward", "reverse")
        for beta in (0.0, 0.3, 0.8, 1.0)
    },
    **{
        f"alpha_beta {alpha}, {beta}": (
            partial(alpha_beta, alpha=alpha, beta=beta),
            lambda z, w, _, alpha=alpha, beta=beta: paper.alpha_beta(z, w, alpha=alpha, beta=beta),
        )
        for alpha, beta in (
            *((0.2, 0.7), (0.5, 0.5), (1.3, -0.4), (-0.3, 0.9)),
            *((1.0, 0.0), (0.0, 1.0), (0.6, 0.0), (0.0, 0.6), (0.6, -0.6), (0.0, 0.0)),
        )
    },
    **{
        f"entropy_aware_kl τ={tau}": (
            partial(entropy_aware_kl, threshold=tau),
            lambda z, w, _, tau=tau: paper.entropy_aware_kl(z, w, threshold=tau),
        )
        for tau in (0.0, 0.8, 1.2, 9.0)
    },
    "todi": (todi, paper.todi),
    "distillm2, teacher's response": (
        partial(skew_forward_kl, alpha=0.1),
        lambda z, w, _: paper.distillm2_teacher(z, w, alpha=0.1),
    ),
    "distillm2, student's response": (
        partial(skew_reverse_kl, alpha=0.1, constant_mixture=True),
        partial(paper.distillm2_student, alpha=0.1),
    ),
    "on_policy_gradient": (
        lambda student, teacher: on_policy_gradient(*(each.log_softmax(-1)[:, TOKEN] for each in (student, teacher))),
        partial(paper.on_policy_gradient, token=TOKEN),
    ),
    **{
        f"concrete_score {of}": (partial(concrete_score, weights=of), partial(paper.concrete_score, weights=of))
        for of in ("student", "teacher", "uniform")
    },
}


def positions(seed=0, count=6, width=7):
    """(N, V) logits in float64 of student and teacher, spread over several nats."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([0.1, 0.5, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)[:count, None]
    return [spread * torch.randn(count, width, dtype=torch.float64, generator=generator) for _ in "qp"]


def slope(function, at, place, step=2e-3):
    """The derivative by five points, its error of order step⁴."""

    def moved(by):
        return function([*at[:place], at[place] + by, *at[place + 1 :]])

    return (8 * (moved(step) - moved(-step)) - (moved(2 * step) - moved(-2 * step))) / (12 * step)


def gradients(loop, student, teacher):
    """(N, V): each loop's derivative, with what the paper detaches held where it is; 0 for absent tokens."""
    rows = []
    for z, w in zip(student.tolist(), teacher.tolist(), strict=True):
        moving = partial(lambda now, z, w: loop(now, w, z), z=z, w=w)
        rows.append([0.0 if ABSENT in (z[v], w[v]) else slope(moving, z, v) for v in range(len(z))])
    return torch.tensor(rows, dtype=torch.float64)


def close(got, wanted, tolerance=1e-9):
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=1e-10)


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, absent):
    objective, loop = CASES[case]
    student, teacher = positions()
    if absent:
        student[:, 2] = teacher[:, 2] = ABSENT
    student.requires_grad_()
    values = objective(student, teacher)
    values.sum().backward()
    rows = zip(student.tolist(), teacher.tolist(), strict=True)
    close(values.detach(), torch.tensor([loop(z, w, z) for z, w in rows], dtype=torch.float64))
    close(student.grad, gradients(loop, student.detach(), teacher))


@pytest.mark.parametrize(
    ("limit", "near"),
    [((0.6, 0), (0.6, 1e-6)), ((0, 0.6), (1e-6, 0.6)), ((0.6, -0.6), (0.6, -0.6 + 1e-6)), ((0, 0), (1e-5, 1e-5))],
)
def test_the_loops_limits_are_limits_of_the_general_line(limit, near):
    for z, w in zip(*(each.tolist() for each in positions()), strict=True):
        at, beside = (paper.alpha_beta(z, w, alpha=alpha, beta=beta) for alpha, beta in (limit, near))
        assert math.isclose(at, beside, rel_tol=1e-3)


def test_the_authors_of_csd_descend_the_reverse_kl():
    student, teacher = positions()
    student.requires_grad_()
    wanted = [paper.concrete_score_gradient(z, w) for z, w in zip(student.tolist(), teacher.tolist(), strict=True)]
    (of_reverse_kl,) = torch.autograd.grad(reverse_kl(student, teacher).sum(), student)
    (of_ours,) = torch.autograd.grad(concrete_score(student, teacher).sum(), student)
    close(of_reverse_kl, torch.tensor(wanted, dtype=torch.float64))
    close(of_ours, 2 * torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize("base", [0.1, 0.3, 0.005])
def test_skew_coefficients_of_distillm2(base):
    """Of responses on which the teacher is far surer than the student, a little surer, as sure, and less sure."""
    student = [[-3.0, -2.0, -4.0], [-1.0, -1.4], [-0.7], [-0.2, -0.3, -0.1]]
    teacher = [[-0.1, -0.3, -0.2], [-0.9, -1.1], [-0.7], [-1.0, -2.0, -0.5]]
    for mean in (0.05, 0.4, 0.9):
        wanted = [paper.distillm2_skew(p, q, base=base, mean=mean) for p, q in zip(teacher, student, strict=True)]
        sure = [[torch.tensor(row, dtype=torch.float64).mean().exp() for row in rows] for rows in (teacher, student)]
        got = skew_coefficients(torch.stack(sure[0]) - torch.stack(sure[1]), mean, alpha=base)
        close(got, torch.tensor(wanted, dtype=torch.float64))


def test_distillm2_weighs_the_students_responses_more_until_the_middle():
    for step in range(9):
        assert contrast_weight(step / 8) == paper.distillm2_beta(step, 8)


@pytest.mark.parametrize("rate", [5e-4, 0.2, 0.0])
def test_the_schedule_of_taid(rate):
    losses = [2.0, 1.9, 1.5, 1.6, 0.7, 3.0, 0.2, 0.1]
    settings = {"start": 0.4, "end": 1.0, "momentum": 0.9}
    objective, used = Taid(alpha=rate, **settings), []
    for k, loss in enumerate(losses):
        objective.before_step(k / 8)
        used.append(objective.metrics()["taid_t"])
        objective.after_step(loss)
    wanted = paper.taid_schedule(losses, steps=8, rate=rate, **settings)
    assert used == pytest.approx(wanted, rel=1e-12)
    lagging = paper.taid_schedule(losses, steps=8, rate=rate, late=1, **settings)
    assert all(0 <= mine - theirs < 0.6 / 8 + 1e-12 for mine, theirs in zip(used, lagging, strict=True))


def test_the_decay_of_veto():
    objective = Veto(beta=0.8)
    for k in range(8):
        objective.before_step(k / 8)
        assert objective.metrics()["veto_beta"] == pytest.approx(paper.veto_decay(0.8, k, 8), rel=1e-12)
