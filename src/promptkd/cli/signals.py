"""What a signal does to a command, and the command that goes on from there."""

import os
import shlex
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from promptkd.errors import Stopped

_MODES = ("resume", "overwrite")


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM raises `Stopped`, as SIGINT raises `KeyboardInterrupt`, so that the body clears away what it began."""
    ignored = signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    if ignored or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def command_that_goes_on(name: str, arguments: Sequence[str], options: Any, flags: Sequence[str]) -> str:
    """The command line that goes on with the command `name`, for a shell.

    Args:
        arguments: what it was given behind its name.
        options: what they and the --config file made.
        flags: what going on takes: --resume, --overwrite or nothing.
    """
    kept = _without_modes(arguments)
    if "--overwrite" not in flags and options.overwrite and kept == list(arguments):
        flags = [*flags, "--no-overwrite"]  # the file says to
    launcher = ["promptkd"] if os.environ.get("WORLD_SIZE", "1") == "1" else ["accelerate", "launch", "-m", "promptkd"]
    return shlex.join([*launcher, name, *kept, *flags])


def _without_modes(arguments: Sequence[str]) -> list[str]:
    kept: list[str] = []
    left_out = False
    for argument in arguments:
        if argument.startswith("--"):
            flag = argument.removeprefix("--").partition("=")[0].replace("-", "_")
            left_out = flag.removeprefix("no_") in _MODES
        if not left_out:
            kept.append(argument)
    return kept


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)
