"""Long jobs that can be killed and gone on with: files of JSON objects, one a line, and what they depend on."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from promptkd.errors import RequestError
from promptkd.io.files import MIB, is_plain_name, json_value, read_regular

__all__ = ["ResumableLines", "settle_settings", "write_whole"]

Line = dict[str, Any]
Key = tuple[Any, ...]
_KEY_TYPES = (int, str)
_MOST_BYTES = 4096 * MIB


class ResumableLines:
    """The lines of `path` by key; of several lines with one key the last one counts.

    A line counts once its line break is written. What a killed process left behind the last break is half a line: it
    is not read, and goes from the file with the next `append`. Nothing else is forgiven.

    Args:
        path: the file; it and its folder need not exist yet.
        key: the fields that tell one line from another, for example ("row",).

    Raises:
        RequestError: if a whole line is no JSON object or lacks a field of the key.
    """

    def __init__(self, path: Path, key: tuple[str, ...] = ("row",)) -> None:
        self.path, self._key = path, key
        content = _content(path)
        self._whole = content.rfind(b"\n") + 1  # bytes up to the last line break, that included
        self.has_half_line = self._whole < len(content)
        self.lines: dict[Key, Line] = {}
        for number, text in enumerate(content[: self._whole].split(b"\n")[:-1], start=1):
            line = self._parsed(text, number)
            self.lines[self._key_of(line)] = line

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write `lines` behind the others, in one piece, and return once the disk has them."""
        added = [dict(line) for line in lines]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.truncate(self._whole)
            file.write(_encoded(added))
            file.flush()
            os.fsync(file.fileno())
            self._whole = file.tell()
        self.has_half_line = False
        self.lines |= {self._key_of(line): line for line in added}

    def replace(self, lines: Sequence[Line]) -> None:
        """Let the file hold `lines` alone, in their order; it is replaced whole, and only if it differs."""
        content = _encoded(lines)
        self.lines = {self._key_of(line): line for line in lines}
        if not self.path.exists() or self.path.read_bytes() != content:
            write_whole(self.path, content)
        self._whole, self.has_half_line = len(content), False

    def _parsed(self, text: bytes, number: int) -> Line:
        try:
            line = json_value(text)
            _encoded([line])  # what cannot be written again is not taken: half a surrogate pair
        except ValueError:  # of the JSON and of its UTF-8
            line = None
        if not isinstance(line, dict) or not all(isinstance(line.get(name), _KEY_TYPES) for name in self._key):
            raise RequestError(
                f"{self.path}, line {number}: expected a JSON object with {', '.join(self._key)} (numbers or texts). "
                "Mend or remove the line, or remove the file to begin anew."
            )
        return line

    def _key_of(self, line: Line) -> Key:
        return tuple(line[name] for name in self._key)


def settle_settings(path: Path, settings: Mapping[str, Any], files: Sequence[Path], *, overwrite: bool) -> list[Path]:
    """Hold all of a job's `files`, which stand beside `path`, to the settings that `path` keeps.

    What was begun may be added to: a setting or a file that `path` does not know yet joins those it holds, and none
    ever leaves it. With `overwrite` everything that was begun goes from the disk first.

    Returns those of `files` that an earlier run has begun.

    Raises:
        RequestError: naming every setting that differs, or a file that was not made under the settings of `path`.
    """
    began: dict[str, Any] = {"settings": {}, "files": []}
    if path.exists():
        began = _read_settings(path)
    if overwrite:
        for file in [*(path.with_name(name) for name in began["files"]), *files, path]:
            file.unlink(missing_ok=True)
        began = {"settings": {}, "files": []}
    before = began["settings"]
    changed = [
        f"{name} was {before[name]!r} and is now {settings[name]!r}"
        for name in before.keys() & settings.keys()
        if before[name] != settings[name]
    ]
    if changed:
        raise RequestError(
            f"{path} was begun with other settings: {'; '.join(sorted(changed))}. Go on with its own settings, give "
            "another --out, or begin anew with --overwrite."
        )
    foreign = [file for file in files if file.exists() and file.name not in began["files"]]
    if foreign:
        raise RequestError(
            f"{foreign[0]} exists, and {path} does not say how it was made. Move it away, give another --out, or "
            "replace it by --overwrite."
        )
    names = [*began["files"], *(file.name for file in files if file.name not in began["files"])]
    content = json.dumps({"settings": {**before, **settings}, "files": names}, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, content.encode())
    return [file for file in files if file.exists()]


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, and return once the disk has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _read_settings(path: Path) -> dict[str, Any]:
    """The settings in `path`, and the files it may speak for: those of its own job beside it, and no others."""
    try:
        began = json_value(_content(path))
        _encoded([began])
    except ValueError:
        began = None
    stem = path.name.removesuffix("settings.json")
    if (
        not isinstance(began, dict)
        or began.keys() != {"settings", "files"}
        or not isinstance(began["settings"], dict)
        or not isinstance(began["files"], list)
        or not all(is_plain_name(file) and file.startswith(stem) and file.endswith(".jsonl") for file in began["files"])
    ):
        raise RequestError(f"{path} does not hold the settings of a job. Move it away or give another --out.")
    return began


def _content(path: Path) -> bytes:
    """The bytes of a file of a job; none if there is no file yet."""
    try:
        return read_regular(path, most=_MOST_BYTES) if path.exists() else b""
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}.") from error


def _encoded(lines: Iterable[Line]) -> bytes:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
