"""The folder of a run: opened empty, to be replaced, or to be resumed."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import prod
from pathlib import Path
from typing import Any

from promptkd.cli.option_checks import check_writable
from promptkd.cli.parsing.config_file import read_config, write_config
from promptkd.cli.terminal import is_main_process
from promptkd.errors import RequestError, writing
from promptkd.io.atomic import remove
from promptkd.io.lock import FOLDER_LOCK, locked

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


class RunFolder:
    """The folder of a run: opened empty, to be replaced, or to be resumed."""

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
            raise RequestError("--resume resumes a run and --overwrite replaces it. Give one of them.")
        if not is_main_process():
            return
        if self.path.is_file():
            raise RequestError(f"--out must be a folder. {self.path} is a file.")
        check_writable(self.path, self.path)
        held = self._held()
        if held and not (resume or overwrite):
            raise RequestError(
                f"{self.path} is not empty. Resume the run in it by --resume, replace it by --overwrite, or give "
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
            remove(self.path / name)
        with writing(self.path):
            write_config(self.config, merged)

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
                    remove(place)
            raise

    def locked(self) -> AbstractContextManager[object]:
        """The folder for this process alone; of a launch's processes the first holds it for all."""
        return locked(self.path, folder=True) if is_main_process() else nullcontext()

    def _held(self) -> list[str]:
        names = [each.name for each in self.path.iterdir()] if self.path.is_dir() else []
        return sorted(name for name in names if name != FOLDER_LOCK)

    def _check_same_settings(self, merged: dict[str, Any]) -> None:
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
                f"--resume continues the run in {self.path} as it was started, but {'; '.join(changed)}. "
                f"Use its own settings (--config {self.config} --resume) or start a new run."
            )


def _rows_of_a_step(settings: dict[str, Any]) -> int:
    """Rows of an optimizer step on each process."""
    return prod(int(settings.get(name, default)) for name, default in _MICRO_BATCHES.items())
