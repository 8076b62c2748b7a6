"""Forward KL with its tokens' contributions cut off: the laws of every objective, numbers by hand, ends."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.loops import Row, gradients, logits
from helpers.objective_laws import OBJECTIVE_LAWS, ObjectiveCase, values_are_not_negative
from promptkd.objectives import clipped_forward_kl, forward_kl


def loop_clipped(q: Row, p: Row, clip: float) -> float:
    return sum(min(p[v] * (math.log(p[v]) - math.log(q[v])), clip) for v in range(len(q)) if p[v] > 0)


CASES = {
    clip: ObjectiveCase(partial(clipped_forward_kl, clip=clip), partial(loop_clipped, clip=clip))
    for clip in (0.05, 0.3, math.inf)
}


@pytest.mark.parametrize("law", [law for law in OBJECTIVE_LAWS if law is not values_are_not_negative])
@pytest.mark.parametrize("clip", CASES)
def test_laws(clip: float, law: Callable[[ObjectiveCase], None]) -> None:
    law(CASES[clip])


def test_numbers_by_hand():
    student, teacher = torch.tensor([0.2, 0.3, 0.5]).log(), torch.tensor([0.5, 0.3, 0.2]).log()
    terms = [0.5 * math.log(2.5), 0.0, 0.2 * math.log(0.4)]  # 0.458, 0, -0.183
    for clip, first in ((1.0, terms[0]), (0.05, 0.05)):
        value = float(clipped_forward_kl(student, teacher, clip=clip))
        assert value == pytest.approx(first + terms[2], rel=1e-5)
    assert float(clipped_forward_kl(student, teacher, clip=0.05)) < 0


def test_without_a_bound_it_is_the_forward_kl():
    student, teacher = logits(4, 30, seed=1, scale=3.0), logits(4, 30, seed=2, scale=3.0)
    for clip in (math.inf, 100.0):
        ours = partial(clipped_forward_kl, clip=clip)
        torch.testing.assert_close(ours(student, teacher), forward_kl(student, teacher), rtol=1e-12, atol=1e-13)
        for mine, plain in zip(gradients(ours, student, teacher), gradients(forward_kl, student, teacher), strict=True):
            torch.testing.assert_close(mine, plain, rtol=1e-10, atol=1e-12)


@given(st.integers(0, 10_000), st.floats(1e-3, 2.0), st.floats(1.0, 5.0))
def test_it_rises_with_the_bound_up_to_the_forward_kl(seed, clip, factor):
    student, teacher = logits(3, 12, seed=seed, scale=3.0), logits(3, 12, seed=seed + 1, scale=3.0)
    low, high = (clipped_forward_kl(student, teacher, clip=each) for each in (clip, clip * factor))
    assert (low <= high + 1e-12).all()
    assert (high <= forward_kl(student, teacher) + 1e-12).all()


def test_a_bound_that_is_not_above_zero_is_refused():
    for clip in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="`clip` must be above 0"):
            clipped_forward_kl(logits(2, 3), logits(2, 3), clip=clip)
