"""Student losses that need the sampled tokens: cross-entropy, MiniLLM, DPKD."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from promptkd.data.batch import TokenBatch, right_pad
from promptkd.engine import ChunkedLoss
from promptkd.methods.losses import entropy
from promptkd.methods.method import Objective, Step
from promptkd.objectives.divergences import reverse_kl
from promptkd.objectives.sequence import Importance, ResponseLogProbs, dpkd, minillm

__all__ = ["CrossEntropy", "DirectPreference", "MiniLLM"]


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
        return ChunkedLoss((1 - self.share) * soft.total + self.share * hard.total, soft.metrics)


@dataclass(frozen=True)
class MiniLLM:
    """MiniLLM's surrogate on responses sampled from (1 - α) q + α p (Gu et al. 2024, eq. 7)."""

    teacher_share: float = 0.2
    """α of the sampler, which the importance weights undo."""
    importance: Importance = "token"
    length_normalization: bool = True
    clip_ratio: float | None = 0.2

    def __call__(self, step: Step) -> ChunkedLoss:
        batch = step.batch
        logits = step.pair.logits("student", step.student_hidden)
        target = step.pair.logits("teacher", step.teacher_hidden(batch)).detach()
        log_q, log_p = _log_probs(logits, batch), _log_probs(target, batch)
        behaviour = None
        if self.teacher_share > 0:
            shares = torch.tensor([1 - self.teacher_share, self.teacher_share], dtype=log_q.dtype, device=log_q.device)
            behaviour = torch.logaddexp(log_q.detach() + shares[0].log(), log_p + shares[1].log())
        mask = batch.by_row(torch.ones_like(log_p)) > 0
        values = minillm(
            batch.by_row(log_q),
            batch.by_row(log_p),
            batch.by_row(reverse_kl(logits, target)),
            mask,
            log_behaviour=None if behaviour is None else batch.by_row(behaviour),
            importance=self.importance,
            length_normalization=self.length_normalization,
            clip_ratio=self.clip_ratio,
        )
        return ChunkedLoss(values.sum(), {"entropy": entropy(logits).sum()})


@dataclass(frozen=True)
class DirectPreference:
    """DPKD: the data's responses (written by the teacher) against the student's own samples, a loss a row."""

    beta: float = 0.1
    level: Literal["sequence", "token"] = "sequence"
    length_normalization: bool = True

    def __call__(self, step: Step) -> ChunkedLoss:
        chosen = right_pad(
            [row.prompt_ids for row in step.rows],
            [row.response_ids for row in step.rows],
            device=step.batch.input_ids.device,
        )
        sides = []
        for batch, hidden in ((chosen, step.hidden_of_student(chosen)), (step.batch, step.student_hidden)):
            logits = step.pair.logits("student", hidden)
            target = step.pair.logits("teacher", step.teacher_hidden(batch)).detach()
            log_q, log_p = _log_probs(logits, batch), _log_probs(target, batch)
            mask = batch.by_row(torch.ones_like(log_p)) > 0
            sides.append(ResponseLogProbs(batch.by_row(log_q), batch.by_row(log_p), mask))
        values = dpkd(*sides, beta=self.beta, level=self.level, length_normalization=self.length_normalization)
        return ChunkedLoss(values.sum(), {"entropy": entropy(logits).sum()})


def _log_probs(logits: Tensor, batch: TokenBatch) -> Tensor:
    """(N,) log-probability of each response token, in float32 or wider."""
    wide = logits.to(torch.promote_types(torch.float32, logits.dtype))
    return -torch.nn.functional.cross_entropy(wide, batch.targets, reduction="none")
