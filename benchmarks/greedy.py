"""Greedy decoding against `generate`: how many rows agree token by token, and how close the others are.

Each row is decoded three times: by promptkd's loop in batches, by transformers' `generate` one row at a time, and by
`generate` in the same batches, padded on the left. Each sums float32 in its own order, so a near tie may go either way.
For every pair of continuations that differ, the script prints the first position at which they differ, and how far
apart the logits of the two candidates are there in float64. One forward pass over the common part of the row computes
that gap. A gap that is large compared with float32's rounding means that the decoder is wrong.

    python -m benchmarks.greedy --model teacher --data dolly.jsonl --rows 50 --new-tokens 64
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from promptkd.data import encode_examples, read_examples, stop_token_ids
from promptkd.generation import SamplingParams, generate
from promptkd.models import load_model, load_tokenizer

Tokens = list[list[int]]


def ours(model: PreTrainedModel, prompts: Tokens, stops: Sequence[int], length: int, batch: int) -> Tokens:
    """promptkd's own loop."""
    return generate(
        model, prompts, SamplingParams(max_new_tokens=length, stop_ids=stops, temperature=0), batch_size=batch
    )


def theirs(model: PreTrainedModel, prompts: Tokens, stops: Sequence[int], length: int, batch: int) -> Tokens:
    """transformers' `generate`, with rows padded on the left and without the settings in the model's folder."""
    config = GenerationConfig(do_sample=False, max_new_tokens=length, eos_token_id=list(stops), pad_token_id=0)
    model.generation_config = GenerationConfig()
    written = []
    for first in range(0, len(prompts), batch):
        rows = prompts[first : first + batch]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        ids, mask = ids.to(model.device), mask.to(model.device)
        out = model.generate(ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
        written += [until_stop(each, stops) for each in out]
    return written


def until_stop(tokens: list[int], stops: Sequence[int]) -> list[int]:
    """`tokens` up to and including the first stop token."""
    return next((tokens[: place + 1] for place, token in enumerate(tokens) if token in stops), tokens)


def parting(left: list[int], right: list[int]) -> int:
    """The first position at which two different continuations differ."""
    return next(
        place for place in range(max(len(left), len(right))) if left[place : place + 1] != right[place : place + 1]
    )


def gap(wide: PreTrainedModel, prompt: list[int], left: list[int], right: list[int]) -> dict[str, float | int]:
    """Where they first differ, and by how much the float64 logit of left's token exceeds that of right's."""
    place = parting(left, right)
    logits = wide(torch.tensor([prompt + left[:place]])).logits[0, -1]
    return {
        "place": place,
        "gap": float(logits[left[place]] - logits[right[place]]),
        "scale": float(logits.abs().max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="hub name, folder or GGUF file")
    parser.add_argument("--data", required=True, help="rows, in any form that promptkd reads")
    parser.add_argument("--rows", type=int, default=50, help="number of rows, from the first (default 50)")
    parser.add_argument("--new-tokens", type=int, default=64, help="maximum tokens of a continuation (default 64)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows decoded together (default 8)")
    parser.add_argument("--template", default="auto", help="text around a request, as in promptkd (default auto)")
    parser.add_argument("--json", type=Path, help="also write the counts and gaps to this file")
    options = parser.parse_args()
    tokenizer, model = load_tokenizer(options.model), load_model(options.model).eval()
    data = encode_examples(
        read_examples(options.data), tokenizer, options.template, max_prompt_length=256, max_response_length=512
    )
    prompts = [row.prompt_ids for row in data.examples[: options.rows]]
    stops = stop_token_ids(tokenizer, model.generation_config, options.template)
    length, batch = options.new_tokens, options.batch_size
    with torch.no_grad():
        made = {
            "ours": ours(model, prompts, stops, length, batch),
            "generate, one row at a time": theirs(model, prompts, stops, length, 1),
            f"generate, {batch} rows at a time": theirs(model, prompts, stops, length, batch),
        }
        wide = model.double()
        names, report = list(made), {}
        for left, right in ((0, 1), (0, 2), (1, 2)):
            pairs = zip(prompts, made[names[left]], made[names[right]], strict=True)
            apart = [{"row": row, **gap(wide, p, a, b)} for row, (p, a, b) in enumerate(pairs) if a != b]
            report[f"{names[left]} / {names[right]}"] = {"identical": len(prompts) - len(apart), "differing": apart}
    for pair, found in report.items():
        print(f"{pair}: {found['identical']} of {len(prompts)} rows identical")
        for each in found["differing"]:
            print(
                f"  row {each['row']} differs from token {each['place']} on: logits {each['gap']:+.2e} apart in "
                f"float64, the largest {each['scale']:.0f}"
            )
    print(f"{sum(map(len, made['ours']))} tokens by ours; torch runs on {torch.get_num_threads()} threads")
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
