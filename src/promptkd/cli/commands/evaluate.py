"""`promptkd evaluate`."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from promptkd.cli.library_logging import quiet_libraries
from promptkd.cli.measuring_device import (
    computing_in,
    load_subject,
    measured_rows,
    precision_notes,
    say_peak,
    settled_precision,
    settled_rows,
    teacher_precision_here,
)
from promptkd.cli.option_checks import check_output
from promptkd.cli.options.evaluate import Options
from promptkd.cli.parsing.parser import merged_config
from promptkd.cli.provenance import data_record, label_of, training_cost
from promptkd.cli.terminal import progress_lines, say
from promptkd.data import stop_token_ids
from promptkd.errors import RequestError
from promptkd.evaluation.dataset_evaluation import SetEvaluation, parts_of
from promptkd.evaluation.hub_metrics import HubMetric
from promptkd.generation import Decoding
from promptkd.io.jsonl import settle_settings
from promptkd.io.lock import locked
from promptkd.models import check_same_vocabulary, load_tokenizer, model_record
from promptkd.report import terminal_table
from promptkd.results import Results

_ANSWERS_DEPEND_ON = (
    *("temperature", "top_p", "top_k", "limit", "template"),
    *("max_prompt_length", "max_completion_length", "max_reference_length"),
)


def run(options: Options, training: dict[str, Any]) -> None:
    check(options)
    with locked(options.out):
        _evaluate(options)


def _evaluate(options: Options) -> None:
    quiet_libraries()
    metrics = [HubMetric(name) for name in options.metrics]
    trust = options.trust_remote_code
    tokenizer = load_tokenizer(options.model, trust_remote_code=trust)
    if options.teacher is not None:
        check_same_vocabulary(tokenizer, load_tokenizer(options.teacher, trust_remote_code=trust))
    sets = _read(options, tokenizer)
    for metric in metrics:
        metric.check(row.references for data in sets.values() for row in data.examples)
    precision = settled_precision(options.dtype)
    model = load_subject(options.model, trust)
    teacher, teacher_dtype = None, None
    if options.teacher is not None:
        teacher_dtype = teacher_precision_here(options.teacher_dtype)
        teacher = load_subject(options.teacher, trust, teacher_dtype)
    decoding = _decoding(options, stop_token_ids(tokenizer, model.generation_config, options.template))
    results = _begun_record(options, sets, model, teacher)
    results.notes += precision_notes(precision, teacher_dtype)
    _settle(options, results, decoding, precision, teacher_dtype)
    for name, data in sets.items():
        started = time.perf_counter()
        job = SetEvaluation(
            model,
            tokenizer,
            data.examples,
            file_of=partial(_file, options.out, name),
            teacher=teacher,
            metrics=metrics,
            progress=progress_lines(name, len(data.examples)),
        )
        with computing_in(precision):
            results.evaluations += job.run(
                decoding,
                options.seeds,
                greedy=options.greedy,
                model_label=label_of(options.model),
                data_label=name,
            )
        results.timings[name] = time.perf_counter() - started
    results.notes += [
        f"{metric.label} could not score {metric.failed_on_empty} empty answers; they count 0."
        for metric in metrics
        if metric.failed_on_empty
    ]
    results.write(options.out)
    print(terminal_table([results]))
    say(f"The record is in {options.out}.")
    say_peak()


def check(options: Options) -> None:
    """Refuse what is wrong by itself, before anything is loaded."""
    check_output(options.out, overwrite=options.overwrite or _settings_file(options.out).exists())
    if options.teacher_dtype is not None and options.teacher is None:
        raise RequestError("--teacher-dtype is of a --teacher. Give one, or leave it out.")
    if not options.seeds:
        raise RequestError("Expected at least one seed. Got none; --temperature 0 decodes greedily alone.")
    if options.temperature == 0 and not options.greedy:
        raise RequestError("--temperature 0 gives greedy answers alone and --no-greedy leaves them out. Give one.")
    if len(set(options.seeds)) < len(options.seeds):
        raise RequestError(f"Each seed must be given once. Got --seeds {' '.join(map(str, options.seeds))}.")
    if len(set(options.data)) < len(options.data):
        raise RequestError(f"Each data set must be given once. Got --data {' '.join(options.data)}.")
    files = [_file(options.out, label_of(path, options.data), "") for path in options.data]
    if len(set(files)) < len(files):
        raise RequestError(
            f"The answers of each data set need a file of their own. Got --data {' '.join(options.data)}, of which two "
            "names are alike but for punctuation; rename a file."
        )


def _read(options: Options, tokenizer: Any) -> dict[str, Any]:
    """The encoded rows of each data set by its label."""
    sets = {}
    for path in options.data:
        data = measured_rows(options, path, tokenizer, max_reference_length=options.max_reference_length)
        dropped = f"; {data.dropped} over a length limit were dropped" if data.dropped else ""
        say(f"{path}: {len(data.examples)} rows{dropped}.")
        sets[label_of(path, options.data)] = data
    return sets


def _begun_record(options: Options, sets: dict[str, Any], model: Any, teacher: Any) -> Results:
    """The record without its metrics."""
    label, cost = label_of(options.model), training_cost(options.model)
    models = {label: model_record(options.model, model)}
    if options.teacher is not None:
        models[f"teacher {label_of(options.teacher)}"] = model_record(options.teacher, teacher)
    return Results(
        kind="evaluate",
        config=merged_config(options, {}),
        models=models,
        data={
            name: data_record(path, len(data.examples), data.dropped)
            for path, (name, data) in zip(options.data, sets.items(), strict=True)
        },
        training={} if cost is None else {label: cost},
    )


def _settle(options: Options, results: Results, decoding: Decoding, precision: str, teacher_dtype: str | None) -> None:
    """Make sure that answers which are there already were made as this command would make them."""
    settings = {f"--{name.replace('_', '-')}": results.config[name] for name in _ANSWERS_DEPEND_ON}
    roles = ("model", "teacher")
    settings |= {role: each.sha256 or each.path for role, each in zip(roles, results.models.values(), strict=False)}
    settings |= {f"data {name}": each.sha256 or each.path for name, each in results.data.items()}
    settings["--dtype"] = precision
    if teacher_dtype is not None:
        settings["--teacher-dtype"] = teacher_dtype
    settings["ids that end an answer"] = list(decoding.stop_ids)
    parts = parts_of(decoding, options.seeds, greedy=options.greedy, teacher=options.teacher is not None)
    files = [_file(options.out, name, part) for name in results.data for part in parts]
    held = settle_settings(_settings_file(options.out), settings, files, overwrite=options.overwrite)
    if held:
        say(f"Resuming from {len(held)} of {len(files)} files of answers and losses.")


def _decoding(options: Options, stop_ids: Sequence[int]) -> Decoding:
    return Decoding(
        stop_ids=stop_ids,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        max_new_tokens=options.max_completion_length,
        batch_size=settled_rows(options.batch_size),
    )


def _settings_file(out: Path) -> Path:
    return out.with_name(f"{out.stem}-settings.json")


def _file(out: Path, data: str, part: str) -> Path:
    """Where a part of a data set's answers is kept, in letters that every file system takes."""
    safe = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in data)
    return out.with_name(f"{out.stem}-{safe}-{part}.jsonl")
