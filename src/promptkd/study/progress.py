"""How far runs are, read from the files that they write while they go."""

import json
from dataclasses import dataclass
from pathlib import Path

from promptkd.errors import RequestError
from promptkd.results import Results
from promptkd.visible import visible

_TAIL = 1 << 14
"""Bytes at the end of a file that are read for its last lines."""


@dataclass(frozen=True)
class Progress:
    step: int = 0
    loss: float | None = None


def progress_of(run: Path) -> Progress:
    """The last logged step of the run in a folder, and the last loss among its last lines."""
    entries = []
    for line in _tail(run / "metrics.jsonl"):
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue  # being written, or cut at the beginning
    step = max((int(entry["step"]) for entry in entries if "step" in entry), default=0)
    losses = [float(entry["loss"]) for entry in entries if "loss" in entry]
    return Progress(step, losses[-1] if losses else None)


def last_words(log: Path) -> str:
    """The last line of a log that says anything, its control characters made visible."""
    return next((visible(line.strip()) for line in reversed(_tail(log)) if line.strip()), "")


def read_results(path: Path) -> Results | None:
    """The record at `path`; None if there is none, or one that this version does not read."""
    try:
        return Results.read(path)
    except RequestError:
        return None


def _tail(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
