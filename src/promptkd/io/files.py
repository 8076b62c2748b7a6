"""Files that others may have written: only regular ones are read (a pipe might never end), up to a size limit."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

from promptkd.errors import RequestError

MIB = 1 << 20
_MOST_SETTINGS_BYTES = 64 * MIB  # of config.json, an index of weights, a checkpoint's state
_DEVICES = dict.fromkeys((stat.S_IFCHR, stat.S_IFBLK), "a device")
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", **_DEVICES}


def not_regular(path: Path) -> str | None:
    """What `path` is if it exists and is no regular file: "a folder", "a named pipe", "a socket" or "a device"."""
    try:
        return _KINDS.get(stat.S_IFMT(path.stat().st_mode))
    except (OSError, ValueError):  # ValueError: a NUL byte in the name
        return None


def read_regular(path: Path, *, most: int) -> bytes:
    """The bytes of a regular file. Raises OSError, also for another kind of file and for one above `most` bytes."""
    if kind := not_regular(path):
        raise OSError(errno.EINVAL, f"it is {kind}, and a regular file was expected", str(path))
    if path.stat().st_size > most:
        raise OSError(errno.EFBIG, f"it holds more than {most // MIB} MiB", str(path))
    return path.read_bytes()


def json_value(text: str | bytes, *, unique: bool = True) -> Any:
    """The value of a JSON text; `unique` refuses duplicate keys. Raises ValueError for what is not valid."""
    try:
        return json.loads(text, object_pairs_hook=_object if unique else None)
    except RecursionError as error:
        raise ValueError(f"nested too deeply ({error})") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a file of settings. Of duplicate keys the last counts, as for the libraries that read it."""
    try:
        value = json_value(read_regular(path, most=_MOST_SETTINGS_BYTES), unique=False)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise RequestError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise RequestError(f"{path} must hold a JSON object. Got a {type(value).__name__}.")
    return value


def is_plain_name(name: object) -> bool:
    """Whether `name` is only a file's name, which cannot lead out of its folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\\", "\0", os.sep} & set(name)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r} in one object")
    return fields
