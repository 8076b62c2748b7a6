"""What every objective per token must hold, whatever it is: `OBJECTIVE_LAWS`, to be run on an `ObjectiveCase`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from helpers.loops import Objective, OfRow, extreme_logits, gradients, logits, loop

close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-13)


@dataclass(frozen=True)
class ObjectiveCase:
    """An objective and its reference.

    `constant` is None where all of it has a gradient; else it makes, of the logits, the objective whose parts without
    a gradient are numbers.
    """

    ours: Objective
    of_row: OfRow  # of probabilities q, p
    constant: Callable[[Tensor, Tensor], Objective] | None = None
    vanishes: bool = True  # for equal inputs
    extremes: bool = True  # whether its value is bounded enough for logits of ±1e4


def values_equal_the_double_loop(case: ObjectiveCase) -> None:
    student, teacher = logits(2, 5, 11, seed=1), logits(2, 5, 11, seed=2)
    values = case.ours(student, teacher)
    assert values.shape == (2, 5)
    assert values.dtype == torch.float64
    close(values, loop(case.of_row, student, teacher))
    close(case.ours(student + 7, teacher - 3), values)  # logits, not log-probabilities


def equal_inputs_give_exactly_zero_and_no_gradient(case: ObjectiveCase) -> None:
    if not case.vanishes:
        return
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        same = logits(3, 50, scale=5.0, dtype=dtype)
        assert (case.ours(same, same.clone()) == 0).all()
        (gradient,) = gradients(lambda student, same=same: case.ours(student, same), same)
        assert gradient.abs().max() < (1e-14 if dtype == torch.float64 else 1e-6)


def values_are_not_negative(case: ObjectiveCase) -> None:
    for scale in (1e-4, 1.0, 8.0):
        student, teacher = logits(64, 30, seed=1, scale=scale), logits(64, 30, seed=2, scale=scale)
        assert (case.ours(student, teacher) >= 0).all()
        assert (case.ours(student.float(), teacher.float()) >= -1e-5).all()


def padded_columns_change_nothing(case: ObjectiveCase) -> None:
    student, teacher = logits(3, 8, seed=1), logits(3, 8, seed=2)
    narrow = gradients(case.ours, student, teacher)
    for padded in ("teacher", "student", "both"):
        wide_student, wide_teacher = logits(3, 12, seed=3), logits(3, 12, seed=4)
        wide_student[:, :8], wide_teacher[:, :8] = student, teacher
        if padded != "teacher":
            wide_student[:, 8:] = -math.inf
        if padded != "student":
            wide_teacher[:, 8:] = -math.inf
        close(case.ours(wide_student, wide_teacher), case.ours(student, teacher))
        close(case.ours(wide_student, wide_teacher), loop(case.of_row, wide_student, wide_teacher))
        for wide, expected in zip(gradients(case.ours, wide_student, wide_teacher), narrow, strict=True):
            close(wide[:, :8], expected)
            assert (wide[:, 8:] == 0).all()


def padded_positions_change_nothing(case: ObjectiveCase) -> None:
    student, teacher = logits(2, 6, 9, seed=1), logits(2, 6, 9, seed=2)
    longer_student = torch.cat([student, torch.zeros(2, 3, 9, dtype=torch.float64)], 1)
    longer_teacher = torch.cat([teacher, torch.full((2, 3, 9), 8.0, dtype=torch.float64)], 1)
    longer_teacher[0, -1, 1:] = -math.inf  # a column missing at one position is missing there alone
    assert torch.equal(case.ours(longer_student, longer_teacher)[:, :6], case.ours(student, teacher))


def extreme_logits_stay_finite_and_right(case: ObjectiveCase) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        student, teacher = extreme_logits(dtype)
        values = case.ours(student, teacher).double()
        torch.testing.assert_close(values, loop(case.of_row, student, teacher), rtol=tolerance, atol=tolerance)
        if case.extremes:
            student, teacher = extreme_logits(dtype, 1e4)
            assert case.ours(student, teacher).isfinite().all()
        for gradient in gradients(case.ours, student, teacher):
            assert gradient.isfinite().all()


def float32_is_near_float64(case: ObjectiveCase) -> None:
    student, teacher = logits(32, 500, seed=1, scale=4), logits(32, 500, seed=2, scale=4)
    exact_student, exact_teacher = student.float().double(), teacher.float().double()
    values = case.ours(student.float(), teacher.float())
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), case.ours(exact_student, exact_teacher), rtol=1e-5, atol=1e-5)
    single = gradients(case.ours, student.float(), teacher.float())
    for mine, exact in zip(single, gradients(case.ours, exact_student, exact_teacher), strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-3, atol=1e-5)


def half_precision_is_computed_in_float32(case: ObjectiveCase) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        student, teacher = logits(4, 40, seed=1, dtype=dtype), logits(4, 40, seed=2, dtype=dtype)
        values = case.ours(student, teacher)
        assert values.dtype == torch.float32
        assert torch.equal(values, case.ours(student.float(), teacher.float()))


def gradients_equal_finite_differences(case: ObjectiveCase) -> None:
    student, teacher = logits(2, 6, seed=1).requires_grad_(), logits(2, 6, seed=2).requires_grad_()
    plain = case.ours
    if case.constant is not None:
        plain = case.constant(student.detach().clone(), teacher.detach().clone())  # gradcheck moves them in place
        close(plain(student, teacher), case.ours(student, teacher))
        for ours, expected in zip(
            gradients(case.ours, student, teacher), gradients(plain, student, teacher), strict=True
        ):
            close(ours, expected)
    assert torch.autograd.gradcheck(plain, (student, teacher))


def other_shapes_are_refused(case: ObjectiveCase) -> None:
    with pytest.raises(ValueError, match=r"\(2, 9\), \(2, 12\)"):
        case.ours(logits(2, 9), logits(2, 12))
    with pytest.raises(ValueError, match=r"\(1, 9\)"):  # which torch would broadcast
        case.ours(logits(2, 9), logits(1, 9))


OBJECTIVE_LAWS = [
    values_equal_the_double_loop,
    equal_inputs_give_exactly_zero_and_no_gradient,
    values_are_not_negative,
    padded_columns_change_nothing,
    padded_positions_change_nothing,
    extreme_logits_stay_finite_and_right,
    float32_is_near_float64,
    half_precision_is_computed_in_float32,
    gradients_equal_finite_differences,
    other_shapes_are_refused,
]
every_law = pytest.mark.parametrize("law", OBJECTIVE_LAWS, ids=lambda law: law.__name__)
