"""The targets of the run on an H100-class card."""

from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["TARGETS", "Target", "verdicts"]


@dataclass(frozen=True)
class Target:
    """A measured value and its limit."""

    part: str
    text: str
    side: Literal["below", "at most", "at least"]
    limit: float
    anywhere: bool = False
    """Whether it is also valid on a CPU and with tiny shapes. Times and memory are valid only on a card."""

    def is_met(self, value: float) -> bool:
        if self.side == "below":
            return value < self.limit
        return value <= self.limit if self.side == "at most" else value >= self.limit


TARGETS = {
    "loss_error": Target(
        "losses",
        "largest error of float32 losses against float64, in nats, or relative above a nat",
        "below",
        1e-5,
        anywhere=True,
    ),
    "gradient_error": Target(
        "losses", "largest relative error of bfloat16 gradients against float64", "below", 2e-2, anywhere=True
    ),
    "kl_bias": Target("losses", "largest signed bias of a KL, in nats per token", "below", 1e-3, anywhere=True),
    "memory": Target("memory", "peak at 7B/1.5B, 8 rows of 256 + 256 tokens, in GB", "below", 80),
    "rollout_ratio": Target(
        "rollouts", "rollout of 0.5B, 64 rows, times the speed of generate with its defaults", "at least", 8
    ),
    "rollout_speed": Target("rollouts", "rollout of 0.5B, 64 rows, in tokens per second", "at least", 15_000),
    "head_seconds": Target("heads", "head and reverse KL, seconds over TRL's", "at most", 1),
    "head_memory": Target("heads", "head and reverse KL, peak memory over TRL's", "at most", 1),
    "step_over_floor": Target("steps", "prompt step and student step, seconds over their floor", "at most", 1.5),
    "step_over_trl": Target("steps", "TRL's seconds per step over PromptKD's", "at least", 2),
}


def verdicts(measured: dict[str, float], *, on_card: bool) -> list[dict[str, Any]]:
    """All targets with "met", "missed" or "not measured".

    Args:
        measured: measured values by the name of the target.
        on_card: whether they were measured on a GPU and with full shapes.
    """
    found = []
    for name, target in TARGETS.items():
        value = measured.get(name) if on_card or target.anywhere else None
        verdict = "not measured" if value is None else "met" if target.is_met(value) else "missed"
        aim = f"{target.side} {target.limit:g}"
        found.append(
            {"name": name, "part": target.part, "text": target.text, "target": aim, "value": value, "verdict": verdict}
        )
    return found
