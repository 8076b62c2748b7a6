"""Kernels of objectives without a written one: what autograd makes of them, in parts."""

from dataclasses import dataclass

import pytest
import torch

from promptkd.objectives import kernels, skew_reverse_kl
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
    logits, *targets = (torch.randn(tokens, 11, dtype=torch.float64) for _ in range(3 if prompted else 2))
    found = []
    for most in (2**26, 3 * 11):
        monkeypatch.setattr(kernels, "_AT_ONCE", most)
        at_once.clear()
        written = logits.clone()
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
    logits, target = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(1))
    values, _ = objective_kernel(Weighted(), PLAIN_KERNELS, absent_tokens=False)(logits.clone(), target)
    assert torch.equal(values, 2 * skew_reverse_kl(logits, target, alpha=0.1))
