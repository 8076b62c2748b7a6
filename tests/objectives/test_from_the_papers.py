"""The objectives of 2024-2026, values and gradients, against loops written from the papers alone (`paper_loops.py`)."""

import math

import pytest

from helpers import paper_loops as paper

STUDENT = [0.3, -1.2, 2.0, 0.1, -0.7]
TEACHER = [1.1, 0.4, -0.3, 0.9, -2.2]


@pytest.mark.parametrize(
    ("limit", "near"),
    [
        ((0.6, 0.0), (0.6, 1e-6)),
        ((0.0, 0.6), (1e-6, 0.6)),
        ((0.6, -0.6), (0.6, -0.6 + 1e-6)),
        ((0.0, 0.0), (1e-5, 1e-5)),
    ],
)
def test_the_loops_limits_are_limits_of_the_general_line(limit, near):
    at, beside = (paper.alpha_beta(STUDENT, TEACHER, alpha=a, beta=b) for a, b in (limit, near))
    assert math.isclose(at, beside, rel_tol=1e-3)


def test_pairs_of_tokens_have_twice_the_gradient_of_the_authors_code():
    given = paper.concrete_score_gradient(STUDENT, TEACHER)
    step = 1e-6
    for v in range(len(STUDENT)):
        up, down = (
            paper.concrete_score_pairs([*STUDENT[:v], STUDENT[v] + by, *STUDENT[v + 1 :]], TEACHER, STUDENT)
            for by in (step, -step)
        )
        assert math.isclose((up - down) / (2 * step), 2 * given[v], rel_tol=1e-6, abs_tol=1e-9)
