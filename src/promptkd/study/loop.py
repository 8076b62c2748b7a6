"""Runs the jobs of a study and shows them: a live table, or without a terminal a line per change of state."""

import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.live import Live
from rich.table import Table as RichTable
from rich.text import Text

from promptkd.study.processes import Job, LocalPool, Phase, RayCluster

_PAUSE = 0.2
_AROUND = 4  # lines of the screen that are not runs
_EVERY = 1.0  # seconds between two drawings, each of which reads the logs of the runs
_COUNTED = (Phase.DONE, Phase.FAILED, Phase.STOPPED, Phase.RUNNING, Phase.QUEUED, Phase.WAITING)


def carry_out(
    jobs: Sequence[Job],
    pool: LocalPool | RayCluster,
    console: Console | None = None,
    *,
    on_done: Callable[[Job], str] = lambda job: "",
) -> int | None:
    """Run every job that is not done; return the signal that stopped the study, if one did.

    `on_done` is called with each job that succeeds, and what it returns is said. SIGINT and SIGTERM ask the running
    jobs to stop, and no further one is started; a second one ends them at once.
    """
    table, heard = Table(jobs, console or Console(stderr=True)), 0
    waiting, active = deque(job for job in jobs if job.phase is Phase.WAITING), dict[str, Job]()
    with _signals() as signals, table.live or nullcontext():
        try:
            while waiting or active:
                if len(signals) > heard:
                    heard, table.is_stopping = len(signals), True
                    waiting.clear()
                    count = f"{len(active)} run{'s' if len(active) != 1 else ''}"
                    asked = f"Waiting for {count} to stop. Once more ends them at once."
                    table.console.print(asked if heard == 1 else f"Ended {count}.", highlight=False)
                    pool.stop(at_once=heard > 1)
                while waiting and pool.has_room():
                    job = waiting.popleft()
                    pool.start(job)
                    active[job.name], job.phase = job, Phase.QUEUED
                for job in active.values():
                    if job.phase is Phase.QUEUED and pool.has_begun(job):
                        table.begun(job)
                for name, status in pool.finished().items():
                    job = active.pop(name)
                    table.ended(job, status, stopped=heard > 0)
                    if job.phase is Phase.DONE and (told := on_done(job)):
                        table.console.print(told, highlight=False, markup=False, soft_wrap=True)
                table.refresh()
                if waiting or active:
                    time.sleep(_PAUSE)
        finally:
            pool.close()
    return signals[0] if heard else None


@contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM as they come, doing nothing else meanwhile. One that is ignored, as under nohup, stays so."""
    come: list[int] = []
    heard = [each for each in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(each) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, frame: come.append(number)) for number in heard}
    try:
        yield come
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def clock(seconds: float) -> str:
    """75 -> "1:15", 3675 -> "1:01:15"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def seconds_left(jobs: Sequence[Job], at_once: int, now: float) -> float | None:
    """What the runs that have not ended will take, measuring included; None before this process has seen one through.

    Their steps take as long as those of such runs of the same group, else of all. Jobs that only measure count nothing.
    """
    jobs = [job for job in jobs if job.steps > job.steps_before]
    seen = [job for job in jobs if job.phase is Phase.DONE and job.began]
    todo = [job for job in jobs if job.phase in (Phase.RUNNING, Phase.QUEUED, Phase.WAITING)]
    if not seen or not todo:
        return None

    def pace(group: str) -> float:
        alike = [job for job in seen if job.group == group] or seen
        return sum(job.seconds for job in alike) / sum(job.steps - job.steps_before for job in alike)

    spent = [now - job.began if job.phase is Phase.RUNNING else 0.0 for job in todo]
    each = [pace(job.group) * (job.steps - job.steps_before) for job in todo]
    left = [max(0.0, seconds - gone) for seconds, gone in zip(each, spent, strict=True)]
    return max(max(left), sum(left) / at_once)


class Table:
    """The jobs on the screen; `live` draws them as long as it is entered."""

    def __init__(self, jobs: Sequence[Job], console: Console):
        self._jobs, self.console = jobs, console
        self._at_once = 1  # the most jobs that have run beside one another
        self.is_stopping = False
        for job in jobs:
            if job.phase is Phase.WAITING:
                job.steps_before = min(job.steps, job.progress()[0])
        is_live = console.is_terminal
        self.live = Live(get_renderable=self._drawn, console=console, auto_refresh=False) if is_live else None
        self._drawn_at = 0.0

    def begun(self, job: Job) -> None:
        job.phase, job.began = Phase.RUNNING, time.monotonic()
        self._at_once = max(self._at_once, sum(each.phase is Phase.RUNNING for each in self._jobs))
        self._say(f"{job.name}: started")

    def ended(self, job: Job, status: int, *, stopped: bool) -> None:
        job.status, job.seconds = status, time.monotonic() - job.began if job.began else 0.0
        job.phase = Phase.DONE if status == 0 else Phase.STOPPED if stopped else Phase.FAILED
        self._say(f"{job.name}: {_state(job)} after {clock(job.seconds)}; {self._counts()}")

    def refresh(self) -> None:
        if self.live is not None and time.monotonic() - self._drawn_at >= _EVERY:
            self.live.refresh()
            self._drawn_at = time.monotonic()

    def _say(self, text: str) -> None:
        if self.live is None:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _counts(self) -> str:
        phases = [job.phase for job in self._jobs]
        told = ", ".join(f"{phases.count(phase)} {phase.value}" for phase in _COUNTED if phase in phases)
        left = None if self.is_stopping else seconds_left(self._jobs, self._at_once, time.monotonic())
        return told if left is None else f"{told}; about {clock(left)} to go"

    def _drawn(self) -> RichTable:
        """As many runs as the screen has lines for, those in motion first."""
        jobs = sorted(self._jobs, key=lambda job: list(Phase).index(job.phase))
        shown = jobs[: max(1, self.console.height - _AROUND)]
        left = f"; {len(jobs) - len(shown)} more runs" if len(shown) < len(jobs) else ""
        table = RichTable("Run", "State", caption=self._counts() + left, box=None, pad_edge=False)
        for head in ("Step", "Loss", "Time"):
            table.add_column(head, justify="right")
        for job in shown:
            (step, loss), is_running = job.progress(), job.phase is Phase.RUNNING
            seconds = time.monotonic() - job.began if is_running else job.seconds
            steps, shown_loss = f"{step}/{job.steps}" if step else "", "" if loss is None else f"{loss:.3f}"
            cells = (job.name, _state(job), steps, shown_loss, clock(seconds) if seconds else "")
            table.add_row(*map(Text, cells))
        return table


def _state(job: Job) -> str:
    if job.phase is Phase.RUNNING and (job.folder / "results.json").exists():
        return "evaluating"
    return f"failed ({job.status})" if job.phase is Phase.FAILED else job.phase.value
