"""`promptkd judge`."""

import hashlib
import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from promptkd.cli.options.judge import Options
from promptkd.cli.outputs import check_writable, label_of, sha256_of
from promptkd.cli.parsing.parser import merged_config
from promptkd.cli.terminal import progress_lines, say
from promptkd.data import read_columns
from promptkd.errors import PromptKDError, RequestError, check_all
from promptkd.io.jsonl import ResumableLines
from promptkd.io.lock import locked
from promptkd.io.redact import without_secret_values
from promptkd.judge.endpoint import Endpoint, Refusal, Reply, ask_all, check_url
from promptkd.judge.metrics import judge_notes, judge_results, token_cost
from promptkd.judge.questions import Key, Task, load_prompt, questions_about, read_models, requests_sha256
from promptkd.judge.verdicts import Verdict, verdict_log, verdict_of
from promptkd.report import terminal_table
from promptkd.results import DataRecord, Results, file_sha256

_WAITS_BETWEEN = 10.0  # seconds between two lines that say why a request waits


def run(options: Options, training: dict[str, Any]) -> None:
    _check(options)
    with locked(options.out):
        _judge(options)


def _judge(options: Options) -> None:
    task: Task = "score" if options.against is None else "pairwise"
    prompt = load_prompt(task, options.prompt_file)
    endpoint = _endpoint(options)
    models = read_models(_files(options), limit=options.limit, data=options.data, columns=read_columns(options.columns))
    questions = questions_about(list(models.values()), prompt)
    log = _log(options, task, endpoint, prompt)
    start = time.monotonic()
    _ask_missing(task, endpoint, questions, log, options)
    log.replace([log.lines[key] for key in sorted(log.lines)])
    verdicts = {key: Verdict(**log.lines[key]) for key in questions}
    given = list(verdicts.values())
    data = options.data_label or ("requests" if options.data is None else label_of(options.data))
    asked = {"judge": endpoint.model, **endpoint.fields, "prompt": hashlib.sha256(prompt.encode()).hexdigest()[:12]}
    results = Results(kind="judge", config=merged_config(options, {}), metrics=token_cost(given))
    results.evaluations, results.differences = judge_results(models, verdicts, data, asked)
    answers, *_ = models.values()  # any of them: all were asked the same
    sha256 = requests_sha256(answers.values())
    results.data = {data: DataRecord(path=options.data or str(options.responses), rows=len(answers), sha256=sha256)}
    results.data |= {
        f"answers of {label}": DataRecord(path=str(path), rows=len(answers), sha256=sha256_of(str(path)))
        for label, path in _files(options)
    }
    results.notes = judge_notes(given, judge=f"{endpoint.model} at {endpoint.url}")
    results.write(options.out)
    print(terminal_table([results]))
    spent = [f"{metric.value:.0f}" for metric in results.metrics.values()]
    cost = f"{spent[0]} prompt and {spent[1]} completion tokens" if spent else "the endpoint counts no tokens"
    unread = sum(each.model is None for each in given)
    say(f"{unread} of {len(given)} verdicts could not be read; {cost}; {time.monotonic() - start:.1f} s.")
    say(f"What the judge wrote is in {log.path}.")


def _check(options: Options) -> None:
    """Refuse what cannot work, all at once and before anything is read."""
    extra, labels = options.extra_body or {}, [label for label, _ in _files(options)]
    own = sorted({"model", "messages", "stream", "n"} & extra.keys())
    no_secret = "no key, token or password, for the record keeps it"
    checks = [
        (not options.judge_model.strip(), "--judge-model must name the judge"),
        (bool(own), f"--extra-body must not hold {', '.join(own)}"),
        (without_secret_values(extra) != extra, f"--extra-body must hold {no_secret}; set OPENAI_API_KEY instead"),
        (options.against is None and options.against_label is not None, "--against-label needs --against"),
        (len({*labels}) < len(labels), "both models have the same name: give --label or --against-label"),
        (options.out.is_dir(), f"--out must be a file, and {options.out} is a folder"),
    ]
    check_all("Cannot judge", checks)
    check_url(options.endpoint)
    check_writable(options.out.parent, options.out)
    if options.out.exists() and not _log_path(options).exists() and not options.overwrite:
        raise RequestError(f"{options.out} exists. Replace it by --overwrite or give another --out.")
    if find_spec("openai") is None:
        advice = "Install it with: pip install 'promptkd[judge]'."
        raise RequestError(f"The judge is asked through the openai package, which is not installed. {advice}")


def _files(options: Options) -> list[tuple[str, Path]]:
    given = ((options.label, options.responses), (options.against_label, options.against))
    return [(label or label_of(str(path)), path) for label, path in given if path is not None]


def _endpoint(options: Options) -> Endpoint:
    """The key is from the environment. No message repeats it, nor --key-variable, which might be the key by mistake."""
    key = os.environ.get(options.key_variable or "OPENAI_API_KEY", "").strip()
    if options.key_variable is not None and not key:
        expected = "--key-variable must name an environment variable that holds the key"
        raise RequestError(f"{expected}. The one it names is not set.")
    if not (key.isascii() and key.isprintable()):
        raise RequestError("The key in the environment holds characters that no header can carry. Set it again.")
    named = {"temperature": options.temperature, "seed": options.seed, "max_tokens": options.max_tokens}
    fields = {name: value for name, value in named.items() if value is not None} | (options.extra_body or {})
    patience = (options.timeout, options.retries, options.backoff)
    return Endpoint(options.endpoint.rstrip("/"), options.judge_model, key or None, fields, *patience)


def _log(options: Options, task: Task, endpoint: Endpoint, prompt: str) -> ResumableLines:
    """The verdicts there are, under the settings on which a verdict depends."""
    settings = {
        "task": task,
        "endpoint": endpoint.url,
        "judge_model": endpoint.model,
        **endpoint.fields,
        "responses_sha256": file_sha256(options.responses),
        "against_sha256": None if options.against is None else file_sha256(options.against),
        "data": None if options.data is None else sha256_of(options.data) or options.data,
        "prompt": prompt,
    }
    return verdict_log(_log_path(options), settings, overwrite=options.overwrite)


def _log_path(options: Options) -> Path:
    return options.out.with_name(f"{options.out.stem}-verdicts.jsonl")


def _ask_missing(
    task: Task, endpoint: Endpoint, questions: dict[Key, str], log: ResumableLines, options: Options
) -> None:
    """Ask what is missing from the log, so many questions at a time. Raises where an answer is missing in the end."""
    missing = {key: question for key, question in questions.items() if key not in log.lines}
    held = done = len(questions) - len(missing)
    if held:
        say(f"{held} of {len(questions)} verdicts are in {log.path} already.")
    tell, told = progress_lines("Judging", len(questions)), -_WAITS_BETWEEN

    def take(key: Key, outcome: Reply | Refusal) -> None:
        nonlocal done
        log.append([verdict_of(task, key, outcome).model_dump()])
        done += 1
        tell("verdicts", done)

    def on_wait(reason: str, seconds: float) -> None:
        nonlocal told
        if time.monotonic() - told >= _WAITS_BETWEEN:
            say(f"Asking again in {seconds:.1f} s: {reason}.")
            told = time.monotonic()

    try:
        at_once = options.concurrency
        if failed := ask_all(endpoint, missing, take, concurrency=at_once, proven=held > 0, on_wait=on_wait):
            *_, reason = failed.values()
            count = f"{len(failed)} of {len(questions)} requests"
            raise PromptKDError(f"{count} were not answered, the last for: {reason}.")
    except PromptKDError as error:
        again = "the same command without --overwrite" if options.overwrite else "the same command"
        kept = f"{done} verdicts are kept in {log.path}; {again} asks for the others."
        raise PromptKDError(f"{error} {kept if done else 'No verdict was had.'}") from None
