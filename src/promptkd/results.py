"""One JSON record per result: what ran, on which code, data and machine, and every metric.

Reports and comparisons read nothing else. A record is validated when written and when read; unknown keys are errors.
"""

import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Collection
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import Field, ValidationError

from promptkd.errors import RequestError
from promptkd.io.atomic import write_atomic
from promptkd.io.files import MIB, read_regular
from promptkd.io.redact import without_secrets
from promptkd.record_parts import Preflight, PromptExplanation
from promptkd.record_parts import Record as _Record

SCHEMA_VERSION: Literal[1] = 1
_MOST_BYTES = 1024 * MIB  # of a record, with every answer of an evaluation in it
_FOREIGN_CODE = "Code that came with a model was allowed to run (--trust_remote_code)."
_Measured = Literal["evaluate", "exposure-bias", "explain-prompt", "judge", "compare"]
Kind = Literal["prune", "sft", "distill", "generate", "study", "demo", _Measured]
Better = Literal["higher", "lower"]
LEVEL = 0.05  # largest adjusted p of a claimed difference, beside an interval of 1 - `LEVEL`
BEFORE = "student before training"  # label of a run's student as it was measured before the first step


class Metric(_Record):
    """A value, with the interval that its rows support where one was computed."""

    value: float
    low: float | None = None
    """Lower end of the 95 % interval."""
    high: float | None = None
    """Upper end of the 95 % interval."""
    rows: int | None = None
    """How many rows the value is a mean over."""
    deviation: float | None = None
    """Standard deviation between the seeds of decoding, or in a study of training, where there were several."""


class RowResult(_Record):
    """One request, the model's answer to it and the scores of that answer."""

    row: int
    """Index of the row in its data file, from 0."""
    seed: int | None = None
    """Seed of the sampled response; None where it was decoded greedily."""
    prompt: str
    """What the model read, in the template's words."""
    request: list[tuple[str, str]] = Field(default_factory=list)
    """The same without the template: roles and texts; empty in older records, and where the row's prompt is a text."""
    references: list[str]
    response: str
    scores: dict[str, float] = Field(default_factory=dict)
    """Per-row scores by metric name; their means are the evaluation's metrics."""
    tokens: dict[str, int] = Field(default_factory=dict)
    """By metric name, the tokens that a score is a mean over: the metric weighs tokens, not rows, equally."""


class Evaluation(_Record):
    """One model measured on one data set."""

    model: str
    """Label of the model: "teacher", "pruned", "recovered", "distilled", `BEFORE`, or a path."""
    data: str
    """Label of the data set."""
    decoding: dict[str, Any] = Field(default_factory=dict)
    """How the responses were decoded; "seeds" where several decodings are taken together."""
    rouge_tokenizer: str = "words"
    """The tokens by which ROUGE compared texts (`evaluation/rouge_tokenizer.py`); older records have the default."""
    metrics: dict[str, Metric]
    samples: list[RowResult] = Field(default_factory=list)


class Difference(_Record):
    """A paired difference, `model` less `baseline`, over the same rows."""

    model: str
    baseline: str
    metric: str
    difference: Metric
    better: Better
    data: str = ""
    """Label of the data set; empty where the record holds a single one."""
    p_value: float | None = None
    """Of the two-sided sign-flip test."""
    p_adjusted: float | None = None
    """The same after Holm's correction over all differences of the comparison."""
    effect_size: float | None = None
    """Mean of the rows' differences over their standard deviation (Cohen's d for pairs)."""
    ratio: Metric | None = None
    """Metric of the model over that of a teacher, over the same rows, for a metric of which more is better."""


class ToldApart(_Record):
    """Which of a study's methods differ in a metric: every pair was tested, and is listed here or cannot be told apart.

    p is adjusted by Holm over the pairs of this metric on this data, unlike that of a `Difference`, which stands for
    all of the comparison.
    """

    metric: str
    data: str
    models: list[str]
    """All that were tested against each other."""
    pairs: list[tuple[str, str]]
    """The better one first."""


class CurvePoint(_Record):
    x: float
    value: float | None
    """None where it is not defined: no row is this long, or the denominator is 0."""
    low: float | None = None
    high: float | None = None
    rows: int | None = None
    row_parts: list[float] = Field(default_factory=list)
    """Each row's part in the value, 0 in sum, by which a study pools seeds; empty in older and in pooled records."""


class Curve(_Record):
    """A metric over lengths, of one model on one data set; over the steps of training at one length; a difference."""

    name: Literal["exposure_bias", "exposure_bias_by_step", "exposure_bias_difference"]
    model: str
    data: str
    settings: dict[str, Any] = Field(default_factory=dict)
    """What the curve depends on: samples per row, treatment of ended rows, the teacher's prompt."""
    points: list[CurvePoint]


class Training(_Record):
    """What a model's training cost, copied from the record of its run."""

    method: str
    steps: int
    seconds: float
    peak_memory_bytes: int
    peak_memory_by_phase: dict[str, int] = Field(default_factory=dict)
    """The peak of each phase of training, in bytes; empty in records of older versions."""
    predicted_memory_bytes: int | None = Field(default=None, exclude=True)
    """Read in records of older versions, which estimated the peak before the start; no longer written."""
    tokens_per_second: float | None = None
    """Prompt and response tokens trained on per second, median over the logged steps."""
    chosen_from: int = 1
    """Validations out of which the kept step was chosen, by the rows that the run then measures it on."""


class Inference(_Record):
    """What a model takes to run: measured in turns with the record's other models, on the machine of the record."""

    precision: str
    """What it computed in, "float32" or "bfloat16"; followed by ", quantized" where weights are packed integers."""
    device: str
    rows: int
    """Rows decoded together in `tokens_per_second`."""
    prompt_tokens: int
    """Length of the prompt in `first_token_seconds`, the median of the data."""
    new_tokens: int
    """Tokens decoded per row and round."""
    weight_bytes: int
    """Of the weights in that precision."""
    tokens_per_second: list[float]
    """Decoding `rows` rows together, without the prefill, by round. Round i of two models ran back to back."""
    tokens_per_second_one_row: list[float]
    """Decoding a single row, by round."""
    first_token_seconds: list[float]
    """From the prompt of a single row to its first token, by round."""


class Series(_Record):
    """The logged steps of one stage of training."""

    name: str
    points: list[dict[str, Any]]
    """One mapping per logged step: "step" and every logged metric."""


class ModelPart(_Record):
    """The base of a merged model, or an adapter that was merged into it."""

    path: str
    sha256: str
    """As in `ModelRecord`; of an adapter, over its settings but for the name of its base, and its weights."""


class ModelRecord(_Record):
    path: str
    parameters: int
    sha256: str
    """Hash over config.json and every weight file, sorted by name; of a merged model, over the hashes of its parts."""
    bytes_on_disk: int | None = None
    """Of the weight files; None in older records, and where they are not on this machine."""
    about: str = ""
    """What the model is, for a reader of the page: "24 of the teacher's 30 layers, nothing trained yet"."""
    base: ModelPart | None = None
    """The model that the adapters were merged into, where there are any."""
    adapters: list[ModelPart] = Field(default_factory=list)
    """In the order in which they were merged."""
    context: str = ""
    """What a teacher reads that its student does not; `kl_to_teacher` is then to the teacher with it."""


class DataRecord(_Record):
    path: str
    rows: int
    sha256: str
    dropped: int = 0
    """Rows over the length limit, which were left out; examples, where one row gives several."""
    cut: int = 0
    """Rows left out since their responses were cut at a length limit when they were written."""
    unanswered: int = 0
    """Conversations that end with the user, which were left out since a response is needed."""
    examples: int | None = None
    """Examples that the rows give; None where each row is one."""


class Results(_Record):
    """The record that `results.json` holds."""

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Kind
    created: str = Field(default_factory=lambda: now())
    command: list[str] = Field(default_factory=lambda: ["promptkd", *without_secrets(sys.argv[1:])])
    config: dict[str, Any] = Field(default_factory=dict)
    code: dict[str, str | None] = Field(default_factory=lambda: code_version())
    machine: dict[str, Any] = Field(default_factory=lambda: machine_facts())
    models: dict[str, ModelRecord] = Field(default_factory=dict)
    data: dict[str, DataRecord] = Field(default_factory=dict)
    preflight: Preflight | None = None
    metrics: dict[str, Metric] = Field(default_factory=dict)
    """Metrics of the whole run."""
    evaluations: list[Evaluation] = Field(default_factory=list)
    differences: list[Difference] = Field(default_factory=list)
    told_apart: list[ToldApart] = Field(default_factory=list)
    """Of a study with several seeds, by metric and data set; empty in older records."""
    curves: list[Curve] = Field(default_factory=list)
    training: dict[str, Training] = Field(default_factory=dict)
    """By the model's label: what it cost to train, where the record of its run was found."""
    inference: dict[str, Inference] = Field(default_factory=dict)
    """By the model's label: its speed and memory, where they were measured."""
    prompts: list[PromptExplanation] = Field(default_factory=list)
    """What trained soft prompts are made of, one per teacher of the run."""
    history: list[Series] = Field(default_factory=list)
    timings: dict[str, float] = Field(default_factory=dict)
    """Seconds per part of the run."""
    notes: list[str] = Field(default_factory=list)
    """Sentences that a reader of the metrics must know."""

    def write(self, path: Path) -> None:
        """Validate and write to `path` atomically. A note says so where a model's own code was allowed."""
        if self.config.get("trust_remote_code") and _FOREIGN_CODE not in self.notes:
            self.notes.append(_FOREIGN_CODE)
        record = Results.model_validate(self.model_dump())
        write_atomic(path, record.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Read and validate `path`. Raises `RequestError` if it is not such a record."""
        try:
            return cls.model_validate_json(read_regular(path, most=_MOST_BYTES).decode("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not valid UTF-8"
            raise RequestError(f"Expected a results file at {path}: {reason}.") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the whole file"
            problem = f"{path} is not a results record of schema version {SCHEMA_VERSION}: {where}: {first['msg']}"
            raise RequestError(f"{problem}. Write it again with the command that made it.") from error


def metric_named(asked: str, known: Collection[str]) -> str | None:
    """The one of `known` metrics that is asked for. One's own, "own:NAME", is also NAME and FILE.py:NAME."""
    if asked in known:
        return asked
    file, _, name = asked.rpartition(":")
    own = [f"{prefix}:{name}" for prefix in ("own", "own-lower")] if file in ("", "own") or file.endswith(".py") else []
    return next((each for each in own if each in known), None)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def code_version() -> dict[str, str | None]:
    """Versions of the code that ran: promptkd, its git commit (None outside a checkout), and the main libraries."""
    git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    packages = ("promptkd", "torch", "transformers", "trl", "peft", "accelerate")
    versions: dict[str, str | None] = dict.fromkeys(("git_commit", *packages))
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True)
        versions["git_commit"] = done.stdout.strip()
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def machine_facts() -> dict[str, Any]:
    """System, kind and number of processors, memory in bytes and Python version."""
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
    }


def _processor() -> str:
    """What the processor calls itself, "AMD EPYC 9B14"; empty where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def file_sha256(*paths: Path) -> str:
    """Hex SHA-256 over the concatenated bytes of `paths`."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def read_history(path: Path) -> list[dict[str, Any]]:
    """The logged steps of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
