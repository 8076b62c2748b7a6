"""What a command writes: where, what it may replace, the folder of a run, and its record's labels and provenance."""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import prod
from pathlib import Path
from typing import Any

from promptkd.cli.parsing.config_file import read_config, write_config
from promptkd.cli.terminal import is_main_process, say
from promptkd.data.encode import EncodedData
from promptkd.data.sources import SUFFIXES
from promptkd.data.summary import FLAGS, Flags, row_counts, row_notes
from promptkd.errors import RequestError, writing
from promptkd.io.atomic import remove
from promptkd.io.lock import FOLDER_LOCK, locked
from promptkd.io.python_file import names_python, python_file
from promptkd.results import DataRecord, Results, Training, file_sha256, read_history

_OWN = {
    *("config.yaml", "metrics.jsonl", "preflight.json", "baselines.json", "results.json", "report.html"),
    *("student", "model", "prompt", "teacher_lora", "teacher", "online_module", "checkpoints", "tensorboard"),
    "responses.jsonl",
    "explain-prompt",
}
_BEFORE_A_STEP = {"config.yaml", "metrics.jsonl", "preflight.json", "baselines.json", "checkpoints", "tensorboard"}
OF_A_RUN = {"out", "data", "keep"}  # keys that are in every config.yaml of a run, and hardly in one typed by hand
_MAY_CHANGE = {"resume", "overwrite", "out", "keep", "on_nan", "measure", "preflight"}
_MAY_CHANGE |= {  # refused today, but in the config.yaml of older runs
    *("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
}
_OF_MEMORY = {  # settings that change what a run holds at a time, not what it computes: one too large resumes smaller
    *("generation_batch_size", "per_device_eval_batch_size", "chunk_tokens"),
    *("gradient_checkpointing", "teacher_gradient_checkpointing", "teachers_resident"),
}
# Defaults of what an optimizer step's rows per process are a product of. They may change together.
_MICRO_BATCHES = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}


def check_writable(folder: Path, target: Path) -> None:
    """Refuse a `target` whose folder, or the nearest one above it that exists, cannot be written to."""
    while not os.path.exists(folder):  # Path.exists would raise where a folder above may not be entered
        folder = folder.parent
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise RequestError(f"Cannot write {target}: {folder} is not a folder that can be written to.")


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuse a folder, a file that exists already, or a place that cannot be written to, before any work."""
    if path.is_dir():
        raise RequestError(f"--out must be a file. {path} is a folder.")
    if path.exists() and not overwrite:
        raise RequestError(f"{path} exists. Replace it by --overwrite or give another --out.")
    check_writable(path.parent, path)


def check_replaceable(folder: Path) -> None:
    """Refuse the working folder and those above it, which cannot be replaced from inside of them."""
    if Path.cwd().is_relative_to(folder.resolve()):
        raise RequestError(f"--out must be a folder that can be replaced. {folder} holds the working folder.")


def refuse_foreign(folder: Path, foreign: Sequence[str], what: str, aside: str = "") -> None:
    """Refuse to replace a folder that holds more than `what` --overwrite replaces there."""
    if foreign:
        held = f"{folder} holds {', '.join(foreign[:5])}{aside}"
        raise RequestError(f"--overwrite replaces {what}, but {held}. Move it away or give another --out.")


class RunFolder:
    """The folder of a run with these settings: opened empty, to be replaced, or to be resumed.

    `resume` is None for a command that has no --resume, whose finished stages come from a cache.
    """

    def __init__(self, path: Path, settings: dict[str, Any], *, resume: bool | None, overwrite: bool):
        self.path, self._settings, self._resume, self._overwrite = path, settings, resume, overwrite
        self.config, self.checkpoints = path / "config.yaml", path / "checkpoints"
        self.metrics, self.results, self.report = path / "metrics.jsonl", path / "results.json", path / "report.html"
        self.curves = path / "tensorboard"
        self.preflight, self.baselines = path / "preflight.json", path / "baselines.json"

    def check(self) -> None:
        """Refuse a folder that holds anything, unless it is this very run's to resume or some run's to replace."""
        if self._resume and self._overwrite:
            raise RequestError("--resume resumes a run and --overwrite replaces it. Give one of them.")
        if not is_main_process():  # which may have begun to write
            return
        if self.path.is_file():
            raise RequestError(f"--out must be a folder. {self.path} is a file.")
        check_writable(self.path, self.path)
        held = self._held()
        if held and not self._overwrite and took_no_step(self.path):
            return
        if held and self._resume:
            self._check_same_settings()
        elif held and not self._overwrite:
            advice = "Resume the run in it by --resume, replace it by --overwrite, or give another --out."
            if self._resume is None:
                advice = "Start it again by --overwrite (finished stages come from the cache) or give another --out."
            raise RequestError(f"{self.path} is not empty. {advice}")
        if self._overwrite:
            foreign = [name for name in held if name.partition(".partial")[0] not in _OWN]
            refuse_foreign(self.path, foreign, "a run", ", which no run wrote")

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Open the folder for the body, and once that has succeeded, clear it if it is to be replaced.

        If the body fails, what was there stays as it was, and what is new goes again. All processes must have come to
        the end of the body before the first leaves it.
        """
        self.check()
        places = (self.config, self.checkpoints, self.path, *self.path.parents)
        new = [place for place in places if not place.exists()] if is_main_process() else []
        held = self._held() if is_main_process() else []
        replaced = held if held and (self._overwrite or self._starts_anew()) else []
        try:
            if is_main_process() and not held:
                self._write_settings()
            yield
            if held:
                self._clear(replaced)
                self._write_settings()
        except BaseException:
            for place in new:
                remove(place)
            raise

    def _clear(self, names: Sequence[str]) -> None:
        """Delete a run: its result first, or what a kill leaves would look finished; the settings are written over."""
        has_checkpoints = self.checkpoints.is_dir()  # where the trainer expects a folder
        for name in sorted(names, key=lambda name: name != self.results.name):
            if name != self.config.name:
                remove(self.path / name)
        if has_checkpoints:
            self.checkpoints.mkdir(exist_ok=True)

    def _write_settings(self) -> None:
        with writing(self.path):
            write_config(self.config, self._settings)

    def locked(self) -> AbstractContextManager[object]:
        """The folder for this process alone; of a launch's processes the first holds it for all."""
        return locked(self.path, folder=True) if is_main_process() else nullcontext()

    def _held(self) -> list[str]:
        return sorted({each.name for each in self.path.iterdir()} - {FOLDER_LOCK}) if self.path.is_dir() else []

    def _starts_anew(self) -> bool:
        """Whether a run that took no step is replaced: by a new start, or because its settings have changed."""
        is_anew = took_no_step(self.path) and not (self._resume and read_config(self.config) == self._settings)
        if is_anew:
            say(f"The run in {self.path} took no step, so it is started anew.")
        return is_anew

    def _check_same_settings(self) -> None:
        if not self.config.is_file():
            raise RequestError(f"--resume needs a run in {self.path}, but config.yaml is not there.")
        before, now = read_config(self.config), self._settings
        rows = [[int(each.get(name, default)) for name, default in _MICRO_BATCHES.items()] for each in (before, now)]
        free = _MAY_CHANGE | _OF_MEMORY | (_MICRO_BATCHES.keys() if prod(rows[0]) == prod(rows[1]) else set())
        own = str(now.get("method"))
        if names_python(own) and before.get("method") == own and before.get("method_sha256") != now["method_sha256"]:
            told = f"{python_file(own)} has changed since the run in {self.path} began"
            raise RequestError(f"{told}. Put it back, or start a new run with another --out.")
        changed = "; ".join(
            f"{key} was {before.get(key)!r} and is now {now.get(key)!r}"
            for key in sorted((before.keys() | now.keys()) - free)
            if before.get(key) != now.get(key)
        )
        if changed:
            advice = f"Use its own settings (--out {self.path} --resume and no other flag) or start a new run."
            raise RequestError(f"--resume continues the run in {self.path} as it was started, but {changed}. {advice}")


def took_no_step(folder: Path) -> bool:
    """Whether a folder holds what a run leaves that failed before its first step: its settings, and no result."""
    held = {each.name for each in folder.iterdir()} - {FOLDER_LOCK} if folder.is_dir() else set()
    if "config.yaml" not in held or held - _BEFORE_A_STEP or not read_config(folder / "config.yaml").keys() >= OF_A_RUN:
        return False
    checkpoints, metrics = folder / "checkpoints", folder / "metrics.jsonl"
    logged = read_history(metrics) if metrics.is_file() else []
    return not (checkpoints.is_dir() and any(checkpoints.iterdir())) and not any(each.get("step") for each in logged)


def data_record(path: str, data: EncodedData) -> DataRecord:
    examples = len(data.examples) if data.turns == "all" else None
    counts: dict[str, Any] = {
        "rows": data.rows,
        "dropped": data.dropped,
        "cut": data.cut,
        "unanswered": data.unanswered,
        "examples": examples,
    }
    return DataRecord(path=path, sha256=sha256_of(path), **counts)


def sha256_of(path: str) -> str:
    """Hex SHA-256 of a data file; "" for a folder or a hub name."""
    return file_sha256(Path(path)) if Path(path).is_file() else ""


def say_rows(path: str, data: EncodedData, flags: Flags = FLAGS) -> list[str]:
    """Say what happened to the rows of a data set; returns what belongs into the record. `flags` set the limits."""
    say(f"{path}: {row_counts(data)}.")
    notes = row_notes(path, data, flags)
    for note in notes:
        say(note)
    return notes


def label_of(path: str, among: Sequence[str] = ()) -> str:
    """A short name: the last part of the path without its suffix, or the whole path where that would be ambiguous."""
    name = Path(path).name
    suffix = next((each for each in (*SUFFIXES, ".gguf") if name.lower().endswith(each)), "")  # not Qwen2.5's
    short = name[: len(name) - len(suffix)] or path
    return path if any(each != path and label_of(each) == short for each in among) else short


def training_cost(model: str) -> Training | None:
    """What the training of `model` cost, if it is a run's folder whose record says so."""
    folder = Path(model).expanduser()
    if not all((folder / name).is_file() for name in ("config.yaml", "results.json")):
        return None
    known = Results.read(folder / "results.json").training
    return next(iter(known.values())) if len(known) == 1 else known.get(label_of(model))
