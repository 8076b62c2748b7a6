"""The live table of a study: one line per run; where there is no terminal, a line whenever a run changes its state."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table as RichTable
from rich.text import Text

from promptkd.study.progress import progress_of

_AROUND = 4
"""Lines of the screen that are not runs."""
_EVERY = 1.0
"""Seconds between two drawings, each of which reads the logs of the runs."""


class Phase(Enum):
    RUNNING = "running"
    QUEUED = "queued"
    FAILED = "failed"
    STOPPED = "stopped"
    WAITING = "waiting"
    DONE = "done"


@dataclass
class Row:
    """What the table knows of one run."""

    name: str
    folder: Path
    steps: int
    """Optimizer steps of the whole run."""
    phase: Phase = Phase.WAITING
    status: int = 0
    began: float = 0.0
    seconds: float = 0.0

    def words(self) -> str:
        """Its state in a word or two."""
        if self.phase is Phase.RUNNING and (self.folder / "results.json").exists():
            return "evaluating"
        return f"failed ({self.status})" if self.phase is Phase.FAILED else self.phase.value


def clock(seconds: float) -> str:
    """75 -> "1:15", 3675 -> "1:01:15"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Table:
    """Shown inside a `with` block."""

    def __init__(self, rows: Sequence[Row], console: Console | None = None):
        self._rows = {row.name: row for row in rows}
        self._console = console or Console(stderr=True)
        self._live: Live | None = None
        self._drawn_at = 0.0

    def __enter__(self) -> None:
        if self._console.is_terminal:
            self._live = Live(self._drawn(), console=self._console, auto_refresh=False)
            self._live.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.update(self._drawn(), refresh=True)
            self._live.stop()
            self._live = None

    def queued(self, name: str) -> None:
        self._rows[name].phase = Phase.QUEUED

    def running(self, name: str) -> None:
        row = self._rows[name]
        row.phase, row.began = Phase.RUNNING, time.monotonic()
        self._say(f"{name}: started")

    def ended(self, name: str, status: int, *, stopped: bool) -> None:
        row = self._rows[name]
        row.status, row.seconds = status, time.monotonic() - row.began if row.began else 0.0
        row.phase = Phase.DONE if status == 0 else Phase.STOPPED if stopped else Phase.FAILED
        self._say(f"{name}: {row.words()} after {clock(row.seconds)}; {self.counts()}")

    def stopping(self, active: int, *, at_once: bool) -> None:
        """Say that the study was told to stop."""
        runs = f"{active} run{'s' if active != 1 else ''}"
        told = f"Ended {runs}." if at_once else f"Waiting for {runs} to stop. Once more ends them at once."
        self._console.print(told, highlight=False)

    def counts(self) -> str:
        """ "3 done, 2 running, 7 waiting"."""
        phases = [row.phase for row in self._rows.values()]
        order = (Phase.DONE, Phase.FAILED, Phase.STOPPED, Phase.RUNNING, Phase.QUEUED, Phase.WAITING)
        return ", ".join(f"{phases.count(phase)} {phase.value}" for phase in order if phase in phases)

    def refresh(self) -> None:
        """Draw the table again if it is time."""
        now = time.monotonic()
        if self._live is not None and now - self._drawn_at >= _EVERY:
            self._live.update(self._drawn(), refresh=True)
            self._drawn_at = now

    def _say(self, text: str) -> None:
        if self._live is None:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _drawn(self) -> RichTable:
        """As many runs as the screen has lines for, those in motion first."""
        order = list(Phase)
        rows = sorted(self._rows.values(), key=lambda row: order.index(row.phase))
        shown = rows[: max(1, self._console.height - _AROUND)]
        left = len(rows) - len(shown)
        table = RichTable(caption=self.counts() + (f"; {left} more runs" if left else ""), box=None, pad_edge=False)
        table.add_column("Run")
        table.add_column("State")
        for head in ("Step", "Loss", "Time"):
            table.add_column(head, justify="right")
        for row in shown:
            table.add_row(*map(Text, self._cells(row)))
        return table

    def _cells(self, row: Row) -> tuple[str, ...]:
        progress = progress_of(row.folder)
        seconds = time.monotonic() - row.began if row.phase is Phase.RUNNING else row.seconds
        return (
            row.name,
            row.words(),
            f"{progress.step}/{row.steps}" if progress.step else "",
            "" if progress.loss is None else f"{progress.loss:.3f}",
            clock(seconds) if seconds else "",
        )
