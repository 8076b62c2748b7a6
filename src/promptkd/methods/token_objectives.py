"""Objectives per token by name, with the settings of their coefficients."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from promptkd import objectives
from promptkd.errors import RequestError
from promptkd.models.pair import Objective
from promptkd.settings import Settings, option

ObjectiveName = Literal[
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "adaptive_kl",
    "taid",
    "veto",
    "alpha_beta",
    "entropy_aware_kl",
    "todi",
    "concrete_score",
    "clipped_forward_kl",
]


class Coefficients(Settings):
    """The coefficients of an objective."""

    def of(self, objective: Callable[..., Any]) -> Objective:
        """The objective with these coefficients: by default its keyword arguments."""
        return partial(objective, **vars(self))


@dataclass(frozen=True, kw_only=True)
class JensenShannon(Coefficients):
    beta: float = option(1.0, at_least=0, at_most=1)
    """jensen_shannon: 0 forward KL, 1 reverse KL, between them Jensen-Shannon (TRL's meaning)."""

    def of(self, objective: Callable[..., Any]) -> Objective:
        ends = {0.0: objectives.forward_kl, 1.0: objectives.reverse_kl}  # by their own names: faster kernels
        return ends.get(self.beta) or super().of(objective)


@dataclass(frozen=True, kw_only=True)
class SkewKL(Coefficients):
    alpha: float = option(0.1, at_least=0, at_most=1)
    """skew_forward_kl, skew_reverse_kl: 0 the plain KL, 1 no divergence. distillm2: the largest of a response."""


@dataclass(frozen=True, kw_only=True)
class AdaptiveKL(Coefficients):
    mu: float = option(0.5, at_least=0, at_most=1)
    """adaptive_kl: the teacher's probability mass that makes the head."""


@dataclass(frozen=True, kw_only=True)
class TaidTarget(Coefficients):
    taid_start: float = option(0.4, at_least=0, at_most=1)
    """taid: the teacher's share t of the target at the first step; 1 the forward KL, 0 the student itself."""
    taid_end: float = option(1.0, at_least=0, at_most=1)
    """taid: the largest t, which a linear rise over the whole run reaches at the latest; the start's value fixes t."""
    taid_alpha: float = option(5e-4, at_least=0, at_most=1)
    """taid: how far a falling loss moves t ahead of the linear rise; 0 leaves it linear."""
    taid_momentum: float = option(0.99, at_least=0, at_most=1)
    """taid: share of the past in the mean by which the loss is said to fall."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.taid_start > self.taid_end:
            told = f"got taid_start {self.taid_start} above taid_end {self.taid_end}"
            raise RequestError(f"TAID's t rises: {told}. Lower the first or raise the second.")

    def of(self, objective: Callable[..., Any]) -> Objective:
        return objectives.Taid(self.taid_start, self.taid_end, self.taid_alpha, self.taid_momentum)


@dataclass(frozen=True, kw_only=True)
class VetoTarget(Coefficients):
    veto_beta: float = option(0.8, at_least=0, at_most=1)
    """veto: the student's exponent in the target p q^β at the first step; 0 the plain KL."""
    veto_beta_end: float = option(0.0, at_least=0, at_most=1)
    """veto: what the exponent goes to over the run, linearly; the first step's value fixes it."""
    veto_direction: Literal["forward", "reverse"] = "forward"
    """veto: KL(target || student), or KL(student || target)."""

    def of(self, objective: Callable[..., Any]) -> Objective:
        return objectives.Veto(self.veto_beta, self.veto_beta_end, self.veto_direction)


@dataclass(frozen=True, kw_only=True)
class AlphaBeta(Coefficients):
    ab_alpha: float = 0.2
    """alpha_beta: the teacher's exponent; 1 with ab_beta 0 is the forward KL."""
    ab_beta: float = 0.7
    """alpha_beta: the student's exponent; 1 with ab_alpha 0 is the reverse KL."""

    def of(self, objective: Callable[..., Any]) -> Objective:
        ends = {(1.0, 0.0): objectives.forward_kl, (0.0, 1.0): objectives.reverse_kl}
        exponents = self.ab_alpha, self.ab_beta
        return ends.get(exponents) or partial(objective, alpha=self.ab_alpha, beta=self.ab_beta)


@dataclass(frozen=True, kw_only=True)
class EntropyAware(Coefficients):
    entropy_threshold: float = option(0.8, at_least=0)
    """entropy_aware_kl: nats of the teacher's entropy above which a token has a forward KL, too."""

    def of(self, objective: Callable[..., Any]) -> Objective:
        return partial(objective, threshold=self.entropy_threshold)


@dataclass(frozen=True, kw_only=True)
class ConcreteScore(Coefficients):
    csd_weights: Literal["student", "teacher", "uniform"] = "student"
    """concrete_score: by whose probabilities the first token of a pair is weighed; the second is by the student's."""

    def of(self, objective: Callable[..., Any]) -> Objective:
        return partial(objective, weights=self.csd_weights)


@dataclass(frozen=True, kw_only=True)
class ClippedKL(Coefficients):
    kl_clip: float = option(0.05, above=0)
    """clipped_forward_kl: nats that one token of the vocabulary can add at a position."""

    def of(self, objective: Callable[..., Any]) -> Objective:
        return partial(objective, clip=self.kl_clip)


OBJECTIVES: dict[ObjectiveName, tuple[Callable[..., Any], type[Coefficients] | None]] = {
    "forward_kl": (objectives.forward_kl, None),
    "reverse_kl": (objectives.reverse_kl, None),
    "jensen_shannon": (objectives.jensen_shannon, JensenShannon),
    "skew_forward_kl": (objectives.skew_forward_kl, SkewKL),
    "skew_reverse_kl": (objectives.skew_reverse_kl, SkewKL),
    "total_variation": (objectives.total_variation, None),
    "adaptive_kl": (objectives.adaptive_kl, AdaptiveKL),
    "taid": (objectives.Taid, TaidTarget),
    "veto": (objectives.Veto, VetoTarget),
    "alpha_beta": (objectives.alpha_beta, AlphaBeta),
    "entropy_aware_kl": (objectives.entropy_aware_kl, EntropyAware),
    "todi": (objectives.todi, None),
    "concrete_score": (objectives.concrete_score, ConcreteScore),
    "clipped_forward_kl": (objectives.clipped_forward_kl, ClippedKL),
}  # each with the class of its coefficients
