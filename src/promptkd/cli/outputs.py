"""Where a command writes: what it may replace, and the folder of a run."""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import prod
from pathlib import Path
from typing import Any

from promptkd.cli.parsing.config_file import read_config, write_config
from promptkd.cli.terminal import is_main_process
from promptkd.errors import RequestError, writing
from promptkd.io.atomic import remove
from promptkd.io.lock import FOLDER_LOCK, locked

_OWN = frozenset(
    {
        *("config.yaml", "metrics.jsonl", "results.json", "report.html", "responses.jsonl"),
        *("student", "model", "prompt", "teacher_lora", "teacher", "online_module", "checkpoints"),
    }
)
_MAY_CHANGE = frozenset({"resume", "overwrite", "out", "keep", "on_nan"})
_OF_MEMORY = frozenset(
    {
        *("generation_batch_size", "per_device_eval_batch_size", "chunk_tokens"),
        *("gradient_checkpointing", "teacher_gradient_checkpointing"),
    }
)
"""Settings that change what a run holds at a time, not what it computes: a run that was too large resumes smaller."""
_MICRO_BATCHES = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
"""The settings whose product is an optimizer step's rows per process, and their defaults. They may change together."""


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


def refuse_foreign(folder: Path, foreign: Sequence[str], what: str, aside: str = "") -> None:
    """Refuse to replace a folder that holds more than `what` --overwrite replaces there."""
    if foreign:
        raise RequestError(
            f"--overwrite replaces {what}, but {folder} holds {', '.join(foreign[:5])}{aside}. Move it away or give "
            "another --out."
        )


class RunFolder:
    """The folder of a run with these settings: opened empty, to be replaced, or to be resumed."""

    def __init__(self, path: Path, settings: dict[str, Any], *, resume: bool, overwrite: bool):
        self.path, self._settings, self._resume, self._overwrite = path, settings, resume, overwrite
        self.config = path / "config.yaml"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.results = path / "results.json"
        self.report = path / "report.html"

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
        if held and self._resume:
            self._check_same_settings()
        elif held and not self._overwrite:
            raise RequestError(
                f"{self.path} is not empty. Resume the run in it by --resume, replace it by --overwrite, or give "
                "another --out."
            )
        foreign = [name for name in held if name.partition(".partial")[0] not in _OWN]
        if self._overwrite:
            refuse_foreign(self.path, foreign, "a run", ", which no run wrote")

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Open the folder, cleared if it is to be replaced, for the body, which makes the trainer.

        If that fails, what is new on the disk goes again.
        """
        self.check()
        places = (self.config, self.checkpoints, self.path, *self.path.parents)
        new = [place for place in places if not place.exists()] if is_main_process() else []
        try:
            if is_main_process():
                for name in self._held() if self._overwrite else ():
                    remove(self.path / name)
                with writing(self.path):
                    write_config(self.config, self._settings)
            yield
        except BaseException:
            for place in new:
                remove(place)
            raise

    def locked(self) -> AbstractContextManager[object]:
        """The folder for this process alone; of a launch's processes the first holds it for all."""
        return locked(self.path, folder=True) if is_main_process() else nullcontext()

    def _held(self) -> list[str]:
        return sorted({each.name for each in self.path.iterdir()} - {FOLDER_LOCK}) if self.path.is_dir() else []

    def _check_same_settings(self) -> None:
        if not self.config.is_file():
            raise RequestError(f"--resume needs a run in {self.path}, but config.yaml is not there.")
        before, now = read_config(self.config), self._settings
        free = _MAY_CHANGE | _OF_MEMORY
        if _rows_of_a_step(before) == _rows_of_a_step(now):
            free |= _MICRO_BATCHES.keys()
        changed = [
            f"{key} was {before.get(key)!r} and is now {now.get(key)!r}"
            for key in sorted((before.keys() | now.keys()) - free)
            if before.get(key) != now.get(key)
        ]
        if changed:
            raise RequestError(
                f"--resume continues the run in {self.path} as it was started, but {'; '.join(changed)}. "
                f"Use its own settings (--config {self.config} --resume) or start a new run."
            )


def _rows_of_a_step(settings: dict[str, Any]) -> int:
    """Rows of an optimizer step on each process."""
    return prod(int(settings.get(name, default)) for name, default in _MICRO_BATCHES.items())
