"""Triton kernels of the chunked losses, to take the place of the hand-written ones in `promptkd.objectives.kernels`.

Same calls, same results, and like them for logits that are finite everywhere (a logit of -inf gives NaN). In float32
alone, each row read twice and written once; what is computed, and how exactly, is told in `row_programs.py`. The plain
kernels stay the reference (tests/engine/test_triton_kernels.py).

Importing this module needs Triton, which torch brings along on CUDA.
"""

from typing import Any

import torch
from torch import Tensor

from promptkd.engine.cuda.row_programs import cross_entropy_rows, forward_kl_rows, reverse_kl_rows
from promptkd.objectives.kernels import Kernel, Kernels

__all__ = ["KERNELS", "cross_entropy_kernel", "forward_kl_kernel", "prompt_kernel", "reverse_kl_kernel"]

# A load of 16 bytes per thread and model. With three models a thread needs 64 registers (sm_90), so that four programs
# run per multiprocessor and 48 KB of loads are in flight there, more than the memory's latency asks for.
_BLOCK, _WARPS = 1024, 8


def reverse_kl_kernel(logits: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """KL(q || p), q of `logits`, p of `target`: d/dz = q (log q - log p - KL).

    Args:
        logits: (C, V) float32, finite, rows of any stride. The gradient is written over it.
        target: like `logits`; only read.

    Returns:
        The values (C,) in nats, and the figure "entropy" (C,) of q.

    Raises:
        ValueError: for another dtype, differing shapes or devices, or rows that are not contiguous.
    """
    values, _, entropy = _reverse_kl(logits, 0.0, target=target)
    return values, {"entropy": entropy}


def forward_kl_kernel(logits: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """KL(p || q), q of `logits`, p of `target`: d/dz = q - p. All else as in `reverse_kl_kernel`."""
    _check(logits, target=target)
    values, entropy = _per_row(logits), _per_row(logits)
    strides = logits.stride(0), target.stride(0)
    _launch(forward_kl_rows, logits, target, values, entropy, *strides)
    return values, {"entropy": entropy}


def cross_entropy_kernel(logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """-log q(y), q of `logits`: d/dz = q - [y].

    Args:
        logits: (C, V) float32, finite, rows of any stride. The gradient is written over it.
        labels: (C,) the tokens y, integers in 0 … V - 1, which is not checked: a check would wait for the device.

    Returns:
        The values (C,) in nats, and the figure "entropy" (C,) of q.

    Raises:
        ValueError: for another dtype, another number of labels, or rows that are not contiguous.
    """
    _check(logits)
    if labels.shape != logits.shape[:1] or labels.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"`labels` must be int32 or int64 of shape (C,) = ({len(logits)},). "
            f"Got {labels.dtype} of shape {tuple(labels.shape)}."
        )
    values, entropy = _per_row(logits), _per_row(logits)
    _launch(cross_entropy_rows, logits, labels.contiguous(), values, entropy, logits.stride(0))
    return values, {"entropy": entropy}


def prompt_kernel(weight: float) -> Kernel:
    """KL(p || q) + λ KL(p || p0), λ = `weight`: a kernel of the logits of p, of q and (optional) of p0.

    d/dz = p (g - Σ p g), g = (1 + λ) log p - log q - λ log p0. The figures are "to_student" and, with p0, "to_plain",
    both unweighted. Tensors and errors as in `reverse_kl_kernel`.
    """

    def kernel(logits: Tensor, student: Tensor, *plain: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if not plain:
            values, _, _ = _reverse_kl(logits, 0.0, student=student)
            return values, {"to_student": values}
        to_student, to_plain, _ = _reverse_kl(logits, weight, student=student, plain=plain[0])
        return to_student + weight * to_plain, {"to_student": to_student, "to_plain": to_plain}

    return kernel


def _reverse_kl(logits: Tensor, weight: float, **targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL to the first target, to the second (0 without one), and entropy, (C,) each; gradient of the weighted sum."""
    _check(logits, **targets)
    student, plain = (*targets.values(), None)[:2]
    results = _per_row(logits), _per_row(logits), _per_row(logits)
    strides = [0 if each is None else each.stride(0) for each in (logits, student, plain)]
    _launch(reverse_kl_rows, logits, student, plain, float(weight), *results, *strides)
    return results


def _launch(program: Any, logits: Tensor, *arguments: Any) -> None:
    with torch.cuda.device_of(logits):  # Triton launches on the current device, wherever the tensors are
        program[(len(logits),)](logits, *arguments, SIZE=logits.shape[1], BLOCK=_BLOCK, num_warps=_WARPS)


def _per_row(logits: Tensor) -> Tensor:
    return logits.new_empty(len(logits))


def _check(logits: Tensor, **targets: Tensor) -> None:
    for name, each in {"logits": logits, **targets}.items():
        if each.dtype != torch.float32 or each.ndim != 2 or each.stride(1) != 1:
            raise ValueError(
                f"`{name}` must be float32 of shape (C, V), contiguous in V. Got {each.dtype} of shape "
                f"{tuple(each.shape)} with strides {each.stride()}. Convert it, or use promptkd.objectives.kernels."
            )
        if each.shape != logits.shape or each.device != logits.device:
            raise ValueError(
                f"`{name}` must have the shape and device of `logits`, {tuple(logits.shape)} on {logits.device}. "
                f"Got {tuple(each.shape)} on {each.device}. Slice padded heads to the shared vocabulary."
            )


KERNELS = Kernels(reverse_kl_kernel, forward_kl_kernel, cross_entropy_kernel, prompt_kernel)
"""For float32 on CUDA."""
