"""One study at a time in a folder."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from promptkd.errors import RequestError

__all__ = ["locked"]

_PAUSE = 0.2


@contextmanager
def locked(folder: Path, patience: float = 10.0) -> Iterator[int]:
    """Hold the folder's lock; gives the open file, which keeps the lock in every process that inherits it.

    Raises `RequestError` if another study, or runs of one that was killed, still hold it after `patience` seconds.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RequestError(f"Cannot write in {folder}: {error.strerror or error}.") from error
    try:
        end = time.monotonic() + patience
        while not _taken(file):
            if time.monotonic() >= end:
                raise RequestError(
                    f"Another study is at work in {folder}, or runs of one that was killed are still stopping. Wait "
                    "until they have ended, or give another `out`."
                )
            time.sleep(_PAUSE)
        yield file
    finally:
        os.close(file)


def _taken(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
