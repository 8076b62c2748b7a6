"""`promptkd evaluate`."""

import re
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from promptkd.cli.headline import compare_within, measure_speed
from promptkd.cli.inference_run import InferenceRun, sampling
from promptkd.cli.options.evaluate import Options
from promptkd.cli.outputs import check_output, data_record, label_of, training_cost
from promptkd.cli.parsing.parser import merged_config
from promptkd.cli.teacher_context import (
    TEACHER_LIMIT,
    context_note,
    context_notes,
    measured_teacher_prompts,
    recorded_context,
    with_context_text,
)
from promptkd.cli.terminal import progress_lines, say
from promptkd.data.encode import EncodedData, EncodedExample
from promptkd.errors import RequestError
from promptkd.evaluation.dataset_evaluation import SetEvaluation, parts_of
from promptkd.evaluation.function_metric import Metric, load_metrics
from promptkd.evaluation.rouge_tokenizer import rouge_tokens
from promptkd.generation import Decoding
from promptkd.io.jsonl import settle_settings
from promptkd.io.lock import locked
from promptkd.io.python_file import names_python, python_file
from promptkd.models import check_rows_fit, model_record
from promptkd.models.positions import PROMPT_LIMIT
from promptkd.models.vocabulary import vocabulary_without
from promptkd.report import terminal_table
from promptkd.results import Results, file_sha256

# settings on which answers depend: those that are there are of no use under others
SETTLED = (
    *("temperature", "top_p", "top_k", "limit", "template"),
    *("max_prompt_length", "max_completion_length", "max_reference_length"),
    *("teacher_prompt", "max_teacher_prompt_length"),
)
# what older files of settings left out if it was so
_ABSENT: dict[str, Any] = {
    **{
        "--columns": None,
        "--chat-template-kwargs": None,
        "--teacher-prompt": None,
        "--max-teacher-prompt-length": None,
    },
    **{"ids that are never written": [], "--model-dtype": "float32", "template of the training": None},
}


def run(options: Options, training: dict[str, Any]) -> None:
    check(options)
    with locked(options.out):
        _evaluate(with_context_text(options), context_note(options.teacher_prompt))


def check(options: Options) -> None:
    check_output(options.out, overwrite=options.overwrite or _settings_file(options.out).exists())
    of_teacher = (
        "teacher_dtype",
        "kl_seeds",
        "teacher_prompt",
        "max_teacher_prompt_length",
        "teacher_model_init_kwargs",
    )
    for name in of_teacher:
        if vars(options)[name] is not None and options.teacher is None:
            raise RequestError(f"--{name.replace('_', '-')} is of a --teacher. Give one, or leave it out.")
    measured_teacher_prompts(with_context_text(options))
    if options.kl_seeds is not None and options.kl_seeds > len(options.seeds):
        raise RequestError(
            f"--kl-seeds must be at most the number of --seeds, {len(options.seeds)}. Got {options.kl_seeds}."
        )
    if not options.seeds:
        raise RequestError("Expected at least one seed. Got none; --temperature 0 decodes greedily alone.")
    if options.temperature == 0 and not options.greedy:
        raise RequestError("--temperature 0 gives greedy answers alone and --no-greedy leaves them out. Give one.")
    for what, flag, given in (("seed", "--seeds", options.seeds), ("data set", "--data", options.data)):
        if len(set(given)) < len(given):
            raise RequestError(f"Each {what} must be given once. Got {flag} {' '.join(map(str, given))}.")
    kinds = [_file, _teacher_file] if _measures_teacher(options) else [_file]
    files = [kind(options.out, label_of(path, options.data), "") for kind in kinds for path in options.data]
    if len(set(files)) < len(files):
        alike = f"Got --data {' '.join(options.data)}, of which two names are alike but for punctuation"
        alike += ", or for the -teacher of the teacher's answers" if len(kinds) > 1 else ""
        raise RequestError(f"The answers of each data set need a file of their own. {alike}; rename a file.")


def _evaluate(options: Options, context: str) -> None:
    job, label, contexts = InferenceRun(options), label_of(options.model), measured_teacher_prompts(options)
    metrics = load_metrics(options.metrics)
    tokenizer = job.load_tokenizer(options.model)
    shared = None if options.teacher is None else job.share(tokenizer, job.load_tokenizer(options.teacher))
    results = Results(kind="evaluate", config=merged_config(options, {}))
    for note in [*([] if shared is None else shared.notes), *([context] if context else [])]:
        say(note)
        results.notes.append(note)
    own = [python_file(name) for name in options.metrics if names_python(name)]
    results.code |= {str(file): f"sha256 {file_sha256(file)}" for file in own}
    read: dict[str, EncodedData] = {}
    for path in options.data:
        name = label_of(path, options.data)
        data = job.read_rows(path, tokenizer, options.limit, options.max_reference_length, contexts)
        read[name], results.data[name] = data, data_record(path, data)
        if shared is not None:
            shared.check(data.examples, path)
    sets = {name: data.examples for name, data in read.items()}
    if options.teacher is not None:
        told = "the KL and the teacher's own answers are of" if _measures_teacher(options) else "the KL is to"
        for note in context_notes(options, options.teacher, read, [options.model], told):
            say(note)
            results.notes.append(note)
    for name, rows in sets.items():
        if unread := rouge_tokens(options.rouge_tokenizer, tokenizer).told_unread([row.references for row in rows]):
            say(f"{name}: {unread}")
            results.notes.append(f"{name}: {unread}")
    for metric in metrics:
        metric.check(row.references for rows in sets.values() for row in rows)
    job.settle_precision()
    model = job.load_model(options.model)
    results.models[label] = model_record(options.model, model)
    teacher, of_teacher = None, f"teacher {label_of(options.teacher or '')}"
    if options.teacher is not None:
        teacher = job.load_teacher(options.teacher)
        record = results.models[of_teacher] = model_record(options.teacher, teacher)
        record.context = recorded_context(options.teacher_prompt, *read.values())
    for rows in sets.values():
        check_rows_fit("model", model, rows, options.max_completion_length)
        if teacher is not None:
            by = TEACHER_LIMIT if contexts else PROMPT_LIMIT
            asked = [row.for_teacher() for row in rows]
            check_rows_fit("teacher", teacher, asked, options.max_completion_length, limit_by=by)
    if cost := training_cost(options.model):
        results.training[label] = cost
    results.notes += [*job.row_notes, *job.precision_notes()]
    decoding = job.decoding(tokenizer, model, masked_ids=() if shared is None else shared.masked, **sampling(options))
    _settle(options, results, decoding, job)
    for name, rows in sets.items():
        started = time.perf_counter()
        files, tell = partial(_file, options.out, name), progress_lines(name, len(rows))
        how: dict[str, Any] = {"metrics": metrics, "progress": tell, "rouge_tokenizer": options.rouge_tokenizer}
        part = SetEvaluation(model, tokenizer, rows, file_of=files, teacher=teacher, kl_seeds=options.kl_seeds, **how)
        labels = {"model_label": label, "data_label": name}
        with job.computing():
            results.evaluations += part.run(decoding, options.seeds, greedy=options.greedy, **labels)
        results.timings[name] = time.perf_counter() - started
    if teacher is not None and _measures_teacher(options):
        _measure_teacher(job, results, {label: model, of_teacher: teacher}, sets, decoding, tokenizer, metrics)
    for metric in metrics:
        if failed := metric.failed_on_empty:
            results.notes.append(f"{metric.label} could not score {failed} empty answers; they count 0.")
    results.write(options.out)
    print(terminal_table([results]))
    say(f"The record is in {options.out}.")
    job.say_peak()


def _measure_teacher(
    job: InferenceRun,
    results: Results,
    models: dict[str, Any],
    sets: dict[str, list[EncodedExample]],
    decoding: Decoding,
    tokenizer: Any,
    metrics: list[Metric],
) -> None:
    """The teacher's own answers to the same rows, the differences from them, and the speed and size of both."""
    options, (model, (label, teacher)) = job.options, (next(iter(models)), list(models.items())[1])
    say(f"Measuring the {label} on the same rows; --measure student leaves this out.")
    started = time.perf_counter()
    own = job.decoding(tokenizer, teacher, **sampling(options))
    own = replace(decoding, stop_ids=tuple(sorted({*decoding.stop_ids, *own.stop_ids})))
    for name, rows in sets.items():
        how: dict[str, Any] = {"metrics": metrics, "rouge_tokenizer": options.rouge_tokenizer}
        how |= {"progress": progress_lines(f"{name}, {label}", len(rows))}
        files = partial(_teacher_file, options.out, name)
        part = SetEvaluation(teacher, tokenizer, [row.for_teacher() for row in rows], file_of=files, **how)
        labels = {"model_label": label, "data_label": name}
        with job.computing():
            results.evaluations += part.run(own, options.seeds, greedy=options.greedy, **labels)
    results.timings[label] = time.perf_counter() - started
    say(f"That took {results.timings[label]:.0f} s.")
    compare_within(results, [label, model])
    shared = vocabulary_without(tokenizer, decoding.masked_ids).size
    tokens = min(32, options.max_completion_length)
    workload = {"rows": decoding.batch_size, "vocabulary": shared, "new_tokens": tokens}
    with job.computing():
        measure_speed(results, models, next(iter(sets.values())), workload)


def _settle(options: Options, results: Results, decoding: Decoding, job: InferenceRun) -> None:
    """Make sure that answers which are there already were made as this command would make them."""
    settings = {f"--{name.replace('_', '-')}": results.config[name] for name in SETTLED}
    settings |= {"--columns": options.columns or None, "--chat-template-kwargs": options.chat_template_kwargs or None}
    roles = ("model", "teacher")
    settings |= {role: each.sha256 or each.path for role, each in zip(roles, results.models.values(), strict=False)}
    settings |= {f"data {name}": each.sha256 or each.path for name, each in results.data.items()}
    settings |= {"--dtype": job.precision, "--model-dtype": job.model_dtype}
    if job.teacher_dtype is not None:
        settings["--teacher-dtype"] = job.teacher_dtype
    settings["template of the training"] = job.trained_on
    settings["ids that end an answer"] = list(decoding.stop_ids)
    settings["ids that are never written"] = list(decoding.masked_ids)
    kl_seeds = [] if options.teacher is None else options.seeds[: options.kl_seeds]
    parts = parts_of(decoding, options.seeds, greedy=options.greedy, kl_seeds=kl_seeds)
    files = [_file(options.out, name, part) for name in results.data for part in parts]
    if _measures_teacher(options):
        parts = parts_of(decoding, options.seeds, greedy=options.greedy)
        files += [_teacher_file(options.out, name, part) for name in results.data for part in parts]
    place = _settings_file(options.out)
    if held := settle_settings(place, settings, files, overwrite=options.overwrite, absent=_ABSENT):
        say(f"Resuming from {len(held)} of {len(files)} files of answers and losses.")


def _measures_teacher(options: Options) -> bool:
    return options.teacher is not None and options.measure == "all"


def _settings_file(out: Path) -> Path:
    return out.parent / f"{out.stem}-settings.json"


def _file(out: Path, data: str, part: str) -> Path:
    """Where a part of a data set's answers is kept, in letters that every file system takes."""
    safe = re.sub(r"[^\w.-]", "-", data)
    return out.parent / f"{out.stem}-{safe}-{part}.jsonl"


def _teacher_file(out: Path, data: str, part: str) -> Path:
    return _file(out, data, f"teacher-{part}")
