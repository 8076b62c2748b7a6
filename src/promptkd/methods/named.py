"""The methods that ship, by name, with their papers' defaults."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from promptkd.errors import RequestError
from promptkd.methods.method import Adapter, Method, Objective
from promptkd.methods.sequence import CrossEntropy, DirectPreference, MiniLLM
from promptkd.objectives import (
    adaptive_kl,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)
from promptkd.objectives.sequence import Importance
from promptkd.responses import AdaptiveReplay, ResponseMix, TeacherMixed

__all__ = ["METHODS", "MethodSettings", "ObjectiveName", "named_method"]

ObjectiveName = Literal[
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "adaptive_kl",
]


@dataclass(frozen=True)
class MethodSettings:
    """What the named methods can be told. None stands for the method's own default."""

    student_share: float | None = None
    """Share of the responses that the student writes: imitkd and gkd (0.5 and 1), distillm (where it starts, 0)."""
    objective: ObjectiveName | None = None
    """Another objective than the method's own, for methods that have one a token."""
    beta: float = 1.0
    """jensen_shannon: 0 forward KL, 1 reverse KL (TRL's meaning). gkd's divergence."""
    alpha: float = 0.1
    """skew KL: 0 the plain KL, 1 no divergence at all. distillm's."""
    mu: float = 0.5
    """adaptive_kl: the teacher's probability mass that makes the head. akl's."""
    cross_entropy_share: float = 0.0
    """Share of the cross-entropy with the response's own tokens: 0 the objective alone, 1 the cross-entropy alone."""
    distillation_temperature: float = 1.0
    """Both models' logits are divided by it before they are compared; the loss is not multiplied by its square."""
    teacher_adapter: Adapter | None = None
    """What of the teacher is trained, for another than the method's own."""
    teacher_mix: float = 0.2
    """minillm: the teacher's share α of the distribution that is sampled from."""
    importance: Importance = "token"
    """minillm: how tokens are weighed that the student did not sample: token, product or none."""
    length_normalization: bool = True
    """minillm and dpkd: means over the tokens of a response in place of sums."""
    clip_ratio: float | None = 0.2
    """minillm: ε of the clipped ratio; None never clips."""
    dpkd_beta: float = 0.1
    """dpkd: scale of the log-ratio difference."""
    dpkd_level: Literal["sequence", "token"] = "sequence"
    """dpkd: compare whole responses or token by token."""
    replay_capacity: int = 1000
    """distillm: responses that the replay buffer holds."""
    replay_step: float = 0.1
    """distillm: by how much the student's share rises when validation gets worse."""


def _objective(name: ObjectiveName, settings: MethodSettings) -> Objective:
    coefficients: dict[ObjectiveName, Objective] = {
        "forward_kl": forward_kl,
        "reverse_kl": reverse_kl,
        # its ends by their own names, for which there are faster kernels
        "jensen_shannon": {0.0: forward_kl, 1.0: reverse_kl}.get(
            settings.beta, partial(jensen_shannon, beta=settings.beta)
        ),
        "skew_forward_kl": partial(skew_forward_kl, alpha=settings.alpha),
        "skew_reverse_kl": partial(skew_reverse_kl, alpha=settings.alpha),
        "total_variation": total_variation,
        "adaptive_kl": partial(adaptive_kl, mu=settings.mu),
    }
    chosen = coefficients[name]
    if settings.distillation_temperature == 1:
        return chosen
    return partial(_at_temperature, chosen, settings.distillation_temperature)


def _at_temperature(objective: Objective, temperature: float, student: Tensor, teacher: Tensor) -> Tensor:
    return objective(student / temperature, teacher / temperature)


def _token_method(
    settings: MethodSettings,
    responses: ResponseMix | AdaptiveReplay,
    name: ObjectiveName,
    adapter: Adapter = "none",
) -> Method:
    objective = _objective(settings.objective or name, settings)
    adapter = settings.teacher_adapter or adapter
    if settings.cross_entropy_share == 0:
        return Method(responses, objective, adapter)
    return Method(responses, None, adapter, loss=CrossEntropy(settings.cross_entropy_share, objective))


def _mix(settings: MethodSettings, default: float) -> ResponseMix:
    return ResponseMix(default if settings.student_share is None else settings.student_share)


def _minillm(settings: MethodSettings) -> Method:
    if settings.teacher_mix > 0 and settings.teacher_adapter not in (None, "none"):
        raise RequestError(
            "minillm samples from the plain teacher and weighs by the adapted one if that is another: give "
            "--teacher_mix 0 with a teacher adapter."
        )
    loss = MiniLLM(settings.teacher_mix, settings.importance, settings.length_normalization, settings.clip_ratio)
    return Method(TeacherMixed(settings.teacher_mix), loss=loss, teacher_adapter=settings.teacher_adapter or "none")


def _dpkd(settings: MethodSettings) -> Method:
    loss = DirectPreference(settings.dpkd_beta, settings.dpkd_level, settings.length_normalization)
    responses = ResponseMix(1.0)
    responses.needs_data = True  # the responses that the student's own are compared with
    return Method(responses, loss=loss, teacher_adapter=settings.teacher_adapter or "none", per_row=True)


def _distillm(settings: MethodSettings) -> Method:
    start = 0.0 if settings.student_share is None else settings.student_share
    responses = AdaptiveReplay(start=start, step=settings.replay_step, capacity=settings.replay_capacity)
    return _token_method(settings, responses, "skew_reverse_kl")


METHODS: dict[str, Callable[[MethodSettings], Method]] = {
    # Kim, Jang, Yang 2024, and the paper's comparison with other trained parts of the teacher
    "promptkd": lambda s: _token_method(s, ResponseMix(1.0), "reverse_kl", "prompt"),
    "promptkd-lora": lambda s: _token_method(s, ResponseMix(1.0), "reverse_kl", "lora"),
    "promptkd-full": lambda s: _token_method(s, ResponseMix(1.0), "reverse_kl", "full"),
    # Hinton et al. 2015, Sanh et al. 2019: the data's responses
    "kd": lambda s: _token_method(s, _mix(s, 0.0), "forward_kl"),
    # Kim and Rush 2016: cross-entropy on responses that the teacher wrote (promptkd generate)
    "seqkd": lambda s: Method(ResponseMix(0.0), loss=CrossEntropy()),
    # Lin et al. 2020
    "imitkd": lambda s: _token_method(s, _mix(s, 0.5), "forward_kl"),
    # Agarwal et al. 2024
    "gkd": lambda s: _token_method(s, _mix(s, 1.0), "jensen_shannon"),
    # Gu et al. 2024
    "minillm": _minillm,
    # Ko et al. 2024
    "distillm": _distillm,
    # Wu et al. 2024
    "akl": lambda s: _token_method(s, _mix(s, 0.0), "adaptive_kl"),
    # Li et al. 2024
    "dpkd": _dpkd,
    # Rao et al. 2024
    "okd": lambda s: _token_method(s, _mix(s, 0.0), "forward_kl", "online"),
}


_TOKEN = ("objective", "cross_entropy_share", "distillation_temperature", "teacher_adapter")
_MIXED = (*_TOKEN, "student_share")
_TAKEN: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("promptkd", "promptkd-lora", "promptkd-full"), _TOKEN),
    **dict.fromkeys(("kd", "imitkd", "gkd", "akl", "okd"), _MIXED),
    "distillm": (*_MIXED, "replay_step", "replay_capacity"),
    "minillm": ("teacher_adapter", "teacher_mix", "importance", "length_normalization", "clip_ratio"),
    "dpkd": ("teacher_adapter", "dpkd_beta", "dpkd_level", "length_normalization"),
    "seqkd": (),
}
"""The settings that a method reads, but for the coefficient of its objective. Others are refused."""
_COEFFICIENTS: dict[str | None, str] = {
    "jensen_shannon": "beta",
    "skew_forward_kl": "alpha",
    "skew_reverse_kl": "alpha",
    "adaptive_kl": "mu",
}
_OBJECTIVES = {"gkd": "jensen_shannon", "distillm": "skew_reverse_kl", "akl": "adaptive_kl"}
"""The methods whose own objective has a coefficient."""


def _without_effect(name: str, settings: MethodSettings) -> list[str]:
    """Settings that were given and that the method, so set, would not read."""
    if name not in _TAKEN:
        return []
    taken = {*_TAKEN[name], _COEFFICIENTS.get(settings.objective or _OBJECTIVES.get(name))}
    return [
        key for key, default in vars(MethodSettings()).items() if vars(settings)[key] != default and key not in taken
    ]


def named_method(name: str, settings: MethodSettings | None = None) -> Method:
    """The method of that name.

    Raises:
        RequestError: if there is no such method, or a setting is out of its range.
    """
    if name not in METHODS:
        raise RequestError(f"Expected a method of {', '.join(METHODS)}. Got {name!r}.")
    settings = settings or MethodSettings()
    unused = _without_effect(name, settings)
    if unused:
        raise RequestError(f"{name} takes no {', '.join(unused)}. Leave {'it' if len(unused) == 1 else 'them'} out.")
    try:
        return METHODS[name](settings)
    except ValueError as error:
        raise RequestError(f"{name}: {error}") from error
