"""One process at a time writes a run's folder or a growing file.

The lock is the operating system's, so a killed process lets go of it. It is taken on a descriptor and not by filelock's
own class: the file names the holder, and the runs of a study inherit its lock.
"""

import errno
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import lock_descriptor

from promptkd.errors import RequestError, writing

FOLDER_LOCK = ".lock"  # the lock's file in a folder
_PATIENCE = 10.0  # seconds for what a killed process started to end: loaders look for their parent every 5 s
_PAUSE = 0.2
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
_HOLDER_AT = 1  # where the holder's name begins: behind the byte that Windows locks


@contextmanager
def locked(target: Path, *, folder: bool = False, waits: bool = False) -> Iterator[int]:
    """Hold the lock of `target` while the body runs; a process that inherits the yielded descriptor holds it too.

    The lock file is inside a `folder` or beside a file. It is removed at the end, with the folders made for it that are
    still empty. Unless it `waits`, a lock that another process holds is a `RequestError`.
    """
    path = target / FOLDER_LOCK if folder else target.with_name(f".{target.name}.lock")
    new = [parent for parent in path.parents if not parent.exists()]
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = _acquire(path, target, waits)
        try:
            holder = [os.getpid(), platform.node(), f"{datetime.now():%Y-%m-%d %H:%M:%S}"]
            os.ftruncate(handle, 0)
            os.lseek(handle, _HOLDER_AT, os.SEEK_SET)
            os.write(handle, json.dumps(holder).encode())
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
            advice = "Wait until that has ended, stop it, or give another --out."
            raise RequestError(f"{target} can be written by one process at a time, and {holder} is at it. {advice}")
        time.sleep(0 if taken else _PAUSE)


def _release(handle: int, path: Path) -> None:
    """Remove the file while the lock is held: whoever opened it meanwhile finds that it is gone, and opens another."""
    if os.name == "nt":  # which removes no file that anyone has open
        os.close(handle)
    with suppress(OSError):
        if os.name == "nt" or _is_file(handle, path):
            path.unlink()
    if os.name != "nt":
        os.close(handle)


def _try_lock(handle: int, path: Path) -> bool:
    try:
        return lock_descriptor(handle, blocking=False)
    except OSError as error:
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
    import psutil  # slow, and hardly ever needed

    os.lseek(handle, _HOLDER_AT, os.SEEK_SET)
    try:
        pid, host, since = json.loads(os.read(handle, 4096))
    except ValueError:  # it has not written it yet
        return "another process", False
    name = f"process {pid} on {host}, since {since},"
    is_alive = host != platform.node() or psutil.pid_exists(pid)
    return name if is_alive else f"what {name} left running when it was killed", is_alive
