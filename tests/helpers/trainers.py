"""A tiny pair, rows with fixed responses, and trainers on them."""

from pathlib import Path

import torch

from helpers.tiny import tiny_model, tiny_tokenizer
from promptkd.data.encode import EncodedData, EncodedExample
from promptkd.methods import Method
from promptkd.models.adapters import SoftPromptFactory
from promptkd.objectives import reverse_kl
from promptkd.responses import Responses
from promptkd.training import DistillConfig, DistillTrainer
from promptkd.training.callbacks import quiet

TIMINGS = ("tokens_per_second", "seconds_rollout", "seconds_prompt", "seconds_student", "eval_seconds")


class FixedResponses(Responses):
    """The data's own responses, also for methods that ask the student."""

    needs_data = False


FIXED_PROMPTKD = Method(FixedResponses(), reverse_kl, SoftPromptFactory)


def rows(count=16, *, seed=0):
    """Random prompts of 1 to 9 tokens and responses of 1 to 8, the ids of plain characters."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(most):
        length = int(torch.randint(1, most + 1, (), generator=generator))
        return torch.randint(2, 60, (length,), generator=generator).tolist()

    made = [EncodedExample(tokens(9), tokens(8), ("abc",), "?", row) for row in range(count)]
    return EncodedData(made, 0)


def pair(dtype=torch.float32, family="llama", **student_settings):
    """Student and teacher of different widths on one vocabulary."""
    student = tiny_model(family, layers=2, hidden=16, dtype=dtype, seed=1, **student_settings)
    return student, tiny_model(family, layers=3, hidden=24, dtype=dtype, seed=2)


def config(folder: Path, **settings) -> DistillConfig:
    defaults = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "max_completion_length": 8,
        "max_prompt_length": 16,
        "learning_rate": 1e-3,
        "prompt_learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return DistillConfig(output_dir=str(folder), **{**defaults, **settings})


def trainer(
    folder: Path, *, data=None, models=None, method=FIXED_PROMPTKD, eval_data=None, peft_config=None, **settings
):
    if method.adapter is None:
        settings = {"prompt_learning_rate": 1e-3, **settings}  # the default: nothing reads it
    student, teacher = models or pair()
    tokenizer = tiny_tokenizer()
    made = DistillTrainer(
        student,
        teacher,
        config(folder, **settings),
        data or rows(),
        eval_data,
        tokenizer,
        method=method,
        teacher_processing_class=tokenizer,
        peft_config=peft_config,
    )
    quiet(made)
    return made


def log(trainer) -> list[dict]:
    """The logged steps without what depends on the clock."""
    steps = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    return [{key: value for key, value in entry.items() if key not in TIMINGS} for entry in steps]
