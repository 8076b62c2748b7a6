"""A PromptKD step as the authors' public code runs it, rewritten from its description (docs/differences.md).

Every row is padded to `max_length`, and every prompt of the rollout to `max_prompt_length`. `generate` runs until the
last row has ended. The five passes are separate, and each projects every position. Probabilities and log-probabilities
are separate float32 tensors of shape (B, T, V). The order of prompt and student, λ and clipping are those of this
project, so that the losses are the same and only the implementation differs.
"""

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.clock import synchronize
from benchmarks.workload import EndAtLengths, Shape
from promptkd.data.encode import EncodedExample

__all__ = ["AuthorsStep"]


class AuthorsStep:
    """Student, teacher and prompt with their optimizers."""

    def __init__(self, student: nn.Module, teacher: nn.Module, prompt: Tensor, shape: Shape, pad: int, end: int):
        self.student, self.teacher = student, teacher.requires_grad_(False)
        self.prompt = nn.Parameter(prompt.detach().clone())  # (n, E)
        self.shape, self.pad, self.end = shape, pad, end
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=5e-5, weight_decay=0.0)
        self.prompt_optimizer = torch.optim.AdamW([self.prompt], lr=1e-3, weight_decay=0.0)

    def __call__(self, rows: Sequence[EncodedExample], weight: float) -> dict[str, float]:
        """One optimizer step. Returns seconds by part, and the losses as means over response tokens."""
        started = self._now()
        self._rollout(rows)
        rollout = self._now()
        ids, attention, labels = (each.to(self.prompt.device) for each in self._rectangle(rows))
        prompt_loss = self._prompt_step(ids, attention, labels, weight)
        prompt = self._now()
        student_loss = self._student_step(ids, attention, labels)
        student = self._now()
        seconds = {"rollout": rollout - started, "prompt": prompt - rollout, "student": student - prompt}
        return {**seconds, "seconds": student - started, "prompt_loss": prompt_loss, "student_loss": student_loss}

    def _now(self) -> float:
        synchronize(self.prompt.device)
        return time.perf_counter()

    @torch.no_grad()
    def _rollout(self, rows: Sequence[EncodedExample]) -> None:
        width = self.shape.max_prompt_length * self.shape.length_factor
        ids = torch.full((len(rows), width), self.pad)
        for place, row in zip(ids, rows, strict=True):
            place[width - len(row.prompt_ids) :] = torch.tensor(row.prompt_ids)
        mask = torch.stack([(torch.arange(width) >= width - len(row.prompt_ids)).long() for row in rows])
        lengths = [len(row.response_ids) for row in rows]
        self.student.eval()
        self.student.generate(
            input_ids=ids.to(self.prompt.device),
            attention_mask=mask.to(self.prompt.device),
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_length=self.shape.max_length * self.shape.length_factor,
            eos_token_id=self.end,
            pad_token_id=self.pad,
            logits_processor=[EndAtLengths(lengths, width, self.end, self.prompt.device)],
        )

    def _rectangle(self, rows: Sequence[EncodedExample]) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, attention mask, and labels shifted one to the left (-100 is not scored); each (B, T)."""
        shape = (len(rows), self.shape.max_length * self.shape.length_factor)
        ids, attention = torch.full(shape, self.pad), torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, -100)
        for index, row in enumerate(rows):
            tokens = [*row.prompt_ids, *row.response_ids]
            ids[index, : len(tokens)] = torch.tensor(tokens)
            attention[index, : len(tokens)] = 1
            labels[index, len(row.prompt_ids) - 1 : len(tokens) - 1] = torch.tensor(row.response_ids)
        return ids, attention, labels

    def _prompt_step(self, ids: Tensor, attention: Tensor, labels: Tensor, weight: float) -> float:
        prompted = self._prompted_logits(ids, attention)
        with torch.no_grad():
            self.student.eval()
            student = self.student(input_ids=ids, attention_mask=attention, use_cache=False).logits
            plain = self.teacher(input_ids=ids, attention_mask=attention, use_cache=False).logits
        loss = reverse_kl(prompted, student, labels) + weight * reverse_kl(prompted, plain, labels)
        loss.backward()
        nn.utils.clip_grad_norm_([self.prompt], 1.0)
        self.prompt_optimizer.step()
        self.prompt_optimizer.zero_grad()
        return loss.item()

    def _student_step(self, ids: Tensor, attention: Tensor, labels: Tensor) -> float:
        self.student.train()
        student = self.student(input_ids=ids, attention_mask=attention, use_cache=False).logits
        with torch.no_grad():
            prompted = self._prompted_logits(ids, attention)
        loss = reverse_kl(student, prompted, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def _prompted_logits(self, ids: Tensor, attention: Tensor) -> Tensor:
        rows, length = ids.shape[0], len(self.prompt)
        embedded = self.teacher.get_input_embeddings()(ids)
        embedded = torch.cat([self.prompt.to(embedded.dtype).expand(rows, -1, -1), embedded], dim=1)
        mask = torch.cat([attention.new_ones(rows, length), attention], dim=1)
        return self.teacher(inputs_embeds=embedded, attention_mask=mask, use_cache=False).logits[:, length:]


def reverse_kl(learner_logits: Tensor, target_logits: Tensor, labels: Tensor) -> Tensor:
    """KL(learner || target), mean over labeled positions, from full (B, T, V) tensors."""
    probabilities = learner_logits.softmax(-1, dtype=torch.float32)
    log_learner = learner_logits.log_softmax(-1, dtype=torch.float32)
    log_target = target_logits.log_softmax(-1, dtype=torch.float32)
    scored = (labels != -100).reshape(-1)
    values = (probabilities * log_learner).sum(-1) - (probabilities * log_target).sum(-1)
    return (values.reshape(-1) * scored).sum() / scored.sum()
