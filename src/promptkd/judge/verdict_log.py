"""The judge's verdicts as they come: one JSON line each, on the disk before the next is waited for.

The first line holds the settings that the verdicts depend on. A line that a killed process left unfinished is cut off
when the file is gone on with. A finished file is in the order of the rows, whatever order the answers came in.
"""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel, ConfigDict, ValidationError

from promptkd.errors import RequestError
from promptkd.io.files import MIB, json_value, read_regular
from promptkd.io.jsonl import write_whole

__all__ = ["Key", "Verdict", "VerdictLog"]

_MOST_BYTES = 4096 * MIB

Key = tuple[int, bool]
"""The row, and whether the model's answer was shown first."""


class Verdict(BaseModel):
    """What the judge said to one question."""

    model_config = ConfigDict(extra="forbid")

    row: int
    model_first: bool
    """Whether the model's answer was shown before the one it is compared with."""
    model: float | None
    """The model's score, or its share of the win: 1, 0.5 or 0. None where the verdict could not be read."""
    other: float | None
    """The same of the reference's or the other model's answer."""
    text: str
    """What the judge wrote."""
    refused: str | None = None
    """Why the endpoint would not answer."""
    finish_reason: str | None = None
    served_model: str | None = None
    """The judge as the endpoint names it."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    @property
    def key(self) -> Key:
        return self.row, self.model_first


class VerdictLog:
    """The verdicts in `path`, if it holds any under the same settings, and those that are added."""

    def __init__(self, path: Path, settings: dict[str, Any], *, overwrite: bool = False):
        """Read `path`; nothing is written before the first verdict.

        Args:
            settings: plain data that the verdicts depend on; other settings than the file's are refused by name.
            overwrite: begin anew, whatever the file holds.

        Raises:
            RequestError: the file was made with other settings, or is damaged before its last line.
        """
        self.path = path
        self.verdicts: dict[Key, Verdict] = {}
        self._settings = settings
        self._whole = 0  # bytes up to the end of the last finished line
        self._file: BinaryIO | None = None
        if path.exists() and not overwrite:
            self._read()

    def _read(self) -> None:
        try:
            content = read_regular(self.path, most=_MOST_BYTES)
        except OSError as error:
            raise RequestError(f"{self.path} cannot be read: {error.strerror or error}.") from error
        finished, newline, _ = content.rpartition(b"\n")
        self._whole = len(finished) + len(newline)
        lines = finished.splitlines() if newline else []
        for number, line in enumerate(lines, start=1):
            try:
                if number == 1:
                    before = dict(json_value(line)["settings"])
                else:
                    verdict = Verdict.model_validate_json(line)
                    self.verdicts[verdict.key] = verdict
            except (ValueError, KeyError, TypeError) as error:
                reason = "not a verdict" if isinstance(error, ValidationError) else "not the settings of a judge"
                raise RequestError(
                    f"{self.path}, line {number}: {reason}. Mend the file, or replace it by --overwrite."
                ) from None
        if lines:
            self._check_same(before)

    def _check_same(self, before: dict[str, Any]) -> None:
        changed = [
            _change(name, before.get(name), self._settings.get(name))
            for name in sorted(before.keys() | self._settings.keys())
            if before.get(name) != self._settings.get(name)
        ]
        if changed:
            raise RequestError(
                f"{self.path} holds verdicts under other settings: {'; '.join(changed)}. "
                "Judge with those, give another --out, or begin anew with --overwrite."
            )

    def add(self, verdict: Verdict) -> None:
        """Append, and return when it is on the disk."""
        self.verdicts[verdict.key] = verdict
        if self._file is None:
            self._file = self._open()
        self._file.write(_line(verdict))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _open(self) -> BinaryIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self._whole:
            write_whole(self.path, self._header())
            return self.path.open("ab")
        file = self.path.open("r+b")
        file.truncate(self._whole)
        file.seek(self._whole)
        return file

    def finish(self) -> None:
        """Write the file anew in the order of the rows, whole or not at all."""
        self.close()
        write_whole(self.path, self._header() + b"".join(_line(self.verdicts[key]) for key in sorted(self.verdicts)))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _header(self) -> bytes:
        return (json.dumps({"settings": self._settings}, ensure_ascii=False) + "\n").encode()


def _line(verdict: Verdict) -> bytes:
    return (json.dumps(verdict.model_dump(), ensure_ascii=False) + "\n").encode()


def _change(name: str, before: Any, now: Any) -> str:
    short = all(len(str(value)) <= 80 and "\n" not in str(value) for value in (before, now))
    return f"{name} was {before!r} and is now {now!r}" if short else f"{name} is another"
