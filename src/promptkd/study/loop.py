"""Runs the jobs of a study: starts them as there is room, watches them, and stops them when it is told to."""

import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Protocol

from promptkd.errors import PromptKDError
from promptkd.study.processes import Job
from promptkd.study.table import Table

_PAUSE = 0.2


class StoppedError(PromptKDError):
    """A signal stopped the study, which left what it takes to resume (exit status 128 + its number)."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.exit_status = 128 + signal


class Engine(Protocol):
    """Where jobs run."""

    def has_room(self) -> bool: ...
    def start(self, job: Job) -> None: ...
    def is_running(self, job: Job) -> bool: ...
    def finished(self) -> dict[str, int]: ...
    def stop(self) -> None: ...
    def kill(self) -> None: ...
    def close(self) -> None: ...


@dataclass
class Outcome:
    statuses: dict[str, int] = field(default_factory=dict)
    """Exit status of every job that ended; of one that a signal ended, its number below zero."""
    signal: int | None = None
    """The signal that stopped the study, if one did."""


@dataclass
class _Requests:
    """The signals that have come."""

    count: int = 0
    last: int | None = None


def carry_out(jobs: Sequence[Job], engine: Engine, table: Table) -> Outcome:
    """Run every job. A job that fails stops no other.

    SIGINT and SIGTERM ask the running jobs to stop, and no further one is started; a second one ends them at once.
    """
    outcome, waiting = Outcome(), deque(jobs)
    queued: dict[str, Job] = {}
    active: set[str] = set()
    heard = 0
    with _signals() as requests, table:
        try:
            while waiting or active:
                if requests.count > heard:
                    heard, outcome.signal = requests.count, outcome.signal or requests.last
                    waiting.clear()
                    table.stopping(len(active), at_once=heard > 1)
                    (engine.stop if heard == 1 else engine.kill)()
                while waiting and engine.has_room():
                    job = waiting.popleft()
                    engine.start(job)
                    active.add(job.name)
                    queued[job.name] = job
                    table.queued(job.name)
                for job in [each for each in queued.values() if engine.is_running(each)]:
                    del queued[job.name]
                    table.running(job.name)
                for name, status in engine.finished().items():
                    active.remove(name)
                    queued.pop(name, None)
                    outcome.statuses[name] = status
                    table.ended(name, status, stopped=heard > 0)
                table.refresh()
                if waiting or active:
                    time.sleep(_PAUSE)
        finally:
            engine.close()
    return outcome


@contextmanager
def _signals() -> Iterator[_Requests]:
    """Counts SIGINT and SIGTERM, which do nothing else meanwhile. One that is ignored, as under nohup, stays so."""
    requests = _Requests()

    def hear(number: int, frame: FrameType | None) -> None:
        requests.count += 1
        requests.last = number

    heard = [each for each in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(each) is not signal.SIG_IGN]
    before = {number: signal.signal(number, hear) for number in heard}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
