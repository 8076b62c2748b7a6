"""DistiLLM-2 (Ko et al. 2025, arXiv 2503.07067)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from promptkd.data.batch import TokenBatch, on_device, right_pad
from promptkd.engine import ChunkedLoss
from promptkd.methods.method import AdaptedMethod, Method, Step
from promptkd.objectives.moving import Moving
from promptkd.objectives.sequence import contrast_weight, skew_coefficients
from promptkd.responses import ResponseMix
from promptkd.settings import Reader, option

Side = Literal["teacher", "student"]
"""Whose responses."""


class Contrast(Moving):
    """What moves in DistiLLM-2: β, and the mean of each side's gaps in the optimizer steps before."""

    def __init__(self, *, rises: bool):
        self.rises, self.beta = rises, 1.0
        self._begin()

    def _begin(self) -> None:
        self.steps = 0
        self.gaps: dict[Side, float] = {"teacher": 0.0, "student": 0.0}  # the sums of the steps' means

    def mean_gap(self, side: Side) -> float:
        """m, 0 in the first step: every response then has the largest α."""
        return self.gaps[side] / max(1, self.steps)

    def before_step(self, progress: float) -> None:
        if progress == 0:
            self._begin()
        self.beta = contrast_weight(progress) if self.rises else 1.0

    def end_step(self, means: Mapping[str, float]) -> None:
        if "gap_teacher" in means:  # as with an adaptive α
            self.steps += 1
            for side in self.gaps:
                self.gaps[side] += means[f"gap_{side}"]

    def metrics(self) -> dict[str, float]:
        return {"contrast_beta": self.beta}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "gaps": dict(self.gaps)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.gaps = state["steps"], dict(state["gaps"])


@dataclass(frozen=True, kw_only=True)
class DistiLLM2(AdaptedMethod):
    """Skew KL on the data's responses (written by the teacher), skew reverse KL on the student's own, one of each."""

    name = "distillm2"
    alpha: float = option(0.1, at_least=0, at_most=1)
    """skew_forward_kl, skew_reverse_kl: 0 the plain KL, 1 no divergence. distillm2: the largest of a response."""
    adaptive_alpha: bool = True
    """distillm2: less skew, down to 0.01, on responses on which student and teacher are near each other."""
    gradual_beta: bool = True
    """distillm2: the student's responses gain weight, from half of it to three quarters in the middle of training."""

    def build(self, take: Reader) -> Method:
        responses = ResponseMix(1.0)
        responses.needs_data = True  # the responses that the teacher wrote
        moving = Contrast(rises=self.gradual_beta)
        names = ("alpha", "gap") if self.adaptive_alpha else ()
        return Method(
            responses,
            loss=partial(contrastive_loss, self, moving),
            adapter=self.adapter(take),
            per_row=True,
            own_metrics=tuple(f"{name}_{side}" for name in names for side in moving.gaps),
            moving=moving,
        )


def contrastive_loss(settings: DistiLLM2, moving: Contrast, step: Step) -> ChunkedLoss:
    """(2 - β) KL(p || α p + (1 - α) q) on the teacher's responses + β KL(q || (1 - α) p + α sg q) on the student's.

    Each is a mean over the tokens of a response; they are summed over the rows.
    """
    prompts, responses = [row.prompt_ids for row in step.rows], [row.response_ids for row in step.rows]
    written = right_pad(prompts, responses, device=step.batch.input_ids.device)
    sides: list[tuple[Side, TokenBatch, Tensor]] = [
        ("teacher", written, step.hidden_of_student(written)),
        ("student", step.batch, step.student_hidden),
    ]
    totals, metrics = [], dict[str, Tensor]()
    for side, batch, hidden in sides:
        target = step.teacher_hidden(batch)
        lengths = on_device(batch.response_lengths, hidden.device).clamp(min=1)
        if settings.adaptive_alpha:
            log_q, log_p = step.pair.log_probs(hidden.detach(), target, batch.targets)
            p, q = ((batch.by_row(each).sum(-1) / lengths).exp() for each in (log_p, log_q))
            gap = p - q if side == "teacher" else q - p
            alpha = skew_coefficients(gap, moving.mean_gap(side), alpha=settings.alpha)
            metrics |= {f"alpha_{side}": alpha.sum(), f"gap_{side}": gap.sum()}
        else:
            alpha = torch.full(lengths.shape, settings.alpha, device=hidden.device)
        weight = (2 - moving.beta if side == "teacher" else moving.beta) / lengths
        skew: Any = "forward" if side == "teacher" else "reverse"
        loss = step.pair.skew_kl(skew, hidden, target, alpha=alpha[batch.rows], weight=weight[batch.rows])
        totals.append(loss.total)
    return ChunkedLoss(totals[0] + totals[1], loss.metrics | metrics)  # "entropy" and the like on the student's own
