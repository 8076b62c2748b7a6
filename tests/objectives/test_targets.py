"""KL to a target made of both models (TAID, Veto): the laws of every objective, numbers by hand, ends, the gradient."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers.loops import Row, gradients, log, logits, loop, loop_kl
from helpers.objective_laws import ObjectiveCase, every_law
from promptkd.objectives import forward_kl, reverse_kl, taid, veto
from promptkd.objectives.targets import interpolated_logits, product_logits


def normalized(weights: Row) -> Row:
    return [each / math.fsum(weights) for each in weights]


def loop_taid(q: Row, p: Row, t: float) -> float:
    """The logits are log q and log p here: their constants cancel in the softmax."""
    return loop_kl(normalized([q[v] ** (1 - t) * p[v] ** t for v in range(len(q))]), q)


def loop_veto(q: Row, p: Row, beta: float, direction: str) -> float:
    target = normalized([p[v] * q[v] ** beta for v in range(len(q))])
    return loop_kl(target, q) if direction == "forward" else loop_kl(q, target)


def fixed_student(divergence: Callable[..., Tensor], target: Callable[..., Tensor], coefficient: float):
    return lambda student, _: lambda s, t: divergence(s, target(student, t, coefficient))


CASES = {
    f"taid {t}": ObjectiveCase(
        partial(taid, t=t), partial(loop_taid, t=t), fixed_student(forward_kl, interpolated_logits, t)
    )
    for t in (0.0, 0.4, 0.9, 1.0)
}
for beta in (0.0, 0.3, 0.8, 1.0):
    for direction, kl in (("forward", forward_kl), ("reverse", reverse_kl)):
        CASES[f"veto {beta} {direction}"] = ObjectiveCase(
            partial(veto, beta=beta, direction=direction),
            partial(loop_veto, beta=beta, direction=direction),
            fixed_student(kl, product_logits, beta),
            vanishes=beta == 0,
        )


@every_law
@pytest.mark.parametrize("name", CASES)
def test_laws(name: str, law: Callable[[ObjectiveCase], None]) -> None:
    law(CASES[name])


def test_taid_by_hand() -> None:
    # p = (1/2, 1/2), q = (1/5, 4/5): at t = 1/2 the target is sqrt(p q) = (1, 2) normalized
    values = taid(log(0.2, 0.8), log(0.5, 0.5), t=0.5)
    assert values.item() == pytest.approx(1 / 3 * math.log(5 / 3) + 2 / 3 * math.log(5 / 6), rel=1e-12)


def test_veto_by_hand() -> None:
    # p = (1/2, 1/2), q = (1/4, 3/4): at β = 1 the target is p q normalized, which is q
    assert veto(log(0.25, 0.75), log(0.5, 0.5), beta=1.0).item() == pytest.approx(0, abs=1e-15)
    # p = (3/4, 1/4), q = (1/2, 1/2): at any β the target is p
    for direction, expected in (
        ("forward", 0.75 * math.log(1.5) + 0.25 * math.log(0.5)),
        ("reverse", 0.5 * math.log(2 / 3) + 0.5 * math.log(2)),
    ):
        values = veto(log(0.5, 0.5), log(0.75, 0.25), beta=0.6, direction=direction)  # type: ignore[arg-type]
        assert values.item() == pytest.approx(expected, rel=1e-12)


def test_the_ends_are_the_plain_divergences_bit_for_bit() -> None:
    for dtype in (torch.float64, torch.float32):
        student, teacher = logits(4, 9, seed=1, dtype=dtype), logits(4, 9, seed=2, dtype=dtype)
        for ours, plain in (
            (partial(taid, t=1.0), forward_kl),
            (partial(veto, beta=0.0), forward_kl),
            (partial(veto, beta=0.0, direction="reverse"), reverse_kl),
        ):
            assert torch.equal(ours(student, teacher), plain(student, teacher))
            for mine, theirs in zip(gradients(ours, student, teacher), gradients(plain, student, teacher), strict=True):
                assert torch.equal(mine, theirs)
        assert (taid(student, teacher, t=0.0) == 0).all()
        assert (gradients(partial(taid, t=0.0), student, teacher)[0].abs() < 1e-6).all()


def test_a_student_that_is_the_sharpened_teacher_is_vetos_fixed_point() -> None:
    teacher = logits(4, 9, seed=1)
    student = teacher / (1 - 0.6)
    for direction in ("forward", "reverse"):
        ours = partial(veto, beta=0.6, direction=direction)  # type: ignore[arg-type]
        assert ours(student, teacher).abs().max() < 1e-12
        assert gradients(ours, student, teacher)[0].abs().max() < 1e-12


def test_gradients_by_hand() -> None:
    student, teacher = logits(3, 7, seed=1), logits(3, 7, seed=2)
    q, p = student.softmax(-1), teacher.softmax(-1)
    target = (0.3 * student + 0.7 * teacher).softmax(-1)
    torch.testing.assert_close(gradients(partial(taid, t=0.7), student, teacher)[0], q - target)
    target = (teacher + 0.7 * student).softmax(-1)
    torch.testing.assert_close(gradients(partial(veto, beta=0.7), student, teacher)[0], q - target)
    advantage = (1 - 0.7) * q.log() - p.log()  # the paper's theorem 3, up to a baseline
    expected = q * (advantage - (q * advantage).sum(-1, keepdim=True))
    reverse = partial(veto, beta=0.7, direction="reverse")
    torch.testing.assert_close(gradients(reverse, student, teacher)[0], expected)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_coefficients_outside_the_unit_interval_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=f"`t`.*{value}"):
        taid(logits(2, 9), logits(2, 9), t=value)
    with pytest.raises(ValueError, match=f"`beta`.*{value}"):
        veto(logits(2, 9), logits(2, 9), beta=value)
    with pytest.raises(ValueError, match="direction"):
        veto(logits(2, 9), logits(2, 9), beta=0.5, direction="backward")  # type: ignore[arg-type]


@pytest.mark.slow
@given(
    columns=st.integers(1, 12),
    seed=st.integers(0, 999),
    scale=st.sampled_from([1e-3, 1.0, 10.0]),
    coefficient=st.floats(0, 1),
)
def test_values_equal_the_double_loop_at_any_shape_and_coefficient(columns, seed, scale, coefficient) -> None:
    student, teacher = (logits(3, columns, seed=seed + k, scale=scale) for k in (0, 1000))
    cases = [(partial(taid, t=coefficient), partial(loop_taid, t=coefficient))]
    for direction in ("forward", "reverse"):
        settings = {"beta": coefficient, "direction": direction}
        cases.append((partial(veto, **settings), partial(loop_veto, **settings)))
    for ours, of_row in cases:
        values = ours(student, teacher)
        assert (values >= -1e-12).all()
        torch.testing.assert_close(values, loop(of_row, student, teacher), rtol=1e-9, atol=1e-11)
