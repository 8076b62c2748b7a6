"""What moves from step to step of a training, beside the weights: the coefficients of TAID's and Veto's targets."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from promptkd.objectives.divergences import Direction, check_unit_interval, forward_kl, reverse_kl
from promptkd.objectives.targets import interpolated_logits, product_logits


class Moving:
    """What a training tells of its steps; nothing moves here, subclasses override what they need.

    Every process is told the same, so that all of them hold the same coefficient.
    """

    def before_step(self, progress: float) -> None:
        """Called before each optimizer step; `progress` is k / K, and 0 where a training begins anew."""

    def after_step(self, loss: float) -> None:
        """Called after each optimizer step that was taken, with the student's mean loss over the whole of it."""

    def end_step(self, means: Mapping[str, float]) -> None:
        """Called after each optimizer step that was taken, with the means that are logged of it; calls `after_step`."""
        self.after_step(means["student_loss"])

    def metrics(self) -> dict[str, float]:
        """What to log of a step: the coefficients that it had."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state`."""


class MovingTarget(Moving, ABC):
    """An objective: the KL between the student and a target that is made of both models' logits, and moves.

    It is KL(target || q), or KL(q || target) in the `direction` "reverse". The target is constant for the gradient,
    so the written kernels of the plain KLs serve it.
    """

    direction: Direction = "forward"

    @abstractmethod
    def target(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """The target's logits (..., V), of logits without a gradient; -inf where either model's are."""

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        divergence = forward_kl if self.direction == "forward" else reverse_kl
        return divergence(student_logits, self.target(student_logits.detach(), teacher_logits))


class Taid(MovingTarget):
    """`objectives.taid` whose t rises from `start` to `end`, faster while the loss falls (TAID, algorithm 1).

    t_k = min(end, max(start + (end - start) k / K, t_{k-1} + Δ_{k-1})), Δ_k = α σ(m_k) (1 - t_k) and, with the loss J,
    m_k = momentum · m_{k-1} + (1 - momentum) (J_{k-1} - J_k) / J_{k-1}; m_0 = Δ_0 = 0, since nothing comes before J_0.

    Args:
        alpha: α, the size of the adaptive part of a step; with 0, t rises linearly.
        momentum: share of the past in m.

    Raises:
        ValueError: for a value outside of [0, 1], or a start above the end.
    """

    def __init__(self, start: float = 0.4, end: float = 1.0, alpha: float = 5e-4, momentum: float = 0.99):
        for name, value in {"start": start, "end": end, "alpha": alpha, "momentum": momentum}.items():
            check_unit_interval(name, value)
        if start > end:
            raise ValueError(f"TAID's t rises, so its start must not exceed its end. Got {start} and {end}.")
        self.start, self.end, self.alpha, self.momentum = start, end, alpha, momentum
        self._begin()

    def _begin(self) -> None:
        self.t, self.trend = self.start, 0.0
        self.loss: float | None = None  # of the step before

    def target(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return interpolated_logits(student_logits, teacher_logits, self.t)

    def before_step(self, progress: float) -> None:
        if progress == 0:
            self._begin()
        self.t = min(self.end, max(self.start + (self.end - self.start) * progress, self.t))

    def after_step(self, loss: float) -> None:
        if self.loss is not None:
            change = (self.loss - loss) / self.loss if self.loss > 0 else 0.0
            self.trend = self.momentum * self.trend + (1 - self.momentum) * change
            self.t += self.alpha * (1 - self.t) * _sigmoid(self.trend)
        self.loss = loss

    def metrics(self) -> dict[str, float]:
        return {"taid_t": self.t}

    def state_dict(self) -> dict[str, Any]:
        return {"t": self.t, "trend": self.trend, "loss": self.loss}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.t, self.trend, self.loss = state["t"], state["trend"], state["loss"]


class Veto(MovingTarget):
    """`objectives.veto` with β_k = end + (beta - end) (1 - k / K), from `beta` to `end` linearly (Veto, algorithm 1).

    Raises:
        ValueError: for a β outside of [0, 1] or an unknown direction.
    """

    def __init__(self, beta: float = 0.8, end: float = 0.0, direction: Direction = "forward"):
        check_unit_interval("beta", beta)
        check_unit_interval("end", end)
        if direction not in ("forward", "reverse"):
            raise ValueError(f'A KL direction must be "reverse" or "forward". Got {direction!r}.')
        self.start, self.end, self.direction, self.beta = beta, end, direction, beta

    def target(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return product_logits(student_logits, teacher_logits, self.beta)

    def before_step(self, progress: float) -> None:
        self.beta = self.end + (self.start - self.end) * (1 - progress)

    def metrics(self) -> dict[str, float]:
        return {"veto_beta": self.beta}


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
