"""A file or folder that is written whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from promptkd.errors import cannot_write

__all__ = ["written_whole"]


@contextmanager
def written_whole(out: Path, *, folder: bool) -> Iterator[Path]:
    """A place beside `out` to write to; it becomes `out`, whatever was there, when the body is done, and goes if not.

    Raises:
        PromptKDError: if the disk refuses.
    """
    partial = out.with_name(f"{out.stem}.partial{out.suffix}")
    try:
        _remove(partial)
        (partial if folder else partial.parent).mkdir(parents=True, exist_ok=True)
        yield partial
        if folder:
            _remove(out)
        os.replace(partial, out)
    except OSError as error:
        raise cannot_write(out, error) from error
    finally:
        _remove(partial)


def _remove(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
