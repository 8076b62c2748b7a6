"""Kernels of sampled tokens and of coefficients per token, and the skew KLs with one α per token."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.paper_loops import distillm2_student, distillm2_teacher
from promptkd.objectives import skew_forward_kl, skew_reverse_kl
from promptkd.objectives.kernels import PLAIN_KERNELS
from promptkd.objectives.response_kernels import on_policy_kernel, skew_kernel
from promptkd.objectives.sequence import on_policy_gradient

TOKENS, WORDS = 6, 11


def random(*shape, seed=0, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, dtype=torch.float64, generator=generator)).to(dtype)


def plain_on_policy(logits, labels, target):
    log_q, log_p = (each.log_softmax(-1).gather(-1, labels[:, None])[:, 0] for each in (logits, target))
    return on_policy_gradient(log_q, log_p)


def plain_skew(skew):
    def values(logits, target, alpha, weight):
        if skew == "forward":
            return weight * skew_forward_kl(logits, target, alpha=alpha)
        return weight * skew_reverse_kl(logits, target, alpha=alpha, constant_mixture=True)

    return values


def by_autograd(values, logits, *targets):
    variable = logits.clone().requires_grad_()
    found = values(variable, *targets)
    (gradient,) = torch.autograd.grad(found.sum(), variable)
    return found.detach(), gradient


def cases():
    labels = torch.tensor([0, 3, 3, 10, 7, 1])
    alpha = torch.tensor([0.01, 0.05, 0.1, 0.5, 0.99, 0.02], dtype=torch.float64)
    weight = torch.tensor([1.0, 0.2, 1.5, 0.0, 3.0, 0.7], dtype=torch.float64)
    on_policy = on_policy_kernel(PLAIN_KERNELS, absent_tokens=False)
    yield "on_policy", on_policy, plain_on_policy, lambda target: (labels, target)
    for skew in ("forward", "reverse"):
        kernel = skew_kernel(skew, absent_tokens=False)
        yield skew, kernel, plain_skew(skew), lambda target: (target, alpha, weight)


CASES = [pytest.param(*case, id=name) for name, *case in cases()]


@pytest.mark.parametrize(("kernel", "plain", "targets"), CASES)
def test_a_kernel_has_the_values_and_gradients_of_the_plain_function(kernel, plain, targets):
    logits, teacher = random(TOKENS, WORDS), random(TOKENS, WORDS, seed=1)
    expected, gradient = by_autograd(plain, logits, *targets(teacher))
    entropy, top = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1), logits.argmax(-1) == teacher.argmax(-1)
    given_targets = [each.clone() for each in targets(teacher)]
    values, metrics = kernel(logits, *given_targets)
    torch.testing.assert_close(values, expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(logits, gradient, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(metrics["entropy"], entropy)
    assert metrics["top_overlap"].tolist() == top.tolist()
    assert all(map(torch.equal, given_targets, targets(teacher)))  # the teacher's logits stay what they were


@pytest.mark.parametrize(("kernel", "plain", "targets"), CASES)
@pytest.mark.parametrize("scale", [1e4, 80.0, 0.0])
def test_extreme_logits_give_finite_values(kernel, plain, targets, scale):
    for student, teacher in ((1, -1), (1, 1), (0, 1), (1, 0)):
        one_hot = torch.eye(TOKENS, WORDS) * scale
        expected, gradient = by_autograd(plain, (student * one_hot).double(), *targets((teacher * one_hot).double()))
        logits = student * one_hot
        values, metrics = kernel(
            logits, *(each if each.dtype == torch.int64 else each.float() for each in targets(teacher * one_hot))
        )
        assert all(torch.isfinite(each).all() for each in (values, logits, *metrics.values()))
        torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            logits.double(), gradient, rtol=1e-5, atol=1e-5 * max(1.0, float(gradient.abs().max()))
        )


@pytest.mark.parametrize("skew", ["forward", "reverse"])
@pytest.mark.parametrize("gap", [1.0, 12.0, 18.0, 200.0])
def test_no_mixture_and_nothing_but_it_stay_exact_at_any_gap(skew, gap):
    """α = 0 is the plain KL, whose log-ratio log1p would lose; α = 1 is no divergence."""
    student, teacher = torch.tensor([[0.0, 0.0, -gap]]).repeat(2, 1), torch.tensor([[0.0, -gap, 0.0]]).repeat(2, 1)
    expected, gradient = by_autograd(
        lambda logits: (
            skew_forward_kl(logits, teacher.double(), alpha=0.0)
            if skew == "forward"
            else skew_reverse_kl(logits, teacher.double(), alpha=0.0, constant_mixture=True)
        ),
        student.double(),
    )
    logits, alpha = student.clone(), torch.tensor([0.0, 1.0])
    values, _ = skew_kernel(skew, absent_tokens=False)(logits, teacher, alpha, torch.ones(2))
    torch.testing.assert_close(values[0].double(), expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(logits[0].double(), gradient[0], rtol=1e-5, atol=1e-6)
    assert values[1] == 0
    assert logits[1].abs().max() == 0


@pytest.mark.parametrize("skew", ["forward", "reverse"])
def test_equal_models_give_exactly_zero(skew):
    logits, alpha = random(TOKENS, WORDS, dtype=torch.float32), torch.full((TOKENS,), 0.07)
    values, _ = skew_kernel(skew, absent_tokens=False)(logits, logits.clone(), alpha, torch.ones(TOKENS))
    assert values.abs().max() == 0
    assert float(logits.abs().max()) < 1e-6  # of float32


@pytest.mark.parametrize(
    ("kind", "plain"), [("on_policy", None), *((s, plain_skew(s)) for s in ("forward", "reverse"))]
)
def test_tokens_that_one_model_does_not_have_are_as_if_sliced_off(kind, plain):
    logits, teacher = random(TOKENS, WORDS), random(TOKENS, WORDS, seed=1)
    kept = [v for v in range(WORDS) if v not in (2, 5)]
    wide, wide_teacher = logits.clone(), teacher.clone()
    wide[:, 2] = wide_teacher[:, 5] = -math.inf
    labels = torch.tensor([0, 3, 3, 10, 7, 1])
    if kind == "on_policy":
        narrow = torch.tensor([kept.index(int(label)) for label in labels])
        expected, gradient = by_autograd(plain_on_policy, logits[:, kept], narrow, teacher[:, kept])
        values, metrics = on_policy_kernel(PLAIN_KERNELS, absent_tokens=True)(wide, labels, wide_teacher)
    else:
        others = torch.full((TOKENS,), 0.1, dtype=torch.float64), torch.full((TOKENS,), 0.5, dtype=torch.float64)
        expected, gradient = by_autograd(plain, logits[:, kept], teacher[:, kept], *others)
        values, metrics = skew_kernel(kind, absent_tokens=True)(wide, wide_teacher, *others)
    torch.testing.assert_close(values, expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(wide[:, kept], gradient, rtol=1e-10, atol=1e-13)
    assert wide[:, [2, 5]].abs().max() == 0
    assert all(torch.isfinite(each).all() for each in metrics.values())


# The skew KLs with one α per token -----------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [skew_forward_kl, skew_reverse_kl])
def test_an_alpha_per_token_is_that_tokens_alpha(objective):
    alphas = [0.0, 0.01, 0.1, 0.5, 1.0]
    student, teacher = random(len(alphas), WORDS), random(len(alphas), WORDS, seed=1)

    def gradient(alpha, rows):
        return by_autograd(lambda logits: objective(logits, teacher[rows], alpha=alpha), student[rows])

    together = gradient(torch.tensor(alphas, dtype=torch.float64), slice(None))
    alone = [gradient(alpha, slice(row, row + 1)) for row, alpha in enumerate(alphas)]
    for mine, others in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(mine, torch.cat(others), rtol=1e-10, atol=1e-13)
    with pytest.raises(ValueError, match="alpha"):
        objective(student, teacher, alpha=torch.tensor([0.0, 0.1, 0.2, 0.3, 1.5]))


@pytest.mark.slow
@settings(deadline=None)
@given(seed=st.integers(0, 999), words=st.integers(2, 6), alpha=st.floats(0.01, 0.99))
def test_the_two_sides_of_distillm2_equal_the_loops_with_their_gradients(seed, words, alpha):
    """The gradients by central differences of the loop, in which the mixture's student stays where it is."""
    student, teacher = random(1, words, seed=seed, scale=1.5), random(1, words, seed=seed + 1, scale=1.5)
    coefficients, row, target = torch.tensor([alpha], dtype=torch.float64), student[0].tolist(), teacher[0].tolist()
    loops = {
        "forward": lambda moved: distillm2_teacher(moved, target, alpha=alpha),
        "reverse": lambda moved: distillm2_student(moved, target, row, alpha=alpha),
    }
    for skew, loop in loops.items():
        ones = torch.ones_like(coefficients)
        values, gradient = by_autograd(plain_skew(skew), student, teacher, coefficients, ones)
        assert float(values) == pytest.approx(loop(row), rel=1e-9, abs=1e-12)
        for v in range(words):
            up, down = ([z + h * (u == v) for u, z in enumerate(row)] for h in (1e-5, -1e-5))
            assert float(gradient[0, v]) == pytest.approx((loop(up) - loop(down)) / 2e-5, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("objective", [skew_forward_kl, skew_reverse_kl])
def test_gradcheck_with_an_alpha_per_token(objective):
    alpha = torch.tensor([0.01, 0.1, 0.9], dtype=torch.float64)
    student, teacher = random(3, 5).requires_grad_(), random(3, 5, seed=1)
    assert torch.autograd.gradcheck(lambda logits: objective(logits, teacher, alpha=alpha), student)
