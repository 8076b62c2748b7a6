"""Methods whose student minimizes one value per response token: their objectives by name, and what they share."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from torch import Tensor

from promptkd.engine import ChunkedLoss
from promptkd.methods.method import AdaptedMethod, Method, Step
from promptkd.models.pair import Objective
from promptkd.objectives import (
    adaptive_kl,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)
from promptkd.responses import ResponseMix, Responses
from promptkd.settings import Reader, Settings, option

ObjectiveName = Literal[
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "adaptive_kl",
]


@dataclass(frozen=True, kw_only=True)
class JensenShannon(Settings):
    beta: float = option(1.0, at_least=0, at_most=1)
    """jensen_shannon: 0 forward KL, 1 reverse KL, between them Jensen-Shannon (TRL's meaning)."""


@dataclass(frozen=True, kw_only=True)
class SkewKL(Settings):
    alpha: float = option(0.1, at_least=0, at_most=1)
    """skew_forward_kl, skew_reverse_kl: 0 the plain KL, 1 no divergence at all."""


@dataclass(frozen=True, kw_only=True)
class AdaptiveKL(Settings):
    mu: float = option(0.5, at_least=0, at_most=1)
    """adaptive_kl: the teacher's probability mass that makes the head."""


OBJECTIVES: dict[ObjectiveName, tuple[Callable[..., Tensor], type[Settings] | None]] = {
    "forward_kl": (forward_kl, None),
    "reverse_kl": (reverse_kl, None),
    "jensen_shannon": (jensen_shannon, JensenShannon),
    "skew_forward_kl": (skew_forward_kl, SkewKL),
    "skew_reverse_kl": (skew_reverse_kl, SkewKL),
    "total_variation": (total_variation, None),
    "adaptive_kl": (adaptive_kl, AdaptiveKL),
}
"""Each objective with the class of its coefficients, whose fields are its keyword arguments."""


def token_objective(name: ObjectiveName, take: Reader) -> Objective:
    """The objective of that name with its coefficients from `take`."""
    function, coefficients = OBJECTIVES[name]
    if coefficients is None:
        return function
    chosen = take(coefficients)
    if isinstance(chosen, JensenShannon) and chosen.beta in (0, 1):  # by their own names there are faster kernels
        return reverse_kl if chosen.beta else forward_kl
    return partial(function, **vars(chosen))


def at_temperature(objective: Objective, temperature: float, student: Tensor, teacher: Tensor) -> Tensor:
    """`objective` of logits that are divided by `temperature`."""
    return objective(student / temperature, teacher / temperature)


@dataclass(frozen=True)
class CrossEntropy:
    """(1 - s) · objective + s · cross-entropy with the response's own tokens; s = `share`. At 1 no teacher is read."""

    share: float = 1.0
    objective: Objective | None = None

    def __call__(self, step: Step) -> ChunkedLoss:
        hard = step.pair.cross_entropy("student", step.student_hidden, step.batch.targets)
        if self.share == 1:
            return hard
        assert self.objective is not None
        soft = step.pair.student_loss(self.objective, step.student_hidden, step.teacher_hidden(step.batch))
        return ChunkedLoss((1 - self.share) * soft.total + self.share * hard.total, soft.figures)


@dataclass(frozen=True, kw_only=True)
class TokenMethod(AdaptedMethod):
    """A method with an objective per token, for which another may be chosen."""

    own_objective: ClassVar[ObjectiveName]

    objective: ObjectiveName | None = None
    """Another token objective than the method's own."""
    cross_entropy_share: float = option(0.0, at_least=0, at_most=1)
    """Share of the cross-entropy with the response's own tokens: 0 the objective alone, 1 the cross-entropy alone."""
    distillation_temperature: float = option(1.0, above=0)
    """Both models' logits are divided by it before they are compared; the loss is not multiplied by its square."""

    @abstractmethod
    def responses(self) -> Responses:
        """Whose responses the student learns from."""

    def build(self, take: Reader) -> Method:
        objective = token_objective(self.objective or self.own_objective, take)
        if self.distillation_temperature != 1:
            objective = partial(at_temperature, objective, self.distillation_temperature)
        adapter = self.adapter(take)
        if self.cross_entropy_share == 0:
            return Method(self.responses(), objective, adapter)
        return Method(self.responses(), adapter=adapter, loss=CrossEntropy(self.cross_entropy_share, objective))


@dataclass(frozen=True, kw_only=True)
class MixedMethod(TokenMethod):
    """A token method on responses of student and data."""

    own_share: ClassVar[float]

    student_share: float | None = option(None, at_least=0, at_most=1)
    """Share of the responses that the student writes; by default the method's own."""

    @property
    def share(self) -> float:
        """`student_share`, or the method's own."""
        return self.own_share if self.student_share is None else self.student_share

    def responses(self) -> Responses:
        return ResponseMix(self.share)
