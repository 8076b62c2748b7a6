"""`promptkd judge`."""

import hashlib
import os
import time
from pathlib import Path
from typing import Any

from promptkd.cli.options.judge import Options
from promptkd.cli.outputs import check_writable
from promptkd.cli.parsing.parser import merged_config
from promptkd.cli.provenance import data_record, label_of
from promptkd.cli.terminal import say
from promptkd.cli.verdict_requests import ask_missing, cost_sentence
from promptkd.errors import RequestError, check_all
from promptkd.io.jsonl import ResumableLines
from promptkd.io.lock import locked
from promptkd.io.redact import without_secret_values
from promptkd.judge.endpoint import Endpoint, check_client, check_url
from promptkd.judge.metrics import judge_notes, judge_results, token_cost
from promptkd.judge.questions import (
    JudgedAnswer,
    Task,
    check_same_requests,
    load_prompt,
    questions_about,
    read_answers,
    requests_sha256,
    with_requests,
)
from promptkd.judge.verdicts import Verdict, verdict_log
from promptkd.report import terminal_table
from promptkd.results import DataRecord, Results, file_sha256


def run(options: Options, training: dict[str, Any]) -> None:
    _check(options)
    check_client()
    with locked(options.out):
        _judge(options)


def _judge(options: Options) -> None:
    task: Task = "score" if options.against is None else "pairwise"
    prompt = load_prompt(task, options.prompt_file)
    endpoint = _endpoint(options)
    models = _answers(options)
    questions = questions_about(list(models.values()), prompt)
    log = _log(options, task, endpoint, prompt)
    start = time.monotonic()
    ask_missing(task, endpoint, questions, log, options.concurrency)
    log.replace([log.lines[key] for key in sorted(log.lines)])
    verdicts = {key: Verdict(**log.lines[key]) for key in questions}
    data = options.data_label or ("requests" if options.data is None else label_of(options.data))
    asked = {"judge": endpoint.model, **endpoint.fields, "prompt": hashlib.sha256(prompt.encode()).hexdigest()[:12]}
    results = Results(kind="judge", config=merged_config(options, {}), metrics=token_cost(verdicts.values()))
    results.evaluations, results.differences = judge_results(models, verdicts, data=data, asked=asked)
    results.data = _provenance(options, data, models)
    results.notes = judge_notes(verdicts.values(), judge=f"{endpoint.model} at {endpoint.url}")
    results.write(options.out)
    print(terminal_table([results]))
    say(f"{cost_sentence(verdicts.values(), results.metrics)}; {time.monotonic() - start:.1f} s.")
    say(f"What the judge wrote is in {log.path}.")


def _check(options: Options) -> None:
    """Refuse what cannot work, all at once and before anything is read."""
    own = sorted({"model", "messages", "stream", "n"} & (options.extra_body or {}).keys())
    checks = [
        (not options.judge_model.strip(), "--judge-model must name the judge"),
        (bool(own), f"--extra-body must not hold {', '.join(own)}"),
        (
            without_secret_values(options.extra_body or {}) != (options.extra_body or {}),
            "--extra-body must hold no key, token or password, for the record keeps it; set OPENAI_API_KEY instead",
        ),
        (options.against is None and options.against_label is not None, "--against-label needs --against"),
        (_same_label(options), "both models have the same name: give --label or --against-label"),
        (options.out.is_dir(), f"--out must be a file, and {options.out} is a folder"),
    ]
    check_all("Cannot judge", checks)
    check_url(options.endpoint)
    check_writable(options.out.parent, options.out)
    if options.out.exists() and not _log_path(options).exists() and not options.overwrite:
        raise RequestError(f"{options.out} exists. Replace it by --overwrite or give another --out.")


def _same_label(options: Options) -> bool:
    if options.against is None:
        return False
    return _label(options.responses, options.label) == _label(options.against, options.against_label)


def _endpoint(options: Options) -> Endpoint:
    named = {"temperature": options.temperature, "seed": options.seed, "max_tokens": options.max_tokens}
    return Endpoint(
        url=options.endpoint.rstrip("/"),
        model=options.judge_model,
        key=_key(options.key_variable),
        fields={name: value for name, value in named.items() if value is not None} | (options.extra_body or {}),
        timeout=options.timeout,
        retries=options.retries,
        backoff=options.backoff,
    )


def _key(variable: str | None) -> str | None:
    """The key from the environment. No message repeats it, nor `variable`, which might be the key by mistake."""
    key = os.environ.get(variable or "OPENAI_API_KEY", "").strip()
    if variable is not None and not key:
        raise RequestError(
            "--key-variable must name an environment variable that holds the key. The one it names is not set."
        )
    if not (key.isascii() and key.isprintable()):
        raise RequestError("The key in the environment holds characters that no header can carry. Set it again.")
    return key or None


def _answers(options: Options) -> dict[str, dict[int, JudgedAnswer]]:
    """The answers of one model, or of two to the same requests, by label."""
    models = {_label(options.responses, options.label): read_answers(options.responses, limit=options.limit)}
    (answers,) = models.values()
    if options.against is not None:
        others = read_answers(options.against)
        if options.limit is not None:
            others = {row: answer for row, answer in others.items() if row in answers}
        models[_label(options.against, options.against_label)] = others
    if options.data is not None:
        models = {label: with_requests(each, options.data) for label, each in models.items()}
    if options.against is not None:
        ours, theirs = models.values()
        check_same_requests(ours, theirs, (str(options.responses), str(options.against)))
    return models


def _label(path: Path, given: str | None) -> str:
    return given or label_of(str(path))


def _provenance(options: Options, data: str, models: dict[str, dict[int, JudgedAnswer]]) -> dict[str, DataRecord]:
    """The files of answers, and the requests: their hash is the same for every model that was asked the same."""
    answers, *_ = models.values()
    sha256 = requests_sha256(answers.values())
    source = options.data or str(options.responses)
    records = {data: DataRecord(path=source, rows=len(answers), sha256=sha256)}
    paths = [path for path in (options.responses, options.against) if path is not None]
    for label, path in zip(models, paths, strict=True):
        records[f"answers of {label}"] = data_record(str(path), len(answers), 0)
    return records


def _log(options: Options, task: Task, endpoint: Endpoint, prompt: str) -> ResumableLines:
    """The verdicts there are, under settings on which a verdict depends; how patiently one asks is not among them."""
    settings = {
        "task": task,
        "endpoint": endpoint.url,
        "judge_model": endpoint.model,
        **endpoint.fields,
        "responses_sha256": file_sha256(options.responses),
        "against_sha256": None if options.against is None else file_sha256(options.against),
        "data": None if options.data is None else data_record(options.data, 0, 0).sha256 or options.data,
        "prompt": prompt,
    }
    return verdict_log(_log_path(options), settings, overwrite=options.overwrite)


def _log_path(options: Options) -> Path:
    return options.out.with_name(f"{options.out.stem}-verdicts.jsonl")
