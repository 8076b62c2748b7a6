"""`promptkd generate`."""

from functools import partial
from typing import Any

from promptkd.cli.inference_run import InferenceRun, sampling
from promptkd.cli.kept_logits import LogitsRequest
from promptkd.cli.options.generate import Options
from promptkd.cli.outputs import check_output
from promptkd.cli.terminal import progress_lines, say
from promptkd.data import EncodedData
from promptkd.data.tokens import Spelling
from promptkd.errors import PromptKDError
from promptkd.generation import generate, row_seeds
from promptkd.io.atomic import write_atomic
from promptkd.io.jsonl import encoded
from promptkd.models import check_positions


def run(options: Options, training: dict[str, Any]) -> None:
    wanted = LogitsRequest(options)
    wanted.check()
    if not wanted.has_responses:
        check_output(options.out, overwrite=options.overwrite)
    job = InferenceRun(options)
    tokenizer = job.load_tokenizer(options.model)
    data = None if wanted.has_responses else job.read_rows(options.data, tokenizer, options.limit)
    job.settle_precision()
    model = job.load_model(options.model)
    if data is not None:
        wanted.say_most(data, model)
        _write(options, job, tokenizer, model, data)
    if options.keep_logits is not None:
        wanted.keep(job, tokenizer, model)
    job.say_peak()


def _write(options: Options, job: InferenceRun, tokenizer: Any, model: Any, data: EncodedData) -> None:
    """The responses, and what to say of them."""
    rows = data.examples
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
    only_ended = options.ended_only or options.keep_logits is not None  # training takes no others
    written = [line for line in lines if line["ended"] or not only_ended]
    if not written and options.keep_logits is not None:
        raise PromptKDError(
            f"None of {len(lines)} responses ended by itself within {options.max_completion_length} tokens, so none "
            "can be trained on. Raise --max-completion-length."
        )
    write_atomic(options.out, encoded(written))
    dropped = f"; {data.dropped} rows over the length limit were dropped" if data.dropped else ""
    say(f"{len(written)} responses in {options.out}; {cut} did not end by themselves{dropped}.")
