"""Seconds per optimizer step with `--prompt_every` 1, 2 and 4, in turn within one training, as a Markdown table.

    python -m benchmarks.prompt_every --student STUDENT --teacher TEACHER --data train.jsonl

One training of PromptKD takes blocks of four steps, in which the prompt is trained as each N says, after two steps that
are not counted. Responses are sampled up to the limit, so that every step reads as many response tokens. Beside the
seconds stand those of the process on its cores, which other processes of the machine change less.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from promptkd.data import read_examples
from promptkd.data.encode import encode_examples
from promptkd.models import load_tokenizer
from promptkd.training import DistillTrainer, PromptKDConfig
from promptkd.training.callbacks import quiet

EVERY, BLOCK, WARM_UP = (1, 2, 4), 4, 2


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--student", "--teacher", "--data"):
        parser.add_argument(flag, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4, help="rows per step")
    parser.add_argument("--prompt-tokens", type=int, default=96)
    parser.add_argument("--response-tokens", type=int, default=40)
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as place:
        clock = trained(given, Path(place))
    print("| `--prompt_every` | seconds per step | of the cores |\n|---|---|---|")
    for every in EVERY:
        own = [clock.steps[step] for step in range(WARM_UP, len(clock.steps)) if block_of(step) == every]
        blocks = [own[first : first + BLOCK] for first in range(0, len(own), BLOCK)]
        medians = [statistics.median(statistics.mean(step[at] for step in block) for block in blocks) for at in (0, 1)]
        print(f"| {every} | {medians[0]:.2f} | {medians[1]:.2f} |")


def block_of(step: int) -> int:
    """N of the block that a step is in; 1 while warming up."""
    return EVERY[(step - WARM_UP) // BLOCK % len(EVERY)] if step >= WARM_UP else 1


def trained(given: argparse.Namespace, place: Path) -> "Clock":
    tokenizer = load_tokenizer(given.student)
    args = PromptKDConfig(
        str(place),
        max_steps=WARM_UP + given.rounds * BLOCK * len(EVERY),
        per_device_train_batch_size=given.rows,
        max_prompt_length=given.prompt_tokens,
        max_completion_length=given.response_tokens,
        save_strategy="no",
        disable_tqdm=True,
    )
    limits = {"max_prompt_length": given.prompt_tokens, "max_response_length": 10_000}
    rows = encode_examples(read_examples(given.data), tokenizer, **limits)
    trainer = DistillTrainer(given.student, given.teacher, args, rows, processing_class=tokenizer)
    quiet(trainer)
    trainer.rollout.write_to_the_limit()
    assert trainer.tuner is not None
    trainer.tuner.is_due = lambda step: max(step - WARM_UP, 0) % block_of(step) == 0
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    return clock


class Clock(TrainerCallback):
    """Seconds of every step, by the clock and of the process."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append((time.perf_counter() - self._since[0], time.process_time() - self._since[1]))


if __name__ == "__main__":
    main()
