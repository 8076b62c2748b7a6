"""Kernels of objectives without a written one: what autograd makes of them, in parts."""

from dataclasses import dataclass, replace

import pytest
import torch

from helpers.loops import gradients, logits
from promptkd.objectives import AtTemperature, Taid, forward_kl, kernels, reverse_kl, skew_reverse_kl
from promptkd.objectives.kernels import PLAIN_KERNELS, objective_kernel, prompt_kernel


@pytest.mark.parametrize("tokens", [0, 1, 7, 9])
@pytest.mark.parametrize("prompted", [False, True])
def test_autograd_takes_few_tokens_at_a_time_and_changes_nothing(monkeypatch, tokens, prompted):
    at_once = []

    def objective(student, teacher):
        at_once.append(len(student))
        return skew_reverse_kl(student, teacher, alpha=0.1)

    kernel = objective_kernel(objective, PLAIN_KERNELS, absent_tokens=False)
    if prompted:
        kernel = prompt_kernel(0.5, PLAIN_KERNELS, absent_tokens=False, student_direction="forward")
    torch.manual_seed(0)
    given, *targets = (torch.randn(tokens, 11, dtype=torch.float64) for _ in range(3 if prompted else 2))
    found = []
    for most in (2**26, 3 * 11):
        monkeypatch.setattr(kernels, "_AT_ONCE", most)
        at_once.clear()
        written = given.clone()
        values, metrics = kernel(written, *targets)
        found.append((written, values, metrics))
    (gradient, values, metrics), (of_parts, values_of_parts, metrics_of_parts) = found
    assert torch.equal(gradient, of_parts)
    assert torch.equal(values, values_of_parts)
    assert metrics.keys() == metrics_of_parts.keys()
    assert all(torch.equal(value, metrics_of_parts[name]) for name, value in metrics.items())
    assert prompted or (sum(at_once) == tokens and max(at_once) <= 3)


@dataclass
class Weighted:
    """An objective that is equal to others of its weight, and so has no hash."""

    weight: float = 2.0

    def __call__(self, logits, target):
        return self.weight * skew_reverse_kl(logits, target, alpha=0.1)


def test_an_objective_without_a_hash_is_computed():
    given, target = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(1))
    values, _ = objective_kernel(Weighted(), PLAIN_KERNELS, absent_tokens=False)(given.clone(), target)
    assert torch.equal(values, 2 * skew_reverse_kl(given, target, alpha=0.1))


@pytest.mark.parametrize("temperature", [0.5, 4.0])
@pytest.mark.parametrize("objective", [reverse_kl, forward_kl, Taid(), Weighted()])
@pytest.mark.parametrize("absent", [False, True])
def test_a_temperature_divides_logits_and_gradient_and_leaves_the_metrics(objective, temperature, absent):
    student, teacher = logits(6, 9, seed=1), logits(6, 9, seed=2)
    if absent:
        student[:, 3] = teacher[:, 3] = -torch.inf
    tempered, called = AtTemperature(objective, temperature), []

    def noted(kernel):
        return lambda *tensors: (called.append(1), kernel(*tensors))[1]

    written = {"reverse_kl": noted(PLAIN_KERNELS.reverse_kl), "forward_kl": noted(PLAIN_KERNELS.forward_kl)}
    kernel = objective_kernel(tempered, replace(PLAIN_KERNELS, **written), absent_tokens=absent)
    expected = objective(student / temperature, teacher / temperature)
    (gradient,) = gradients(lambda s: objective(s / temperature, teacher / temperature), student)
    written, before = student.clone(), teacher.clone()
    values, metrics = kernel(written, before)
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(written, gradient, rtol=1e-11, atol=1e-13)
    assert torch.equal(before, teacher)
    q = student.softmax(-1)
    torch.testing.assert_close(metrics["entropy"], -torch.special.xlogy(q, q).sum(-1), rtol=1e-12, atol=1e-13)
    assert torch.equal(metrics["top_overlap"], (student.argmax(-1) == teacher.argmax(-1)).float())
    assert len(called) == (not absent and not isinstance(objective, Weighted))
