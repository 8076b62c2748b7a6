"""Methods whose student minimizes one value per response token, and what they share."""

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from promptkd.engine import ChunkedLoss
from promptkd.methods.method import AdaptedMethod, Method, Step
from promptkd.methods.token_objectives import OBJECTIVES, ObjectiveName
from promptkd.models.pair import Objective
from promptkd.objectives import AtTemperature, Moving
from promptkd.responses import ResponseMix, Responses
from promptkd.settings import Reader, option


def cross_entropy(step: Step) -> ChunkedLoss:
    """-log q(y) of the responses' own tokens y, summed; no teacher is read."""
    return step.pair.cross_entropy("student", step.student_hidden, step.batch.targets)


def mixed_loss(objective: Objective, share: float, step: Step) -> ChunkedLoss:
    """(1 - s) · objective + s · cross-entropy; s = `share`."""
    soft = step.pair.student_loss(objective, step.student_hidden, step.teacher_hidden(step.batch))
    return ChunkedLoss((1 - share) * soft.total + share * cross_entropy(step).total, soft.metrics)


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
        objective, coefficients = OBJECTIVES[self.objective or self.own_objective]
        if coefficients is not None:
            objective = take(coefficients).of(objective)
        moving = objective if isinstance(objective, Moving) else Moving()
        if self.distillation_temperature != 1:
            objective = AtTemperature(objective, self.distillation_temperature)
        adapter, share = self.adapter(take), self.cross_entropy_share
        if share == 0:
            return Method(self.responses(), objective, adapter, moving=moving)
        if share < 1:
            return Method(self.responses(), loss=partial(mixed_loss, objective, share), adapter=adapter, moving=moving)
        return Method(self.responses(), loss=cross_entropy, adapter=adapter, reads_teacher=adapter is not None)


@dataclass(frozen=True, kw_only=True)
class MixedMethod(TokenMethod):
    """A token method on responses of student and data."""

    own_share: ClassVar[float]
    student_share: float | None = option(None, at_least=0, at_most=1)
    """Share of the responses that the student writes; by default the method's own."""

    @property
    def share(self) -> float:
        return self.own_share if self.student_share is None else self.student_share

    def responses(self) -> Responses:
        return ResponseMix(self.share)
