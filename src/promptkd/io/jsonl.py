"""Long jobs that resume where they were killed: JSON objects, one per line, and the settings they depend on."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from promptkd.errors import RequestError
from promptkd.io.atomic import write_atomic
from promptkd.io.files import MIB, is_plain_name, json_value, read_regular

T = TypeVar("T")
Line = dict[str, Any]
Key = tuple[Any, ...]
_MOST_BYTES = 4096 * MIB


class ResumableLines:
    """The lines of `path` (None: in memory) by the fields `key`; of several lines with one key the last one counts.

    A line counts once its line break is written: what a killed process left behind the last break is not read, and the
    next `append` removes it. `settings`, which the lines depend on, have a first line of their own. Other settings than
    the file's, or a line of which `check` raises ValueError, are a `RequestError`. With `overwrite` the file counts as
    empty, and the first `append` replaces it.
    """

    def __init__(
        self,
        path: Path | None,
        key: tuple[str, ...] = ("row",),
        *,
        settings: Mapping[str, Any] | None = None,
        check: Callable[[Line], object] = lambda line: None,
        overwrite: bool = False,
    ) -> None:
        self.path, self._key, self._check = path, key, check
        self._header = [] if settings is None else [{"settings": dict(settings)}]
        content = b"" if path is None or overwrite else _content(path)
        self._size = content.rfind(b"\n") + 1  # of what is complete
        texts = content[: self._size].split(b"\n")[:-1]
        wrong = "Fix or remove the line, or remove the file to start from scratch."
        fields = f"a JSON object with {', '.join(key)} (numbers or texts) and what else this job writes"
        if settings is not None and texts:
            told = f"{path}, line 1: expected the settings of the lines below. {wrong}"
            _refuse_changes(path, _parsed(texts[0], lambda line: dict(line["settings"]), told), settings)
        self.lines: dict[Key, Line] = {}
        for number, text in list(enumerate(texts, start=1))[len(self._header) :]:
            line = _parsed(text, self._checked, f"{path}, line {number}: expected {fields}. {wrong}")
            self.lines[self._key_of(line)] = line

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write `lines` behind the others in one piece, and return once the disk has them."""
        added = [dict(line) for line in lines]
        if self.path is not None:
            if not self._size:
                self.replace([])
            with self.path.open("ab") as file:
                file.truncate(self._size)
                file.write(encoded(added))
                file.flush()
                os.fsync(file.fileno())
                self._size = file.tell()
        self.lines |= {self._key_of(line): line for line in added}

    def replace(self, lines: Sequence[Line]) -> None:
        """Let the file hold `lines` alone, in their order; it is replaced atomically, and only if it differs."""
        if self.path is not None:
            content = encoded([*self._header, *lines])
            if not self.path.exists() or self.path.read_bytes() != content:
                write_atomic(self.path, content)
            self._size = len(content)
        self.lines = {self._key_of(line): line for line in lines}

    def _checked(self, line: Any) -> Line:
        if not isinstance(line, dict) or not all(isinstance(line[name], int | str) for name in self._key):
            raise ValueError
        self._check(line)
        return line

    def _key_of(self, line: Line) -> Key:
        return tuple(line[name] for name in self._key)


def encoded(lines: Iterable[Line]) -> bytes:
    """The bytes of a JSONL file."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def settle_settings(
    path: Path,
    settings: Mapping[str, Any],
    files: Sequence[Path],
    *,
    overwrite: bool,
    absent: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Hold all of a job's `files`, which stand beside `path`, to the settings that `path` keeps.

    A job may grow: settings and files that `path` does not know yet join those it holds, but for settings that are in
    `absent`: where `path` lacks one, its files were made as `absent` says. With `overwrite` everything that an earlier
    run wrote is deleted first. Returns those of `files` that an earlier run has begun. A setting that differs, or a
    file not made under those settings, is a `RequestError`.
    """
    before, names = dict[str, Any](), list[str]()
    if path.exists():
        wrong = f"{path} does not hold the settings of a job. Move it away or give another --out."
        before, names = _parsed(_content(path), lambda job: _job(job, path.name.removesuffix("settings.json")), wrong)
        before |= {name: value for name, value in (absent or {}).items() if name not in before}
    if overwrite:
        for file in [*(path.with_name(name) for name in names), *files, path]:
            file.unlink(missing_ok=True)
        before, names = {}, []
    _refuse_changes(path, {**settings, **before}, {**before, **settings})
    if foreign := [file for file in files if file.exists() and file.name not in names]:
        advice = "Move it away, give another --out, or replace it by --overwrite."
        raise RequestError(f"{foreign[0]} exists, and {path} does not say how it was made. {advice}")
    job = {"settings": {**before, **settings}, "files": list(dict.fromkeys([*names, *(file.name for file in files)]))}
    write_atomic(path, json.dumps(job, indent=1, ensure_ascii=False) + "\n")
    return [file for file in files if file.exists()]


def _job(job: Any, stem: str) -> tuple[Line, list[str]]:
    """The settings of a job, and the files it may speak for: those of its own beside it, and no others."""
    settings, names = job.pop("settings"), job.pop("files")
    own = [is_plain_name(name) and name.startswith(stem) and name.endswith(".jsonl") for name in names]
    if job or not isinstance(settings, dict) or not isinstance(names, list) or not all(own):
        raise ValueError
    return settings, names


def _refuse_changes(path: Path | None, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = []
    for name in sorted(before.keys() | now.keys()):
        was, now_is = before.get(name), now.get(name)
        if was != now_is:
            is_short = max(len(str(was)), len(str(now_is))) <= 80
            changed.append(f"{name} was {was!r} and is now {now_is!r}" if is_short else f"{name} is another")
    if changed:
        advice = "Resume it with its own settings, give another --out, or start from scratch with --overwrite."
        raise RequestError(f"{path} was begun with other settings: {'; '.join(changed)}. {advice}")


def _parsed(text: bytes, read: Callable[[Any], T], wrong: str) -> T:
    """What `read` makes of the JSON in `text`. Raises `RequestError`, saying `wrong`, if it is none or `read` fails."""
    try:
        value = json_value(text)
        encoded([value])  # what cannot be written again is not taken: half a surrogate pair
        return read(value)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RequestError(wrong) from None


def _content(path: Path) -> bytes:
    try:
        return read_regular(path, most=_MOST_BYTES) if path.exists() else b""
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}.") from error
