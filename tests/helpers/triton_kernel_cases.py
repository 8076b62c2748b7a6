"""The Triton kernels against float64 and the plain kernels; `test_triton_kernels.py` runs this file in a process.

With TRITON_INTERPRET=1 on the CPU, else on the GPU.
"""

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from promptkd.engine.cuda import triton_kernels as kernels
from promptkd.objectives.kernels import PLAIN_KERNELS

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
LAMBDA = 0.6


def entropy(z):
    return -(z.log_softmax(-1).exp() * z.log_softmax(-1)).sum(-1)


def cross_entropy(z, y):
    return -z.log_softmax(-1).gather(-1, y[:, None])[:, 0]


def kl(z_a, z_b):
    log_a, log_b = z_a.log_softmax(-1), z_b.log_softmax(-1)
    return (log_a.exp() * (log_a - log_b)).sum(-1)


class Case(NamedTuple):
    kernel: Callable[..., Any]
    plain: Callable[..., Any]
    targets: int
    """Logits that the kernel compares with; 0 stands for labels."""
    value: Callable[..., Any]
    figures: dict[str, Callable[..., Any]]


def prompt_case(weight, targets):
    written = PLAIN_KERNELS.prompt(weight)
    figures = {"to_student": lambda z, q, *p0: kl(z, q), "to_plain": lambda z, q, *p0: kl(z, *p0)}
    if targets == 1:
        del figures["to_plain"]
    value = lambda z, q, *p0: kl(z, q) + (weight * kl(z, *p0) if p0 else 0)  # noqa: E731
    return Case(kernels.prompt_kernel(weight), written, targets, value, figures)


OF_ENTROPY = {"entropy": lambda z, *_: entropy(z)}
CASES = {
    "reverse_kl": Case(kernels.reverse_kl_kernel, PLAIN_KERNELS.reverse_kl, 1, kl, OF_ENTROPY),
    "forward_kl": Case(
        kernels.forward_kl_kernel,
        PLAIN_KERNELS.forward_kl,
        1,
        lambda z, p: kl(p, z),
        OF_ENTROPY,
    ),
    "cross_entropy": Case(kernels.cross_entropy_kernel, PLAIN_KERNELS.cross_entropy, 0, cross_entropy, OF_ENTROPY),
    "prompt": prompt_case(LAMBDA, 2),
    "prompt, λ = 0": prompt_case(0.0, 2),
    "prompt, λ = 1": prompt_case(1, 2),
    "prompt without plain": prompt_case(0.0, 1),
}


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def inputs(case, rows, size, *, spread=3.0, gap=1.0, offset=0.0, seed=0):
    """Logits around 20 and what they are compared with: `offset` higher, and `gap` apart otherwise; or labels."""
    logits = spread * random(rows, size, seed=seed) + 20
    if case.targets == 0:
        return logits, [torch.arange(rows, device=DEVICE) * (size - 1) // max(1, rows - 1)]
    return logits, [logits + gap * random(rows, size, seed=seed + 1 + each) + offset for each in range(case.targets)]


def padded(logits, stride):
    """The same rows inside of wider ones, beyond whose end stands NaN."""
    wide = torch.full((len(logits), stride), torch.nan, device=logits.device)
    wide[:, : logits.shape[1]] = logits
    return wide[:, : logits.shape[1]]


def expected(case, logits, targets):
    """Values, figures and gradient in float64, the gradient by autograd."""
    wide = logits.double().requires_grad_()
    others = [each.double() if each.is_floating_point() else each for each in targets]
    values = case.value(wide, *others)
    (gradient,) = torch.autograd.grad(values.sum(), wide)
    return values.detach(), {name: each(wide.detach(), *others) for name, each in case.figures.items()}, gradient


def assert_right(case, logits, targets, *, atol=1e-6, rtol=1e-6, per_row=5e-6):
    """The kernel gives what float64 gives; `per_row` bounds the summed error of a row's gradient."""
    values, figures, gradient = expected(case, logits, targets)
    kept = [each.clone() for each in targets]
    ours, seen = case.kernel(logits, *targets)
    assert ours.dtype == torch.float32
    assert seen.keys() == figures.keys()
    torch.testing.assert_close(ours.double(), values, rtol=rtol, atol=atol)
    for name in figures:
        torch.testing.assert_close(seen[name].double(), figures[name], rtol=rtol, atol=atol)
    assert (logits - gradient).abs().sum(-1).max() < per_row
    for target, before in zip(targets, kept, strict=True):
        assert torch.equal(target, before)


SIZES = [1, 97, 1000, 1024, 2049, 3 * 1024 + 1]  # below, at and above whole blocks


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_values_figures_and_gradients_equal_float64(name, size):
    assert_right(CASES[name], *inputs(CASES[name], 2, size))


@pytest.mark.parametrize(("name", "size"), [("forward_kl", 49_152), ("cross_entropy", 151_665), ("prompt", 49_152)])
def test_vocabularies_of_real_models(name, size):
    assert_right(CASES[name], *inputs(CASES[name], 1, size))


@pytest.mark.parametrize(("size", "offset"), [(1, 0.0), (97, 0.0), (1024, 15.0), (2049, -15.0)])
def test_the_policy_gradient_of_sampled_tokens_equals_float64(size, offset):
    logits, (target,) = inputs(CASES["reverse_kl"], 3, size, offset=offset)
    labels, kept = torch.tensor([0, size // 2, size - 1], device=DEVICE), target.clone()
    wide = logits.double().requires_grad_()
    cost, advantage = cross_entropy(wide, labels), cross_entropy(wide.detach(), labels)
    advantage = advantage - cross_entropy(target.double(), labels)
    (gradient,) = torch.autograd.grad((advantage * cost).sum(), wide)
    values, figures = kernels.on_policy_kernel(logits, labels, target)
    torch.testing.assert_close(values.double(), (advantage * cost).detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(figures["sampled_kl"].double(), -advantage, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(figures["entropy"].double(), entropy(wide.detach()), rtol=1e-6, atol=1e-6)
    assert (logits - gradient).abs().sum(-1).max() < 5e-5
    assert torch.equal(target, kept)


@pytest.mark.parametrize("offset", [-15.0, 15.0])
@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "prompt"])
def test_models_whose_logits_lie_apart(name, offset):
    """Only differences within a model count; a log-sum-exp as one number of 40 would be off by 2e-6."""
    assert_right(CASES[name], *inputs(CASES[name], 2, 4099, offset=offset))


@pytest.mark.parametrize("stride", [1024, 1001])
@pytest.mark.parametrize("name", CASES)
def test_rows_of_padded_heads(name, stride):
    """The padding is neither read nor written, be the rows aligned or not."""
    case = CASES[name]
    logits, targets = inputs(case, 3, 1000)
    logits = padded(logits, stride)
    targets = [padded(each, stride + 64) if each.is_floating_point() else each for each in targets]
    assert_right(case, logits, targets)
    assert logits._base[:, 1000:].isnan().all()


@pytest.mark.parametrize("name", CASES)
def test_the_plain_kernels_agree(name):
    case = CASES[name]
    logits, targets = inputs(case, 4, 1500)
    other = logits.clone()
    ours, seen = case.kernel(logits, *targets)
    theirs, figures = case.plain(other, *targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen, figures, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, other, rtol=1e-4, atol=1e-6)


def literal_log_softmax(row):
    top = max(row)
    total = math.fsum(math.exp(z - top) for z in row)
    return [z - top - math.log(total) for z in row]


def literal_kl(row_a, row_b):
    log_a, log_b = literal_log_softmax(row_a), literal_log_softmax(row_b)
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(log_a, log_b, strict=True))


def test_literal_loops():
    logits, targets = inputs(CASES["prompt"], 3, 97)
    rows = [each.tolist() for each in (logits, *targets)]
    student = [literal_kl(p, q) for p, q in zip(rows[0], rows[1], strict=True)]
    away = [literal_kl(p, p0) for p, p0 in zip(rows[0], rows[2], strict=True)]
    back = [literal_kl(q, p) for p, q in zip(rows[0], rows[1], strict=True)]
    entropies = [-math.fsum(math.exp(a) * a for a in literal_log_softmax(p)) for p in rows[0]]
    surprise = [-literal_log_softmax(p)[7] for p in rows[0]]
    values, figures = kernels.prompt_kernel(LAMBDA)(logits.clone(), *targets)
    assert figures["to_student"].tolist() == pytest.approx(student, abs=1e-6)
    assert figures["to_plain"].tolist() == pytest.approx(away, abs=1e-6)
    assert values.tolist() == pytest.approx([a + LAMBDA * b for a, b in zip(student, away, strict=True)], abs=1e-6)
    values, figures = kernels.forward_kl_kernel(logits.clone(), targets[0])
    assert values.tolist() == pytest.approx(back, abs=1e-6)
    assert figures["entropy"].tolist() == pytest.approx(entropies, abs=1e-6)
    values, _ = kernels.cross_entropy_kernel(logits.clone(), torch.full((3,), 7, device=DEVICE))
    assert values.tolist() == pytest.approx(surprise, abs=1e-6)


def test_by_hand():
    """q = (1/4, 3/4), p = (1/2, 1/2): KL(q || p) = ln 2 - H(q), and d/dz_1 = q_1 q_2 (ln q_1 - ln q_2)."""
    logits = torch.tensor([[0.0, math.log(3)]], device=DEVICE)
    values, figures = kernels.reverse_kl_kernel(logits, torch.zeros(1, 2, device=DEVICE))
    h = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    assert values.item() == pytest.approx(math.log(2) - h, abs=1e-7)
    assert figures["entropy"].item() == pytest.approx(h, abs=1e-7)
    slope = 3 / 16 * math.log(1 / 3)
    assert logits.tolist()[0] == pytest.approx([slope, -slope], abs=1e-7)


@pytest.mark.parametrize("scale", [3.0, 1e4])
@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "prompt"])
def test_equal_inputs_give_zero(name, scale):
    logits = scale * random(2, 3000, seed=0)
    targets = [logits.clone() for _ in range(CASES[name].targets)]
    values, _ = CASES[name].kernel(logits, *targets)
    torch.testing.assert_close(values, torch.zeros_like(values), rtol=0, atol=1e-7)
    torch.testing.assert_close(logits, torch.zeros_like(logits), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "prompt"])
@pytest.mark.parametrize("gap", [1e-4, 1e-2])
def test_a_kl_of_nearly_equal_models_has_no_bias(name, gap):
    """The mean signed error is below 1e-7 nats, and no value is negative beyond its rounding."""
    case = CASES[name]
    logits, targets = inputs(case, 8, 4096, gap=gap)
    values, _, _ = expected(case, logits, targets)
    ours, _ = case.kernel(logits, *targets)
    assert (ours - values).mean().abs() < 1e-7
    assert ours.min() > -3e-7


@pytest.mark.parametrize("name", CASES)
def test_extreme_logits(name):
    case = CASES[name]
    logits, targets = inputs(case, 4, 1100, spread=0.0)
    for tensor, columns in zip((logits, *targets), ((5, 1050), (7, 1050), (1050, 5)), strict=False):
        if tensor.is_floating_point():
            tensor.fill_(-1e4)
            tensor[0, columns[0]] = 1e4  # one-hot
            tensor[1, list(columns)] = 1e4  # between two
            tensor[2] = 1e4  # uniform
            tensor[3] = 1e4 * torch.linspace(-1, 1, 1100)
    assert_right(case, logits, targets, rtol=1e-6, atol=1e-5, per_row=3e-3)  # 1e-7 of logits of 1e4


def test_one_hot_equals_the_label():
    """KL to a one-hot p is the cross-entropy of its label, gradient included."""
    logits = 3 * random(3, 1500, seed=0)
    labels = torch.tensor([0, 1023, 1499], device=DEVICE)
    target = torch.zeros_like(logits).scatter_(1, labels[:, None], 1e4)
    other = logits.clone()
    values, _ = kernels.forward_kl_kernel(logits, target)
    theirs, _ = kernels.cross_entropy_kernel(other, labels.int())
    torch.testing.assert_close(values, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits, other, rtol=0, atol=1e-7)


def test_no_rows():
    values, figures = kernels.prompt_kernel(LAMBDA)(*(torch.empty(0, 97, device=DEVICE) for _ in range(3)))
    assert values.shape == figures["to_plain"].shape == (0,)


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        (torch.zeros(2, 5).double(), torch.zeros(2, 5), "`logits` must be float32"),
        (torch.zeros(2, 5), torch.zeros(2, 5).bfloat16(), "`target` must be float32"),
        (torch.zeros(5, 2).T, torch.zeros(2, 5), "contiguous in V"),
        (torch.zeros(2, 5), torch.zeros(2, 6), "`target` must have the shape and device"),
    ],
)
@pytest.mark.parametrize("kernel", [kernels.reverse_kl_kernel, kernels.forward_kl_kernel])
def test_tensors_that_a_kernel_cannot_read(kernel, logits, target, message):
    with pytest.raises(ValueError, match=message):
        kernel(logits.to(DEVICE), target.to(DEVICE))


@pytest.mark.parametrize("labels", [torch.zeros(3, dtype=torch.int64), torch.zeros(2)])
def test_labels_that_are_none(labels):
    with pytest.raises(ValueError, match="`labels` must be int32 or int64"):
        kernels.cross_entropy_kernel(torch.zeros(2, 5, device=DEVICE), labels.to(DEVICE))
