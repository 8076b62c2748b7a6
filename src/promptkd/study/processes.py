"""The commands of a run, one after the other, each in a process of its own that ends with its study."""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from promptkd.io.redact import without_secrets

_PAUSE = 0.2
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Job:
    name: str
    commands: tuple[tuple[str, ...], ...]
    """Arguments of `promptkd`. The next command starts when the one before has ended with status 0."""
    log: Path
    """Where everything that the commands say is appended."""


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


def run_job(job: Job, environment: Mapping[str, str], folder: Path) -> int:
    """Run a job to its end; return the exit status of the command that was its last."""
    status = 0
    for arguments in job.commands:
        process = start_command(arguments, job.log, environment, folder)
        try:
            while process.poll() is None:
                time.sleep(_PAUSE)  # a plain wait would not hear that the caller is cancelled
        except BaseException:
            process.terminate()
            process.wait()
            raise
        status = process.returncode
        if status != 0:
            break
    return status


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
