"""Divergences and the prompt loss: a float64 double loop, numbers by hand, laws, padded heads, precision, TRL."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers.loops import Row, extreme_logits, gradients, log, logits, loop, loop_kl
from promptkd.objectives import (
    adaptive_kl,
    forward_kl,
    jensen_shannon,
    prompt_loss,
    regularizer_weight,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)

Divergence = Callable[[Tensor, Tensor], Tensor]
INF = math.inf


# The literal reference (helpers/loops.py) ---------------------------------------------------------------------------


def loop_mixture(a: Row, b: Row, share: float) -> Row:
    return [share * a[v] + (1 - share) * b[v] for v in range(len(a))]


def loop_jensen_shannon(q: Row, p: Row, beta: float) -> float:
    if beta == 0:
        return loop_kl(p, q)
    if beta == 1:
        return loop_kl(q, p)
    m = loop_mixture(p, q, beta)
    return beta * loop_kl(p, m) + (1 - beta) * loop_kl(q, m)


def loop_adaptive_weight(q: Row, p: Row, mu: float) -> float:
    mass, head_gap, all_gap = 0.0, 0.0, 0.0
    for v in sorted(range(len(p)), key=lambda v: (-p[v], v)):
        gap = abs(p[v] - q[v])
        all_gap += gap
        if mass < mu:
            head_gap += gap
        mass += p[v]
    return head_gap / all_gap if all_gap > 0 else 0.5


def loop_adaptive_kl(q: Row, p: Row, mu: float) -> float:
    weight = loop_adaptive_weight(q, p, mu)
    return weight * loop_kl(p, q) + (1 - weight) * loop_kl(q, p)


CASES: dict[str, tuple[Divergence, Callable[[Row, Row], float]]] = {
    "forward_kl": (forward_kl, lambda q, p: loop_kl(p, q)),
    "reverse_kl": (reverse_kl, lambda q, p: loop_kl(q, p)),
    "total_variation": (total_variation, lambda q, p: 0.5 * sum(abs(p[v] - q[v]) for v in range(len(p)))),
    "adaptive_kl": (adaptive_kl, partial(loop_adaptive_kl, mu=0.5)),
}
for c in (0.0, 0.01, 0.1, 0.5, 0.9, 1.0):
    CASES[f"jensen_shannon {c}"] = (partial(jensen_shannon, beta=c), partial(loop_jensen_shannon, beta=c))
    CASES[f"adaptive_kl {c}"] = (partial(adaptive_kl, mu=c), partial(loop_adaptive_kl, mu=c))
    CASES[f"skew_forward_kl {c}"] = (
        partial(skew_forward_kl, alpha=c),
        lambda q, p, c=c: loop_kl(p, loop_mixture(p, q, c)),
    )
    CASES[f"skew_reverse_kl {c}"] = (
        partial(skew_reverse_kl, alpha=c),
        lambda q, p, c=c: loop_kl(q, loop_mixture(q, p, c)),
    )
every_case = pytest.mark.parametrize(("ours", "of_row"), CASES.values(), ids=CASES.keys())


# Values ------------------------------------------------------------------------------------------------------------


@every_case
def test_values_equal_the_double_loop(ours: Divergence, of_row) -> None:
    student, teacher = logits(2, 5, 11, seed=1), logits(2, 5, 11, seed=2)
    values = ours(student, teacher)
    assert values.shape == (2, 5)
    assert values.dtype == torch.float64
    torch.testing.assert_close(values, loop(of_row, student, teacher), rtol=1e-12, atol=1e-13)


@pytest.mark.slow
@given(
    shape=st.lists(st.integers(1, 3), max_size=2),
    columns=st.integers(1, 12),
    seed=st.integers(0, 999),
    scale=st.sampled_from([1e-3, 1.0, 10.0]),
    coefficient=st.floats(0, 1).filter(lambda c: c in (0, 1) or 1e-6 < c < 1 - 1e-6),
)
def test_values_equal_the_double_loop_at_any_shape_and_coefficient(shape, columns, seed, scale, coefficient) -> None:
    student, teacher = (logits(*shape, columns, seed=seed + k, scale=scale) for k in (0, 1000))
    cases: list[tuple[Divergence, Callable[[Row, Row], float]]] = [
        (partial(jensen_shannon, beta=coefficient), partial(loop_jensen_shannon, beta=coefficient)),
        (partial(skew_forward_kl, alpha=coefficient), lambda q, p: loop_kl(p, loop_mixture(p, q, coefficient))),
        (partial(skew_reverse_kl, alpha=coefficient), lambda q, p: loop_kl(q, loop_mixture(q, p, coefficient))),
    ]
    for ours, of_row in cases:
        values = ours(student, teacher)
        assert values.shape == tuple(shape)
        assert (values >= -1e-12).all()
        torch.testing.assert_close(values, loop(of_row, student, teacher), rtol=1e-9, atol=1e-12)


P, Q = (0.5, 0.5), (0.25, 0.75)
HAND = [  # teacher P, student Q
    (forward_kl, {}, 0.5 * math.log(2) + 0.5 * math.log(2 / 3)),
    (reverse_kl, {}, 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)),
    (total_variation, {}, 0.25),
    (
        jensen_shannon,
        {"beta": 0.25},
        0.25 * 0.5 * math.log(64 / 55) + 0.75 * (math.log(0.8) + 3 * math.log(12 / 11)) / 4,
    ),
    (skew_forward_kl, {"alpha": 0.25}, 0.5 * math.log(1.6) + 0.5 * math.log(8 / 11)),  # to (5/16, 11/16)
    (skew_reverse_kl, {"alpha": 0.25}, 0.25 * math.log(4 / 7) + 0.75 * math.log(4 / 3)),  # to (7/16, 9/16)
]


@pytest.mark.parametrize(("f", "coefficient", "expected"), HAND, ids=[each[0].__name__ for each in HAND])
def test_values_by_hand(f, coefficient: dict[str, float], expected: float) -> None:
    assert f(log(*Q), log(*P), **coefficient).item() == pytest.approx(expected, rel=1e-12)
    scaled = f(log(*Q) + 7, log(*P) - 3, **coefficient)  # logits, not log-probabilities
    assert scaled.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("mu", "weight"),
    [(0.4, 0.5), (0.6, 0.875), (0.9, 1.0), (0.0, 0.0), (1.0, 1.0)],
    ids=["first token", "crossing token is head", "all", "no head", "no tail"],
)
def test_adaptive_weight_by_hand(mu: float, weight: float) -> None:
    # Gaps 0.4, 0.3, 0.1. At 0.6 the second token crosses; were it tail, the weight would be 0.5.
    student, teacher = log(0.1, 0.6, 0.3), log(0.5, 0.3, 0.2)
    expected = weight * forward_kl(student, teacher) + (1 - weight) * reverse_kl(student, teacher)
    torch.testing.assert_close(adaptive_kl(student, teacher, mu=mu), expected, rtol=1e-12, atol=0)


def test_adaptive_head_takes_the_lower_id_among_equal_probabilities() -> None:
    student, teacher = log(0.55, 0.15, 0.15, 0.15), log(0.25, 0.25, 0.25, 0.25)
    expected = 2 / 3 * forward_kl(student, teacher) + 1 / 3 * reverse_kl(student, teacher)
    torch.testing.assert_close(adaptive_kl(student, teacher, mu=0.4), expected, rtol=1e-12, atol=0)


def test_adaptive_default_is_one_half() -> None:
    student, teacher = logits(4, 9, seed=1), logits(4, 9, seed=2)
    torch.testing.assert_close(adaptive_kl(student, teacher), adaptive_kl(student, teacher, mu=0.5), rtol=0, atol=0)


# Laws --------------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_inputs_give_exactly_zero_and_no_gradient(ours: Divergence, of_row, dtype: torch.dtype) -> None:
    same = logits(3, 50, scale=5.0, dtype=dtype)
    assert (ours(same, same.clone()) == 0).all()
    (gradient,) = gradients(lambda student: ours(student, same), same)
    if ours is not total_variation:  # which has a kink there
        assert gradient.abs().max() < (1e-15 if dtype == torch.float64 else 1e-6)


@pytest.mark.slow
@given(coefficient=st.floats(0, 1), dtype=st.sampled_from([torch.float32, torch.float64]), seed=st.integers(0, 99))
def test_equal_inputs_give_exactly_zero_at_any_coefficient(coefficient: float, dtype: torch.dtype, seed: int) -> None:
    same = logits(2, 20, seed=seed, dtype=dtype)
    assert (jensen_shannon(same, same, beta=coefficient) == 0).all()
    assert (skew_forward_kl(same, same, alpha=coefficient) == 0).all()
    assert (skew_reverse_kl(same, same, alpha=coefficient) == 0).all()
    assert (adaptive_kl(same, same, mu=coefficient) == 0).all()


@every_case
@pytest.mark.parametrize("scale", [1e-4, 1.0, 8.0])
def test_values_are_not_negative_and_positive_where_the_models_differ(ours: Divergence, of_row, scale: float) -> None:
    student, teacher = logits(64, 30, seed=1, scale=scale), logits(64, 30, seed=2, scale=scale)
    values = ours(student, teacher)
    vanishes = isinstance(ours, partial) and ours.keywords.get("alpha") == 1
    assert (values == 0).all() if vanishes else (values > 0).all()
    assert (ours(student.float(), teacher.float()) >= -1e-6).all()


def test_the_ends_of_each_coefficient() -> None:
    student, teacher = logits(4, 9, seed=1), logits(4, 9, seed=2)
    forward, reverse = forward_kl(student, teacher), reverse_kl(student, teacher)
    exact = partial(torch.testing.assert_close, rtol=1e-14, atol=1e-15)
    exact(jensen_shannon(student, teacher, beta=0), forward)
    exact(jensen_shannon(student, teacher, beta=1), reverse)
    exact(skew_forward_kl(student, teacher, alpha=0), forward)
    exact(skew_reverse_kl(student, teacher, alpha=0), reverse)
    exact(skew_forward_kl(student, teacher, alpha=1), torch.zeros_like(forward))
    exact(skew_reverse_kl(student, teacher, alpha=1), torch.zeros_like(forward))
    exact(adaptive_kl(student, teacher, mu=0), reverse)
    exact(adaptive_kl(student, teacher, mu=1), forward)


def test_the_limits_of_each_coefficient() -> None:
    student, teacher = logits(4, 9, seed=1), logits(4, 9, seed=2)
    forward, reverse = forward_kl(student, teacher), reverse_kl(student, teacher)
    near = partial(torch.testing.assert_close, rtol=1e-3, atol=0)
    small = 1e-6
    near(jensen_shannon(student, teacher, beta=small) / small, forward)
    near(jensen_shannon(student, teacher, beta=1 - small) / small, reverse)
    near(skew_forward_kl(student, teacher, alpha=small), forward)
    near(skew_reverse_kl(student, teacher, alpha=small), reverse)
    assert skew_forward_kl(student, teacher, alpha=1 - small).max() < 1e-10  # shrinks with the square
    assert skew_reverse_kl(student, teacher, alpha=1 - small).max() < 1e-10


def test_exchanging_the_models() -> None:
    a, b = logits(4, 9, seed=1), logits(4, 9, seed=2)
    exact = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-14)
    exact(forward_kl(a, b), reverse_kl(b, a))
    exact(skew_forward_kl(a, b, alpha=0.3), skew_reverse_kl(b, a, alpha=0.3))
    exact(jensen_shannon(a, b, beta=0.3), jensen_shannon(b, a, beta=0.7))
    exact(total_variation(a, b), total_variation(b, a))


def test_bounds() -> None:
    student, teacher = logits(200, 12, seed=1, scale=4), logits(200, 12, seed=2, scale=4)
    forward, reverse = forward_kl(student, teacher), reverse_kl(student, teacher)
    distance = total_variation(student, teacher)
    assert (distance <= torch.minimum((forward / 2).sqrt(), (reverse / 2).sqrt())).all()  # Pinsker
    assert (jensen_shannon(student, teacher, beta=0.3) <= -0.3 * math.log(0.3) - 0.7 * math.log(0.7)).all()
    assert (skew_forward_kl(student, teacher, alpha=0.2) <= -math.log(0.2)).all()
    assert (skew_reverse_kl(student, teacher, alpha=0.2) <= -math.log(0.2)).all()
    adaptive = adaptive_kl(student, teacher)
    assert (adaptive >= torch.minimum(forward, reverse) - 1e-12).all()
    assert (adaptive <= torch.maximum(forward, reverse) + 1e-12).all()


# Padding -----------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("padded", ["teacher", "student", "both"])
def test_padded_columns_change_nothing(ours: Divergence, of_row, padded: str) -> None:
    student, teacher = logits(3, 8, seed=1), logits(3, 8, seed=2)
    wide_student, wide_teacher = logits(3, 12, seed=3), logits(3, 12, seed=4)
    wide_student[:, :8], wide_teacher[:, :8] = student, teacher
    if padded != "teacher":
        wide_student[:, 8:] = -INF
    if padded != "student":
        wide_teacher[:, 8:] = -INF
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-14)
    close(ours(wide_student, wide_teacher), ours(student, teacher))
    close(ours(wide_student, wide_teacher), loop(of_row, wide_student, wide_teacher))
    narrow = gradients(ours, student, teacher)
    for wide, expected in zip(gradients(ours, wide_student, wide_teacher), narrow, strict=True):
        close(wide[:, :8], expected)
        assert (wide[:, 8:] == 0).all()


@every_case
def test_padded_positions_change_nothing(ours: Divergence, of_row) -> None:
    student, teacher = logits(2, 6, 9, seed=1), logits(2, 6, 9, seed=2)
    longer_student = torch.cat([student, torch.zeros(2, 3, 9, dtype=torch.float64)], 1)
    longer_teacher = torch.cat([teacher, torch.full((2, 3, 9), 80.0, dtype=torch.float64)], 1)
    longer_teacher[0, -1, 1:] = -INF  # a column missing at one position is missing there alone
    torch.testing.assert_close(ours(longer_student, longer_teacher)[:, :6], ours(student, teacher), rtol=0, atol=0)


# Precision and gradients -------------------------------------------------------------------------------------------


def reaches_its_end_by_rounding(ours: Divergence) -> bool:
    """μ = 1 asks for a sum of exactly 1, which rounding gives before the whole tail is in."""
    return isinstance(ours, partial) and ours.keywords.get("mu") == 1


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extreme_logits_stay_finite_and_right(ours: Divergence, of_row, dtype: torch.dtype) -> None:
    if reaches_its_end_by_rounding(ours):
        return
    student, teacher = extreme_logits(dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(
        ours(student, teacher).double(), loop(of_row, student, teacher), rtol=tolerance, atol=tolerance
    )
    for gradient in gradients(ours, student, teacher):
        assert gradient.isfinite().all()


@every_case
def test_float32_is_within_1e_5_of_float64(ours: Divergence, of_row) -> None:
    if reaches_its_end_by_rounding(ours):
        return
    student, teacher = logits(32, 500, seed=1, scale=4), logits(32, 500, seed=2, scale=4)
    exact_student, exact_teacher = student.float().double(), teacher.float().double()
    values = ours(student.float(), teacher.float())
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), ours(exact_student, exact_teacher), rtol=1e-5, atol=1e-5)
    for single, double in zip(
        gradients(ours, student.float(), teacher.float()), gradients(ours, exact_student, exact_teacher), strict=True
    ):
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [1e-3, 1e-5, 1e-7, 1e-9])
def test_float32_holds_at_small_coefficients_and_distant_models(share: float) -> None:
    student, teacher = extreme_logits(torch.float32)
    for ours, of_row in (
        (partial(skew_forward_kl, alpha=share), lambda q, p: loop_kl(p, loop_mixture(p, q, share))),
        (partial(skew_reverse_kl, alpha=share), lambda q, p: loop_kl(q, loop_mixture(q, p, share))),
        (partial(jensen_shannon, beta=share), partial(loop_jensen_shannon, beta=share)),
    ):
        torch.testing.assert_close(
            ours(student, teacher).double(), loop(of_row, student, teacher), rtol=1e-5, atol=1e-6
        )
        for gradient in gradients(ours, student, teacher):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("gap", [5.0, 30.0, 110.0])
def test_a_share_of_each_position_may_be_nothing_or_all(gap: float) -> None:
    student, teacher = torch.tensor([[0.0, 0.0, -gap]]), torch.tensor([[0.0, -gap, 0.0]])
    shares = torch.tensor([0.0, 1.0])
    for ours in (skew_forward_kl, skew_reverse_kl):
        both = partial(ours, alpha=shares)
        values = both(student.repeat(2, 1), teacher.repeat(2, 1))
        expected = ours(student.double(), teacher.double(), alpha=0.0)
        torch.testing.assert_close(values.double(), torch.cat([expected, torch.zeros(1).double()]), rtol=1e-6, atol=0)
        for gradient, exact in zip(
            gradients(both, student.repeat(2, 1), teacher.repeat(2, 1)),
            gradients(partial(ours, alpha=0.0), student.double(), teacher.double()),
            strict=True,
        ):
            torch.testing.assert_close(gradient[:1].double(), exact, rtol=1e-5, atol=1e-6)
            assert gradient[1].abs().max() < 1e-6


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(ours: Divergence, of_row, dtype: torch.dtype) -> None:
    student, teacher = logits(4, 40, seed=1, dtype=dtype), logits(4, 40, seed=2, dtype=dtype)
    values = ours(student, teacher)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, ours(student.float(), teacher.float()), rtol=0, atol=0)


@every_case
def test_gradients_equal_finite_differences(ours: Divergence, of_row) -> None:
    student, teacher = logits(2, 6, seed=1).requires_grad_(), logits(2, 6, seed=2).requires_grad_()
    target: Divergence = ours
    if isinstance(of_row, partial) and of_row.func is loop_adaptive_kl:  # its weight is a constant for the gradient
        mu = of_row.keywords["mu"]
        weight = loop(partial(loop_adaptive_weight, mu=mu), student.detach(), teacher.detach())

        def target(student: Tensor, teacher: Tensor) -> Tensor:
            return weight * forward_kl(student, teacher) + (1 - weight) * reverse_kl(student, teacher)

        for ours_gradient, expected in zip(
            gradients(ours, student, teacher), gradients(target, student, teacher), strict=True
        ):
            torch.testing.assert_close(ours_gradient, expected, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(target, (student, teacher))


def test_gradients_by_hand() -> None:
    student, teacher = logits(3, 7, seed=1), logits(3, 7, seed=2)
    q, p = student.softmax(-1), teacher.softmax(-1)
    torch.testing.assert_close(gradients(forward_kl, student, teacher)[0], q - p)
    ratio = q.log() - p.log()
    expected = q * (ratio - (q * ratio).sum(-1, keepdim=True))
    torch.testing.assert_close(gradients(reverse_kl, student, teacher)[0], expected)


# Against TRL -------------------------------------------------------------------------------------------------------

betas = pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])


@betas
@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
def test_jensen_shannon_equals_that_of_trl_gkd(beta: float) -> None:
    from trl.experimental.gkd import GKDTrainer

    student, teacher = logits(2, 5, 40, seed=1), logits(2, 5, 40, seed=2)
    ours = partial(jensen_shannon, beta=beta)

    def theirs(student: Tensor, teacher: Tensor) -> Tensor:
        return GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, reduction="none").sum(-1)

    torch.testing.assert_close(ours(student, teacher), theirs(student, teacher), rtol=1e-12, atol=1e-13)
    for mine, other in zip(gradients(ours, student, teacher), gradients(theirs, student, teacher), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


@betas
def test_jensen_shannon_equals_that_of_trl_distillation_trainer(beta: float) -> None:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student, teacher = logits(10, 40, seed=1, dtype=torch.float32), logits(10, 40, seed=2, dtype=torch.float32)
    head = torch.eye(40)  # so that hidden states are logits

    def theirs(student: Tensor) -> Tensor:
        return ChunkedDivergenceFunction.apply(student, head, None, teacher, head, None, beta)[0]

    torch.testing.assert_close(jensen_shannon(student, teacher, beta=beta), theirs(student), rtol=1e-5, atol=1e-6)
    (mine,) = gradients(lambda student: jensen_shannon(student, teacher, beta=beta), student)
    torch.testing.assert_close(mine, gradients(theirs, student)[0], rtol=1e-5, atol=1e-6)


# Refusals ----------------------------------------------------------------------------------------------------------


@every_case
def test_logits_of_different_shapes_are_refused(ours: Divergence, of_row) -> None:
    with pytest.raises(ValueError, match=r"\(2, 9\), \(2, 12\)"):
        ours(logits(2, 9), logits(2, 12))
    with pytest.raises(ValueError, match=r"\(1, 9\)"):  # which torch would broadcast
        ours(logits(2, 9), logits(1, 9))


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
@pytest.mark.parametrize(
    ("f", "name"),
    [(jensen_shannon, "beta"), (skew_forward_kl, "alpha"), (skew_reverse_kl, "alpha"), (adaptive_kl, "mu")],
)
def test_coefficients_outside_the_unit_interval_are_refused(f, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"`{name}`.*{value}"):
        f(logits(2, 9), logits(2, 9), **{name: value})


# The prompt loss ---------------------------------------------------------------------------------------------------

directions = pytest.mark.parametrize("student_direction", ["reverse", "forward"])
plain_directions = pytest.mark.parametrize("plain_direction", ["reverse", "forward"])


@directions
@plain_directions
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 2.0])
def test_prompt_loss_equals_the_double_loop(student_direction, plain_direction, weight: float) -> None:
    prompted, student, plain = (logits(2, 3, 9, seed=seed) for seed in (1, 2, 3))
    ours = prompt_loss(
        prompted,
        student,
        plain,
        weight=weight,
        student_direction=student_direction,
        plain_direction=plain_direction,
    )

    def term(other: Tensor, direction: str) -> Tensor:
        kl = loop_kl if direction == "reverse" else (lambda learner, target: loop_kl(target, learner))
        return loop(kl, prompted, other)

    expected = term(student, student_direction) + weight * term(plain, plain_direction)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)


def test_prompt_loss_by_hand() -> None:
    prompted, student, plain = log(0.5, 0.5), log(0.25, 0.75), log(0.75, 0.25)
    half = 0.5 * math.log(4 / 3)  # KL((1/2, 1/2) || (1/4, 3/4)), and of its mirror image
    assert prompt_loss(prompted, student, plain, weight=0.4).item() == pytest.approx(1.4 * half)
    turned = 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
    flipped = prompt_loss(prompted, student, plain, weight=0.4, student_direction="forward")
    assert flipped.item() == pytest.approx(turned + 0.4 * half)
    flipped = prompt_loss(prompted, student, plain, weight=0.4, plain_direction="forward")
    assert flipped.item() == pytest.approx(half + 0.4 * turned)


@directions
@plain_directions
def test_prompt_loss_moves_the_prompted_teacher_alone(student_direction, plain_direction) -> None:
    prompted, student, plain = (logits(2, 9, seed=seed).requires_grad_() for seed in (1, 2, 3))
    f = partial(prompt_loss, weight=0.7, student_direction=student_direction, plain_direction=plain_direction)
    f(prompted, student, plain).sum().backward()
    assert prompted.grad is not None
    assert student.grad is None
    assert plain.grad is None
    fixed = student.detach(), plain.detach()
    assert torch.autograd.gradcheck(lambda prompted: f(prompted, *fixed), (prompted,))


def test_prompt_gradient_by_hand() -> None:
    prompted, student, plain = (logits(2, 9, seed=seed) for seed in (1, 2, 3))
    weight = 0.7
    p = prompted.softmax(-1)
    g = (1 + weight) * p.log() - student.log_softmax(-1) - weight * plain.log_softmax(-1)
    expected = p * (g - (p * g).sum(-1, keepdim=True))
    (gradient,) = gradients(lambda prompted: prompt_loss(prompted, student, plain, weight=weight), prompted)
    torch.testing.assert_close(gradient, expected)


@directions
@plain_directions
def test_prompt_loss_laws(student_direction, plain_direction) -> None:
    f = partial(prompt_loss, student_direction=student_direction, plain_direction=plain_direction)
    prompted, student, plain = (logits(40, 9, seed=seed) for seed in (1, 2, 3))
    assert (f(prompted, prompted.clone(), prompted.clone(), weight=1.0) == 0).all()
    assert (f(prompted, student, plain, weight=1.0) > 0).all()
    without = f(prompted, student, None, weight=0)
    torch.testing.assert_close(f(prompted, student, plain, weight=0), without, rtol=0, atol=0)
    single = f(prompted.float(), student.float(), plain.float(), weight=1.0)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), f(prompted, student, plain, weight=1.0), rtol=1e-5, atol=1e-5)


@directions
@plain_directions
@pytest.mark.parametrize("student_is_padded", [True, False])
def test_prompt_loss_with_padded_heads(student_direction, plain_direction, student_is_padded: bool) -> None:
    f = partial(prompt_loss, weight=0.7, student_direction=student_direction, plain_direction=plain_direction)
    narrow = [logits(2, 9, seed=seed) for seed in (1, 2, 3)]
    wide = [torch.cat([each, torch.full((2, 4), -INF, dtype=torch.float64)], -1) for each in narrow]
    if not student_is_padded:
        wide[1][:, 9:] = 0.5
    torch.testing.assert_close(f(*wide), f(*narrow), rtol=1e-12, atol=1e-14)
    (gradient,) = gradients(lambda prompted: f(prompted, *wide[1:]), wide[0])
    (expected,) = gradients(lambda prompted: f(prompted, *narrow[1:]), narrow[0])
    torch.testing.assert_close(gradient[:, :9], expected, rtol=1e-12, atol=1e-14)
    assert (gradient[:, 9:] == 0).all()


@directions
@plain_directions
def test_prompt_loss_of_extreme_logits(student_direction, plain_direction) -> None:
    student, prompted = extreme_logits(torch.float32)
    f = partial(prompt_loss, weight=1.0, student_direction=student_direction, plain_direction=plain_direction)
    assert f(prompted, student, student.flip(0)).isfinite().all()
    (gradient,) = gradients(lambda prompted: f(prompted, student, student.flip(0)), prompted)
    assert gradient.isfinite().all()


def test_prompt_loss_refuses_what_it_cannot_do() -> None:
    prompted, student, plain = (logits(2, 9, seed=seed) for seed in (1, 2, 3))
    with pytest.raises(ValueError, match="direction"):
        prompt_loss(prompted, student, plain, weight=1.0, student_direction="backward")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="direction"):
        prompt_loss(prompted, student, plain, weight=1.0, plain_direction="backward")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shape"):
        prompt_loss(prompted, student, plain[:, :8], weight=1.0)
    with pytest.raises(ValueError, match="plain_logits"):
        prompt_loss(prompted, student, None, weight=0.5)  # the second term would be absent in silence


@pytest.mark.parametrize(
    ("step", "schedule", "expected"),
    [
        (0, "linear", 2.0),
        (1, "linear", 1.5),
        (3, "linear", 0.5),  # the last step: c / K, not 0
        (0, "constant", 2.0),
        (3, "constant", 2.0),
        (0, "none", 0.0),
        (3, "none", 0.0),
    ],
)
def test_regularizer_weight(step: int, schedule, expected: float) -> None:
    assert regularizer_weight(step, 4, coefficient=2.0, schedule=schedule) == expected


def test_regularizer_weight_defaults_and_refusals() -> None:
    assert [regularizer_weight(k, 5) for k in range(5)] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    for step, total in ((5, 5), (-1, 5), (0, 0)):
        with pytest.raises(ValueError, match="step"):
            regularizer_weight(step, total)
    with pytest.raises(ValueError, match="schedule"):
        regularizer_weight(0, 5, schedule="cosine")  # type: ignore[arg-type]
