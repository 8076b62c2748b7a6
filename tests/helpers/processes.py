"""Processes of their own, forked from this one: they have imported all that it has, which takes seconds otherwise."""

import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from accelerate.state import AcceleratorState

from helpers import processes_worker
from promptkd.cli import main

CHECKS = (
    "fixed",
    "tuned",
    "contrast",
    "empty",
    "early",
    "mixed",
    "moving",
    "reached",
    "uneven",
    "resumed",
    "served",
    "heads",
    "sharded",
    "kept",
)
SECONDS = 150  # in which processes that train together are done, or hang


def port() -> int:
    """One that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def forked(work: Callable[[], object], log: Path, **environment: str) -> int:
    """Start a process that does `work` and ends with the status it returns; what it says is appended to `log`."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.environ |= environment
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        warnings.simplefilter("ignore")
        AcceleratorState._reset_state(reset_partial_state=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = int(work() or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # past torch's teardown, in which a thread of gloo's aborts the process now and then


def forked_command(request: list[object], log: Path, **environment: str) -> int:
    """Start a process that runs a command."""
    return forked(lambda: main([str(each) for each in request]), log, **environment)


class ForkedCommand:
    """What `subprocess.Popen([sys.executable, "-m", "promptkd", ...])` starts, forked instead."""

    def __init__(self, command: list[str], *, stdout: BinaryIO, env: dict[str, str], **_: object):
        assert command[:3] == [sys.executable, "-m", "promptkd"]
        self.returncode: int | None = None
        self.pid = forked(lambda: os.setsid() or main(command[3:]), Path(stdout.name), **env)

    def poll(self) -> int | None:
        if self.returncode is None and (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(found[1])
        return self.returncode

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.02)
        return self.returncode or 0

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)


def exit_code(child: int) -> int:
    """Wait for a forked process; negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    assert exit_code(child) == -signal.SIGKILL, "it ended before it was killed"


def group(processes: int) -> list[dict[str, str]]:
    """What the environments of processes that train together say."""
    common = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    common["MASTER_PORT"] = str(port())
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def together(work: Callable[[], object], folder: Path, processes: int, seconds: float = SECONDS) -> list[str]:
    """Do `work` in so many processes that train together and return what each printed.

    Raises:
        AssertionError: if one fails, or they are not done in time; the others are ended with it.
    """
    logs = [folder / f"output-{rank}" for rank in range(processes)]
    children = [forked(work, log, **own) for log, own in zip(logs, group(processes), strict=True)]
    ended: dict[int, int] = {}
    until = time.monotonic() + seconds
    while len(ended) < processes and not any(ended.values()) and time.monotonic() < until:
        time.sleep(0.05)
        for child in set(children) - ended.keys():
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                ended[child] = os.waitstatus_to_exitcode(status)
    for child in set(children) - ended.keys():
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    texts = [log.read_text() for log in logs]
    assert [ended.get(child) for child in children] == [0] * processes, "\n".join(
        f"process {rank}: {ended.get(child)}\n{texts[rank][-3000:]}" for rank, child in enumerate(children)
    )
    return texts


def start(folder: Path, processes: int, checks: tuple[str, ...], seconds: float = SECONDS) -> list[str]:
    """Run checks of processes_worker.py on so many processes and return what each printed."""
    return together(lambda: processes_worker.work(folder, checks), folder, processes, seconds)
