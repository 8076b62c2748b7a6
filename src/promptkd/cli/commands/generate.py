"""`promptkd generate`."""

from functools import partial
from typing import Any

from promptkd.cli.inference_run import InferenceRun, sampling
from promptkd.cli.options.generate import Options
from promptkd.cli.outputs import check_output
from promptkd.cli.terminal import progress_lines, say
from promptkd.data.tokens import Spelling
from promptkd.generation import generate, row_seeds
from promptkd.io.atomic import write_atomic
from promptkd.io.jsonl import encoded
from promptkd.models import check_positions


def run(options: Options, training: dict[str, Any]) -> None:
    check_output(options.out, overwrite=options.overwrite)
    job = InferenceRun(options)
    tokenizer = job.load_tokenizer(options.model)
    data = job.read_rows(options.data, tokenizer, options.limit)
    rows = data.examples
    job.settle_precision()
    model = job.load_model(options.model)
    check_positions("model", model, max(len(row.prompt_ids) for row in rows), options.max_completion_length)
    decoding = job.decoding(tokenizer, model, **sampling(options))
    seeds = row_seeds(options.seed, max(row.row for row in rows) + 1)
    prompts, seeds = [row.prompt_ids for row in rows], [seeds[row.row] for row in rows]
    tell, size = partial(progress_lines("Generating", len(rows)), "responses"), decoding.batch_size
    with job.computing():
        responses = generate(model, prompts, decoding, seeds=seeds, batch_size=size, on_batch=tell)
    spelling = Spelling(tokenizer)
    lines = [
        {
            "row": row.row,
            "prompt": row.prompt,
            "completion": spelling.answer_text(response),
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
