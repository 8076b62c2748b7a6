# mypy: disallow-untyped-defs=False
"""Triton programs that take one row of logits each, for `kernels.py`: values, and the gradient over the logits.

A program walks over its row twice, since a row of 152k logits does not fit on chip, and the rows that run at the same
time do not fit into the L2 cache:

1. log-sum-exps, and the mean that centers the gradient of a reverse KL;
2. values and gradient.

Bytes moved per logit in float32 (plain torch moves 168 for a reverse KL to two models):

| program | first pass | second pass | gradient | all |
|---|---|---|---|---|
| reverse KL to two models | 12 | 12 | 4 | 28 |
| reverse KL to one, forward KL | 8 | 8 | 4 | 20 |
| cross-entropy | 4 | 4 | 4 | 12 |

All arithmetic is float32. Every lane of a block has its own sums, so that only V / BLOCK terms are added one after the
other; then the lanes meet in a tree, once per pass. A log-sum-exp stays a pair, top + log(mass): as one number it would
be off by up to 1e-6 at logits around 30, and a KL with it. A log-ratio is

    log p - log q = ((z_p - top_p) - (z_q - top_q)) - log(mass_p / mass_q),

which has no rounding at the tops, where p is large, and is exactly 0 for equal inputs.
"""

import triton
import triton.language as tl

__all__ = ["cross_entropy_rows", "forward_kl_rows", "reverse_kl_rows"]

_LOWEST = tl.constexpr(-3.4e38)  # what stands after the last column; finite, since inf - inf is not a number


@triton.jit
def reverse_kl_rows(
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

    A constant in g changes nothing in the gradient. So g is taken from the logits as they are, and its mean is known
    after the first pass.
    """
    token = tl.program_id(0).to(tl.int64)  # times a stride it may exceed 2^31
    logits += token * stride
    student += token * student_stride
    if plain is not None:
        plain += token * plain_stride

    p_top = tl.full((BLOCK,), _LOWEST, tl.float32)
    q_top = p_top
    plain_top = p_top
    p_mass = tl.zeros((BLOCK,), tl.float32)
    q_mass = p_mass
    plain_mass = p_mass
    mean = p_mass
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
    student_sum = tl.zeros((BLOCK,), tl.float32)
    plain_sum = student_sum
    entropy_sum = student_sum
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
def forward_kl_rows(
    logits,  # (C, V) of the model q that requires grad
    target,  # (C, V) of p
    values,  # (C,) KL(p || q)
    entropy,  # (C,) of q
    stride,
    target_stride,
    SIZE: tl.constexpr,  # V
    BLOCK: tl.constexpr,
):
    """KL(p || q): d/dz = q - p."""
    token = tl.program_id(0).to(tl.int64)
    logits += token * stride
    target += token * target_stride

    q_top = tl.full((BLOCK,), _LOWEST, tl.float32)
    p_top = q_top
    q_mass = tl.zeros((BLOCK,), tl.float32)
    p_mass = q_mass
    for start in range(0, SIZE, BLOCK):
        q_top, q_mass, _, _ = _absorb(_load(logits, start, SIZE, BLOCK), q_top, q_mass)
        p_top, p_mass, _, _ = _absorb(_load(target, start, SIZE, BLOCK), p_top, p_mass)
    q_top, q_mass, _ = _merge(q_top, q_mass)
    p_top, p_mass, _ = _merge(p_top, p_mass)
    log_mass = tl.log(q_mass)
    over = tl.log(p_mass / q_mass)

    q_share = 1.0 / q_mass
    p_share = 1.0 / p_mass
    value_sum = tl.zeros((BLOCK,), tl.float32)
    entropy_sum = value_sum
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
def cross_entropy_rows(
    logits,  # (C, V) of the model q that requires grad
    labels,  # (C,)
    values,  # (C,) -log q(y)
    entropy,  # (C,) of q
    stride,
    SIZE: tl.constexpr,  # V
    BLOCK: tl.constexpr,
):
    """-log q(y): d/dz = q - [y]."""
    token = tl.program_id(0).to(tl.int64)
    logits += token * stride
    label = tl.load(labels + token)
    z_label = tl.load(logits + label)  # before the gradient takes its place

    top = tl.full((BLOCK,), _LOWEST, tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
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
    """BLOCK logits from column `start` on. The last block alone has a mask: one that ends at an odd column makes every
    load of 16 bytes four of 4."""
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
    """Every lane's log-sum-exp with one more logit, at one exponential.

    The last two results keep a sum of exp(z - top) x up to date: sum * old + new * x.
    """
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
