"""Score a model's answers to one or several data sets, sampled under every seed and greedy.

The record, --out, holds every figure with its interval over rows and its deviation between seeds, and every row's
answers and scores. The answers are kept beside it while they are made, a JSONL file a data set and seed. Run a command
that was stopped once more, and it does only what is missing; sets and seeds may be added in the same way.

    promptkd evaluate --model runs/promptkd --data dolly.jsonl sni.jsonl --seeds 10 20 30 40 50 --out results.json
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from promptkd.evaluation.measure import Decoding
    from promptkd.results import Results

GOES_ON: tuple[str, ...] = ()
LESS_MEMORY = (
    "a smaller --batch-size (now {batch_size})",
    "a smaller --max-completion-length (now {max_completion_length})",
)


@dataclass
class Options:
    model: str
    """The model to score: a hub name, folder, run folder or GGUF file."""
    data: list[str]
    """Rows with references: files, folders or hub data sets."""
    out: Path
    """The results file to write; answers go beside it."""
    teacher: str | None = None
    """A teacher, to report the KL from the model to it."""
    seeds: list[int] = field(default_factory=lambda: [10])
    """Seeds of the sampled answers; each is a decoding of every row."""
    greedy: bool = True
    """Decode greedily as well; --no-greedy leaves it out."""
    metrics: list[str] = field(default_factory=list)
    """More metrics, of Hugging Face's `evaluate`: names, or paths of metric scripts."""
    temperature: float = 1.0
    """Sampling temperature; 0 gives the greedy answers alone."""
    top_p: float = 1.0
    """Share of the probability mass to sample from."""
    top_k: int = 0
    """Number of tokens to sample from; 0 for all."""
    batch_size: int | None = None
    """Rows that are decoded at a time; by default 32 on CPU, 128 on a GPU."""
    limit: int | None = None
    """Use the first so many rows of each data set."""
    template: str = "auto"
    """auto, alpaca, chat, or a Jinja text."""
    max_prompt_length: int = 256
    """Most tokens of a prompt; rows above it are dropped and counted."""
    max_completion_length: int = 256
    """Most tokens of a response."""
    max_reference_length: int = 768
    """Most tokens of a first reference; rows above it are dropped and counted."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision to compute in, with weights in float32; auto is bfloat16 where the device has units for it."""
    teacher_dtype: Literal["float32", "bfloat16", "float16", "auto"] | None = None
    """Precision of the teacher's weights; by default bfloat16 where the device has units for it, else float32."""
    trust_remote_code: bool = False
    """Run code that a hub model ships."""
    overwrite: bool = False
    """Begin anew: replace --out and the answers beside it."""


_ANSWERS_DEPEND_ON = (
    *("temperature", "top_p", "top_k", "limit", "template"),
    *("max_prompt_length", "max_completion_length", "max_reference_length"),
)


def run(options: Options, training: dict[str, Any]) -> None:
    import time

    from promptkd.cli.measured_memory import say_peak
    from promptkd.cli.measuring import (
        computing_in,
        label_of,
        load_subject,
        precision_notes,
        settled_precision,
        teacher_precision_here,
    )
    from promptkd.cli.session import progress_lines, quiet_libraries, say
    from promptkd.data.dataset import stop_ids_of
    from promptkd.evaluation.dataset_evaluation import SetEvaluation
    from promptkd.evaluation.hub_metrics import HubMetric
    from promptkd.models import check_same_vocabulary, load_tokenizer
    from promptkd.report import terminal_table

    check(options)
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
    stops = stop_ids_of(tokenizer, model.generation_config, template=options.template)
    results = _begun_record(options, sets, model, teacher)
    results.notes += precision_notes(precision, teacher_dtype)
    _settle(options, results, stops, precision, teacher_dtype)
    for name, data in sets.items():
        started = time.perf_counter()
        job = SetEvaluation(
            model,
            tokenizer,
            data.examples,
            stops,
            file_of=partial(_file, options.out, name),
            teacher=teacher,
            metrics=metrics,
            progress=progress_lines(name, len(data.examples)),
        )
        with computing_in(precision):
            results.evaluations += job.run(
                _decoding(options),
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
    from promptkd.cli.measuring import check_decoding, check_output, label_of
    from promptkd.errors import RequestError

    check_output(options.out, overwrite=options.overwrite or _settings_file(options.out).exists())
    check_decoding(options, options.seeds)
    if options.teacher_dtype is not None and options.teacher is None:
        raise RequestError("--teacher-dtype is of a --teacher. Give one, or leave it out.")
    if not options.seeds:
        raise RequestError("Expected at least one seed. Got none; --temperature 0 decodes greedily alone.")
    if options.temperature == 0 and not options.greedy:
        raise RequestError("--temperature 0 gives greedy answers alone and --no-greedy leaves them out. Give one.")
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
    from promptkd.cli.measuring import label_of, measured_rows
    from promptkd.cli.session import say

    sets = {}
    for path in options.data:
        data = measured_rows(options, path, tokenizer, max_reference_length=options.max_reference_length)
        dropped = f"; {data.dropped} over a length limit were dropped" if data.dropped else ""
        say(f"{path}: {len(data.examples)} rows{dropped}.")
        sets[label_of(path, options.data)] = data
    return sets


def _begun_record(options: Options, sets: dict[str, Any], model: Any, teacher: Any) -> "Results":
    """The record without its metrics."""
    from promptkd.cli.measuring import label_of, training_cost
    from promptkd.cli.options import merged_config
    from promptkd.cli.session import data_record
    from promptkd.models import model_record
    from promptkd.results import Results

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


def _settle(
    options: Options, results: "Results", stops: Sequence[int], precision: str, teacher_dtype: str | None
) -> None:
    """Make sure that answers which are there already were made as this command would make them."""
    from promptkd.cli.session import say
    from promptkd.evaluation.dataset_evaluation import parts_of
    from promptkd.io.jsonl import settle_settings

    settings = {f"--{name.replace('_', '-')}": results.config[name] for name in _ANSWERS_DEPEND_ON}
    roles = ("model", "teacher")
    settings |= {role: each.sha256 or each.path for role, each in zip(roles, results.models.values(), strict=False)}
    settings |= {f"data {name}": each.sha256 or each.path for name, each in results.data.items()}
    settings["--dtype"] = precision
    if teacher_dtype is not None:
        settings["--teacher-dtype"] = teacher_dtype
    settings["ids that end an answer"] = list(stops)
    parts = parts_of(_decoding(options), options.seeds, greedy=options.greedy, teacher=options.teacher is not None)
    files = [_file(options.out, name, part) for name in results.data for part in parts]
    held = settle_settings(_settings_file(options.out), settings, files, overwrite=options.overwrite)
    if held:
        say(f"Going on from {len(held)} of {len(files)} files of answers and losses.")


def _decoding(options: Options) -> "Decoding":
    from promptkd.cli.measuring import settled_rows
    from promptkd.evaluation.measure import Decoding

    return Decoding(
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
