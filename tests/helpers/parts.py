"""The parts of a training step without a trainer, and windows for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from helpers.tiny import VOCABULARY, tiny_tokenizer
from helpers.trainers import FIXED_PROMPTKD, config, pair
from promptkd.data.batch import right_pad
from promptkd.data.encode import EncodedExample
from promptkd.methods import Method
from promptkd.training.config import chosen_method
from promptkd.training.guard import Guard
from promptkd.training.phases import Phases
from promptkd.training.rollout import Rollout
from promptkd.training.setup import make_adapter
from promptkd.training.student_loss import StudentLoss
from promptkd.training.teacher import Teacher
from promptkd.training.teacher_tuner import TeacherTuner
from promptkd.training.window import MicroBatch, StepMetrics, Window


@dataclass
class Parts:
    """What `DistillTrainer` makes of a pair of models, each part in its own right."""

    args: Any
    accelerator: Accelerator
    method: Method
    student: Any
    teacher: Teacher
    phases: Phases
    metrics: StepMetrics
    guard: Guard

    def tuner(self) -> TeacherTuner:
        return TeacherTuner(self.teacher, self.args, self.accelerator, self.guard, self.phases, self.metrics)

    def student_loss(self) -> StudentLoss:
        return StudentLoss(self.method, self.teacher, self.args, self.accelerator, self.metrics)

    def rollout(self, *stop_ids: int) -> Rollout:
        return Rollout(
            self.method,
            self.teacher,
            self.student,
            tiny_tokenizer(),
            stop_ids,
            self.args,
            self.accelerator,
            self.metrics,
        )


def parts(folder: Path, *, method: Method = FIXED_PROMPTKD, models: Any = None, **settings: Any) -> Parts:
    args, accelerator = config(folder, **settings), Accelerator(cpu=True)
    student, teacher = models or pair()
    method = chosen_method(args, method)
    adapter, adapted = make_adapter(method, teacher.requires_grad_(False), tiny_tokenizer(), args, accelerator)
    teacher = Teacher(adapted, adapter, accelerator, args, VOCABULARY)
    guard = Guard(args, accelerator, lambda: {"student": student, "teacher": teacher.model})
    phases = Phases(accelerator.device)
    return Parts(args, accelerator, method, student, teacher, phases, StepMetrics(), guard)


def window(*micro_batches: Sequence[EncodedExample]) -> Window:
    """A window of rows with their own responses."""
    made = [
        MicroBatch(index, rows, right_pad([row.prompt_ids for row in rows], [row.response_ids for row in rows]), [])
        for index, rows in enumerate(micro_batches)
    ]
    tokens = torch.tensor(sum(len(each.batch.targets) for each in made))
    return Window(made, tokens, tokens, torch.tensor(0))
