"""Tokens per second of a rollout, ours against transformers' `generate`, on the same rows and response lengths.

    python -m benchmarks.rollout --data dolly.jsonl --json rollout.json

A third variant is ours with the model's own layers, without the fused decoder of the Llama family. All sample at
temperature 1 from the whole distribution, in one process, taking turns. `generate` pads its prompts to the longest of
the batch and continues until the longest response has ended, as it always does. Each row ends where the data's response
ends.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

from benchmarks.step import demo_rows, demo_teacher, pruned_student
from benchmarks.workload import EndAtLengths, Shape, workload
from promptkd.data.encode import EncodedExample
from promptkd.engine.cpu import ENGINE as CPU_ENGINE
from promptkd.generation import SamplingParams, generate
from promptkd.models import load_model, load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="rows; by default those of the demo")
    parser.add_argument("--model", help="by default 10 layers of the demo's teacher, made once and cached")
    parser.add_argument("--template", default="alpaca")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--repeats", type=int, default=3, help="batches of each size, each with different rows")
    parser.add_argument("--json", help="file for the record")
    given = parser.parse_args()
    given.data, given.teacher, given.prefix = given.data or str(demo_rows()), str(demo_teacher()), ""
    model_path = given.model or str(pruned_student(given))
    model, tokenizer = load_model(model_path).eval(), load_tokenizer(model_path)
    record = {
        str(size): compare(model, tokenizer, given.data, given.template, size, given.repeats)
        for size in given.batch_sizes
    }
    print("| batch | variant | tokens/s | ours over it, median | range |\n|---|---|---|---|---|")
    for size, speeds in record.items():
        for name, each in speeds.items():
            ratios = [mine / other for mine, other in zip(speeds["ours"], each, strict=True)]
            middle, least, most = statistics.median(ratios), min(ratios), max(ratios)
            print(f"| {size} | {name} | {statistics.median(each):.0f} | {middle:.2f} | {least:.2f}-{most:.2f} |")
    if given.json:
        Path(given.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def compare(model: nn.Module, tokenizer, data: str, template: str, size: int, repeats: int) -> dict[str, list[float]]:
    """Tokens per second of every variant, in each of `repeats` turns."""
    rows = workload(data, tokenizer, Shape(batch_size=size), template, first=0, steps=repeats)
    ways = {"ours": ours, "ours, unfused": unfused, "generate": by_generate}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():  # the first call of each is not counted
        way(model, tokenizer, rows[:2])
    for turn in range(repeats):
        batch = rows[turn * size : (turn + 1) * size]
        for name, way in ways.items():
            started = time.perf_counter()
            way(model, tokenizer, batch)
            speeds[name].append(sum(len(row.response_ids) for row in batch) / (time.perf_counter() - started))
    return speeds


def ours(model: nn.Module, tokenizer, rows: Sequence[EncodedExample]) -> None:
    lengths = [len(row.response_ids) for row in rows]
    prompts = [row.prompt_ids for row in rows]
    generate(model, prompts, SamplingParams(max_new_tokens=lengths), seeds=list(range(len(rows))))


def unfused(model: nn.Module, tokenizer, rows: Sequence[EncodedExample]) -> None:
    fused, *others = CPU_ENGINE.decoders
    assert fused.name == "fused decoder"
    with patch("promptkd.engine.resolve._of_kind", return_value=replace(CPU_ENGINE, decoders=tuple(others))):
        ours(model, tokenizer, rows)


def by_generate(model: nn.Module, tokenizer, rows: Sequence[EncodedExample]) -> None:
    width = max(len(row.prompt_ids) for row in rows)
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row.prompt_ids)) + row.prompt_ids for row in rows])
    mask = torch.tensor([[0] * (width - len(row.prompt_ids)) + [1] * len(row.prompt_ids) for row in rows])
    lengths = [len(row.response_ids) for row in rows]
    with torch.no_grad():
        model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_new_tokens=max(lengths),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            logits_processor=[EndAtLengths(lengths, width, tokenizer.eos_token_id)],
        )


if __name__ == "__main__":
    main()
