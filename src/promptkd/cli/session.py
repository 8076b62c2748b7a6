"""What the commands that train or measure share: the run's folder, a quiet transformers, a closing line."""

import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promptkd.cli.options import write_config
from promptkd.errors import RequestError, cannot_write
from promptkd.visible import shown

if TYPE_CHECKING:
    from promptkd.results import DataRecord

__all__ = [
    "RunFolder",
    "check_writable",
    "data_record",
    "is_main_process",
    "progress_lines",
    "quiet_libraries",
    "say",
]

_OWN = ("config.yaml", "metrics.jsonl", "results.json", "report.html", "responses.jsonl")
_OWN_FOLDERS = ("student", "model", "prompt", "teacher_lora", "teacher", "online_module", "checkpoints")
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


def say(text: str) -> None:
    """A line on standard error, from the first process alone; no terminal obeys what a name in it holds."""
    if is_main_process():
        print(shown(text), file=sys.stderr, flush=True)


def is_main_process() -> bool:
    """Whether this is the process of rank 0, by the environment that torchrun and accelerate set."""
    return os.environ.get("RANK", "0") == "0"


def quiet_libraries() -> None:
    """Leave the terminal to the command's own lines; errors of the libraries still show."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    from datasets import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    for name in ("accelerate", "promptkd.training.validation"):  # the latter's notes, a command says itself
        logging.getLogger(name).setLevel(logging.ERROR)


def check_writable(folder: Path, target: Path) -> None:
    """Refuse a `target` whose folder, or the nearest one above it that exists, cannot be written to."""
    while not os.path.exists(folder):  # Path.exists would raise where a folder above may not be entered
        folder = folder.parent
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise RequestError(f"Cannot write {target}: {folder} is not a folder that can be written to.")


class RunFolder:
    """The folder of a run: opened empty, to be replaced, or to be gone on with."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.yaml"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.results = path / "results.json"
        self.report = path / "report.html"

    def check(self, merged: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Whether the folder can be opened; nothing is changed.

        The first process speaks for all: the others may come when it has begun to write.

        Raises:
            RequestError: if it holds anything and neither flag is given, if `overwrite` meets files that are no run's,
                or if a resumed run was started with other settings.
        """
        if resume and overwrite:
            raise RequestError("--resume goes on with a run and --overwrite replaces it. Give one of them.")
        if not is_main_process():
            return
        if self.path.is_file():
            raise RequestError(f"--out must be a folder. {self.path} is a file.")
        check_writable(self.path, self.path)
        held = self._held()
        if held and not (resume or overwrite):
            raise RequestError(
                f"{self.path} is not empty. Go on with the run in it by --resume, replace it by --overwrite, or give "
                "another --out."
            )
        if resume and held:
            self._check_same_settings(merged)
        foreign = [name for name in held if name.partition(".partial")[0] not in (*_OWN, *_OWN_FOLDERS)]
        if overwrite and foreign:
            raise RequestError(
                f"--overwrite replaces a run, but {self.path} holds {', '.join(foreign[:5])}, which no run wrote. "
                "Move it away or give another --out."
            )

    def open(self, merged: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Check the folder, clear it if it is to be replaced, and write `config.yaml` into it."""
        self.check(merged, resume=resume, overwrite=overwrite)
        if not is_main_process():
            return
        for name in self._held() if overwrite else ():
            _remove(self.path / name)
        try:
            write_config(self.config, merged)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    @contextmanager
    def opened(self, merged: dict[str, Any], *, resume: bool, overwrite: bool) -> Iterator[None]:
        """Open the folder for the body, which makes the trainer. If that fails, what is new on the disk goes again."""
        places = (self.config, self.checkpoints, self.path, *self.path.parents)
        new = [place for place in places if not place.exists()]
        try:
            self.open(merged, resume=resume, overwrite=overwrite)
            yield
        except BaseException:
            if is_main_process():
                for place in new:
                    _remove(place)
            raise

    def _held(self) -> list[str]:
        return sorted(each.name for each in self.path.iterdir()) if self.path.is_dir() else []

    def _check_same_settings(self, merged: dict[str, Any]) -> None:
        from promptkd.cli.config_file import read_config

        if not self.config.is_file():
            raise RequestError(f"--resume needs a run in {self.path}, but config.yaml is not there.")
        before = read_config(self.config)
        free = _MAY_CHANGE | _OF_MEMORY
        if _rows_of_a_step(before) == _rows_of_a_step(merged):
            free |= _MICRO_BATCHES.keys()
        changed = [
            f"{key} was {before.get(key)!r} and is now {merged.get(key)!r}"
            for key in sorted(before.keys() | merged.keys())
            if key not in free and before.get(key) != merged.get(key)
        ]
        if changed:
            raise RequestError(
                f"--resume goes on with the run in {self.path} as it was started, but {'; '.join(changed)}. "
                f"Use its own settings (--config {self.config} --resume) or start a new run."
            )


def _rows_of_a_step(settings: dict[str, Any]) -> int:
    """Rows of an optimizer step on each process."""
    return prod(int(settings.get(name, default)) for name, default in _MICRO_BATCHES.items())


def _remove(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def data_record(path: str, rows: int, dropped: int) -> "DataRecord":
    """Provenance of a data set: hash of the file, or of nothing for a hub name."""
    from promptkd.results import DataRecord, file_sha256

    file = Path(path)
    return DataRecord(path=path, rows=rows, dropped=dropped, sha256=file_sha256(file) if file.is_file() else "")


def progress_lines(title: str, total: int, every: float = 10.0) -> Callable[[str, int], None]:
    """A callback that says how many of `total` rows are done, at most every `every` seconds."""
    last = time.monotonic()

    def tell(what: str, done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= every:
            say(f"{title}: {done} of {total} {what}")
            last = now

    return tell
