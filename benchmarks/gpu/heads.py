"""Part 7: head and divergence, forward and backward, at 8,192 tokens: ours, TRL's, Liger's, plain torch.

The student is trained (float32 states and weights under autocast), and the teacher's head is bfloat16. TRL and Liger
support two distributions, so they are compared only with the student's reverse KL. Liger has no reverse KL, so its
closest divergence is used, β = 0.5.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.clock import median_seconds, peak_bytes, restart_peak
from benchmarks.gpu.bench import Bench
from promptkd.engine import Head, chunked_objective, chunked_prompt_loss
from promptkd.objectives import prompt_loss, reverse_kl

__all__ = ["run"]

Work = Callable[[], Tensor]
"""Computes a loss; its gradients are taken outside."""


def run(bench: Bench) -> None:
    tokens, columns, wide, wider = (48, 512, 24, 32) if bench.tiny else (8192, 151_936, 896, 1536)
    half = torch.bfloat16 if bench.on_cuda else torch.float32

    def normal(*shape: int, dtype: torch.dtype, trained: bool = False) -> Tensor:
        values = torch.randn(*shape, device=bench.device, dtype=dtype) * (1 if shape[0] == tokens else shape[1] ** -0.5)
        return values.requires_grad_(trained)

    student, weight = (normal(rows, wide, dtype=torch.float32, trained=True) for rows in (tokens, columns))
    prompted, plain, theirs = (normal(rows, wider, dtype=half) for rows in (tokens, tokens, columns))
    prompted.requires_grad_()
    head, teacher_head = Head(weight), Head(theirs)

    def ours() -> Tensor:
        return chunked_objective(reverse_kl, (student, head), (prompted.detach(), teacher_head)).total

    def ours_prompt() -> Tensor:
        target = student.detach()
        return chunked_prompt_loss((prompted, teacher_head), (target, head), (plain, teacher_head), weight=0.7).total

    def simple() -> Tensor:
        return reverse_kl(student @ weight.T, (prompted.detach() @ theirs.T).float()).sum()

    def simple_prompt() -> Tensor:
        with torch.no_grad():
            target, away_from = student @ weight.T, plain @ theirs.T
        return prompt_loss((prompted @ theirs.T).float(), target.float(), away_from.float(), weight=0.7).sum()

    found = {
        "reverse KL, ours": _measure(bench, "reverse KL, ours", ours, [student, weight]),
        "prompt loss, ours": _measure(bench, "prompt loss, ours", ours_prompt, [prompted]),
    }
    with bench.attempt("reverse KL, TRL's chunked divergence"):
        name = "reverse KL, TRL's chunked divergence"
        found["trl"] = _measure(bench, name, _trl(student, weight, prompted, theirs), [student, weight])
    if find_spec("liger_kernel") is None:
        bench.skip("JSD, Liger's", "liger-kernel is not installed")
    else:
        with bench.attempt("JSD, Liger's"):
            _measure(bench, "JSD, Liger's", _liger(student, weight, prompted, theirs), [student, weight])
    with bench.attempt("reverse KL, plain torch"):
        _measure(bench, "reverse KL, plain torch", simple, [student, weight])
    with bench.attempt("prompt loss, plain torch"):
        _measure(bench, "prompt loss, plain torch", simple_prompt, [prompted])
    if "trl" in found:
        _compare(bench, found["reverse KL, ours"], found["trl"])


def _measure(bench: Bench, name: str, work: Work, learned: list[Tensor]) -> tuple[float, int | None]:
    """Median seconds of forward and backward, and the peak beyond the memory in use before."""

    def both() -> None:
        with bench.autocast():
            loss = work()
        torch.autograd.grad(loss, learned)

    standing = torch.cuda.memory_allocated(bench.device) if bench.on_cuda else 0
    restart_peak(bench.device)
    seconds = median_seconds(both, bench.device, 5)
    peak = peak_bytes(bench.device)
    beyond = None if peak is None else peak - standing
    metrics = {"ms": 1e3 * seconds}
    if beyond is not None:
        metrics["GB beyond inputs"] = beyond / 1e9
    with torch.no_grad(), bench.autocast():
        metrics["loss per token"] = float(work()) / len(learned[0])
    bench.report(name, metrics)
    return seconds, beyond


def _compare(bench: Bench, ours: tuple[float, int | None], trl: tuple[float, int | None]) -> None:
    bench.report("seconds over TRL's", ours[0] / trl[0])
    bench.measured("head_seconds", ours[0] / trl[0])
    if ours[1] is None or trl[1] is None:
        bench.skip("memory over TRL's")
        return
    bench.report("memory over TRL's", ours[1] / trl[1])
    bench.measured("head_memory", ours[1] / trl[1])


def _trl(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Work:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    mask = torch.ones(1, len(student), device=student.device)
    target = teacher.detach()[None]

    def work() -> Tensor:
        loss, _, _ = _chunked_divergence_loss(
            student[None], target, weight, teacher_weight, mask, beta=1.0, num_items_in_batch=1
        )
        return loss

    return work


def _liger(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Work:
    from liger_kernel.transformers import LigerFusedLinearJSD

    divergence = LigerFusedLinearJSD(jsd_beta=0.5)
    dtype, target, tokens = teacher.dtype, teacher.detach(), len(student)
    # it multiplies in the precision of its inputs, and divides by the number of tokens
    return lambda: divergence(student.to(dtype), weight.to(dtype), target, teacher_weight) * tokens
