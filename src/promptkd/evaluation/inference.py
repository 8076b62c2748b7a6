"""What models take to run: speed of decoding, time to the first token, bytes. All are measured in turns.

In each round every model does the same work right after the other, so that whatever else the machine does meets both,
and a ratio of two models within a round is fairer than one of their means. The clock runs around the engine's own
steps: weights that a decoder reorders, graphs that it captures and trials that it takes are done before.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn

from promptkd.engine import decoding, embedding_device, evaluating, unwrap_peft
from promptkd.engine.backbone import model_matmul_dtype
from promptkd.results import Inference

_LEAST_TOKENS = 4  # per row and round
_LEAST_ROUNDS = 3
_PREFILLS = 3  # of a round, the median of which counts


@dataclass(frozen=True)
class Workload:
    """What the models decode. `seconds` bound the whole measurement, about: slow models decode fewer tokens."""

    prompts: Sequence[Sequence[int]]  # token ids
    rows: int  # decoded together
    vocabulary: int
    new_tokens: int = 32  # per row and round, at most
    rounds: int = 5
    seconds: float = 20.0

    @property
    def typical(self) -> Sequence[int]:
        """The prompt of median length."""
        return sorted(self.prompts, key=len)[len(self.prompts) // 2]

    @property
    def batch(self) -> list[Sequence[int]]:
        """`rows` prompts, from the start again where there are fewer."""
        return [self.prompts[row % len(self.prompts)] for row in range(self.rows)]


@dataclass
class _Times:
    first_token: float  # seconds
    token: float  # seconds per token of one row
    batch_token: float  # seconds per token of each row of a batch


def measure_inference(models: Mapping[str, nn.Module], workload: Workload) -> dict[str, Inference]:
    """Speed and bytes of each model by its label, in the precision in effect (autocast's, else the weights')."""
    tokens = min(_LEAST_TOKENS, workload.new_tokens)
    with torch.no_grad():
        for model in models.values():
            _round(model, workload, tokens)  # trials, graphs, caches
        began = time.perf_counter()
        for model in models.values():
            _round(model, workload, tokens)
        spent = time.perf_counter() - began
        rounds = max(_LEAST_ROUNDS, min(workload.rounds, int(workload.seconds / spent)))
        tokens = max(tokens, min(workload.new_tokens, int(tokens * workload.seconds / (rounds * spent))))
        for model in models.values():
            _round(model, workload, tokens)  # more tokens may take graphs of other sizes
        times: dict[str, list[_Times]] = {label: [] for label in models}
        for at in range(rounds):
            for label in list(models)[:: 1 if at % 2 == 0 else -1]:  # no model is always the first
                times[label].append(_round(models[label], workload, tokens))
        return {label: _inference(model, workload, tokens, times[label]) for label, model in models.items()}


def _inference(model: nn.Module, workload: Workload, tokens: int, times: list[_Times]) -> Inference:
    inner = unwrap_peft(model)
    dtype, weights = model_matmul_dtype(inner), list(inner.parameters())
    packed = any(not each.is_floating_point() for each in weights)
    sizes = (each.numel() * (dtype.itemsize if each.is_floating_point() else each.itemsize) for each in weights)
    return Inference(
        precision=str(dtype).removeprefix("torch.") + (", quantized" if packed else ""),
        device=embedding_device(inner).type,
        rows=workload.rows,
        prompt_tokens=len(workload.typical),
        new_tokens=tokens,
        weight_bytes=sum(sizes),
        tokens_per_second=[workload.rows / each.batch_token for each in times],
        tokens_per_second_one_row=[1 / each.token for each in times],
        first_token_seconds=[each.first_token for each in times],
    )


def _round(model: nn.Module, workload: Workload, tokens: int) -> _Times:
    one = _decode(model, [workload.typical], [*[0] * (_PREFILLS - 1), tokens], workload.vocabulary)
    ((_, batch_token),) = _decode(model, workload.batch, [tokens], workload.vocabulary)
    return _Times(median(first for first, _ in one), one[-1][1], batch_token)


def _decode(
    model: nn.Module, prompts: Sequence[Sequence[int]], tokens: Sequence[int], vocabulary: int
) -> list[tuple[float, float]]:
    """Seconds to the first token, and seconds per token behind it, of a session for each number of tokens."""
    device, found = embedding_device(unwrap_peft(model)), []
    with evaluating(model), decoding(model, len(prompts), vocabulary=vocabulary) as session:
        for count in tokens:
            with session(max(count, 1)) as running:
                began = _now(device)
                following = running.prefill(prompts).argmax(-1)
                read = _now(device)
                for _ in range(count):
                    following = running.decode(following).argmax(-1)
                found.append((read - began, (_now(device) - read) / max(count, 1)))
    return found


def _now(device: torch.device) -> float:
    """The clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
