"""One process at a time writes a run's folder or a growing file.

The lock is the operating system's (`flock`, `msvcrt.locking`): a process that is killed lets go of it. filelock has no
place for the holder's name, and none for the descriptor that the runs of a study inherit.
"""

import errno
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from promptkd.errors import RequestError, writing

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

FOLDER_LOCK = ".lock"
"""The lock's file in a folder."""

_PATIENCE = 10.0
"""Seconds for what a killed process started to end: loaders look for their parent every 5 s, a study's runs stop."""
_PAUSE = 0.2
_TAKEN = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
_BEHIND_CONTENT = 1 << 20
"""Windows locks bytes, and keeps others from reading them."""


@contextmanager
def locked(target: Path, *, folder: bool = False, waits: bool = False) -> Iterator[int]:
    """Hold the lock of `target` while the body runs.

    Yields the lock's descriptor: every process that inherits it holds the lock too. The lock file names the process. It
    is removed at the end, and with it what folders were made for it and are still empty.

    Args:
        folder: whether `target` is a folder, which has its lock file inside; that of a file is beside it.
        waits: wait for the lock however long it takes.

    Raises:
        RequestError: if another process holds the lock, or none can be made here.
    """
    path = target / FOLDER_LOCK if folder else target.with_name(f".{target.name}.lock")
    new = [parent for parent in path.parents if not parent.exists()]
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = _acquire(path, target, waits)
        try:
            os.ftruncate(handle, 0)
            os.write(handle, json.dumps([os.getpid(), platform.node(), f"{datetime.now():%Y-%m-%d %H:%M:%S}"]).encode())
            yield handle
        finally:
            _release(handle, path)
    finally:
        with suppress(OSError):  # one that holds something, and those above it, stay
            for parent in new:
                parent.rmdir()


def _acquire(path: Path, target: Path, waits: bool) -> int:
    deadline = time.monotonic() + _PATIENCE
    while True:
        with writing(path.parent):
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        taken = _try_lock(handle, path)
        if taken and _is_file(handle, path):  # else its holder has removed it since it was opened
            return handle
        holder, is_alive = _holder(handle)
        os.close(handle)
        if not (taken or waits) and (is_alive or time.monotonic() >= deadline):
            raise RequestError(
                f"{target} can be written by one process at a time, and {holder} is at it. Wait until that has ended, "
                "stop it, or give another --out."
            )
        time.sleep(0 if taken else _PAUSE)


def _release(handle: int, path: Path) -> None:
    """Remove the file while the lock is held: whoever opened it meanwhile finds that it is gone, and opens another."""
    with suppress(OSError):
        if sys.platform != "win32" and _is_file(handle, path):
            path.unlink()
    os.close(handle)
    with suppress(OSError):
        if sys.platform == "win32":  # which removes no file that anyone has open
            path.unlink()


def _try_lock(handle: int, path: Path) -> bool:
    try:
        if sys.platform == "win32":
            os.lseek(handle, _BEHIND_CONTENT, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            os.lseek(handle, 0, os.SEEK_SET)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        if error.errno not in _NO_LOCKS:
            raise
        logging.getLogger(__name__).warning("%s has no locks: let no second process write there.", path.parent)
    return True


def _is_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _holder(handle: int) -> tuple[str, bool]:
    """Who holds the lock, and whether that process is alive."""
    import psutil  # slow to import, and hardly ever needed

    os.lseek(handle, 0, os.SEEK_SET)
    try:
        pid, host, since = json.loads(os.read(handle, 4096))
    except ValueError:  # it has not written it yet
        return "another process", False
    name = f"process {pid} on {host}, since {since},"
    if host == platform.node() and not psutil.pid_exists(pid):
        return f"what {name} left running when it was killed", False
    return name, True
