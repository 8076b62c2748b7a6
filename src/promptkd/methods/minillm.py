"""MiniLLM (Gu et al. 2024, arXiv 2306.08543)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from promptkd.engine import ChunkedLoss
from promptkd.errors import RequestError
from promptkd.methods.method import AdaptedMethod, Method, Step
from promptkd.objectives.sequence import minillm, value_and_weights
from promptkd.responses import TeacherMixed
from promptkd.settings import Reader, option


@dataclass(frozen=True, kw_only=True)
class MiniLLM(AdaptedMethod):
    """The policy gradient of reverse KL on responses sampled from (1 - α) q + α p."""

    name = "minillm"
    teacher_mix: float = option(0.2, at_least=0, at_most=1)
    """The teacher's share α of the distribution that is sampled from."""
    importance: Literal["token", "product", "none"] = "token"
    """Weights of tokens that the student did not sample."""
    length_normalization: bool = True
    """Means over the tokens of a response in place of sums."""
    clip_ratio: float | None = option(0.2, at_least=0)
    """Epsilon of the clipped ratio; none never clips."""

    def build(self, take: Reader) -> Method:
        adapter = self.adapter(take)
        if self.teacher_mix > 0 and adapter is not None:
            differing = "minillm samples from the plain teacher and weights by the adapted one if they differ"
            raise RequestError(f"{differing}: give --teacher_mix 0 with a teacher adapter.")
        return Method(TeacherMixed(self.teacher_mix), loss=self.loss, adapter=adapter)

    def loss(self, step: Step) -> ChunkedLoss:
        """The surrogate of equation 7, summed over the tokens; its weights undo the sampler's α."""
        batch, hidden = step.batch, step.student_hidden
        target = step.teacher_hidden(batch)
        log_q, log_p = step.pair.log_probs(hidden, target, batch.targets)
        behavior = None
        if self.teacher_mix > 0:
            shares = torch.tensor([1 - self.teacher_mix, self.teacher_mix], dtype=log_q.dtype, device=log_q.device)
            behavior = batch.by_row(torch.logaddexp(log_q + shares[0].log(), log_p + shares[1].log()))
        mask = batch.by_row(torch.ones_like(log_p)) > 0

        def surrogate(log_q: Tensor, single_step: Tensor) -> Tensor:
            values = minillm(
                batch.by_row(log_q),
                batch.by_row(log_p),
                batch.by_row(single_step),
                mask,
                log_behavior=behavior,
                importance=self.importance,
                length_normalization=self.length_normalization,
                clip_ratio=self.clip_ratio,
            )
            return values.sum()

        # linear in the single-step KLs, so that 0 stands for them
        value, (weight, kl_weight) = value_and_weights(surrogate, log_q, torch.zeros_like(log_q))
        loss = step.pair.weighted(hidden, batch.targets, weight, target, kl_weight)
        return ChunkedLoss(loss.total + value - (weight * log_q).sum(), loss.metrics)
