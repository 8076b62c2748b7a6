"""Part 2: every loss and its gradients, as training computes them, against float64 on the CPU.

All states and weights are numbers that bfloat16 represents exactly, kept in float32 (the student's, as in training) or
in bfloat16 (the teacher's head). So rounding the factors of a product changes nothing, and the measured error is that
of products, divergences and sums. The bias is measured twice: in this way, and with float32 numbers that the products
must round ("rounded factors").
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.float64 import LOSSES, Inputs, Reference, references
from promptkd.engine import ChunkedLoss, Head, chunked_cross_entropy, chunked_objective, chunked_prompt_loss, engine_for
from promptkd.objectives import forward_kl, jensen_shannon, reverse_kl, skew_forward_kl, skew_reverse_kl

__all__ = ["run"]

OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jensen_shannon 0.5": partial(jensen_shannon, beta=0.5),
    "skew_forward_kl 0.1": partial(skew_forward_kl, alpha=0.1),
    "skew_reverse_kl 0.1": partial(skew_reverse_kl, alpha=0.1),
}
FORMS: dict[str, tuple[bool, float | None]] = {"plain": (False, None), "bias": (True, None), "soft cap": (False, 8.0)}
"""Whether the student's head has a bias, and the soft cap of both heads."""
SIZES = ((49_152, 49_152), (151_665, 151_936))
"""Tokens, and columns of the heads: SmolLM2's and Qwen2.5's."""
SIZES_TINY = ((97, 128), (1001, 1024))
_FLOAT32_GRADIENT = 1e-4
_RESERVE = 10.0
"""Seconds needed after the cases."""


@dataclass
class Worst:
    """The largest errors of all cases in one precision, each with its case."""

    loss: tuple[float, str] = (0.0, "")
    relative: tuple[float, str] = (0.0, "")
    gradient: tuple[float, str] = (0.0, "")
    bias: tuple[float, str] = (0.0, "")
    token: tuple[float, str] = (0.0, "")

    def see(self, case: str, found: dict[str, float]) -> None:
        for name, value in found.items():
            wrong = math.inf if math.isnan(value) else value
            if abs(wrong) > abs(vars(self)[name][0]):
                setattr(self, name, (wrong, case))


def run(bench: Bench) -> None:
    head = Head(torch.zeros(64, 8, device=bench.device))
    kernels = engine_for(bench.device).head.kernels(torch.float32)
    rounds = engine_for(bench.device).head.projection(head, torch.bfloat16).weight.dtype == torch.bfloat16
    bench.report("kernels", kernels.reverse_kl.__module__)
    bench.report("products in bfloat16 round their factors", rounds)
    worst = {"float32": Worst(), "bfloat16": Worst()}
    left_out = 0
    for vocabulary, columns in SIZES_TINY if bench.tiny else SIZES:
        for form in FORMS:
            exact = _inputs(bench, vocabulary, columns, form, exact=True)
            here = Here.of(exact, bench.device)
            for name in LOSSES:
                if bench.left < _RESERVE:
                    left_out += 1
                    continue
                expected = references(name, exact)
                for mode, worsts in worst.items():
                    case = f"{name}, {form}, {vocabulary} tokens"
                    worsts.see(case, _errors(here, name, expected, bfloat16=mode == "bfloat16"))
    bench.check("every loss was computed", left_out == 0, f"{left_out} left out because time was short")
    for mode, worsts in worst.items():
        for name, (value, case) in vars(worsts).items():
            bench.report(f"{mode}, worst {_WHAT[name]}", {"value": value, "case": case})
    rounding = max((_rounding_bias(bench, name) for name in ("reverse_kl", "prompt, λ 0.7")), key=abs)
    bench.report("bfloat16, bias with rounded factors", rounding, "nats")
    _judge(bench, worst, rounding, rounds=rounds)


_WHAT = {
    "loss": "error of a loss, in nats or relative, whichever is smaller",
    "relative": "relative error of a loss",
    "gradient": "relative error of a gradient (norms)",
    "bias": "signed bias, nats per token",
    "token": "error of a mean over eight tokens, nats",
}


def _judge(bench: Bench, worst: dict[str, Worst], rounding: float, *, rounds: bool) -> None:
    single, half = worst["float32"], worst["bfloat16"]
    bias = max((single.bias[0], half.bias[0], rounding), key=abs)
    bench.check("float32 losses", abs(single.loss[0]) < 1e-5, f"{single.loss[0]:.1e}, under 1e-5")
    bench.check("bfloat16 losses of the same factors", abs(half.loss[0]) < 1e-5, f"{half.loss[0]:.1e}, under 1e-5")
    limit = _FLOAT32_GRADIENT
    bench.check("float32 gradients", single.gradient[0] < limit, f"{single.gradient[0]:.1e}, under {limit:.0e}")
    bench.check("bfloat16 gradients", half.gradient[0] < 2e-2, f"{half.gradient[0]:.1e}, under 2e-2")
    bench.check("bias", abs(bias) < 1e-3, f"{bias:+.1e} nats per token, under 1e-3")
    bench.measured("loss_error", abs(single.loss[0]))
    if rounds:  # otherwise they were float32 gradients
        bench.measured("gradient_error", half.gradient[0])
        bench.measured("kl_bias", abs(bias))


def _inputs(bench: Bench, vocabulary: int, columns: int, form: str, *, exact: bool) -> Inputs:
    """A student close to its teacher, and a prompted teacher close to the plain one: divergences below a nat."""
    tokens, wide, wider = (16, 24, 32) if bench.tiny else (64, 128, 192)
    generator = torch.Generator().manual_seed(vocabulary)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    has_bias, softcap = FORMS[form]
    hidden, head = normal(tokens, wide), normal(columns, wide, scale=3 * wide**-0.5)  # logits spread over 3 nats
    teacher_head = torch.cat([head, normal(columns, wider - wide, scale=0.3 * wide**-0.5)], dim=1)
    teacher_head[:, :wide] += normal(columns, wide, scale=0.5 * wide**-0.5)
    plain = torch.cat([hidden, normal(tokens, wider - wide)], dim=1)
    made = {
        "student_hidden": hidden,
        "student_head": head,
        "student_bias": normal(columns, scale=0.3) if has_bias else None,
        "prompted_hidden": plain + normal(tokens, wider, scale=0.1),
        "plain_hidden": plain,
        "teacher_head": teacher_head,
    }
    rounded = {"teacher_head"} if not exact else made.keys()  # a teacher's weights are bfloat16 in any case
    inputs = {
        name: None if each is None else (each.bfloat16() if name in rounded else each).double()
        for name, each in made.items()
    }
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    return Inputs(**inputs, labels=labels, vocabulary=vocabulary, softcap=softcap)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Here:
    """The same inputs on the device, the student's side in float32."""

    inputs: Inputs
    teacher_half: Tensor
    """The teacher's head in bfloat16, which represents it exactly."""

    @classmethod
    def of(cls, inputs: Inputs, device: torch.device) -> "Here":
        def moved(values: Any) -> Any:
            wide = isinstance(values, Tensor) and values.is_floating_point()
            return values.float().to(device) if wide else values.to(device) if isinstance(values, Tensor) else values

        there = Inputs(**{name: moved(each) for name, each in vars(inputs).items()})
        return cls(there, there.teacher_head.bfloat16())


def _loss(here: Here, name: str, *, bfloat16: bool, part: slice = slice(None)) -> tuple[ChunkedLoss, dict[str, Tensor]]:
    """promptkd's loss over `part` of the tokens, and the leaves that it has gradients for."""
    inputs, prompt = here.inputs, name.startswith("prompt")
    hidden = inputs.student_hidden[part].detach().requires_grad_(not prompt)
    weight = inputs.student_head.detach().requires_grad_(not prompt)
    offset = None if inputs.student_bias is None else inputs.student_bias.detach().requires_grad_(not prompt)
    prompted = inputs.prompted_hidden[part].detach().requires_grad_(prompt)
    student = Head(weight, offset, 1.0, inputs.softcap, inputs.vocabulary)
    theirs = here.teacher_half if bfloat16 else inputs.teacher_head
    teacher = Head(theirs, None, 1.0, inputs.softcap, inputs.vocabulary)
    chunk = len(hidden) // 2 + 1  # two chunks, of different lengths
    with torch.autocast(hidden.device.type, dtype=torch.bfloat16, enabled=bfloat16):
        if prompt:
            plain, strength = inputs.plain_hidden[part], 0.7 if name.endswith("0.7") else 0.0
            loss = chunked_prompt_loss(
                (prompted, teacher), (hidden, student), (plain, teacher), weight=strength, chunk=chunk
            )
        elif name == "cross_entropy":
            loss = chunked_cross_entropy((hidden, student), inputs.labels[part], chunk=chunk)
        else:
            loss = chunked_objective(OBJECTIVES[name], (hidden, student), (prompted, teacher), chunk=chunk)
    leaves = {"student_hidden": hidden, "student_head": weight, "student_bias": offset, "prompted_hidden": prompted}
    return loss, {key: each for key, each in leaves.items() if each is not None and each.requires_grad}


def _errors(here: Here, name: str, expected: Reference, *, bfloat16: bool) -> dict[str, float]:
    loss, leaves = _loss(here, name, bfloat16=bfloat16)
    gradients = torch.autograd.grad(loss.total, list(leaves.values()))
    tokens = len(expected.values)
    mean = float(expected.values.mean())
    distances = [
        float((got.cpu().double() - expected.gradients[key]).norm() / expected.gradients[key].norm())
        for key, got in zip(leaves, gradients, strict=True)
    ]
    bias = float(loss.total.detach()) / tokens - mean
    groups = [slice(first, first + 8) for first in range(0, tokens, 8)]
    apart = [
        (float(_loss(here, name, bfloat16=bfloat16, part=part)[0].total.detach()) - float(expected.values[part].sum()))
        / 8
        for part in groups
    ]
    return {
        "loss": bias / max(mean, 1.0),
        "relative": bias / mean,
        "gradient": max(distances, key=lambda each: math.inf if math.isnan(each) else each),
        "bias": bias,
        "token": max(apart, key=abs),
    }


def _rounding_bias(bench: Bench, name: str) -> float:
    """Nats per token by which a bfloat16 loss exceeds the float64 loss if the product must round its factors."""
    vocabulary, columns = (SIZES_TINY if bench.tiny else SIZES)[-1]
    inputs = _inputs(bench, vocabulary, columns, "plain", exact=False)
    expected = references(name, inputs).values
    loss, _ = _loss(Here.of(inputs, bench.device), name, bfloat16=True)
    return float(loss.total.detach().double().cpu() - expected.sum()) / len(expected)
