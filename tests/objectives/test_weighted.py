"""Alpha-beta, entropy-aware, ToDi and concrete scores: the laws of every objective, numbers by hand, ends, limits."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers.loops import Objective, OfRow, Row, gradients, log, logits, loop, loop_kl
from helpers.objective_laws import ObjectiveCase, every_law
from promptkd.engine.heads import MASKED
from promptkd.objectives import alpha_beta, concrete_score, entropy_aware_kl, forward_kl, reverse_kl, todi


def loop_alpha_beta(q: Row, p: Row, alpha: float, beta: float) -> float:
    total = 0.0
    for v in range(len(q)):
        a, b = math.log(p[v]), math.log(q[v])
        if alpha == 0 and beta == 0:
            total += 0.5 * (a - b) ** 2
        elif alpha == 0:
            total += (q[v] ** beta * beta * (b - a) - q[v] ** beta + p[v] ** beta) / beta**2
        elif beta == 0:
            total += (p[v] ** alpha * alpha * (a - b) - p[v] ** alpha + q[v] ** alpha) / alpha**2
        elif alpha + beta == 0:
            total += (alpha * (b - a) + (p[v] / q[v]) ** alpha - 1) / alpha**2
        else:
            s = alpha + beta
            inner = p[v] ** alpha * q[v] ** beta - alpha / s * p[v] ** s - beta / s * q[v] ** s
            total -= inner / (alpha * beta)
    return total


def loop_entropy_aware(q: Row, p: Row, threshold: float) -> float:
    entropy = -math.fsum(each * math.log(each) for each in p if each > 0)
    return loop_kl(q, p) + (loop_kl(p, q) if entropy > threshold else 0.0)


def loop_todi(q: Row, p: Row) -> float:
    total = 0.0
    for v in range(len(q)):
        weight = 1 / (1 + math.exp(math.log(q[v]) - math.log(p[v])))
        total += weight * p[v] * math.log(p[v] / q[v]) + (1 - weight) * q[v] * math.log(q[v] / p[v])
    return total


def loop_concrete_score(q: Row, p: Row, weights: str) -> float:
    w = {"student": q, "teacher": p, "uniform": [1 / len(q)] * len(q)}[weights]
    total = 0.0
    for y in range(len(q)):
        for x in range(len(q)):
            difference = math.log(q[x]) - math.log(q[y]) - math.log(p[x]) + math.log(p[y])
            total += 0.5 * w[y] * q[x] * difference**2
    return total


def todi_with_fixed_weights(student: Tensor, teacher: Tensor) -> Objective:
    w = (teacher.log_softmax(-1) - student.log_softmax(-1)).sigmoid()

    def value(s: Tensor, t: Tensor) -> Tensor:
        log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
        return (w * log_p.exp() * (log_p - log_q) + (1 - w) * log_q.exp() * (log_q - log_p)).sum(-1)

    return value


def concrete_score_with_fixed_weights(weights: str, student: Tensor, teacher: Tensor) -> Objective:
    q = student.softmax(-1)
    w = {"student": q, "teacher": teacher.softmax(-1), "uniform": torch.full_like(q, 1 / q.shape[-1])}[weights]

    def value(s: Tensor, t: Tensor) -> Tensor:
        gap = s - t
        return 0.5 * (w[..., :, None] * q[..., None, :] * (gap[..., None, :] - gap[..., :, None]).square()).sum(
            (-1, -2)
        )

    return value


AB = [(0.2, 0.7), (1.0, 0.0), (0.0, 1.0), (0.0, 0.7), (0.2, 0.0), (0.5, 0.5), (1.0, 1.0), (0.0, 0.0)]
AB_BELOW_ZERO = [(0.02, -0.02), (-0.05, 0.7)]  # unbounded, so small
CASES: dict[str, ObjectiveCase] = {}
for alpha, beta in AB + AB_BELOW_ZERO:
    CASES[f"alpha_beta {alpha} {beta}"] = ObjectiveCase(
        partial(alpha_beta, alpha=alpha, beta=beta),
        partial(loop_alpha_beta, alpha=alpha, beta=beta),
        extremes=min(alpha, beta) >= 0,
    )
for threshold in (-1.0, 0.8, 1.6, 9.0):
    CASES[f"entropy_aware_kl {threshold}"] = ObjectiveCase(
        partial(entropy_aware_kl, threshold=threshold), partial(loop_entropy_aware, threshold=threshold)
    )
CASES["todi"] = ObjectiveCase(todi, loop_todi, todi_with_fixed_weights)
for weights in ("student", "teacher", "uniform"):
    CASES[f"concrete_score {weights}"] = ObjectiveCase(
        partial(concrete_score, weights=weights),  # type: ignore[arg-type]
        partial(loop_concrete_score, weights=weights),
        partial(concrete_score_with_fixed_weights, weights),
    )


@every_law
@pytest.mark.parametrize("name", CASES)
def test_laws(name: str, law: Callable[[ObjectiveCase], None]) -> None:
    law(CASES[name])


P, Q = (0.5, 0.5), (0.25, 0.75)
UP, DOWN = math.log(2), math.log(1.5)  # log p/q of the first token, log q/p of the second
HAND: list[tuple[Callable[..., Tensor], dict[str, object], float]] = [
    (alpha_beta, {"alpha": 1.0, "beta": 1.0}, 0.5 * (0.25**2 + 0.25**2)),  # half the squared distance
    (alpha_beta, {"alpha": 0.5, "beta": 0.5}, 4 - 4 * (0.125**0.5 + 0.375**0.5)),  # 4 (1 - Σ sqrt(p q))
    (alpha_beta, {"alpha": 0.0, "beta": 0.0}, 0.5 * (UP**2 + DOWN**2)),
    (alpha_beta, {"alpha": 1.0, "beta": -1.0}, -UP + DOWN + 2 + 2 / 3 - 2),
    (entropy_aware_kl, {"threshold": 0.8}, 0.75 * DOWN - 0.25 * UP),  # H(p) = log 2 < 0.8
    (entropy_aware_kl, {"threshold": 0.69}, 0.75 * DOWN - 0.25 * UP + 0.5 * UP - 0.5 * DOWN),
    (todi, {}, 2 / 3 * 0.5 * UP - 1 / 3 * 0.25 * UP - 0.4 * 0.5 * DOWN + 0.6 * 0.75 * DOWN),
    (concrete_score, {}, 0.25 * 0.75 * (UP + DOWN) ** 2),
    (concrete_score, {"weights": "teacher"}, 0.5 * (UP + DOWN) ** 2 * (0.5 * 0.75 + 0.5 * 0.25)),
]


@pytest.mark.parametrize(("f", "settings", "expected"), HAND)
def test_values_by_hand(f: Callable[..., Tensor], settings: dict[str, object], expected: float) -> None:
    assert f(log(*Q), log(*P), **settings).item() == pytest.approx(expected, rel=1e-12)


# Ends and limits ---------------------------------------------------------------------------------------------------


def test_the_ends_of_each_coefficient() -> None:
    student, teacher = logits(4, 9, seed=1), logits(4, 9, seed=2)
    forward, reverse = forward_kl(student, teacher), reverse_kl(student, teacher)
    exact = partial(torch.testing.assert_close, rtol=1e-13, atol=1e-14)
    exact(alpha_beta(student, teacher, alpha=1, beta=0), forward)
    exact(alpha_beta(student, teacher, alpha=0, beta=1), reverse)
    exact(entropy_aware_kl(student, teacher, threshold=math.log(9)), reverse)  # no entropy is higher
    exact(entropy_aware_kl(student, teacher, threshold=-1e-9), forward + reverse)
    exact(todi(student, teacher), forward + reverse)  # its value; not its gradient:
    both = gradients(lambda s, t: forward_kl(s, t) + reverse_kl(s, t), student, teacher)[0]
    assert (gradients(todi, student, teacher)[0] - both).abs().max() > 1e-3
    exact(gradients(concrete_score, student, teacher)[0], 2 * gradients(reverse_kl, student, teacher)[0])


def test_exchanging_the_models() -> None:
    a, b = logits(4, 9, seed=1), logits(4, 9, seed=2)
    exact = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-14)
    for alpha, beta in AB + AB_BELOW_ZERO:
        exact(alpha_beta(a, b, alpha=alpha, beta=beta), alpha_beta(b, a, alpha=beta, beta=alpha))
    exact(todi(a, b), todi(b, a))


@pytest.mark.parametrize("step", [1e-2, 1e-4, 1e-6, 1e-8, 1e-10, 1e-30])
def test_alpha_beta_goes_over_into_its_limits_also_in_float32(step: float) -> None:
    student, teacher = logits(4, 9, seed=1), logits(4, 9, seed=2)
    for at, near in (
        ((0.0, 0.7), (step, 0.7)),
        ((0.0, 0.7), (-step, 0.7)),
        ((0.2, 0.0), (0.2, step)),
        ((0.2, 0.0), (0.2, -step)),
        ((0.5, -0.5), (0.5 + step, -0.5)),
        ((0.5, -0.5), (0.5 - step, -0.5)),
        ((0.0, 0.0), (step, step)),
        ((0.0, 0.0), (step, -step)),
        ((0.0, 0.0), (step, 0.0)),
    ):
        limit, ours = (partial(alpha_beta, alpha=a, beta=b) for a, b in (at, near))
        torch.testing.assert_close(ours(student, teacher), limit(student, teacher), rtol=12 * step + 1e-7, atol=0)
        single = ours(student.float(), teacher.float()).double()
        torch.testing.assert_close(single, limit(student, teacher), rtol=12 * step + 1e-5, atol=0)
        for mine, exact in zip(
            gradients(ours, student.float(), teacher.float()), gradients(limit, student, teacher), strict=True
        ):
            torch.testing.assert_close(mine.double(), exact, rtol=30 * step + 1e-4, atol=30 * step + 1e-4)


def test_the_threshold_itself_is_not_above_it() -> None:
    teacher = torch.zeros(1, 2)  # H(p) = log 2 in float32
    entropy = float(-(teacher.log_softmax(-1).exp() * teacher.log_softmax(-1)).sum())
    student = log(0.25, 0.75).float()[None]
    assert torch.equal(entropy_aware_kl(student, teacher, threshold=entropy), reverse_kl(student, teacher))


@pytest.mark.parametrize("never", [-math.inf, MASKED, MASKED / 20])  # the last at a temperature of 20
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "ours",
    [
        *(partial(concrete_score, weights=weights) for weights in ("student", "teacher", "uniform")),
        *(partial(alpha_beta, alpha=a, beta=b) for a, b in ((0.0, 0.0), (0.5, 0.5), (0.0, 1.0))),
        todi,
        partial(entropy_aware_kl, threshold=0.5),
    ],
)
def test_columns_that_one_side_lacks_change_nothing(ours: Objective, dtype: torch.dtype, never: float) -> None:
    """Nor does it matter where the zero of the logits is."""
    student, teacher = (logits(3, 9, seed=seed).to(dtype) for seed in (1, 2))
    wider = [torch.cat([each, torch.full((3, 4), never, dtype=dtype)], -1) for each in (student + 5, teacher)]
    torch.testing.assert_close(ours(*wider), ours(student, teacher), rtol=1e-4, atol=1e-5)


def test_settings_that_are_none_are_refused() -> None:
    student, teacher = logits(2, 9, seed=1), logits(2, 9, seed=2)
    with pytest.raises(ValueError, match="finite"):
        alpha_beta(student, teacher, alpha=math.nan, beta=0.5)
    with pytest.raises(ValueError, match="finite"):
        alpha_beta(student, teacher, alpha=0.5, beta=math.inf)
    with pytest.raises(ValueError, match="threshold"):
        entropy_aware_kl(student, teacher, threshold=math.nan)
    with pytest.raises(ValueError, match="weights"):
        concrete_score(student, teacher, weights="both")  # type: ignore[arg-type]


@pytest.mark.slow
@given(
    columns=st.integers(1, 12),
    seed=st.integers(0, 999),
    scale=st.sampled_from([1e-3, 1.0, 6.0]),
    alpha=st.floats(0, 2).filter(lambda c: c == 0 or c > 1e-3),
    beta=st.floats(0, 2).filter(lambda c: c == 0 or c > 1e-3),
    threshold=st.floats(-1, 3),
)
def test_values_equal_the_double_loop_at_any_shape_and_coefficient(
    columns, seed, scale, alpha, beta, threshold
) -> None:
    student, teacher = (logits(2, columns, seed=seed + k, scale=scale) for k in (0, 1000))
    cases: list[tuple[Objective, OfRow]] = [
        (partial(alpha_beta, alpha=alpha, beta=beta), partial(loop_alpha_beta, alpha=alpha, beta=beta)),
        (partial(entropy_aware_kl, threshold=threshold), partial(loop_entropy_aware, threshold=threshold)),
        (todi, loop_todi),
        (concrete_score, partial(loop_concrete_score, weights="student")),
    ]
    for ours, of_row in cases:
        values = ours(student, teacher)
        assert (values >= -1e-12).all()
        torch.testing.assert_close(values, loop(of_row, student, teacher), rtol=1e-7, atol=1e-9)
