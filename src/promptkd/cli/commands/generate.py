"""`promptkd generate`."""

from typing import Any

from promptkd.cli.library_logging import quiet_libraries
from promptkd.cli.measuring_device import (
    computing_in,
    load_subject,
    measured_rows,
    say_peak,
    settled_precision,
    settled_rows,
)
from promptkd.cli.option_checks import check_output
from promptkd.cli.options.generate import Options
from promptkd.cli.terminal import progress_lines, say
from promptkd.data import stop_token_ids
from promptkd.generation import SamplingParams, generate, row_seeds
from promptkd.io.atomic import write_atomic
from promptkd.io.jsonl import encoded
from promptkd.models import load_tokenizer, vocabulary_size


def run(options: Options, training: dict[str, Any]) -> None:
    check_output(options.out, overwrite=options.overwrite)
    quiet_libraries()
    tokenizer = load_tokenizer(options.model, trust_remote_code=options.trust_remote_code)
    data = measured_rows(options, options.data, tokenizer, need_response=False)
    rows = data.examples
    precision = settled_precision(options.dtype)
    model = load_subject(options.model, options.trust_remote_code)
    stops = stop_token_ids(tokenizer, model.generation_config, options.template)
    seeds = row_seeds(options.seed, max(row.row for row in rows) + 1)
    params = SamplingParams(
        max_new_tokens=options.max_completion_length,
        stop_ids=stops,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        vocabulary=vocabulary_size(tokenizer),
    )
    tell = progress_lines("Generating", len(rows))
    with computing_in(precision):
        responses = generate(
            model,
            [row.prompt_ids for row in rows],
            params,
            seeds=[seeds[row.row] for row in rows],
            batch_size=settled_rows(options.batch_size),
            on_batch=lambda done: tell("responses", done),
        )
    lines = [
        {
            "row": row.row,
            "prompt": row.prompt,
            "completion": tokenizer.decode(response, skip_special_tokens=True),
            "references": list(row.references),
            "tokens": len(response),
            "ended": bool(response) and response[-1] in stops,
        }
        for row, response in zip(rows, responses, strict=True)
    ]
    cut = sum(not line["ended"] for line in lines)
    written = [line for line in lines if line["ended"] or not options.ended_only]
    write_atomic(options.out, encoded(written))
    dropped = f"; {data.dropped} rows over the length limit were dropped" if data.dropped else ""
    say(f"{len(written)} responses in {options.out}; {cut} did not end by themselves{dropped}.")
    say_peak()
