"""The student's part of an optimizer step: its loss on one micro-batch."""

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from promptkd.data.batch import right_pad
from promptkd.engine import (
    ChunkedLoss,
    chunked_cross_entropy,
    engine_for,
    evaluating,
    head_logits,
    linear_head,
    response_hidden,
)
from promptkd.methods import Method, Step
from promptkd.training.distributed import autocast, is_sharded, run_in_forward
from promptkd.training.teacher import Teacher
from promptkd.training.window import MicroBatch, StepMetrics, Window, labeled, per_token


def summed(loss: ChunkedLoss, name: str) -> Tensor | float:
    """A metric's sum in float64, on its device: a number would wait for that. 0 of a loss without tokens."""
    return loss.metrics[name].double() if name in loss.metrics else 0.0


class StudentLoss:
    """The method's loss, and the language-modeling loss on plain text where that is asked for."""

    def __init__(
        self,
        method: Method,
        teachers: Teacher | Sequence[Teacher],
        args: Any,
        accelerator: Accelerator,
        metrics: StepMetrics,
    ):
        self.method, self.metrics = method, metrics
        self.teachers = [teachers] if isinstance(teachers, Teacher) else teachers
        self._named = [each.name for each in self.teachers if each.name and not method.per_row]
        self._args, self._accelerator = args, accelerator
        # Without dropout, the tuner and the student want the same states of the first micro-batch.
        self._shares_pass = (
            engine_for(accelerator.device).shares_passes and args.disable_dropout and not is_sharded(accelerator)
        )

    def hidden_for_tuner(self, model: nn.Module, micro_batch: MicroBatch) -> Tensor:
        """(N, H) states of the student without dropout and without a graph, before its own part of the step.

        On devices where that pays, the pass over the first micro-batch is kept with its graph for `__call__`.
        """
        student = self._accelerator.unwrap_model(model)
        if self._shares_pass and micro_batch.index == 0:
            with autocast(self._accelerator, self._args):
                micro_batch.student_hidden = response_hidden(student, micro_batch.batch)
            return micro_batch.student_hidden.detach()
        with evaluating(student), torch.no_grad(), autocast(self._accelerator, self._args):
            return run_in_forward(lambda: response_hidden(student, micro_batch.batch), model, self._accelerator)

    def __call__(self, model: nn.Module, window: Window, micro_batch: MicroBatch) -> Tensor:
        """The micro-batch's part of the window's mean loss; it runs inside the forward of the student's wrapper."""
        student = self._accelerator.unwrap_model(model)
        return run_in_forward(lambda: self._loss(student, window, micro_batch), model, self._accelerator, always=True)

    def _loss(self, student: nn.Module, window: Window, micro_batch: MicroBatch) -> Tensor:
        items = window.items.clamp(min=1)
        for each in self._named:  # of all processes alike, whoever's rows they have
            self.metrics.add(labeled("student_loss", each), 0.0, per=per_token(each))
        parts = [(each, part) for each in self.teachers if (part := micro_batch.of(each.name)) is not None]
        total = reduce(add, (self._of_teacher(student, window, *part) for part in parts)) / items
        if micro_batch.texts:
            total = total + self._language_loss(student, window, micro_batch)
        # Processes average their gradients; times their number, the sum over all of them is the mean over all tokens.
        return total * self._accelerator.num_processes

    def _of_teacher(self, student: nn.Module, window: Window, teacher: Teacher, micro_batch: MicroBatch) -> Tensor:
        """The loss summed over rows of one teacher."""
        items = window.items.clamp(min=1)
        teacher.bring()
        with autocast(self._accelerator, self._args):  # the redirected forward runs outside of accelerate's own
            hidden, micro_batch.student_hidden = micro_batch.student_hidden, None
            if hidden is None:
                hidden = response_hidden(student, micro_batch.batch)  # (N, H)
            loss = self.method.student_loss(
                Step(
                    pair=teacher.pair(student),
                    rows=micro_batch.rows,
                    batch=micro_batch.batch,
                    student_hidden=hidden,
                    teacher_hidden=self._target(teacher, micro_batch),
                    hidden_of_student=lambda other: response_hidden(student, other),
                    progress=window.progress,
                )
            )
        share = (window.tokens.clamp(min=1) / items).double()
        self.metrics.add("student_loss", loss.total.detach().double() * share)
        if teacher.name in self._named:
            of_rows = labeled("student_loss", teacher.name), loss.total.detach().double()
            self.metrics.add(*of_rows, per=per_token(teacher.name))
        self.metrics.add("entropy", summed(loss, "entropy"), per="with_entropy")  # custom losses may lack it
        self.metrics.with_entropy += len(hidden) if "entropy" in loss.metrics else 0
        self.metrics.add("top_overlap", summed(loss, "top_overlap"), per="compared")
        self.metrics.compared += len(hidden) if "top_overlap" in loss.metrics else 0
        for name in self.method.own_metrics:
            self.metrics.add(name, summed(loss, name), per="row" if self.method.per_row else "token")
        return loss.total

    def _target(self, teacher: Teacher, micro_batch: MicroBatch) -> Any:
        """The states to learn from: a new pass of the moved teacher, or that of before its step if "stale"."""
        stale, micro_batch.teacher_hidden = micro_batch.teacher_hidden, None
        if self._args.prompt_refresh == "stale":
            self.metrics.set("prompt_lag", int(stale is not None))
        if stale is None:
            return lambda batch: teacher.adapted_hidden(micro_batch.for_teacher(batch))
        return lambda batch: stale  # only methods whose loss reads this one batch are let through

    def _language_loss(self, student: nn.Module, window: Window, micro_batch: MicroBatch) -> Tensor:
        """The micro-batch's part of the mean cross-entropy on plain text (MiniLLM's L_PT), weighted."""
        texts = micro_batch.texts
        batch = right_pad([ids[:1] for ids in texts], [ids[1:] for ids in texts], device=self._accelerator.device)
        with autocast(self._accelerator, self._args):
            hidden = response_hidden(student, batch)
            if self._args.chunk_tokens != 0 and (head := linear_head(student)) is not None:
                loss = chunked_cross_entropy((hidden, head), batch.targets, chunk=self._args.chunk_tokens).total
            else:
                logits = head_logits(student, hidden).float()
                loss = nn.functional.cross_entropy(logits, batch.targets, reduction="sum")
        self.metrics.add("language_loss", loss.detach().double(), per="text")
        return self._args.language_weight * loss / window.text_tokens.clamp(min=1)
