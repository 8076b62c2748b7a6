"""The commands of a run, each in a process of its own that ends with its study, and the pool of this machine."""

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

from promptkd.io.redact import without_secrets
from promptkd.visible import visible

_PAUSE = 0.2
_PR_SET_PDEATHSIG = 1
_TAIL = 1 << 14  # bytes at the end of a file that are read for its last lines


class Phase(Enum):
    RUNNING = "running"
    QUEUED = "queued"
    FAILED = "failed"
    STOPPED = "stopped"
    WAITING = "waiting"
    DONE = "done"


@dataclass
class Job:
    """A run: its commands, and how far they are."""

    name: str
    folder: Path
    commands: tuple[tuple[str, ...], ...]  # arguments of `promptkd`, one after the other while they succeed
    log: Path  # where everything that the commands say is appended
    steps: int = 0  # optimizer steps of the whole run
    phase: Phase = Phase.WAITING
    status: int = 0  # exit status of the last command; if a signal ended it, the signal's number below zero
    began: float = 0.0
    seconds: float = 0.0

    def progress(self) -> tuple[int, float | None]:
        """The last logged step of training, and the last loss among the last lines."""
        entries = []
        for line in _tail(self.folder / "metrics.jsonl"):
            with suppress(ValueError):  # being written, or cut at the beginning
                entries.append(json.loads(line))
        losses = [float(entry["loss"]) for entry in entries if "loss" in entry]
        step = max((int(entry["step"]) for entry in entries if "step" in entry), default=0)
        return step, losses[-1] if losses else None

    def last_words(self) -> str:
        """The last line of the log that says anything, its control characters made visible."""
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


def start_command(
    arguments: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    folder: Path | None = None,
    keep_open: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start `promptkd` with `arguments` in `folder`, by default this one; it inherits the files of `keep_open`.

    It is out of reach of the terminal's Ctrl-C, for the study stops its runs itself. On Linux it is asked to stop when
    the process that started it ends in whatever way; elsewhere a run survives a study that is killed.
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
            cwd=folder,
            pass_fds=keep_open,
            start_new_session=True,
            preexec_fn=_ending_with_parent(),
        )


def _ending_with_parent() -> Callable[[], None] | None:
    """What a new process does before its program starts, made ready here: nothing may be imported after the fork."""
    if sys.platform != "linux":
        return None
    set_option, parent = ctypes.CDLL(None).prctl, os.getpid()

    def prepare() -> None:
        set_option(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended in between
            os._exit(128 + signal.SIGTERM)

    return prepare


def run_commands(commands: Sequence[Sequence[str]], log: Path, environment: Mapping[str, str], folder: Path) -> int:
    """Run commands one after the other while they succeed; return the exit status of the last one."""
    for arguments in commands:
        process = start_command(arguments, log, environment, folder)
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
    """What is added to the environment of each of the `workers`: its threads, and its GPU where there are any.

    Threads are the cores over the workers, at least one, unless the environment says OMP_NUM_THREADS. A worker has one
    GPU, for a run is one process; where there are more workers than GPUs, some share one.
    """
    threads = {} if "OMP_NUM_THREADS" in inherited else {"OMP_NUM_THREADS": str(max(1, cores // workers))}
    return [threads | ({"CUDA_VISIBLE_DEVICES": gpus[worker % len(gpus)]} if gpus else {}) for worker in range(workers)]


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    environment: Mapping[str, str]
    log: Path
    waiting: list[tuple[str, ...]]  # the commands that follow


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
        self._running[job.name] = _Running(self._process(first, job.log, environment), environment, job.log, others)

    def has_begun(self, job: Job) -> bool:
        """Whether a job that was started has begun; here it has at once."""
        return True

    def finished(self) -> dict[str, int]:
        """The jobs that have ended since the last call, with their exit statuses; begins what follows in the others."""
        ended: dict[str, int] = {}
        for name, running in list(self._running.items()):
            status = running.process.poll()
            if status == 0 and running.waiting and not self._stopped:
                running.process = self._process(running.waiting.pop(0), running.log, running.environment)
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
        """Leave nothing running."""
        self.stop(at_once=True)
        for each in self._running.values():
            each.process.wait()

    def _process(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        return start_command(arguments, log, environment, keep_open=self._keep_open)
