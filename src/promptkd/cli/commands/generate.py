"""`promptkd generate`."""

from contextlib import nullcontext
from hashlib import sha256
from typing import Any

from promptkd.cli.inference_run import InferenceRun, sampling
from promptkd.cli.kept_logits import LogitsRequest
from promptkd.cli.options.generate import Options
from promptkd.cli.outputs import check_output, sha256_of
from promptkd.cli.terminal import progress_lines, say
from promptkd.data import EncodedData
from promptkd.data.prompt_tokens import tokens_as_read
from promptkd.data.tokens import KEPT, Spelling
from promptkd.errors import PromptKDError, writing
from promptkd.evaluation.measure import row_batches
from promptkd.generation import Decoding, generate, row_seeds
from promptkd.io.atomic import remove, write_atomic
from promptkd.io.jsonl import Line, ResumableLines, encoded
from promptkd.io.lock import locked
from promptkd.models import check_positions, model_record
from promptkd.models.vocabulary import check_row_ids
from promptkd.results import ModelRecord

_SETTINGS = ("model", "data", "limit", "template", "max_prompt_length", "max_completion_length", "seed")


def run(options: Options, training: dict[str, Any]) -> None:
    wanted = LogitsRequest(options)
    wanted.check()
    if not wanted.has_responses:
        check_output(options.out, overwrite=options.overwrite or wanted.unfinished.exists())
    with nullcontext() if options.score else locked(options.out):
        _run(options, wanted)


def _run(options: Options, wanted: LogitsRequest) -> None:
    job = InferenceRun(options)
    tokenizer = job.load_tokenizer(options.model)
    data = None if wanted.has_responses else job.read_rows(options.data, tokenizer, options.limit)
    job.settle_precision()
    model = job.load_model(options.model)
    record = model_record(options.model, model)
    if data is not None:
        wanted.say_most(data, model)
        _write(options, job, tokenizer, (model, record), data, wanted)
    if options.keep_logits is not None:
        wanted.keep(job, tokenizer, model, record)
    if data is not None:
        remove(wanted.unfinished)
    job.say_peak()


def _decode(
    job: InferenceRun, model: Any, record: ModelRecord, data: EncodedData, decoding: Decoding, wanted: LogitsRequest
) -> list[list[int]]:
    """The responses' tokens, in the order of the rows; those that a killed call has left are not decoded again."""
    options, rows = job.options, data.examples
    prompts = sha256(repr([row.prompt_ids for row in rows]).encode()).hexdigest()
    settings = {
        **{name: vars(options)[name] for name in _SETTINGS},
        **sampling(options),
        "data_sha256": sha256_of(options.data),
        "model_sha256": record.sha256,
        "precision": job.computed,
        "prompts_sha256": prompts,
        "stop_ids": list(decoding.stop_ids),
    }
    held = ResumableLines(wanted.unfinished, settings=settings, check=_check, overwrite=options.overwrite)
    if options.overwrite:  # from here on the same command without it resumes
        with writing(options.out):
            held.replace([])
        if options.keep_logits is not None:
            remove(wanted.folder)
    if held.lines:
        say(f"{len(held.lines):,} of {len(rows):,} responses are written already; going on with the others.")
    seeds = row_seeds(options.seed, max(row.row for row in rows) + 1)
    tell, done = progress_lines("Generating", len(rows)), 0
    for batch in row_batches(rows, decoding.batch_size):  # of all rows: bfloat16 rounds by who shares a batch
        if any((row.row,) not in held.lines for row in batch):
            own, size = [seeds[row.row] for row in batch], decoding.batch_size
            with job.computing():
                written = generate(model, [row.prompt_ids for row in batch], decoding, seeds=own, batch_size=size)
            with writing(options.out):
                held.append({"row": row.row, "token_ids": ids} for row, ids in zip(batch, written, strict=True))
        done += len(batch)
        tell("responses", done)
    return [held.lines[row.row,]["token_ids"] for row in rows]


def _check(line: Line) -> None:
    """Raise ValueError for a line without a response's tokens."""
    ids = line["token_ids"]
    if not isinstance(ids, list) or not all(type(each) is int and each >= 0 for each in ids):
        raise ValueError("expected token ids")


def _write(
    options: Options,
    job: InferenceRun,
    tokenizer: Any,
    loaded: tuple[Any, ModelRecord],
    data: EncodedData,
    wanted: LogitsRequest,
) -> None:
    """The responses, and what to say of them."""
    (model, record), rows = loaded, data.examples
    check_row_ids("model", model, rows, responses=False)
    check_positions("model", model, max(len(row.prompt_ids) for row in rows), options.max_completion_length)
    decoding = job.decoding(tokenizer, model, **sampling(options))
    responses = _decode(job, model, record, data, decoding, wanted)
    spelling = Spelling(tokenizer)
    as_read = tokens_as_read([row.prompt for row in rows], tokenizer)
    lines = [
        {
            "row": row.row,
            "prompt": row.prompt,
            "completion": spelling.answer_text(response),
            "references": list(row.references),
            "tokens": len(response),
            "ended": bool(response) and response[-1] in decoding.stop_ids,
            **({} if row.prompt_ids == read else {KEPT: row.prompt_ids}),
        }
        for row, response, read in zip(rows, responses, as_read, strict=True)
    ]
    cut = sum(not line["ended"] for line in lines)
    only_ended = options.ended_only or options.keep_logits is not None  # training takes no others
    written = [line for line in lines if line["ended"] or not only_ended]
    if not written and options.keep_logits is not None:
        remove(wanted.unfinished)
        raise PromptKDError(
            f"None of {len(lines)} responses ended by itself within {options.max_completion_length} tokens, so none "
            "can be trained on. Raise --max-completion-length."
        )
    write_atomic(options.out, encoded(written))
    dropped = f"; {data.dropped} rows over the length limit were dropped" if data.dropped else ""
    say(f"{len(written)} responses in {options.out}; {cut} did not end by themselves{dropped}.")
