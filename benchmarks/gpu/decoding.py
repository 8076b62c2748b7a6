"""Part 4: greedy decoding against transformers' generate, and the distribution of samples against exact probabilities.

Two decoders sum in different orders, so at a near tie they may differ. Where two rows first differ, the gap between the
two candidates' logits is computed in float64. It must be within the rounding of the precision.
"""

import copy
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import greedy
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.shapes import lengths_around, random_rows, sharp_model
from promptkd.engine import engine_for
from promptkd.engine.resolve import first_verified
from promptkd.generation import SamplingParams, generate

__all__ = ["run"]

_GAPS = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Largest gap at which rows may differ, relative to the largest logit there."""
_SAME = {torch.float32: 0.9, torch.bfloat16: 0.0}
"""Share of the rows that must be identical. In float32 near ties are rare; bfloat16 has one in most rows."""
_WORDS = 16
"""Vocabulary size of the model that is sampled from; small, so that each pair of tokens is frequent."""


def run(bench: Bench) -> None:
    kinds = [("float32", torch.float32, False)]
    if bench.on_cuda:
        kinds += [("bfloat16 weights", torch.bfloat16, False), ("float32 weights, bfloat16", torch.float32, True)]
    for architecture, settings in (("qwen2", {"num_key_value_heads": 2}), ("mistral", {"sliding_window": 16})):
        for name, dtype, autocast in kinds:
            model = sharp_model(architecture, bench, dtype=dtype, **settings)
            _compare_greedy(bench, f"{architecture}, {name}", model, autocast=autocast)
    for name, dtype, autocast in kinds:
        _compare_samples(bench, name, dtype, autocast=autocast)


def _compare_greedy(bench: Bench, name: str, model: PreTrainedModel, *, autocast: bool) -> None:
    count, length = (6, 12) if bench.tiny else (32, 64)
    prompts = [row.prompt_ids for row in random_rows(lengths_around(20, count), [0] * count, 320)]
    precision = torch.bfloat16 if autocast else model.dtype
    with torch.no_grad(), _autocast(bench, autocast):
        way = first_verified(engine_for(bench.device).decoders, model).name
        mine = greedy.ours(model, prompts, [], length, count)
        theirs = greedy.theirs(model, prompts, [], length, count)
        wide = copy.deepcopy(model).to("cpu", torch.float64)
    with torch.no_grad():
        pairs = zip(prompts, mine, theirs, strict=True)
        parted = [greedy.gap(wide, *each) for each in pairs if each[1] != each[2]]
    gaps = [abs(each["gap"]) / each["scale"] for each in parted]
    same = 1 - len(parted) / count
    places = sorted(int(each["place"]) for each in parted)
    alike = sum(
        length if left == right else greedy.parting(left, right) for left, right in zip(mine, theirs, strict=True)
    )
    found = {"run by": way, "identical rows": same, "identical tokens": alike / (count * length), "differ at": places}
    bench.report(f"greedy, {name}", found)
    right = same >= _SAME[precision] and all(gap <= _GAPS[precision] for gap in gaps)
    detail = f"{len(parted)} of {count} rows differ, the largest gap {max(gaps, default=0.0):.1e} of the logits"
    bench.check(f"greedy decoding, {name}", right, detail)


def _compare_samples(bench: Bench, name: str, dtype: torch.dtype, *, autocast: bool) -> None:
    """Chi-square test of the pairs of tokens that follow one prompt, over many samples."""
    draws = 3000 if bench.tiny else 16_384
    model = sharp_model("qwen2", bench, dtype=dtype, seed=5, vocab_size=_WORDS)
    prompt = [3, 1, 4, 1, 5]
    with _autocast(bench, autocast):
        written = generate(
            model,
            [prompt] * draws,
            SamplingParams(max_new_tokens=2),
            seeds=list(range(draws)),
            batch_size=512,
        )
    pairs = torch.tensor(written)
    counts = torch.bincount(pairs[:, 0] * _WORDS + pairs[:, 1], minlength=_WORDS**2).double()
    chance = _chi_square(counts, _pair_probabilities(model, prompt) * draws)
    bench.check(f"samples, {name}", chance > 1e-4, f"chi-square of {draws} draws, p = {chance:.3f}, above 1e-4")


@torch.no_grad()
def _pair_probabilities(model: PreTrainedModel, prompt: list[int]) -> Tensor:
    """(V * V,) probabilities of the next two tokens, in float64 on the CPU."""
    wide = copy.deepcopy(model).to("cpu", torch.float64)
    rows = torch.tensor([[*prompt, token] for token in range(_WORDS)])
    first, second = wide(rows).logits[:, -2:].softmax(-1).unbind(1)  # (V, V) each
    return (first[0][:, None] * second).flatten()


def _chi_square(counts: Tensor, expected: Tensor) -> float:
    """Probability of counts that are at least as far from the expected ones; cells below 5 are merged into one."""
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    hoped = torch.cat([expected[common], expected[~common].sum()[None]])
    if hoped[-1] < 5:
        observed, hoped = observed[:-1], hoped[:-1]
    statistic = ((observed - hoped) ** 2 / hoped).sum()
    return float(torch.special.gammaincc((torch.tensor(float(len(hoped) - 1))) / 2, statistic.float() / 2))


def _autocast(bench: Bench, enabled: bool) -> torch.autocast | nullcontext:
    return torch.autocast(bench.device.type, dtype=torch.bfloat16) if enabled else nullcontext()
