"""Runs on this machine: up to N processes at a time, with the cores and GPUs shared out among them."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from promptkd.study.processes import Job, start_command


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def shares(workers: int, cores: int, gpus: Sequence[str], inherited: Mapping[str, str]) -> list[dict[str, str]]:
    """What is added to the environment of each of the `workers`: its threads, and its GPU where there are any.

    Threads are the cores over the workers, at least one, unless the environment says OMP_NUM_THREADS. A worker has one
    GPU, for a run is one process; where there are more workers than GPUs, some share one.
    """
    threads = {} if "OMP_NUM_THREADS" in inherited else {"OMP_NUM_THREADS": str(max(1, cores // workers))}
    return [threads | ({"CUDA_VISIBLE_DEVICES": gpus[worker % len(gpus)]} if gpus else {}) for worker in range(workers)]


@dataclass
class _Running:
    job: Job
    worker: int
    process: subprocess.Popen[bytes]
    stage: int = 0


class LocalPool:
    """Runs jobs in as many processes as `environments` holds workers; they inherit the files of `keep_open`."""

    def __init__(self, environments: Sequence[Mapping[str, str]], keep_open: Sequence[int] = ()):
        self._environments, self._keep_open = environments, keep_open
        self._running: dict[str, _Running] = {}
        self._stopped = False

    def has_room(self) -> bool:
        return len(self._running) < len(self._environments)

    def start(self, job: Job) -> None:
        taken = {each.worker for each in self._running.values()}
        worker = next(each for each in range(len(self._environments)) if each not in taken)
        self._running[job.name] = _Running(job, worker, self._process(job, worker, 0))

    def is_running(self, job: Job) -> bool:
        """Whether a job that was started has begun; here it has at once."""
        return True

    def finished(self) -> dict[str, int]:
        """The jobs that have ended since the last call, with their exit statuses; begins what follows in the others."""
        ended: dict[str, int] = {}
        for name, running in list(self._running.items()):
            status = running.process.poll()
            if status is None:
                continue
            if status == 0 and running.stage + 1 < len(running.job.commands) and not self._stopped:
                running.stage += 1
                running.process = self._process(running.job, running.worker, running.stage)
            else:
                unfinished = status == 0 and running.stage + 1 < len(running.job.commands)
                ended[name] = -signal.SIGTERM if unfinished else status
                del self._running[name]
        return ended

    def stop(self) -> None:
        """Ask every run to stop: it writes a checkpoint first."""
        self._stopped = True
        for each in self._running.values():
            each.process.terminate()

    def kill(self) -> None:
        """End every run at once, with all processes that it started."""
        self._stopped = True
        for each in self._running.values():
            with suppress(ProcessLookupError):
                os.killpg(each.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Leave nothing running."""
        self.kill()
        for each in self._running.values():
            each.process.wait()

    def _process(self, job: Job, worker: int, stage: int) -> subprocess.Popen[bytes]:
        return start_command(job.commands[stage], job.log, self._environments[worker], keep_open=self._keep_open)
