"""Part 9: one PromptKD step under torch's profiler: time by kind of kernel, and how often the host waits.

It uses half the rows of part 8 in two micro-batches, and short responses, because processing a profile of thousands of
kernels takes long.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import TrainerCallback

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.shapes import lengths_around, qwen, random_rows, vocabulary_of, words
from benchmarks.gpu.watched import PHASES, watched_trainer
from benchmarks.variants import run_ours
from benchmarks.workload import Shape

__all__ = ["kind_of_kernel", "run"]

_STEPS = 3
"""Only the last step is profiled."""
_MICRO_BATCHES = 2
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense")
"""Calls in which the host waits. On any device, `.item()`, `float()` and `.tolist()` of one number end in the last."""
_KINDS = (
    ("attention", r"flash|fmha|attention|attn"),
    ("gemm", r"gemm|gemv|cutlass|nvjet|xmma|::mm|addmm|bmm|matmul|::linear|mkldnn|sm\d+_"),
    ("copies and fills", r"memcpy|memset|copy|fill|::cat|zero"),
    ("optimizer", r"adam|multi_tensor|foreach"),
    ("triton", r"triton|_rows$"),
    ("reductions", r"reduce|softmax|::sum|norm|scan|cumsum|sort"),
    ("element by element", r"elementwise|vectorized|index|gather|scatter|::mul|::add|::sub|::div|silu|where"),
)


def run(bench: Bench) -> None:
    rows, mean = (4, 8) if bench.tiny else (16, 64)
    prompts, responses = (lengths_around(mean, rows * _STEPS, seed=seed) for seed in (0, 1))
    made = random_rows(prompts, responses, vocabulary_of(bench))
    half = torch.bfloat16 if bench.on_cuda else torch.float32
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.on_cuda else [])]
    profiler = profile(activities=activities, acc_events=True)
    run_ours(
        qwen("0.5B", bench, torch.float32),
        qwen("1.5B", bench, half),
        words(vocabulary_of(bench)),
        [made[start : start + rows] for start in range(0, len(made), rows)],
        Shape(max_length=4 * mean, max_prompt_length=2 * mean, batch_size=rows // _MICRO_BATCHES),
        trainer_class=watched_trainer(_range),
        callbacks=[_LastStep(profiler)],
        use_cpu=not bench.on_cuda,
        bf16=bench.on_cuda,
        gradient_accumulation_steps=_MICRO_BATCHES,
    )
    events = profiler.events()
    _report_kernels(bench, events)
    _report_waits(bench, events)


class _LastStep(TrainerCallback):
    """Profiles the last step."""

    def __init__(self, profiler: profile):
        self._profiler = profiler

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == _STEPS - 1:
            self._profiler.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == _STEPS:
            self._profiler.stop()


def _range(phase: str) -> record_function:
    return record_function(f"promptkd {phase}")


def kind_of_kernel(name: str) -> str:
    """The kind of a kernel, or of an operator on a CPU, by its name."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def _report_kernels(bench: Bench, events: Iterable[Any]) -> None:
    spent: dict[str, float] = defaultdict(float)
    longest: dict[str, float] = defaultdict(float)
    for event in events:
        if event.is_user_annotation or event.name.startswith(("promptkd ", "ProfilerStep")):
            continue  # a range of kernels, which count themselves
        if bench.on_cuda and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        seconds = (event.time_range.elapsed_us() if bench.on_cuda else event.self_cpu_time_total) / 1e6
        spent[kind_of_kernel(event.name)] += seconds
        longest[event.name[:80]] += seconds
    total = sum(spent.values())
    bench.report("time of all kernels" if bench.on_cuda else "time of all operators", total, "s")
    shares = {kind: seconds / total for kind, seconds in sorted(spent.items(), key=lambda each: -each[1])}
    bench.report("shares by kind", shares)
    bench.report("the longest", dict(sorted(longest.items(), key=lambda each: -each[1])[:12]), "s")


def _report_waits(bench: Bench, events: Sequence[Any]) -> None:
    """Host waits by phase and per micro-batch, each counted for the innermost phase that contains it."""
    ranges = [event for event in events if event.name.startswith("promptkd ") and _on_host(event)]
    counts: dict[str, dict[str, int]] = {phase: dict.fromkeys(_WAITS, 0) for phase in (*PHASES, "between")}
    for event in events:
        if event.name not in _WAITS:
            continue
        around = [
            each
            for each in ranges
            if each.time_range.start <= event.time_range.start and event.time_range.end <= each.time_range.end
        ]
        innermost = min(around, key=lambda each: each.time_range.elapsed_us(), default=None)
        counts["between" if innermost is None else innermost.name.removeprefix("promptkd ")][event.name] += 1
    if not bench.on_cuda:
        bench.skip("cudaStreamSynchronize and its like")
    for phase, found in counts.items():
        share = _MICRO_BATCHES if phase in ("prompt", "student") else 1
        each = {name: count / share for name, count in found.items() if count}
        what = "in a micro-batch of" if share > 1 else "in"
        bench.report(f"waits {what} {phase}", each or "none")


def _on_host(event: Any) -> bool:
    return event.device_type == torch.autograd.DeviceType.CPU
