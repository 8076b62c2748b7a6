# mypy: disallow-untyped-defs=False
"""Triton kernels of the chunked losses: the same calls and results as those in `promptkd.objectives.kernels`.

A program takes one row of float32 logits, finite everywhere, and writes the gradient over it. It reads the row twice,
since a row of 152k logits does not fit on chip: first for log-sum-exps and the mean that centers the gradient of a
reverse KL, then for values and gradient. For a reverse KL to two models it moves 28 bytes per logit, plain torch 168.

Each lane of a block has its own sums, so that only V / BLOCK terms are added one after the other; then the lanes are
added in a tree, once per pass. A log-sum-exp stays a pair, top + log(mass): as one number it would be off by up to 1e-6
at logits around 30, and a KL with it. The log-ratio ((z_p - top_p) - (z_q - top_q)) - log(mass_p / mass_q) has no
rounding at the tops, where p is large, and is exactly 0 for equal inputs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from promptkd.objectives.kernels import Kernel, Kernels, Metrics

# A load of 16 bytes per thread and model. With three models a thread needs 64 registers (sm_90), so four programs run
# per multiprocessor with 48 KB of loads in flight, more than the latency of memory asks for.
_BLOCK, _WARPS = 1024, 8
_LOWEST = tl.constexpr(-3.4e38)  # past the last column; finite, since inf - inf is not a number


def reverse_kl_kernel(logits: Tensor, target: Tensor) -> tuple[Tensor, Metrics]:
    """KL(q || p), q of `logits`, p of `target`: d/dz = q (log q - log p - KL). The metric is the "entropy" of q.

    Both are (C, V) in float32, finite, with contiguous rows of any stride; others raise a ValueError. The gradient is
    written over `logits`.
    """
    values, _, entropy = _reverse_kl(logits, 0.0, target=target)
    return values, {"entropy": entropy}


def forward_kl_kernel(logits: Tensor, target: Tensor) -> tuple[Tensor, Metrics]:
    """KL(p || q), q of `logits`, p of `target`: d/dz = q - p. All else as in `reverse_kl_kernel`."""
    _check(logits, target=target)
    values, entropy = _empty(logits, 2)
    _launch(_forward_kl_rows, logits, target, values, entropy, logits.stride(0), target.stride(0))
    return values, {"entropy": entropy}


def cross_entropy_kernel(logits: Tensor, labels: Tensor) -> tuple[Tensor, Metrics]:
    """-log q(y), q of `logits`, y of `labels`: d/dz = q - [y]. All else as in `reverse_kl_kernel`.

    That the labels (C,) are in 0 … V - 1 is not checked, since a check would wait for the device.
    """
    _check(logits)
    if labels.shape != logits.shape[:1] or labels.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"`labels` must be int32 or int64 of shape (C,) = ({len(logits)},). "
            f"Got {labels.dtype} of shape {tuple(labels.shape)}."
        )
    values, entropy = _empty(logits, 2)
    _launch(_cross_entropy_rows, logits, labels.contiguous(), values, entropy, logits.stride(0))
    return values, {"entropy": entropy}


def prompt_kernel(weight: float) -> Kernel:
    """KL(p || q) + λ KL(p || p0), λ = `weight`: see `objectives.kernels`. All else as in `reverse_kl_kernel`."""

    def kernel(logits: Tensor, student: Tensor, *plain: Tensor) -> tuple[Tensor, Metrics]:
        if not plain:
            values, _, _ = _reverse_kl(logits, 0.0, student=student)
            return values, {"to_student": values}
        to_student, to_plain, _ = _reverse_kl(logits, weight, student=student, plain=plain[0])
        return to_student + weight * to_plain, {"to_student": to_student, "to_plain": to_plain}

    return kernel


def on_policy_kernel(logits: Tensor, labels: Tensor, target: Tensor) -> tuple[Tensor, Metrics]:
    """-A log q(y), A = log p(y) - log q(y), p of `target`: d/dz = A (q - [y]), that of the cross-entropy times A.

    "sampled_kl" is -A. All else as in `cross_entropy_kernel`.
    """
    _check(logits, target=target)
    costs, metrics = cross_entropy_kernel(logits, labels)
    advantages = target.gather(-1, labels[:, None])[:, 0] - target.logsumexp(-1) + costs
    logits.mul_(advantages[:, None])
    return advantages * costs, metrics | {"sampled_kl": -advantages}


def _reverse_kl(logits: Tensor, weight: float, **targets: Tensor) -> tuple[Tensor, ...]:
    """KL to the first target, to the second (0 without one), and entropy, (C,) each; gradient of the weighted sum."""
    _check(logits, **targets)
    student, plain = (*targets.values(), None)[:2]
    results = _empty(logits, 3)
    strides = [0 if each is None else each.stride(0) for each in (logits, student, plain)]
    _launch(_reverse_kl_rows, logits, student, plain, float(weight), *results, *strides)
    return results


def _empty(logits: Tensor, count: int) -> tuple[Tensor, ...]:
    """Tensors (C,), each of its own: rows of one would be aligned otherwise, and Triton would compile for that anew."""
    return tuple(logits.new_empty(len(logits)) for _ in range(count))


def _launch(program: Any, logits: Tensor, *arguments: Any) -> None:
    with torch.cuda.device_of(logits):  # Triton launches on the current device, wherever the tensors are
        program[(len(logits),)](logits, *arguments, SIZE=logits.shape[1], BLOCK=_BLOCK, num_warps=_WARPS)


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


KERNELS = Kernels(reverse_kl_kernel, forward_kl_kernel, cross_entropy_kernel, prompt_kernel, on_policy_kernel)
"""For float32 on CUDA."""


@triton.jit
def _reverse_kl_rows(
    logits,  # (C, V) of the model p that requires grad
    student,  # (C, V) of q
    plain,  # (C, V) of p0, or None
    weight,
    to_student,  # (C,) KL(p || q)
    to_plain,  # (C,) KL(p || p0), 0 without `plain`
    entropy,  # (C,) of p
    stride,
    student_stride,
    plain_stride,
    SIZE: tl.constexpr,  # V
    BLOCK: tl.constexpr,
):
    """KL(p || q) + λ KL(p || p0), λ = `weight`: d/dz = p (g - Σ p g), g = (1 + λ) log p - log q - λ log p0.

    A constant in g changes no gradient. So g is computed from logits, and its mean is known after the first pass.
    """
    token = tl.program_id(0).to(tl.int64)  # times a stride it may exceed 2^31
    logits += token * stride
    student += token * student_stride
    if plain is not None:
        plain += token * plain_stride

    lowest, zero = tl.full((BLOCK,), _LOWEST, tl.float32), tl.zeros((BLOCK,), tl.float32)
    p_top, q_top, plain_top = lowest, lowest, lowest
    p_mass, q_mass, plain_mass, mean = zero, zero, zero, zero
    for start in range(0, SIZE, BLOCK):
        z = _load(logits, start, SIZE, BLOCK)
        z_q = _load(student, start, SIZE, BLOCK)
        g = z - z_q
        if plain is not None:
            z_plain = _load(plain, start, SIZE, BLOCK)
            g += weight * (z - z_plain)
            plain_top, plain_mass, _, _ = _absorb(z_plain, plain_top, plain_mass)
        q_top, q_mass, _, _ = _absorb(z_q, q_top, q_mass)
        p_top, p_mass, old, new = _absorb(z, p_top, p_mass)
        mean = mean * old + new * g
    p_top, p_mass, factors = _merge(p_top, p_mass)
    q_top, q_mass, _ = _merge(q_top, q_mass)
    mean = tl.sum(mean * factors, 0) / p_mass
    log_mass = tl.log(p_mass)
    over_student = tl.log(p_mass / q_mass)
    if plain is not None:
        plain_top, plain_mass, _ = _merge(plain_top, plain_mass)
        over_plain = tl.log(p_mass / plain_mass)

    share = 1.0 / p_mass
    student_sum, plain_sum, entropy_sum = zero, zero, zero
    for start in range(0, SIZE, BLOCK):
        z = _load(logits, start, SIZE, BLOCK)
        z_q = _load(student, start, SIZE, BLOCK)
        g = z - z_q
        below = z - p_top
        p = tl.exp(below) * share
        student_sum += p * ((below - (z_q - q_top)) - over_student)
        entropy_sum += p * (log_mass - below)
        if plain is not None:
            z_plain = _load(plain, start, SIZE, BLOCK)
            g += weight * (z - z_plain)
            plain_sum += p * ((below - (z_plain - plain_top)) - over_plain)
        _store(logits, start, p * (g - mean), SIZE, BLOCK)
    tl.store(to_student + token, tl.sum(student_sum, 0))
    tl.store(to_plain + token, tl.sum(plain_sum, 0))
    tl.store(entropy + token, tl.sum(entropy_sum, 0))


@triton.jit
def _forward_kl_rows(logits, target, values, entropy, stride, target_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """KL(p || q): d/dz = q - p. `logits` of q, which requires grad, `target` of p, (C, V); `entropy` (C,) of q."""
    token = tl.program_id(0).to(tl.int64)
    logits += token * stride
    target += token * target_stride

    lowest, zero = tl.full((BLOCK,), _LOWEST, tl.float32), tl.zeros((BLOCK,), tl.float32)
    q_top, p_top, q_mass, p_mass = lowest, lowest, zero, zero
    for start in range(0, SIZE, BLOCK):
        q_top, q_mass, _, _ = _absorb(_load(logits, start, SIZE, BLOCK), q_top, q_mass)
        p_top, p_mass, _, _ = _absorb(_load(target, start, SIZE, BLOCK), p_top, p_mass)
    q_top, q_mass, _ = _merge(q_top, q_mass)
    p_top, p_mass, _ = _merge(p_top, p_mass)
    log_mass = tl.log(q_mass)
    over = tl.log(p_mass / q_mass)

    q_share, p_share = 1.0 / q_mass, 1.0 / p_mass
    value_sum, entropy_sum = zero, zero
    for start in range(0, SIZE, BLOCK):
        below = _load(logits, start, SIZE, BLOCK) - q_top
        p_below = _load(target, start, SIZE, BLOCK) - p_top
        q = tl.exp(below) * q_share
        p = tl.exp(p_below) * p_share
        value_sum += p * ((p_below - below) - over)
        entropy_sum += q * (log_mass - below)
        _store(logits, start, q - p, SIZE, BLOCK)
    tl.store(values + token, tl.sum(value_sum, 0))
    tl.store(entropy + token, tl.sum(entropy_sum, 0))


@triton.jit
def _cross_entropy_rows(logits, labels, values, entropy, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """-log q(y): d/dz = q - [y]. `logits` (C, V) and `entropy` (C,) of q, which requires grad."""
    token = tl.program_id(0).to(tl.int64)
    logits += token * stride
    label = tl.load(labels + token)
    z_label = tl.load(logits + label)  # before the gradient takes its place

    top, mass = tl.full((BLOCK,), _LOWEST, tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, SIZE, BLOCK):
        top, mass, _, _ = _absorb(_load(logits, start, SIZE, BLOCK), top, mass)
    top, mass, _ = _merge(top, mass)
    log_mass = tl.log(mass)
    tl.store(values + token, log_mass - (z_label - top))

    share = 1.0 / mass
    entropy_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, SIZE, BLOCK):
        below = _load(logits, start, SIZE, BLOCK) - top
        q = tl.exp(below) * share
        entropy_sum += q * (log_mass - below)
        is_label = start + tl.arange(0, BLOCK) == label
        _store(logits, start, q - tl.where(is_label, 1.0, 0.0), SIZE, BLOCK)
    tl.store(entropy + token, tl.sum(entropy_sum, 0))


@triton.jit
def _load(row, start, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK logits. Only the last block is masked: a mask that ends at an odd column splits every load in four."""
    columns = start + tl.arange(0, BLOCK)
    if start + BLOCK <= SIZE:
        logits = tl.load(row + columns)
    else:
        logits = tl.load(row + columns, mask=columns < SIZE, other=_LOWEST)
    return logits


@triton.jit
def _store(row, start, values, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    columns = start + tl.arange(0, BLOCK)
    if start + BLOCK <= SIZE:
        tl.store(row + columns, values)
    else:
        tl.store(row + columns, values, mask=columns < SIZE)


@triton.jit
def _absorb(z, top, mass):
    """Every lane's log-sum-exp with one more logit; and factors for a sum of exp(z - top) x: sum * old + new * x."""
    fall = tl.exp(-tl.abs(z - top))
    higher = z > top
    old = tl.where(higher, fall, 1.0)
    new = tl.where(higher, 1.0, fall)
    return tl.maximum(z, top), mass * old + new, old, new


@triton.jit
def _merge(top, mass):
    """The log-sum-exp of all lanes, and the factor by which each lane's sums count."""
    peak = tl.max(top, 0)
    factors = tl.exp(top - peak)
    return peak, tl.sum(mass * factors, 0), factors
