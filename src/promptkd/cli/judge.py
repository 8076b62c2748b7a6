"""Let a language model score a model's answers, or compare them with another model's.

Alone, --responses asks a score from 1 to 10 for every answer and for its row's first reference, and reports the ratio
of the sums in % (the feedback score of MiniLLM and PromptKD). With --against it asks which of two models' answers is
better, in both orders, and reports win, tie and flip rates.

The judge is any OpenAI-compatible endpoint. Its key is read from the environment variable OPENAI_API_KEY, or the one
that --key-variable names, and is written nowhere; a server without keys needs none. Every verdict goes at once to a
JSONL file beside --out, and the same command asks for the missing ones alone.

    promptkd judge --responses student.jsonl --endpoint http://localhost:8000/v1 --judge-model NAME --out judged.json
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from promptkd.judge.endpoint import Endpoint
    from promptkd.judge.prompt_template import Task
    from promptkd.judge.questions import Answer
    from promptkd.judge.verdict_log import VerdictLog
    from promptkd.results import DataRecord

GOES_ON: tuple[str, ...] = ()


@dataclass
class Options:
    responses: Path
    """The answers to judge, as `promptkd generate` or `promptkd evaluate` writes them."""
    endpoint: str
    """Base address of an OpenAI-compatible server, such as http://localhost:8000/v1."""
    judge_model: str
    """The judge, by the name that the server knows it by."""
    out: Path
    """The results file to write; the verdicts go beside it."""
    against: Path | None = None
    """Another model's answers to the same requests, to compare with."""
    label: str | None = None
    """Name of the model; by default the file's."""
    against_label: str | None = None
    """Name of the other model; by default the file's."""
    data: str | None = None
    """The data the answers were made from: the judge is then shown its requests, without the template around them."""
    data_label: str | None = None
    """Name of the data set in tables and reports; by default that of --data, else "requests"."""
    prompt_file: Path | None = None
    """Text to ask with, in place of the one that ships; it must hold {{ request }}, {{ first }} and {{ second }}."""
    limit: int | None = None
    """Judge the first so many rows."""
    temperature: float | None = 0.0
    """Temperature of the judge; none sends none."""
    seed: int | None = 0
    """Seed of the judge; none sends none."""
    max_tokens: int | None = 512
    """Most tokens of a verdict; none sends none."""
    extra_body: dict[str, Any] | None = None
    """Further fields of every request, such as {"reasoning_effort": "low"}."""
    key_variable: str | None = None
    """The environment variable that holds the key, in place of OPENAI_API_KEY."""
    concurrency: int = 4
    """Requests under way at a time."""
    timeout: float = 120.0
    """Seconds to wait for a whole answer."""
    retries: int = 5
    """How often a request is repeated after a failure that may pass."""
    backoff: float = 1.0
    """Seconds before the first repetition, doubled for each further one; a server's Retry-After counts where longer."""
    overwrite: bool = False
    """Replace --out and the verdicts beside it."""


def run(options: Options, training: dict[str, Any]) -> None:
    import hashlib
    import time

    from promptkd.cli.judging import ask_missing, cost_sentence
    from promptkd.cli.measuring import label_of
    from promptkd.cli.options import merged_config
    from promptkd.cli.session import say
    from promptkd.judge.endpoint import check_client
    from promptkd.judge.metrics import judge_notes, judge_results, token_cost
    from promptkd.judge.prompt_template import load_prompt
    from promptkd.judge.questions import questions_about
    from promptkd.report import terminal_table
    from promptkd.results import Results

    _check(options)
    check_client()
    task: Task = "score" if options.against is None else "pairwise"
    prompt = load_prompt(task, options.prompt_file)
    endpoint = _endpoint(options)
    models = _answers(options)
    questions = questions_about(list(models.values()), prompt)
    log = _log(options, task, endpoint, prompt)
    start = time.monotonic()
    ask_missing(task, endpoint, questions, log, options.concurrency)
    log.finish()
    verdicts = {key: log.verdicts[key] for key in questions}
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
    from promptkd.cli.session import check_writable
    from promptkd.errors import RequestError
    from promptkd.io.redact import without_secret_values
    from promptkd.judge.endpoint import check_url

    own = sorted({"model", "messages", "stream", "n"} & (options.extra_body or {}).keys())
    checks = [
        (not options.judge_model.strip(), "--judge-model must name the judge"),
        (options.concurrency < 1, f"--concurrency must be at least 1, got {options.concurrency}"),
        (options.retries < 0, f"--retries must be 0 or more, got {options.retries}"),
        (options.timeout <= 0, f"--timeout must be above 0 seconds, got {options.timeout:g}"),
        (options.backoff < 0, f"--backoff must be 0 seconds or more, got {options.backoff:g}"),
        ((options.temperature or 0) < 0, f"--temperature must be 0 or more, got {options.temperature}"),
        (
            options.max_tokens is not None and options.max_tokens < 1,
            f"--max-tokens must be 1 or more, got {options.max_tokens}",
        ),
        (bool(own), f"--extra-body must not hold {', '.join(own)}"),
        (
            without_secret_values(options.extra_body or {}) != (options.extra_body or {}),
            "--extra-body must hold no key, token or password, for the record keeps it; set OPENAI_API_KEY instead",
        ),
        (options.against is None and options.against_label is not None, "--against-label needs --against"),
        (_same_label(options), "both models have the same name: give --label or --against-label"),
        (options.out.is_dir(), f"--out must be a file, and {options.out} is a folder"),
    ]
    problems = [text for wrong, text in checks if wrong]
    if problems:
        raise RequestError("Cannot judge: " + "; ".join(problems) + ".")
    check_url(options.endpoint)
    check_writable(options.out.parent, options.out)
    if options.out.exists() and not _log_path(options).exists() and not options.overwrite:
        raise RequestError(f"{options.out} exists. Replace it by --overwrite or give another --out.")


def _same_label(options: Options) -> bool:
    if options.against is None:
        return False
    return _label(options.responses, options.label) == _label(options.against, options.against_label)


def _endpoint(options: Options) -> "Endpoint":
    from promptkd.judge.endpoint import Endpoint

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
    import os

    from promptkd.errors import RequestError

    key = os.environ.get(variable or "OPENAI_API_KEY", "").strip()
    if variable is not None and not key:
        raise RequestError(
            "--key-variable must name an environment variable that holds the key. The one it names is not set."
        )
    if not (key.isascii() and key.isprintable()):
        raise RequestError("The key in the environment holds characters that no header can carry. Set it anew.")
    return key or None


def _answers(options: Options) -> "dict[str, dict[int, Answer]]":
    """The answers of one model, or of two to the same requests, by label."""
    from promptkd.judge.questions import check_same_requests, read_answers, with_requests

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
    from promptkd.cli.measuring import label_of

    return given or label_of(str(path))


def _provenance(options: Options, data: str, models: "dict[str, dict[int, Answer]]") -> "dict[str, DataRecord]":
    """The files of answers, and the requests: their hash is the same for every model that was asked the same."""
    from promptkd.cli.session import data_record
    from promptkd.judge.questions import requests_sha256
    from promptkd.results import DataRecord

    answers, *_ = models.values()
    sha256 = requests_sha256(answers.values())
    source = options.data or str(options.responses)
    records = {data: DataRecord(path=source, rows=len(answers), sha256=sha256)}
    paths = [path for path in (options.responses, options.against) if path is not None]
    for label, path in zip(models, paths, strict=True):
        records[f"answers of {label}"] = data_record(str(path), len(answers), 0)
    return records


def _log(options: Options, task: "Task", endpoint: "Endpoint", prompt: str) -> "VerdictLog":
    """The verdicts there are, under settings on which a verdict depends; how patiently one asks is not among them."""
    from promptkd.cli.session import data_record
    from promptkd.judge.verdict_log import VerdictLog
    from promptkd.results import file_sha256

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
    return VerdictLog(_log_path(options), settings, overwrite=options.overwrite)


def _log_path(options: Options) -> Path:
    return options.out.with_name(f"{options.out.stem}-verdicts.jsonl")
