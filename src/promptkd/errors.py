"""The exceptions that end a command: a failure, a wrong request, a signal."""

import errno
import signal
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors of a disk that becomes unwritable while a command runs."""


class PromptKDError(Exception):
    """The run failed. The message says what was expected, what came and what to do (exit status 1)."""

    exit_status = 1


class RequestError(PromptKDError, ValueError):
    """The request was wrong: usage, configuration or data (exit status 2)."""

    exit_status = 2


class Stopped(SystemExit):
    """A signal ended the command (exit status 128 + its number). As a `SystemExit`, it passes `except Exception`.

    Args:
        number: the signal's.
        reached: how far the command got, as the end of a sentence: "after step 7 of 10".
    """

    def __init__(self, number: int, reached: str = ""):
        super().__init__(128 + number)
        self.status = 128 + number
        self.reached = reached
        self._name = "Interrupted" if number == signal.SIGINT else f"Stopped by {signal.Signals(number).name}"

    def __str__(self) -> str:
        return f"{self._name} {self.reached}".rstrip() + "."


def cannot_write(target: Path, error: OSError) -> PromptKDError:
    """The exception for a write that failed: a full disk fails the run, a wrong place is a wrong request."""
    reason = error.strerror or str(error)
    if error.errno in NO_ROOM and error.errno != errno.EROFS:
        return PromptKDError(f"Cannot write {target}: {reason}. Make room there or give another --out.")
    return RequestError(f"Cannot write {target}: {reason}.")
