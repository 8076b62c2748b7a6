"""The teacher's part of an optimizer step: its adapter learns to come towards the student (PromptKD section 3.2)."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import get_scheduler

from promptkd.errors import RequestError
from promptkd.models.adapters import PromptLossSettings, TunerStep
from promptkd.settings import Reader
from promptkd.training.config import TunerSettings
from promptkd.training.distributed import autocast
from promptkd.training.guard import Guard
from promptkd.training.phases import Phases
from promptkd.training.student_loss import summed
from promptkd.training.teacher import Teacher
from promptkd.training.window import MicroBatch, StepMetrics, Window, labeled, per_token


class TeacherTuner:
    """Trains the teacher's adapter, with an AdamW and a schedule of its own, by one step in each window that `is_due`.

    Guard and metrics of the running step hear of its loss's terms, λ, the gradient's norm and the learning rate.
    """

    def __init__(
        self, teacher: Teacher, args: Any, accelerator: Accelerator, guard: Guard, phases: Phases, metrics: StepMetrics
    ):
        assert teacher.adapter is not None
        self.teacher, self.adapter, self.metrics = teacher, teacher.adapter, metrics
        self._args, self._accelerator, self._guard, self._phases = args, accelerator, guard, phases
        self._settings, self._loss_settings = Reader(args)(TunerSettings), Reader(args)(PromptLossSettings)
        self._before: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        every = self._settings.prompt_every
        self.is_due: Callable[[int], bool] = lambda step: step % every == 0  # of k = 0, N, 2N …

    def start(self, total_steps: int) -> None:
        """Make a new optimizer and schedule, for a training of `total_steps` optimizer steps of the student.

        The schedule counts the adapter's own steps, ⌈K / N⌉ of them with `prompt_every` N.
        """
        settings = self._settings
        self.optimizer = torch.optim.AdamW(
            self.adapter.parameters(), lr=settings.prompt_learning_rate, weight_decay=settings.prompt_weight_decay
        )
        self.scheduler = get_scheduler(
            settings.prompt_lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=settings.prompt_warmup_steps,
            num_training_steps=-(-total_steps // settings.prompt_every),
        )
        self.optimizer.zero_grad(set_to_none=True)  # of a training that ended within a step
        self._total_steps = total_steps

    def step(
        self,
        window: Window,
        student: nn.Module,
        student_hidden: Callable[[nn.Module, MicroBatch], Tensor],
        *,
        step: int,
        logs: bool,
    ) -> None:
        """One step of the adapter on all response tokens of the window, if `step` is due; else no model is run.

        Args:
            student_hidden: (N, H) states of the student for a micro-batch, without a graph and without dropout.
            step: optimizer steps that are done, k. λ follows k / K, whether or not the adapter moves in each step.
            logs: whether the step will be logged, so that the KL to the plain teacher is wanted even at λ = 0.
        """
        self._before = None  # what a step does not move is not rolled back; and two copies of a teacher are too many
        if not self.is_due(step):
            return
        args, teacher = self._args, self.teacher
        tokens = window.tokens_of(teacher.name).clamp(min=1)
        regularizes = self.adapter.has_regularizer
        weight = self._loss_settings.weight(step, self._total_steps) if regularizes else 0.0
        reads_plain = regularizes and (weight != 0 or logs)
        # In float16 the gradient of a sum survives, that of a mean does not.
        scale = tokens if teacher.backbone.dtype == torch.float16 else 1
        own = [its for each in window.micro_batches if (its := each.of(teacher.name)) is not None]
        if own:
            teacher.bring()
        pair = teacher.pair(self._accelerator.unwrap_model(student))
        for metric in ("prompt_kl", *(["prompt_regularizer"] if reads_plain else [])) if teacher.name else ():
            self.metrics.add(labeled(metric, teacher.name), 0.0, per=per_token(teacher.name))  # of all processes alike
        for micro_batch in own:
            batch = micro_batch.teacher_batch
            self._phases.works_on(batch.lengths)
            target = student_hidden(student, micro_batch)
            with autocast(self._accelerator, args):
                plain = teacher.plain_hidden(batch) if reads_plain else None
            parts = teacher.parts(batch)
            counts = [len(part.targets) for part in parts]
            plains = [None] * len(parts) if plain is None else plain.split(counts)
            read = []
            for part, part_target, part_plain in zip(parts, target.split(counts), plains, strict=True):
                with autocast(self._accelerator, args):
                    adapted = teacher.trained_hidden(part)
                    seen = TunerStep(pair, part, adapted, part_target, part_plain, weight, self._loss_settings)
                    loss = self.adapter.loss(seen)
                self._add("prompt_kl", summed(loss, "to_student"))
                if reads_plain:
                    self._add("prompt_regularizer", summed(loss, "to_plain"))
                self._guard.note("prompt loss", loss.total, micro_batch.index)
                (loss.total * scale / tokens).backward()
                read.append(adapted.detach())
            if self._settings.prompt_refresh == "stale":
                micro_batch.teacher_hidden = torch.cat(read)
        if regularizes:
            self.metrics.set("lambda", weight)
        if teacher.name and not int(window.tokens_of(teacher.name)):
            self.optimizer.step()  # no process has a row of its own, so there is no gradient and nothing moves
            self.scheduler.step()
            return
        self._update(scale)

    def _add(self, metric: str, value: Tensor | float) -> None:
        """Add to a metric of all teachers, and to that of this one."""
        self.metrics.add(metric, value)
        if self.teacher.name:
            self.metrics.add(labeled(metric, self.teacher.name), value, per=per_token(self.teacher.name))

    def _update(self, scale: Tensor | int) -> None:
        """Sum the gradients of all processes, clip them and step; a gradient that is not finite moves nothing."""
        parameters, name = self.adapter.parameters(), self.teacher.name
        self._reach_alike(parameters)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = self._accelerator.reduce(parameter.grad, reduction="sum") / scale
        norm = float(nn.utils.clip_grad_norm_(parameters, self._settings.prompt_max_grad_norm or math.inf))
        self._guard.note("prompt gradient", torch.tensor(norm))
        self.metrics.set(labeled("prompt_grad_norm", name), norm)
        self.metrics.set("prompt_learning_rate", self.scheduler.get_last_lr()[0])
        if self._args.on_nan == "skip":
            self._before = copy.deepcopy((self.adapter.state_dict(), self.optimizer.state_dict()))
        if not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)  # the student's part of the step runs without a move
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _reach_alike(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give a gradient of zeros to what other processes alone have reached, by rows or experts of their own."""
        if self._accelerator.num_processes == 1:
            return
        reached = torch.tensor([each.grad is not None for each in parameters], device=self._accelerator.device).int()
        for parameter, count in zip(parameters, self._accelerator.reduce(reached, "sum").tolist(), strict=True):
            if count and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def rollback(self) -> None:
        """Undo what the last `step` moved of the adapter and its optimizer; the schedule keeps its place."""
        if self._before is None:
            return
        adapter, optimizer = self._before
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.adapter.load_state_dict(adapter)
        self.optimizer.load_state_dict(optimizer)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        """The adapter, its optimizer and its schedule."""
        return {
            "adapter": self.adapter.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state`."""
        self.adapter.load_state_dict(state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])

    def load_adapter(self, state: Mapping[str, Any]) -> None:
        """Take the adapter alone from a `state_dict`."""
        self.adapter.load_state_dict(state["adapter"])


class TeacherTuners:
    """The tuners of several teachers, each with an adapter, an optimizer and a schedule of its own.

    An adapter's loss is a mean over the response tokens of its teacher's own rows. Every process walks the teachers in
    the same order, since each update waits for the others.
    """

    def __init__(self, tuners: Sequence[TeacherTuner]):
        self.each = {tuner.teacher.name: tuner for tuner in tuners}

    @property
    def is_due(self) -> Callable[[int], bool]:
        return next(iter(self.each.values())).is_due

    @is_due.setter
    def is_due(self, decides: Callable[[int], bool]) -> None:
        for tuner in self.each.values():
            tuner.is_due = decides

    def start(self, total_steps: int) -> None:
        for tuner in self.each.values():
            tuner.start(total_steps)

    def step(
        self,
        window: Window,
        student: nn.Module,
        student_hidden: Callable[[nn.Module, MicroBatch], Tensor],
        *,
        step: int,
        logs: bool,
    ) -> None:
        """See `TeacherTuner.step`."""
        for tuner in self.each.values():
            tuner.step(window, student, student_hidden, step=step, logs=logs)

    def rollback(self) -> None:
        for tuner in self.each.values():
            tuner.rollback()

    def state_dict(self) -> dict[str, Any]:
        return {"teachers": {name: tuner.state_dict() for name, tuner in self.each.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, tuner in self.each.items():
            tuner.load_state_dict(self._held(state, name))

    def load_adapter(self, state: Mapping[str, Any]) -> None:
        for name, tuner in self.each.items():
            tuner.load_adapter(self._held(state, name))

    def _held(self, saved: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        held = saved.get("teachers", {})
        if name not in held:
            known = ", ".join(held) or "one without a name"
            raise RequestError(f"The checkpoint holds no teacher {name}, but {known}. Give the teachers of the run.")
        return held[name]


def make_tuner(
    teachers: Sequence[Teacher],
    args: Any,
    accelerator: Accelerator,
    guard: Guard,
    phases: Phases,
    metrics: StepMetrics,
) -> TeacherTuner | TeacherTuners | None:
    """What trains the adapters of one or of several teachers, whose moves the guard can undo; None without adapters."""
    if teachers[0].adapter is None:
        return None
    tuners = [TeacherTuner(each, args, accelerator, guard, phases, metrics) for each in teachers]
    tuner = TeacherTuners(tuners) if teachers[0].name else tuners[0]
    guard.rollback = tuner.rollback
    return tuner
