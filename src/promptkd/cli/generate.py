"""Write a model's responses to a data set, one JSON object a line.

Each line holds row, prompt, completion, references, tokens and whether the response ended by itself. The file is data
for `promptkd distill` too: a teacher's responses for --method seqkd or dpkd. Responses that were cut at the limit are
left out of it by --ended-only.

    promptkd generate --model runs/promptkd --data test.jsonl --out responses.jsonl --seed 10
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

LESS_MEMORY = (
    "a smaller --batch-size (now {batch_size})",
    "a smaller --max-completion-length (now {max_completion_length})",
)


@dataclass
class Options:
    model: str
    """Who answers: a hub name, folder, run folder or GGUF file."""
    data: str
    """Requests: a JSONL, .jsonl.gz, Parquet or CSV file, a folder, or a hub data set."""
    out: Path
    """The JSONL file to write."""
    temperature: float = 1.0
    """Sampling temperature; 0 decodes greedily."""
    top_p: float = 1.0
    """Share of the probability mass to sample from."""
    top_k: int = 0
    """Number of tokens to sample from; 0 for all."""
    seed: int = 10
    """Seed of the samples."""
    batch_size: int | None = None
    """Rows that are decoded at a time; by default 32 on CPU, 128 on a GPU."""
    limit: int | None = None
    """Use the first so many rows."""
    template: str = "auto"
    """auto, alpaca, chat, or a Jinja text."""
    max_prompt_length: int = 256
    """Most tokens of a prompt; rows above it are dropped and counted."""
    max_completion_length: int = 256
    """Most tokens of a response."""
    ended_only: bool = False
    """Leave out the responses that were cut at the limit, and count them."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision to compute in, with weights in float32; auto is bfloat16 where the device has units for it."""
    trust_remote_code: bool = False
    """Run code that a hub model ships."""
    overwrite: bool = False
    """Replace --out."""


def run(options: Options, training: dict[str, Any]) -> None:
    import json
    import os

    from promptkd.cli.measured_memory import say_peak
    from promptkd.cli.measuring import (
        check_decoding,
        check_output,
        computing_in,
        load_subject,
        measured_rows,
        settled_precision,
        settled_rows,
    )
    from promptkd.cli.session import progress_lines, quiet_libraries, say
    from promptkd.data.dataset import stop_ids_of
    from promptkd.generation import generate, row_seeds
    from promptkd.models import load_tokenizer, vocabulary_size

    check_output(options.out, overwrite=options.overwrite)
    check_decoding(options, [options.seed])
    quiet_libraries()
    tokenizer = load_tokenizer(options.model, trust_remote_code=options.trust_remote_code)
    data = measured_rows(options, options.data, tokenizer, need_response=False)
    rows = data.examples
    precision = settled_precision(options.dtype)
    model = load_subject(options.model, options.trust_remote_code)
    stops = stop_ids_of(tokenizer, model.generation_config, template=options.template)
    seeds = row_seeds(options.seed, max(row.row for row in rows) + 1)
    tell = progress_lines("Generating", len(rows))
    with computing_in(precision):
        responses = generate(
            model,
            [row.prompt_ids for row in rows],
            max_new_tokens=options.max_completion_length,
            stop_ids=stops,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            seeds=[seeds[row.row] for row in rows],
            batch_size=settled_rows(options.batch_size),
            vocabulary=vocabulary_size(tokenizer),
            on_batch=lambda done: tell("responses", done),
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    partial = options.out.with_name(options.out.name + ".partial")
    cut = 0
    with partial.open("w", encoding="utf-8") as file:
        for row, response in zip(rows, responses, strict=True):
            ended = bool(response) and response[-1] in stops
            cut += not ended
            if options.ended_only and not ended:
                continue
            line = {
                "row": row.row,
                "prompt": row.prompt,
                "completion": tokenizer.decode(response, skip_special_tokens=True),
                "references": list(row.references),
                "tokens": len(response),
                "ended": ended,
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    os.replace(partial, options.out)
    written = len(rows) - cut if options.ended_only else len(rows)
    dropped = f"; {data.dropped} rows over the length limit were dropped" if data.dropped else ""
    say(f"{written} responses in {options.out}; {cut} did not end by themselves{dropped}.")
    say_peak()
