"""Atomic writes: a file or folder is written beside its place, which it takes once the disk has all of it.

All files and folders written are fsynced before the rename, or a power failure could leave the new name without its
content, and the folder above after it, or the old content could come back.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file, and its folder where there is none. Whatever happens, `path` is the old file or the new."""
    with atomic(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic(target: Path, *, writes: bool = True) -> Iterator[Path]:
    """A place to write a file or folder to that replaces `target`, whatever was there, once the body has succeeded.

    What a killed process left goes with the next attempt, so only one process may write a target at a time (`io.lock`).
    Without `writes` nothing is written: the other ranks of a launch only learn the place.
    """
    partial = target.with_name(f"{target.name}.partial")
    if not writes:
        yield partial
        return
    remove(partial)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        replace(partial, target)
    except BaseException:
        with suppress(OSError):  # the first error counts
            remove(partial)
        raise


def replace(written: Path, target: Path) -> None:
    """Let the disk have all of `written`, a file or folder, and give it the name `target` in place of what has it.

    A folder takes two renames; a process killed between them leaves the old one as `written` + ".replaced".
    """
    for path in [*written.rglob("*"), written]:
        if not path.is_symlink():
            fsync(path)
    replaced = written.with_name(f"{written.name}.replaced")
    remove(replaced)
    if target.is_dir():
        os.replace(target, replaced)
    try:
        os.replace(written, target)
    except OSError:
        if replaced.exists():
            os.replace(replaced, target)
        raise
    fsync(target.parent)
    remove(replaced)


def fsync(path: Path) -> None:
    """Return once the disk has what was written to `path`, a file or a folder."""
    if os.name == "nt" and path.is_dir():  # Windows opens none
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not path.is_dir() or error.errno != errno.EINVAL:  # which some network disks say of every folder
            raise
    finally:
        os.close(handle)


def remove(place: Path) -> None:
    """Delete a file, a link or a folder with all that it holds, if it is there."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
