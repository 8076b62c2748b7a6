"""`promptkd generate`."""

import json
import os
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
from promptkd.cli.option_checks import check_decoding, check_output
from promptkd.cli.options.generate import Options
from promptkd.cli.terminal import progress_lines, say
from promptkd.data.dataset import stop_ids_of
from promptkd.generation.decode_loop import generate, row_seeds
from promptkd.models import load_tokenizer, vocabulary_size


def run(options: Options, training: dict[str, Any]) -> None:
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
