"""Direct preference distillation (Li et al. 2024, arXiv 2406.19774)."""

from dataclasses import dataclass
from typing import Literal

import torch

from promptkd.data.batch import right_pad
from promptkd.engine import ChunkedLoss
from promptkd.methods.method import AdaptedMethod, Method, Step
from promptkd.models.pair import log_probs, with_entropy
from promptkd.objectives.sequence import ResponseLogProbs, dpkd
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
        sides = []
        for batch, hidden in ((chosen, step.hidden_of_student(chosen)), (step.batch, step.student_hidden)):
            logits = step.pair.logits("student", hidden)
            target = step.pair.logits("teacher", step.teacher_hidden(batch)).detach()
            log_q, log_p = log_probs(logits, batch.targets), log_probs(target, batch.targets)
            mask = batch.by_row(torch.ones_like(log_p)) > 0
            sides.append(ResponseLogProbs(batch.by_row(log_q), batch.by_row(log_p), mask))
        beta, normalized = self.dpkd_beta, self.length_normalization
        values = dpkd(*sides, beta=beta, level=self.dpkd_level, length_normalization=normalized)
        return with_entropy(values.sum(), logits)
