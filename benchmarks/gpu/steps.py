"""Part 8: an optimizer step of PromptKD, gkd, TRL and the authors' code: 1.5B teacher, 0.5B student, 32 rows.

All score the same responses with given lengths, and all sample the same number of tokens in the rollout. Our trainer
and TRL's have a float32 student and compute in bfloat16. TRL's keeps its default of recomputed activations. The
authors' implementation has both models in bfloat16, with rows padded to 512 tokens and prompts to 256 as in their
scripts, eight rows at a time: four of its steps are counted as one.
"""

import gc
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.clock import peak_bytes, restart_peak
from benchmarks.floor import matmul_rate, step_flops
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.shapes import lengths_around, qwen, random_rows, vocabulary_of, words
from benchmarks.variants import PROMPT_LENGTH, Steps, run_authors, run_ours, run_trl
from benchmarks.workload import Shape
from promptkd.data.encode import EncodedExample
from promptkd.models.adapters import SoftPromptFactory

__all__ = ["run"]

Windows = list[list[EncodedExample]]
_STEPS = 3
"""The first step is not counted: it compiles kernels and captures graphs."""
_AUTHORS_ROWS = 8


def run(bench: Bench) -> None:
    rows, mean = (4, 10) if bench.tiny else (32, 128)
    shape = Shape(max_length=4 * mean, max_prompt_length=2 * mean, batch_size=rows)
    vocabulary = vocabulary_of(bench)
    prompts, responses = (lengths_around(mean, rows * _STEPS, seed=seed) for seed in (0, 1))
    made = random_rows(prompts, responses, vocabulary)
    windows = [made[start : start + rows] for start in range(0, len(made), rows)]
    tokenizer = words(vocabulary)
    changes = {"use_cpu": not bench.on_cuda, "bf16": bench.on_cuda}
    ways: dict[str, Callable[[], float]] = {
        "PromptKD": lambda: _ours(bench, tokenizer, windows, shape, SoftPromptFactory, changes),
        "gkd": lambda: _ours(bench, tokenizer, windows, shape, None, changes),
        "TRL's DistillationTrainer": lambda: _trl(bench, tokenizer, windows, shape, changes),
        "the authors' code": lambda: _authors(bench, tokenizer, windows),
    }
    found: dict[str, float] = {}
    for name, way in ways.items():
        bench.require(0 if bench.tiny else 10, name)
        with bench.attempt(name):
            found[name] = way()
        gc.collect()
    for name, seconds in found.items():
        if name != "PromptKD" and "PromptKD" in found:
            bench.report(f"{name}, seconds per step over PromptKD's", seconds / found["PromptKD"])
    if "PromptKD" in found and "TRL's DistillationTrainer" in found:
        bench.measured("step_over_trl", found["TRL's DistillationTrainer"] / found["PromptKD"])


def _models(bench: Bench, student: torch.dtype) -> tuple[Any, Any]:
    half = torch.bfloat16 if bench.on_cuda else torch.float32
    return qwen("0.5B", bench, student if bench.on_cuda else torch.float32), qwen("1.5B", bench, half)


def _ours(
    bench: Bench, tokenizer: PreTrainedTokenizerBase, windows: Windows, shape: Shape, adapter: Any, changes: dict
) -> float:
    student, teacher = _models(bench, torch.float32)
    steps = run_ours(student, teacher, tokenizer, windows, shape, adapter=adapter, **changes)
    peak = int(steps[-1]["peak_bytes"]) if bench.on_cuda else None
    seconds = _report(bench, "PromptKD" if adapter else "gkd", steps, windows, peak)
    if adapter:
        dtype = torch.bfloat16 if bench.on_cuda else torch.float32
        rate = matmul_rate(256 if bench.tiny else 8192, device=bench.device, dtype=dtype)
        floors = [step_flops(student, teacher, window, PROMPT_LENGTH)["total"] / rate for window in windows[1:]]
        both = [step["prompt"] + step["student"] for step in steps[1:]]  # including the update
        over = statistics.median(mine / floor for mine, floor in zip(both, floors, strict=True))
        unit = f"s at {rate / 1e12:.3g} TFLOP/s"
        bench.report("floor of prompt step and student step", statistics.median(floors), unit)
        bench.report("prompt step and student step over their floor", over)
        bench.measured("step_over_floor", over)
    return seconds


def _trl(bench: Bench, tokenizer: PreTrainedTokenizerBase, windows: Windows, shape: Shape, changes: dict) -> float:
    student, teacher = _models(bench, torch.float32)
    restart_peak(bench.device)
    steps = run_trl(student, teacher, tokenizer, windows, shape, gradient_checkpointing=True, **changes)
    return _report(bench, "TRL's DistillationTrainer", steps, windows, peak_bytes(bench.device))


def _authors(bench: Bench, tokenizer: PreTrainedTokenizerBase, windows: Windows) -> float:
    student, teacher = _models(bench, torch.bfloat16)
    size = 2 if bench.tiny else _AUTHORS_ROWS
    shape = Shape(max_length=64, max_prompt_length=32) if bench.tiny else Shape(max_length=512, max_prompt_length=256)
    first, second = windows[:2]
    parts = [first[:size], *(second[start : start + size] for start in range(0, len(second), size))]
    restart_peak(bench.device)
    steps = run_authors(student, teacher, tokenizer, parts, shape)
    whole = [steps[0], _joined(steps[1:])]  # the first one is not counted
    return _report(bench, "the authors' code", whole, [first[:size], second], peak_bytes(bench.device))


def _joined(steps: Steps) -> dict[str, float]:
    """Several steps counted as one: seconds are summed, losses averaged."""
    sums = {name: sum(step[name] for step in steps) for name in steps[0]}
    return {name: value / len(steps) if name.endswith("loss") else value for name, value in sums.items()}


def _report(bench: Bench, name: str, steps: Steps, windows: Sequence[Any], peak: int | None) -> float:
    """Median seconds per step, without the first step."""
    counted, tokens = steps[1:], [sum(len(row.prompt_ids) + len(row.response_ids) for row in each) for each in windows]
    seconds = statistics.median(step["seconds"] for step in counted)
    metrics: dict[str, Any] = {"seconds per step": seconds}
    metrics |= {part: statistics.median(step[part] for step in counted) for part in ("rollout", "prompt", "student")}
    metrics["tokens/s"] = statistics.median(
        number / step["seconds"] for number, step in zip(tokens[1:], counted, strict=True)
    )
    if peak is not None:
        metrics["peak GB"] = peak / 1e9
    metrics |= {part: counted[-1][part] for part in ("prompt_loss", "student_loss") if part in counted[-1]}
    bench.report(name, metrics)
    return seconds
