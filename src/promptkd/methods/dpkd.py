"""Direct preference distillation (Li et al. 2024, arXiv 2406.19774)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from promptkd.data.batch import right_pad
from promptkd.engine import ChunkedLoss
from promptkd.methods.method import AdaptedMethod, Method, Step
from promptkd.objectives.sequence import ResponseLogProbs, dpkd, value_and_weights
from promptkd.responses import ResponseMix
from promptkd.settings import Reader, option


@dataclass(frozen=True, kw_only=True)
class DPKD(AdaptedMethod):
    """The data's responses (written by the teacher) preferred to the student's own samples, one loss per row."""

    name = "dpkd"
    dpkd_beta: float = option(0.1, at_least=0)
    """Scale of the log-ratio difference."""
    dpkd_level: Literal["sequence", "token"] = "sequence"
    """Compare whole responses, or token by token."""
    length_normalization: bool = True
    """Means over the tokens of a response in place of sums."""

    def build(self, take: Reader) -> Method:
        responses = ResponseMix(1.0)
        responses.needs_data = True  # the responses that the student's own are compared with
        return Method(responses, loss=self.loss, adapter=self.adapter(take), per_row=True)

    def loss(self, step: Step) -> ChunkedLoss:
        """-log σ of the difference in log-ratio, summed over the rows (equations 8 and 9)."""
        prompts, responses = [row.prompt_ids for row in step.rows], [row.response_ids for row in step.rows]
        chosen = right_pad(prompts, responses, device=step.batch.input_ids.device)
        sides = [(chosen, step.hidden_of_student(chosen)), (step.batch, step.student_hidden)]
        found = [step.pair.log_probs(each, step.teacher_hidden(batch), batch.targets) for batch, each in sides]

        def preference(*log_q: Tensor) -> Tensor:
            compared = [
                ResponseLogProbs(batch.by_row(q), batch.by_row(p), batch.by_row(torch.ones_like(p)) > 0)
                for (batch, _), q, (_, p) in zip(sides, log_q, found, strict=True)
            ]
            beta, normalized = self.dpkd_beta, self.length_normalization
            return dpkd(*compared, beta=beta, level=self.dpkd_level, length_normalization=normalized).sum()

        log_q = [each for each, _ in found]
        total, weights = value_and_weights(preference, *log_q)
        for (batch, hidden), own, weight in zip(sides, log_q, weights, strict=True):
            loss = step.pair.weighted(hidden, batch.targets, weight)
            total = total + loss.total - (weight * own).sum()
        return ChunkedLoss(total, loss.metrics)  # of the student's own responses
