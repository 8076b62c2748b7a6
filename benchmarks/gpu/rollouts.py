"""Part 6: tokens per second of a rollout, 64 rows of 256 new tokens: ours, and transformers' generate in two variants.

Ours has float32 weights under autocast, as a student in training, and copies them each time. generate has the same
weights in bfloat16, which is faster for it. All sample at temperature 1 from the whole distribution, without a stop
token.
"""

import torch
from transformers import GenerationConfig, PreTrainedModel

from benchmarks.clock import peak_bytes, restart_peak, seconds_of
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.shapes import lengths_around, qwen, random_rows, vocabulary_of
from promptkd.engine import engine_for
from promptkd.engine.resolve import first_verified
from promptkd.generation import SamplingParams, generate

__all__ = ["run"]


def run(bench: Bench) -> None:
    rows, new_tokens, prompt = (4, 8, 6) if bench.tiny else (64, 256, 128)
    lengths = lengths_around(prompt, rows)
    prompts = [row.prompt_ids for row in random_rows(lengths, [0] * rows, vocabulary_of(bench))]
    usual: dict[str, tuple[PreTrainedModel, float]] = {}
    for size in ("0.5B", "1.5B"):
        speed = _ours(bench, size, prompts, new_tokens)
        model = qwen(size, bench, torch.bfloat16 if bench.on_cuda else torch.float32)
        bench.require(0 if bench.tiny else 15, f"generate at {size}")
        theirs = _by_generate(bench, f"{size}, generate with its defaults", model, prompts, new_tokens, {})
        bench.report(f"{size}, ours over generate with its defaults", speed / theirs)
        if size == "0.5B":
            bench.measured("rollout_speed", speed)
            bench.measured("rollout_ratio", speed / theirs)
        usual[size] = model, speed
    # last, because its compilation may take all the remaining time
    for size, (model, speed) in usual.items():
        if not bench.on_cuda:
            bench.skip(f"{size}, generate with a static cache")
            continue
        # the part succeeds without it
        with bench.attempt(f"{size}, generate with a static cache", seconds=bench.left - 2):
            static = {"cache_implementation": "static"}
            theirs = _by_generate(bench, f"{size}, generate with a static cache", model, prompts, new_tokens, static)
            bench.report(f"{size}, ours over generate with a static cache", speed / theirs)


def _ours(bench: Bench, size: str, prompts: list[list[int]], new_tokens: int) -> float:
    """Tokens per second, the median of three rollouts after the first."""
    model = qwen(size, bench, torch.float32)
    rows = len(prompts)

    def roll_out() -> None:
        with bench.autocast():
            generate(
                model,
                prompts,
                SamplingParams(max_new_tokens=new_tokens, vocabulary=vocabulary_of(bench)),
                seeds=list(range(rows)),
                batch_size=rows,
            )

    restart_peak(bench.device)
    with bench.autocast(), torch.no_grad():
        bench.report(f"{size}, ours is run by", first_verified(engine_for(bench.device).decoders, model).name)
    bench.report(f"{size}, ours, the first time", seconds_of(roll_out, bench.device), "s, with its captures")
    seconds = sorted(seconds_of(roll_out, bench.device) for _ in range(3))[1]
    _report(bench, f"{size}, ours", seconds, rows, new_tokens)
    return rows * new_tokens / seconds


def _by_generate(
    bench: Bench, name: str, model: PreTrainedModel, prompts: list[list[int]], new_tokens: int, settings: dict
) -> float:
    """Tokens per second of one call, after one that is not counted."""
    width = max(map(len, prompts))
    ids = torch.tensor([[1] * (width - len(each)) + each for each in prompts], device=bench.device)
    mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in prompts], device=bench.device)
    model.generation_config = GenerationConfig()  # the model's own would stop at an end token

    def roll_out(tokens: int) -> None:
        config = GenerationConfig(
            do_sample=True,
            top_k=0,
            temperature=1.0,
            max_new_tokens=tokens,
            pad_token_id=1,
            eos_token_id=None,
            **settings,
        )
        out = model.generate(ids, attention_mask=mask, generation_config=config)
        if out.shape[1] != width + tokens:
            raise RuntimeError(f"generate wrote {out.shape[1] - width} tokens, and {tokens} were requested")

    restart_peak(bench.device)
    # a static cache is compiled for its length; without one a short call is enough
    roll_out(new_tokens if settings else min(8, new_tokens))
    seconds = seconds_of(lambda: roll_out(new_tokens), bench.device)
    _report(bench, name, seconds, len(prompts), new_tokens)
    return len(prompts) * new_tokens / seconds


def _report(bench: Bench, name: str, seconds: float, rows: int, new_tokens: int) -> None:
    metrics = {"tokens/s": rows * new_tokens / seconds, "ms per token of all rows": 1e3 * seconds / new_tokens}
    peak = peak_bytes(bench.device)
    if peak is not None:
        metrics["peak GB"] = peak / 1e9
    bench.report(name, metrics)
