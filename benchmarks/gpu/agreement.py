"""Part 3: the engine's packed states and gradients, and a few trainer steps, against the reference.

States and gradients are compared with float64 on the CPU. In bfloat16 the engine's error may be as large as that of the
reference in the same precision on the same device, and a little larger, because both round, but in different orders.
"""

import copy
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.shapes import random_rows, sharp_model, words
from promptkd import PromptKDConfig, PromptKDTrainer
from promptkd.data.batch import TokenBatch, right_pad
from promptkd.data.encode import EncodedData
from promptkd.engine import engine_for, response_hidden
from promptkd.engine.resolve import VARIABLE, first_verified
from promptkd.methods import Method
from promptkd.models.adapters import SoftPromptFactory
from promptkd.objectives import reverse_kl
from promptkd.responses import Responses
from promptkd.training.callbacks import quiet

__all__ = ["reference_engine", "run"]

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2, biases": ("qwen2", {}),
    "llama, 4 heads on 2 keys": ("llama", {"num_key_value_heads": 2}),
    "qwen3, norms of queries and keys": ("qwen3", {"num_key_value_heads": 2}),
    "mistral, window of 8": ("mistral", {"num_key_value_heads": 2, "sliding_window": 8}),
    "gemma2, soft caps": ("gemma2", {"query_pre_attn_scalar": 8, "sliding_window": 8, "final_logit_softcapping": 6.0}),
}
_FALLS_BACK = {"gemma2, soft caps"}
"""On CUDA, because varlen attention has no soft cap."""
_EXACT = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (0.02, 0.05)}
"""Relative errors of states and of gradients that pass whatever the reference's errors are."""
_WORSE_THAN_REFERENCE = 1.5
STEP_SUMS = ("student_kl", "prompt_kl", "prompt_regularizer", "entropy")


@contextmanager
def reference_engine() -> Iterator[None]:
    """Every model runs with the reference engine in the body."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "reference"
    try:
        yield
    finally:
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before


def run(bench: Bench) -> None:
    modes = [torch.float32, torch.bfloat16] if bench.on_cuda else [torch.float32]
    for name, (architecture, settings) in MODELS.items():
        model = sharp_model(architecture, bench, **settings)
        for mode in modes:
            _compare_states(bench, name, model, mode)
    for bfloat16 in [False, True] if bench.on_cuda else [False]:
        _compare_steps(bench, bfloat16=bfloat16)


def _compare_states(bench: Bench, name: str, model: PreTrainedModel, mode: torch.dtype) -> None:
    """Without and with a soft prompt."""
    kind = str(mode).removeprefix("torch.")
    autocast = torch.autocast(bench.device.type, dtype=torch.bfloat16, enabled=mode == torch.bfloat16)
    with autocast:
        way = first_verified(engine_for(bench.device).scorers, model).name
    if bench.on_cuda and mode == torch.bfloat16:
        padded = way == "padded rows"
        bench.check(f"{name}: which scorer runs it", padded == (name in _FALLS_BACK), way)
    wide = copy.deepcopy(model).to("cpu", torch.float64)
    prompt = torch.randn(5, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    for vectors in (None, prompt):
        with reference_engine():
            exact = _states(wide, _batch(torch.device("cpu")), vectors)
            with autocast:
                reference = _states(model, _batch(bench.device), vectors)
        with autocast:
            ours = _states(model, _batch(bench.device), vectors)
        errors = [_distance(*each) for each in zip(ours, exact, strict=True)]
        usual = [_distance(*each) for each in zip(reference, exact, strict=True)]
        what = f"{name}, {kind}{'' if vectors is None else ', soft prompt'}"
        for part, error, other, limit in zip(("states", "gradients"), errors, usual, _EXACT[mode], strict=True):
            right = error <= max(limit, _WORSE_THAN_REFERENCE * other)
            bench.check(f"{part} of {what}", right, f"{error:.1e}, the reference {other:.1e}; run by {way}")


def _batch(device: torch.device) -> TokenBatch:
    rows = random_rows([3, 40, 17, 1, 25], [12, 30, 0, 9, 21], 320, seed=2)
    return right_pad([row.prompt_ids for row in rows], [row.response_ids for row in rows], device=device)


def _states(model: PreTrainedModel, batch: TokenBatch, vectors: Tensor | None) -> tuple[Tensor, Tensor]:
    """States that predict the responses, and all gradients of a sum over them in one vector; float64 on the CPU."""
    prompt = None if vectors is None else vectors.to(model.device, model.dtype).requires_grad_()
    learned = [*model.base_model.parameters(), *([] if prompt is None else [prompt])]
    hidden = response_hidden(model, batch, prompt)
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3)).to(hidden)
    gradients = torch.autograd.grad((hidden * direction).sum(), learned, allow_unused=True)
    flat = [each.flatten().double().cpu() for each in gradients if each is not None]
    return hidden.detach().double().cpu(), torch.cat(flat)


def _distance(got: Tensor, expected: Tensor) -> float:
    found = float((got - expected).norm() / expected.norm())
    return math.inf if math.isnan(found) else found


def _compare_steps(bench: Bench, *, bfloat16: bool) -> None:
    """Compare the losses of three PromptKD steps on the device with those of the float32 reference on the CPU."""
    kind = "bfloat16" if bfloat16 else "float32"
    limit = 0.02 if bfloat16 else 1e-3 if bench.on_cuda else 1e-5
    cpu = Bench(torch.device("cpu"), bench.tiny, bench.ends, bench.send)
    ours = _steps(bench, bfloat16=bfloat16)
    with reference_engine():
        expected = _steps(cpu, bfloat16=False)
    for index, (mine, other) in enumerate(zip(ours, expected, strict=True)):
        gaps = {name: abs(mine[name] - other[name]) / abs(other[name]) for name in STEP_SUMS}
        worst = max(gaps, key=lambda name: gaps[name])
        detail = f"{worst} {mine[worst]:.6g}, expected {other[worst]:.6g}; limit {limit:.0e}"
        bench.check(f"step {index + 1} in {kind}", all(gap <= limit for gap in gaps.values()), detail)
        bench.report(f"step {index + 1} in {kind}", {name: mine[name] for name in STEP_SUMS})


def _steps(bench: Bench, *, bfloat16: bool) -> list[dict[str, float]]:
    """The log entries of three steps."""
    student = sharp_model("qwen2", bench, seed=1, num_key_value_heads=2)
    teacher = sharp_model("qwen2", bench, seed=2, num_key_value_heads=2, num_hidden_layers=3)
    rows = random_rows([5, 30, 12, 8] * 3, [20, 7, 12, 16] * 3, 310, seed=4)
    with tempfile.TemporaryDirectory() as folder:
        config = PromptKDConfig(
            folder,
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_prompt_length=64,
            max_completion_length=64,
            learning_rate=1e-3,
            prompt_learning_rate=1e-2,
            lr_scheduler_type="constant",
            shuffle_dataset=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not bench.on_cuda,
            bf16=bfloat16,
        )
        trainer = PromptKDTrainer(
            student,
            teacher,
            config,
            train_dataset=EncodedData(rows, 0),
            processing_class=words(310),
            method=Method(Responses(), reverse_kl, SoftPromptFactory),
        )
        quiet(trainer)
        trainer.train()
    return [entry for entry in trainer.state.log_history if "student_kl" in entry]
