"""The commands of a run, each in a process of its own, on this machine or on a Ray cluster."""

import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from promptkd.errors import RequestError
from promptkd.io.redact import without_secrets
from promptkd.visible import visible

_PAUSE = 0.2
_PR_SET_PDEATHSIG = 1
_TAIL = 1 << 14  # bytes at the end of a file that are read for its last lines
Command = tuple[str, ...]  # arguments of `promptkd`


class Phase(Enum):
    RUNNING = "running"
    QUEUED = "queued"
    FAILED = "failed"
    STOPPED = "stopped"
    WAITING = "waiting"
    DONE = "done"


@dataclass
class Job:
    name: str
    folder: Path
    commands: tuple[Command, ...]  # one after the other while they succeed
    log: Path  # where everything that the commands say is appended
    steps: int = 0  # optimizer steps of the whole run
    group: str = ""  # of runs that differ by their seed alone
    steps_before: int = 0  # that were done before this process
    phase: Phase = Phase.WAITING
    status: int = 0  # exit status of the last command; if a signal ended it, the signal's number below zero
    began: float = 0.0
    seconds: float = 0.0

    def progress(self) -> tuple[int, float | None]:
        """The last logged step of training, and the last loss among the last lines."""
        step, loss = 0, None
        for line in _tail(self.folder / "metrics.jsonl"):
            with suppress(ValueError):  # being written, or cut at the beginning
                entry = json.loads(line)
                step, loss = max(step, int(entry.get("step", 0))), entry.get("loss", loss)
        return step, loss

    def last_words(self) -> str:
        """The last line of the log that is not empty, its control characters made visible."""
        return next((visible(line.strip()) for line in reversed(_tail(self.log)) if line.strip()), "")


def _tail(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def shell_line(arguments: Sequence[str]) -> str:
    """A command as it is typed, without secrets."""
    return shlex.join(["promptkd", *without_secrets(arguments)])


def _start(arguments: Command, log: Path, environment: Mapping[str, str], **where: Any) -> subprocess.Popen[bytes]:
    """Start `promptkd` out of reach of the terminal's Ctrl-C, for the study stops its runs itself.

    On Linux it is asked to stop when the process that started it ends; elsewhere a run survives a killed study.
    `where` is what else `Popen` needs to know: `cwd`, `pass_fds`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} $ {shell_line(arguments)}\n".encode())
        file.flush()
        return subprocess.Popen(
            [sys.executable, "-m", "promptkd", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(environment),
            start_new_session=True,
            preexec_fn=_ending_with_parent(),
            **where,
        )


def _ending_with_parent() -> Callable[[], None] | None:
    """Runs in the new process before its program; made ready here, for nothing may be imported after the fork."""
    if sys.platform != "linux":
        return None
    set_option, parent = ctypes.CDLL(None).prctl, os.getpid()

    def prepare() -> None:
        set_option(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended in between
            os._exit(128 + signal.SIGTERM)

    return prepare


def run_commands(commands: Sequence[Command], log: Path, environment: Mapping[str, str], folder: Path) -> int:
    """Run commands one after the other while they succeed; return the exit status of the last one."""
    for arguments in commands:
        process = _start(arguments, log, environment, cwd=folder)
        try:
            while process.poll() is None:
                time.sleep(_PAUSE)  # a plain wait would not hear that the caller is cancelled
        except BaseException:
            process.terminate()
            process.wait()
            raise
        if process.returncode:
            return process.returncode
    return 0


def shares(workers: int, cores: int, gpus: Sequence[str], inherited: Mapping[str, str]) -> list[dict[str, str]]:
    """What is added to the environment of each worker: its share of the cores, and one GPU where there are any.

    OMP_NUM_THREADS is kept where it is set. Where there are more workers than GPUs, some share one.
    """
    threads = {} if "OMP_NUM_THREADS" in inherited else {"OMP_NUM_THREADS": str(max(1, cores // workers))}
    return [threads | ({"CUDA_VISIBLE_DEVICES": gpus[worker % len(gpus)]} if gpus else {}) for worker in range(workers)]


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    environment: Mapping[str, str]
    log: Path
    waiting: list[Command]  # the commands that follow


class LocalPool:
    """Runs jobs on this machine, one in each of `environments` at a time; they inherit the files of `keep_open`."""

    def __init__(self, environments: Sequence[Mapping[str, str]], keep_open: Sequence[int] = ()):
        self._free, self._keep_open = list(reversed(environments)), keep_open
        self._running: dict[str, _Running] = {}
        self._stopped = False

    def has_room(self) -> bool:
        return bool(self._free)

    def start(self, job: Job) -> None:
        environment, (first, *others) = self._free.pop(), job.commands
        process = _start(first, job.log, environment, pass_fds=self._keep_open)
        self._running[job.name] = _Running(process, environment, job.log, others)

    def has_begun(self, job: Job) -> bool:
        return True

    def finished(self) -> dict[str, int]:
        """The jobs that have ended since the last call, with their exit statuses; begins what follows in the others."""
        ended: dict[str, int] = {}
        for name, running in list(self._running.items()):
            status = running.process.poll()
            if status == 0 and running.waiting and not self._stopped:
                following = running.waiting.pop(0)
                running.process = _start(following, running.log, running.environment, pass_fds=self._keep_open)
            elif status is not None:
                ended[name] = -signal.SIGTERM if status == 0 and running.waiting else status
                self._free.append(self._running.pop(name).environment)
        return ended

    def stop(self, *, at_once: bool = False) -> None:
        """Ask every run to stop, for which it writes a checkpoint first, or end it with all processes it started."""
        self._stopped = True
        for each in self._running.values():
            if not at_once:
                each.process.terminate()
                continue
            with suppress(ProcessLookupError):
                os.killpg(each.process.pid, signal.SIGKILL)

    def close(self) -> None:
        self.stop(at_once=True)
        for each in self._running.values():
            each.process.wait()


class RayCluster:
    """Gives all jobs to Ray at once, which begins them as there is room; a fraction of `gpus` lets runs share one.

    Every node must have promptkd installed and see the study's folder, models and data under the same paths.
    """

    def __init__(self, address: str | None, *, cpus: int, gpus: float):
        try:
            import ray
        except ImportError as error:
            raise RequestError("--engine ray needs Ray. Install it by: pip install 'promptkd[ray]'.") from error
        self._ray = ray
        place = address or os.environ.get("RAY_ADDRESS", "auto")
        try:
            ray.init(address=place, log_to_driver=False, logging_level="error")
        except (ConnectionError, ValueError, RuntimeError) as error:
            told = f"No Ray cluster answers at {address or 'this machine'}: {' '.join(str(error).split())}"
            advice = "Start one by `ray start --head`, or name one by --ray-address."
            raise RequestError(f"{told} {advice}") from error
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
            held = "; ".join(f"{node.get('CPU', 0):g} cores, {node.get('GPU', 0):g} GPUs" for node in nodes)
            asked = f"--cpus-per-run {cpus} and --gpus-per-run {gpus:g}"
            ray.shutdown()
            raise RequestError(f"No node of the cluster has {asked}. Its nodes have {held}.")
        self._task = ray.remote(run_commands).options(num_cpus=cpus, num_gpus=gpus)
        self._environment = {"OMP_NUM_THREADS": str(max(1, cpus))}
        self._jobs: dict[Any, Job] = {}
        self._logged: dict[str, int] = {}

    def has_room(self) -> bool:
        return True

    def start(self, job: Job) -> None:
        self._logged[job.name] = _size(job.log)
        self._jobs[self._task.remote(job.commands, job.log, self._environment, Path.cwd())] = job

    def has_begun(self, job: Job) -> bool:
        return _size(job.log) > self._logged[job.name]

    def finished(self) -> dict[str, int]:
        ready = self._ray.wait(list(self._jobs), num_returns=len(self._jobs), timeout=0)[0] if self._jobs else ()
        ended = {task: self._jobs.pop(task) for task in ready}
        return {job.name: self._status(task, job) for task, job in ended.items()}

    def stop(self, *, at_once: bool = False) -> None:
        for task in self._jobs:
            self._ray.cancel(task, force=at_once)

    def close(self) -> None:
        """Leave nothing running, and the cluster alone."""
        self.stop(at_once=True)
        self._ray.shutdown()

    def _status(self, task: Any, job: Job) -> int:
        errors = self._ray.exceptions
        try:
            return int(self._ray.get(task))
        except errors.TaskCancelledError:
            return -signal.SIGTERM
        except errors.RayError as error:
            job.log.parent.mkdir(parents=True, exist_ok=True)
            with job.log.open("a", encoding="utf-8") as file:
                file.write(f"Ray could not finish this run: {error}\n")
            return 1


def _size(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0
