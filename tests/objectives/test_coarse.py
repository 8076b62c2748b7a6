"""Objectives on K + 1 outcomes: a float64 double loop, numbers by hand, laws and ends, absent tokens, extremes."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from promptkd.errors import RequestError
from promptkd.objectives import (
    adaptive_kl,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)
from promptkd.objectives.coarse import check_coarse, coarse_kernel, coarse_log_probs

TAKEN = [
    forward_kl,
    adaptive_kl,
    total_variation,
    partial(skew_forward_kl, alpha=0.1),
    partial(jensen_shannon, beta=0.5),
    partial(adaptive_kl, mu=0.3),
]
every_taken = pytest.mark.parametrize("objective", TAKEN)
INF = math.inf


def drawn(tokens=5, size=11, *, seed=0, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return tuple(scale * torch.randn(tokens, size, generator=generator, dtype=torch.float64).to(dtype) for _ in "qp")


def kept(teacher, count):
    """The teacher's top `count` tokens, most probable first, and its K + 1 log-probabilities."""
    ids = teacher.argsort(-1, descending=True)[:, :count]
    return ids, coarse_log_probs(teacher, ids)


def loop_coarse(logits, ids):
    """Probabilities of the kept tokens and the others' sum, in Python floats."""
    coarse = []
    for row, chosen in zip(logits.tolist(), ids.tolist(), strict=True):
        weights = [math.exp(z - max(row)) for z in row]
        p = [weight / math.fsum(weights) for weight in weights]
        others = math.fsum(p[v] for v in range(len(p)) if v not in chosen)
        coarse.append([*(p[v] for v in chosen), others])
    return coarse


def loop_kl(a, b):
    return math.fsum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)


def loop_value(objective, q, p):
    name, settings = objective, {}
    if isinstance(objective, partial):
        name, settings = objective.func, objective.keywords
    if name is forward_kl:
        return loop_kl(p, q)
    if name is total_variation:
        return 0.5 * math.fsum(abs(x - y) for x, y in zip(p, q, strict=True))
    if name is skew_forward_kl:
        alpha = settings["alpha"]
        return loop_kl(p, [alpha * x + (1 - alpha) * y for x, y in zip(p, q, strict=True)])
    if name is jensen_shannon:
        beta = settings["beta"]
        m = [beta * x + (1 - beta) * y for x, y in zip(p, q, strict=True)]
        return beta * loop_kl(p, m) + (1 - beta) * loop_kl(q, m)
    mass, gaps = 0.0, [0.0, 0.0]  # of the head and of the tail
    for x, y in sorted(zip(p, q, strict=True), reverse=True):
        gaps[mass >= settings.get("mu", 0.5)] += abs(x - y)
        mass += x
    weight = gaps[0] / sum(gaps)
    return weight * loop_kl(p, q) + (1 - weight) * loop_kl(q, p)


@every_taken
@pytest.mark.parametrize("count", [1, 4, 10, 11])
def test_values_and_gradients_equal_a_float64_loop_and_autograd(objective, count):
    student, teacher = drawn()
    ids, target = kept(teacher, count)
    p = loop_coarse(teacher, ids)
    assert target.exp().tolist() == [pytest.approx(row, abs=1e-12) for row in p]
    expected = [loop_value(objective, q, each) for q, each in zip(loop_coarse(student, ids), p, strict=True)]
    variable = student.clone().requires_grad_()
    plain = objective(coarse_log_probs(variable, ids), target)
    assert plain.tolist() == pytest.approx(expected, abs=1e-12)
    plain.sum().backward()
    logits = student.clone()
    values, metrics = coarse_kernel(objective)(logits, ids, target)
    assert values.tolist() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(logits, variable.grad)
    log_q = student.log_softmax(-1)
    torch.testing.assert_close(metrics["entropy"], -(log_q.exp() * log_q).sum(-1))
    assert torch.equal(metrics["top_overlap"], (student.argmax(-1) == teacher.argmax(-1)).float())


def test_numbers_by_hand():
    p, q = torch.tensor([[0.5, 0.3, 0.1, 0.1]]).log(), torch.tensor([[0.25, 0.15, 0.4, 0.2]]).log()
    ids, target = kept(p, 1)
    assert target.exp().tolist() == [pytest.approx([0.5, 0.5])]
    value = coarse_kernel(forward_kl)(q.clone(), ids, target)[0]
    assert value.item() == pytest.approx(0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75), abs=1e-6)
    logits = q.clone()
    coarse_kernel(forward_kl)(logits, ids, target)  # q_0 - P_0, and q_j (1 - P_r / q_r)
    assert logits.tolist() == [pytest.approx([-0.25, 0.15 / 3, 0.4 / 3, 0.2 / 3], abs=1e-6)]


@every_taken
def test_all_tokens_kept_is_the_objective_itself(objective):
    student, teacher = drawn()
    ids, target = kept(teacher, 11)
    assert target[:, -1].tolist() == [-INF] * 5
    variable = student.clone().requires_grad_()
    full = objective(variable, teacher)
    full.sum().backward()
    logits = student.clone()
    values, _ = coarse_kernel(objective)(logits, ids, target)
    torch.testing.assert_close(values, full.detach())
    torch.testing.assert_close(logits, variable.grad)


@pytest.mark.slow
@given(st.integers(0, 10_000), st.integers(1, 8), st.floats(0.1, 6))
def test_coarse_kl_is_a_lower_bound_that_grows_with_k(seed, count, scale):
    student, teacher = drawn(3, 9, seed=seed, scale=scale)
    values = [coarse_kernel(forward_kl)(student.clone(), *kept(teacher, k))[0] for k in (count, count + 1)]
    assert (values[0] >= -1e-12).all()
    assert (values[1] >= values[0] - 1e-12).all()
    assert (forward_kl(student, teacher) >= values[1] - 1e-12).all()


def test_the_kept_tokens_bound_what_is_lost():
    student, teacher = drawn(64, 30)
    ids, target = kept(teacher, 5)
    rest = target[:, -1].exp()
    within = [each.scatter(-1, ids, -INF).log_softmax(-1) for each in (student, teacher)]
    lost = rest * torch.where(within[1] == -INF, 0.0, within[1].exp() * (within[1] - within[0])).sum(-1)
    coarse = coarse_kernel(forward_kl)(student.clone(), ids, target)[0]
    torch.testing.assert_close(coarse + lost, forward_kl(student, teacher))


@every_taken
def test_equal_models_give_zero_and_no_gradient(objective):
    _, teacher = drawn()
    logits = teacher.clone()
    values, _ = coarse_kernel(objective)(logits, *kept(teacher, 4))
    assert values.abs().max() < 1e-12
    assert logits.abs().max() < 1e-9


@every_taken
def test_extremes_stay_finite(objective):
    one_hot = torch.full((1, 8), -1e4)
    one_hot[0, 3] = 1e4
    spread = torch.zeros(1, 8)
    for student, teacher in ((one_hot, spread), (spread, one_hot), (one_hot, one_hot), (-one_hot, one_hot)):
        logits = student.clone()
        values, _ = coarse_kernel(objective)(logits, *kept(teacher, 2))
        assert values.isfinite().all()
        assert logits.isfinite().all()


def test_a_tiny_rest_keeps_its_digits():
    logits = torch.tensor([[0.0, -40.0, -41.0]])
    rest = coarse_log_probs(logits, torch.tensor([[0]]))[0, 1]
    assert rest.item() == pytest.approx(math.log(math.exp(-40) + math.exp(-41)), rel=1e-6)


@every_taken
def test_a_token_that_the_student_lacks_is_left_out_of_both(objective):
    student, teacher = drawn(4, 7)
    ids, target = kept(teacher, 3)
    absent = student.scatter(-1, ids[:, 1:2], -INF)
    logits = absent.clone()
    values, _ = coarse_kernel(objective)(logits, ids, target)
    rest = [0, 2, 3]  # outcomes that both have
    expected = objective(coarse_log_probs(absent, ids)[:, rest], target[:, rest])
    torch.testing.assert_close(values, expected)
    assert logits.isfinite().all()


def test_gradients_pass_gradcheck_without_the_kernel():
    student, teacher = drawn(2, 6)
    for count in (2, 6):
        ids, target = kept(teacher, count)
        variable = student.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda z, i=ids, t=target: forward_kl(coarse_log_probs(z, i), t), variable)


def test_one_kept_token_that_is_certain_is_a_cross_entropy():
    student, _ = drawn(4, 6)
    ids = torch.tensor([[0], [3], [5], [1]])
    target = torch.tensor([[0.0, -1e4]], dtype=torch.float64).expand(4, 2)
    values, _ = coarse_kernel(forward_kl)(student.clone(), ids, target)
    torch.testing.assert_close(values, cross_entropy(student, ids[:, 0], reduction="none"))


@every_taken
def test_what_is_bounded_is_taken(objective):
    check_coarse(objective, is_whole=False)


@pytest.mark.parametrize(
    ("objective", "named"),
    [
        (reverse_kl, "reverse_kl"),
        (partial(skew_reverse_kl, alpha=0.1), "skew_reverse_kl"),
        (partial(jensen_shannon, beta=0.9), "jensen_shannon with beta 0.9"),
        (lambda student, teacher: student.sum(-1), "lambda"),
    ],
)
def test_what_would_lie_is_refused_unless_all_tokens_are_kept(objective, named):
    with pytest.raises(RequestError, match=named):
        check_coarse(objective, is_whole=False)
    check_coarse(objective, is_whole=True)
