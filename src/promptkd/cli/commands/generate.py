"""`promptkd generate`."""

from typing import Any

from promptkd.cli.inference_run import InferenceRun, sampling
from promptkd.cli.options.generate import Options
from promptkd.cli.outputs import check_output
from promptkd.cli.terminal import progress_lines, say
from promptkd.generation import generate, row_seeds
from promptkd.io.atomic import write_atomic
from promptkd.io.jsonl import encoded


def run(options: Options, training: dict[str, Any]) -> None:
    check_output(options.out, overwrite=options.overwrite)
    job = InferenceRun(options)
    tokenizer = job.load_tokenizer(options.model)
    data = job.read_rows(options.data, tokenizer, limit=options.limit)
    rows = data.examples
    job.settle_precision()
    model = job.load_model(options.model)
    decoding = job.decoding(tokenizer, model, **sampling(options))
    seeds = row_seeds(options.seed, max(row.row for row in rows) + 1)
    tell = progress_lines("Generating", len(rows))
    with job.computing():
        responses = generate(
            model,
            [row.prompt_ids for row in rows],
            decoding,
            seeds=[seeds[row.row] for row in rows],
            batch_size=decoding.batch_size,
            on_batch=lambda done: tell("responses", done),
        )
    lines = [
        {
            "row": row.row,
            "prompt": row.prompt,
            "completion": tokenizer.decode(response, skip_special_tokens=True),
            "references": list(row.references),
            "tokens": len(response),
            "ended": bool(response) and response[-1] in decoding.stop_ids,
        }
        for row, response in zip(rows, responses, strict=True)
    ]
    cut = sum(not line["ended"] for line in lines)
    written = [line for line in lines if line["ended"] or not options.ended_only]
    write_atomic(options.out, encoded(written))
    dropped = f"; {data.dropped} rows over the length limit were dropped" if data.dropped else ""
    say(f"{len(written)} responses in {options.out}; {cut} did not end by themselves{dropped}.")
    job.say_peak()
