"""Objectives of distributions at another temperature."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AtTemperature:
    """`objective(student / T, teacher / T)`, without the factor T² of Hinton et al. (2015, arXiv 1503.02531)."""

    objective: Callable[[Tensor, Tensor], Tensor]
    temperature: float

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The values (N,) for logits (N, V)."""
        return self.objective(student / self.temperature, teacher / self.temperature)
