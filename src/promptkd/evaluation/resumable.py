"""A file of JSON objects, one a line, that a long job appends to and a later run of the job goes on from."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from promptkd.errors import RequestError

__all__ = ["ResumableLines"]

Line = dict[str, Any]
Key = tuple[Any, ...]


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
        content = path.read_bytes() if path.exists() else b""
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

    def sort(self, keys: Iterable[Key]) -> None:
        """Leave one line for each of `keys`, in that order; the file is replaced whole or not at all."""
        self.lines = {key: self.lines[key] for key in keys}
        content = _encoded(self.lines.values())
        partial = self.path.with_name(self.path.name + ".partial")
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path)
        self._whole = len(content)

    def _parsed(self, text: bytes, number: int) -> Line:
        try:
            line = json.loads(text)
        except ValueError:  # of the JSON and of its UTF-8
            line = None
        if not isinstance(line, dict) or not line.keys() >= set(self._key):
            raise RequestError(
                f"{self.path}, line {number}: expected a JSON object with {', '.join(self._key)}. "
                "Mend or remove the line, or remove the file to begin anew."
            )
        return line

    def _key_of(self, line: Line) -> Key:
        return tuple(line[name] for name in self._key)


def _encoded(lines: Iterable[Line]) -> bytes:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
