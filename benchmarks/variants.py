"""Run one variant of the step benchmark in its own process, and print one line of JSON.

`benchmarks.step` starts it and describes the variants.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from benchmarks.authors import AuthorsStep
from benchmarks.clock import synchronize
from benchmarks.floor import matmul_rate, step_flops
from benchmarks.workload import EndAtLengths, Shape, workload
from promptkd import PromptKDConfig, PromptKDTrainer
from promptkd.data.encode import EncodedData, EncodedExample
from promptkd.generation import SamplingParams, generate
from promptkd.memory import peak_memory
from promptkd.methods import Method
from promptkd.models import SoftPrompt, load_model, load_tokenizer
from promptkd.models.adapters import AdapterFactory, SoftPromptFactory
from promptkd.objectives import reverse_kl
from promptkd.responses import Responses
from promptkd.training.callbacks import quiet

Steps = list[dict[str, float]]
PROMPT_LENGTH = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["authors", "trl", "ours"])
    for flag in ("--student", "--teacher", "--data", "--template"):
        parser.add_argument(flag, required=True)
    for flag in ("--first", "--steps", "--max-length", "--max-prompt-length", "--batch-size", "--length-factor"):
        parser.add_argument(flag, type=int, required=True)
    given = parser.parse_args()
    rate = matmul_rate()
    shape = Shape(given.max_length, given.max_prompt_length, given.batch_size, given.length_factor)
    tokenizer = load_tokenizer(given.student)
    rows = workload(given.data, tokenizer, shape, given.template, first=given.first, steps=given.steps)
    windows = [rows[start : start + shape.batch_size] for start in range(0, len(rows), shape.batch_size)]
    student, teacher = load_model(given.student), load_model(given.teacher)
    run = {"authors": run_authors, "trl": run_trl, "ours": run_ours}[given.kind]
    steps = run(student, teacher, tokenizer, windows, shape)
    for step, window in zip(steps, windows, strict=True):
        step["tokens"] = sum(len(row.prompt_ids) + len(row.response_ids) for row in window)
        step["response_tokens"] = sum(len(row.response_ids) for row in window)
        step["flops"] = step_flops(student, teacher, window, PROMPT_LENGTH)
    print(json.dumps({"steps": steps, "peak_rss": peak_memory(), "matmul_rate": rate}))


def run_authors(
    student: nn.Module,
    teacher: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    windows: Sequence[Sequence[EncodedExample]],
    shape: Shape,
) -> Steps:
    prompt = SoftPrompt.create(teacher, tokenizer, length=PROMPT_LENGTH)()
    end = tokenizer.eos_token_id
    step = AuthorsStep(student, teacher, prompt, shape, pad=tokenizer.pad_token_id, end=end)
    return [step(rows, weight=1 - k / len(windows)) for k, rows in enumerate(windows)]


class StepClock(TrainerCallback):
    """Seconds from the beginning of each optimizer step to its end, without the loading of rows."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        synchronize(self._device)
        self.seconds.append(-time.perf_counter())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        synchronize(self._device)
        self.seconds[-1] += time.perf_counter()


def settings(folder: str, shape: Shape, steps: int) -> dict[str, Any]:
    """The arguments of both trainers."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": shape.batch_size,
        "max_steps": steps,
        "max_completion_length": (shape.max_length - shape.max_prompt_length) * shape.length_factor,
        "learning_rate": 5e-5,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "disable_dropout": True,
        "shuffle_dataset": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }


def run_trl(
    student: nn.Module,
    teacher: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    windows: Sequence[Sequence[EncodedExample]],
    shape: Shape,
    **changes: Any,
) -> Steps:
    """TRL's trainer with reverse KL. It has no prompt step.

    Args:
        changes: arguments of the trainer that extend or override `settings`.
    """
    rows = [row for window in windows for row in window]
    responses = {tuple(row.prompt_ids): row.response_ids for row in rows}
    clock, rollouts = StepClock(student.device), []

    class Trainer(DistillationTrainer):
        """TRL's trainer with given response lengths, which scores the data's responses."""

        def _tokenize_prompts(self, prompts: list) -> tuple:
            return prompts, None, {}  # token ids already

        def _generate_single_turn(self, prompt_ids: list, *args: Any, **kwargs: Any) -> list:
            started = time.perf_counter()
            given = [responses[tuple(ids)] for ids in prompt_ids]
            width = max(len(ids) for ids in prompt_ids)
            width += -width % (self.pad_to_multiple_of or 1)
            lengths = [len(each) for each in given]
            ends = EndAtLengths(lengths, width, tokenizer.eos_token_id, self.model.device)
            original = self.model.generate
            self.model.generate = lambda **inputs: original(**inputs, logits_processor=[ends])
            super()._generate_single_turn(prompt_ids, *args, **kwargs)
            del self.model.generate
            rollouts.append(time.perf_counter() - started)
            return given

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=student,
            teacher_model=teacher,
            args=DistillationConfig(**(settings(folder, shape, len(windows)) | changes), beta=1.0),
            train_dataset=Dataset.from_dict({"prompt": [row.prompt_ids for row in rows]}),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        quiet(trainer)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [
        {"rollout": rollout, "prompt": 0.0, "student": whole - rollout, "seconds": whole, "student_loss": loss}
        for rollout, whole, loss in zip(rollouts, clock.seconds, losses, strict=True)
    ]


def run_ours(
    student: nn.Module,
    teacher: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    windows: Sequence[Sequence[EncodedExample]],
    shape: Shape,
    *,
    adapter: type[AdapterFactory] | None = SoftPromptFactory,
    trainer_class: type[PromptKDTrainer] = PromptKDTrainer,
    callbacks: Sequence[TrainerCallback] = (),
    **changes: Any,
) -> Steps:
    """This project's trainer, with the engine that the environment selects.

    Args:
        adapter: the soft prompt is PromptKD; None is GKD with the reverse KL, on the student's own text.
        trainer_class: the class to use instead of `PromptKDTrainer`.
        callbacks: callbacks of the trainer.
        changes: arguments of the trainer that extend or override `settings`.
    """
    rows = [row for window in windows for row in window]
    clock = StepClock(student.device)

    class AtLengths(Responses):
        """The student writes responses with the data's lengths; the data's responses are used."""

        def __call__(self, rows: Sequence[EncodedExample], sample: Any, progress: float) -> list[list[int]]:
            lengths = [len(row.response_ids) for row in rows]
            with trainer.accelerator.autocast():
                generate(
                    student,
                    [row.prompt_ids for row in rows],
                    SamplingParams(max_new_tokens=lengths, vocabulary=trainer.teacher.vocabulary),
                    seeds=torch.randint(2**62, (len(rows),)).tolist(),
                )
            return [row.response_ids for row in rows]

    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            student,
            teacher,
            PromptKDConfig(
                **(settings(folder, shape, len(windows)) | changes),
                max_prompt_length=shape.max_prompt_length * shape.length_factor,
                prompt_length=PROMPT_LENGTH,
            ),
            train_dataset=EncodedData(rows, 0),
            processing_class=tokenizer,
            method=Method(AtLengths(), reverse_kl, adapter),
            callbacks=[clock, *callbacks],
        )
        quiet(trainer)
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "student_kl" in entry]
    return [
        {
            "rollout": entry["seconds_rollout"],
            "prompt": entry["seconds_prompt"],
            "student": whole - entry["seconds_rollout"] - entry["seconds_prompt"],
            "seconds": whole,
            **_prompt_loss(entry),
            "student_loss": entry["student_kl"],
            "peak_bytes": max(trainer.phases.peaks.values()),
        }
        for entry, whole in zip(log, clock.seconds, strict=True)
    ]


def _prompt_loss(entry: dict[str, float]) -> dict[str, float]:
    """The prompt loss of a logged step; empty if it had no prompt."""
    if "prompt_kl" not in entry:
        return {}
    return {"prompt_loss": entry["prompt_kl"] + entry["lambda"] * entry["prompt_regularizer"]}


if __name__ == "__main__":
    main()
