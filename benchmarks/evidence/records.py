"""A study's finished runs as compact records for git: what was measured of every row, without any text, and back.

RECORDS/STUDY holds the study's config.yaml, and by run, teacher and untrained student one NAME.json.gz: a mapping from
a file's path in the study's folder to the record in it. The answers of a row, one per decoding seed, are one row here:
the mean of their scores, for a mean over tokens weighted by these. This is the first thing that the pooling over
training seeds does, so what it makes of these records is what it makes of the originals, but for rounding.
"""

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from promptkd.cli.parsing.config_file import read_config
from promptkd.cli.study_comparison import REFERENCES, read_study
from promptkd.errors import RequestError
from promptkd.io.atomic import write_atomic
from promptkd.results import Results
from promptkd.study.plan import plan_runs

Plain = dict[str, Any]  # a record, or a part of one, as JSON has it

_FILE = "results.json"
_PARTS = ("", "evaluations", "exposure-bias")  # folders in a study's, each with a folder per run
_DIGITS = 7  # significant digits of every number
_FEWER = {"row_parts": 3}  # by field: a row's part in a curve's point, of which only the spread is used
MOST_STEPS = 60  # logged steps that are kept of a run; its validations are kept all
_KINDS = ("scores", "tokens")
_OF_TEXT = {"prompts"}  # fields of a record that hold texts of the data
_ABSOLUTE = re.compile(r"(?<![\w./:])(?:~|[A-Za-z]:)?/(?:[^/\s\"']+/)+")


def collect(folder: Path, records: Path) -> list[Path]:
    """Write the records of a study's finished runs into `records`, and return the files that are new, changed or gone.

    Those of runs that the study no longer has go. Raises `RequestError` where `folder` holds no finished run, or a
    study whose settings name absolute paths, and where runs that stay in `records` had another teacher.
    """
    study = read_study(folder)
    config = read_config(folder / "config.yaml")
    if absolute := sorted({text for text in _texts(config) if _ABSOLUTE.match(text)}):
        told = f"The paths of a study whose records are kept must be relative. Got {', '.join(absolute)}"
        raise RequestError(f"{told} in {folder / 'config.yaml'}. Run it from the folder that they all lie in.")
    files = {records / "config.yaml": (folder / "config.yaml").read_bytes()}
    beside = [file.parent.name for part in _PARTS[1:] for file in sorted(folder.glob(f"{part}/*/{_FILE}"))]
    references = [name for name in beside if name.partition(".")[0] in REFERENCES.values()]
    for name in dict.fromkeys([*(run.planned.name for run in study.runs), *references]):
        places = [folder / part / name / _FILE for part in _PARTS]
        found = {file.relative_to(folder).as_posix(): file for file in places if file.is_file()}
        is_measured_apart = f"evaluations/{name}/{_FILE}" in found
        held = {
            place: _compact(Results.read(file), rows=not (is_measured_apart and place == f"{name}/{_FILE}"))
            for place, file in found.items()
        }
        files[records / f"{name}.json.gz"] = json.dumps(held, ensure_ascii=False, separators=(",", ":")).encode()
    options = study.options
    planned = plan_runs(options.base, options.methods, options.seeds, options.grid, read_file=lambda path: {})
    stays = {*(f"{run.name}.json.gz" for run in planned), *(f"{name}.json.gz" for name in references)}
    kept = [file for file in sorted(records.glob("*.json.gz")) if file not in files]
    teachers = _teachers(json.loads(content) for file, content in files.items() if file.suffix == ".gz")
    for file in (file for file in kept if file.name in stays):
        if _teachers([json.loads(gzip.decompress(file.read_bytes()))]) - teachers:
            told = f"{file} is of another teacher than the runs in {folder}, and a study has one"
            raise RequestError(
                f"{told}. Delete {records} to keep the new runs, or finish the study with the old teacher."
            )
    gone = [file for file in kept if file.name not in stays]
    for file in gone:
        file.unlink()
    return [*gone, *(file for file, content in files.items() if _replaced(file, content))]


def _teachers(held: Iterable[Mapping[str, Plain]]) -> set[str]:
    """The SHA-256 of the teachers of runs."""
    records = [record for each in held for record in each.values()]
    return {model["sha256"] for record in records for role, model in record["models"].items() if role == "teacher"}


def unpack(records: Path, folder: Path) -> Path:
    """Write a study's folder as `promptkd.cli.study_comparison.read_study` reads it, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_bytes((records / "config.yaml").read_bytes())
    for file in sorted(records.glob("*.json.gz")):
        for place, record in json.loads(gzip.decompress(file.read_bytes())).items():
            for evaluation in record["evaluations"]:
                evaluation["samples"] = _samples(evaluation.pop("columns", {}))
            target = folder / place
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(record), encoding="utf-8")
    return folder


def _compact(record: Results, *, rows: bool) -> Plain:
    """With the rows of its evaluations as columns, or without them."""
    plain = json.loads(record.model_dump_json(exclude=_OF_TEXT))
    for evaluation in plain["evaluations"]:
        samples = evaluation.pop("samples")
        if rows and samples:
            evaluation["columns"] = _columns(samples)
    for series in plain["history"]:
        steps = [point for point in series["points"] if not _is_validation(point)]
        kept = {id(point) for point in steps[:: -(-len(steps) // MOST_STEPS) or 1]}
        series["points"] = [point for point in series["points"] if _is_validation(point) or id(point) in kept]
    made: Plain = _rounded(plain)
    return made


def _is_validation(point: Plain) -> bool:
    return any(name.startswith("eval_") for name in point)


def _columns(samples: list[Plain]) -> Plain:
    """The rows' indices, and by metric a score per row and, of a mean over tokens, its tokens over all seeds.

    An answer without the metric, such as the KL of a seed that it was not taken on, is left out; None if all are.
    """
    by_row: defaultdict[int, list[Plain]] = defaultdict(list)
    for sample in samples:
        by_row[sample["row"]].append(sample)
    made: Plain = {"row": list(by_row), "scores": {}, "tokens": {}}
    for name in dict.fromkeys(name for sample in samples for name in sample["scores"]):
        scored = [[each for each in answers if name in each["scores"]] for answers in by_row.values()]
        weights = [[each["tokens"].get(name, 1) for each in answers] for answers in scored]
        values = [[float(each["scores"][name]) for each in answers] for answers in scored]
        made["scores"][name] = list(map(_mean, values, weights))
        if any(name in sample["tokens"] for sample in samples):
            made["tokens"][name] = [sum(each) if each else None for each in weights]
    return made


def _mean(values: list[float], weights: list[int]) -> float | None:
    if not values:
        return None
    total = sum(weights)
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / total if total else values[0]


def _samples(columns: Plain) -> list[Plain]:
    texts: Plain = {"prompt": "", "references": [], "response": ""}

    def of_row(kind: str, at: int) -> Plain:
        return {name: held[at] for name, held in columns[kind].items() if held[at] is not None}

    rows = columns.get("row", [])
    return [{"row": row, **texts, **{kind: of_row(kind, at) for kind in _KINDS}} for at, row in enumerate(rows)]


def _rounded(value: Any, digits: int = _DIGITS) -> Any:
    """The same with every number cut to so many digits, and no path of this machine in any text."""
    if isinstance(value, dict):
        return {name: _rounded(each, _FEWER.get(name, digits)) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each, digits) for each in value]
    if isinstance(value, float):
        short = float(f"{value:.{digits}g}")
        return int(short) if short.is_integer() and abs(short) < 1e9 else short
    return _ABSOLUTE.sub("", value.replace(f"{Path.cwd()}/", "")) if isinstance(value, str) else value


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict | list):
        return [text for each in (value.values() if isinstance(value, dict) else value) for text in _texts(each)]
    return [value] if isinstance(value, str) else []


def _replaced(file: Path, content: bytes) -> bool:
    """Write `content`, compressed where the name says so; False where the file already holds it."""
    is_packed = file.suffix == ".gz"
    held = file.read_bytes() if file.is_file() else None
    if held is not None and (gzip.decompress(held) if is_packed else held) == content:
        return False  # another zlib would compress it into other bytes
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, gzip.compress(content, mtime=0) if is_packed else content)
    return True
