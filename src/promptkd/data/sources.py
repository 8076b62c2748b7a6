"""Where rows come from: a file, a folder, or a data set on the hub.

The rule for a name, in this order:
1. A path that exists is read: a file by its suffix (.jsonl, .jsonl.gz, .json, .parquet, .csv); a folder that
   `datasets.save_to_disk` wrote; any other folder if it holds one such file, or one named after the split.
2. What looks like a path (begins with ".", "/" or "~", or ends in one of the suffixes) and does not exist is an error.
3. "owner/name" is a data set on the hub; "owner/name:split" picks its split, "owner/name:config:split" its
   configuration as well.

A file is read within limits, lest a small one fill the memory: `MOST_LINE_BYTES`, `MOST_JSON_BYTES`, and `allowance`
for a packed one.
"""

import csv
import gzip
import re
import zlib
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from itertools import islice
from json import JSONDecodeError
from pathlib import Path
from typing import IO, Any, cast

from promptkd.data.rows import Example, Instruction, Message, Request, example_from_row, examples_from_rows
from promptkd.data.tables import allowance, parquet_rows, saved_rows, undecoded, unpacks_too_far
from promptkd.errors import RequestError
from promptkd.io.files import MIB, json_value, not_regular, read_regular

__all__ = [
    "MOST_JSON_BYTES",
    "MOST_LINE_BYTES",
    "SUFFIXES",
    "Example",
    "Instruction",
    "Message",
    "Request",
    "examples_from_rows",
    "read_examples",
    "read_objects",
]

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv")
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[^:/]+)(?=:))?(:(?P<split>[^:/]+))?")

MOST_LINE_BYTES = 16 * MIB
"""Of a line of JSONL or CSV."""
MOST_JSON_BYTES = 256 * MIB
"""Of a .json file, which is read as one; JSONL has no such limit."""

_UTF16 = (BOM_UTF16_LE, BOM_UTF16_BE)

_Located = tuple[str, Any]
"""Where a row stands, and the row."""


def read_examples(source: str | Path, *, split: str = "train", limit: int | None = None) -> list[Example]:
    """Read the rows of `source`: a file, a folder or a hub name, by the rule at the top of this file.

    Args:
        split: which split of a folder or a hub data set, where the name itself does not say.
        limit: read only that many rows, the first ones.

    Raises:
        RequestError: if there is no such source, it cannot be read, it is empty, or a row is wrong; with the line or
            the row.
    """
    located = read_objects(source, split=split, limit=limit)
    return [example_from_row(row, location=location, row=index) for index, (location, row) in enumerate(located)]


def read_objects(source: str | Path, *, split: str = "train", limit: int | None = None) -> list[_Located]:
    """The rows of `source` as they stand, each with its location. Arguments and errors as `read_examples`."""
    if limit is not None and limit < 1:
        raise RequestError(f"The number of rows to read must be at least 1. Got {limit}.")
    try:
        rows = list(islice(_located_rows(str(source), split), limit))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RequestError(f"{source} is not a whole gzip file: {error}. Compress it anew.") from error
    except OSError as error:
        raise RequestError(f"{source} cannot be read: {error.strerror or error}.") from error
    if not rows:
        raise RequestError(f"{source} holds no rows. Expected at least one.")
    return rows


def _located_rows(source: str, split: str) -> Iterator[_Located]:
    path = Path(source).expanduser()
    if source and path.is_dir():
        return _folder(path, split)
    if path.is_file():
        return _file(path)
    if source and (kind := not_regular(path)):
        raise RequestError(f"{source} is {kind}. Expected a regular file, for data are read more than once.")
    return _hub(source, split)


def _file(path: Path) -> Iterator[_Located]:
    readers = {".jsonl": _jsonl, ".jsonl.gz": _jsonl, ".json": _json, ".parquet": parquet_rows, ".csv": _csv}
    suffix = _suffix(path.name)
    if suffix is None:
        raise RequestError(f"{path} must be a data file that ends in one of {', '.join(SUFFIXES)}.")
    return readers[suffix](path)


def _suffix(name: str) -> str | None:
    return next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), None)


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a text file with their locations, ends of line included."""
    left = allowance(path.stat().st_size) if path.suffix.lower() == ".gz" else None
    with _open(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MOST_LINE_BYTES + 1), b""), start=1):
            location = f"{path}, line {number}"
            if len(line) > MOST_LINE_BYTES:
                raise RequestError(f"{location}: is longer than {MOST_LINE_BYTES // MIB} MiB. Expected a row a line.")
            if left is not None and (left := left - len(line)) < 0:
                raise unpacks_too_far(path)
            if b"\0" in line and not line.startswith(_UTF16):
                raise RequestError(f"{location}: holds a NUL byte. Expected text in UTF-8.")
            yield location, _utf8(line.removeprefix(BOM_UTF8) if number == 1 else line, location)


def _utf8(data: bytes, location: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if data.startswith(_UTF16):
            raise RequestError(f"{location}: is UTF-16. Save the file as UTF-8.") from error
        raise RequestError(
            f"{location}: not valid UTF-8 (byte {data[error.start]:#04x} at {error.start}). Save the file as UTF-8."
        ) from error


def _jsonl(path: Path) -> Iterator[_Located]:
    for location, line in _lines(path):
        if line.strip():
            row = _parsed(line, location)
            if isinstance(row, list):
                raise RequestError(f"{location}: expected an object, got a list. One list of objects is a .json file.")
            yield location, row


def _json(path: Path) -> Iterator[_Located]:
    text = _utf8(read_regular(path, most=MOST_JSON_BYTES).removeprefix(BOM_UTF8), str(path))
    if "\0" in text:
        raise RequestError(f"{path}: holds a NUL byte. Expected text in UTF-8.")
    if not text.strip():
        return
    rows = _parsed(text, str(path))
    if not isinstance(rows, list):
        raise RequestError(f"{path}: expected a list of objects. One object a line is a .jsonl file.")
    for index, row in enumerate(rows):
        yield f"{path}, row {index}", row


def _parsed(text: str, location: str) -> Any:
    try:
        return json_value(text)
    except JSONDecodeError as error:
        where = (
            f"character {error.colno}" if "\n" not in text.strip() else f"line {error.lineno}, character {error.colno}"
        )
        raise RequestError(f"{location}: not valid JSON: {error.msg} ({where}).") from error
    except ValueError as error:
        raise RequestError(f"{location}: not valid JSON: {error}.") from error


def _csv(path: Path) -> Iterator[_Located]:
    """Every cell is text, as it stands; an empty cell is a missing field."""
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    try:
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise RequestError(f"{path}: the header names a column twice: {', '.join(names)}.")
        first = reader.line_num + 1
        for cells in reader:
            location = f"{path}, line {first}"
            first = reader.line_num + 1
            if cells and len(cells) != len(names):
                raise RequestError(
                    f"{location}: expected {len(names)} cells as in the header, got {len(cells)}. "
                    "A cell with a comma or a line break needs quotes."
                )
            if cells:
                yield location, {name: cell for name, cell in zip(names, cells, strict=True) if cell}
    except csv.Error as error:
        raise RequestError(f"{path}, line {reader.line_num}: not valid CSV: {error}.") from error


def _folder(path: Path, split: str) -> Iterator[_Located]:
    if any((path / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
        return saved_rows(path, split)
    files = sorted(file for file in path.iterdir() if file.is_file() and _suffix(file.name))
    named = [file for file in files if file.name.lower().removesuffix(str(_suffix(file.name))) == split]
    if len(named) == 1 or len(files) == 1:
        return _file((named or files)[0])
    names = ", ".join(file.name for file in files) or "no such file"
    raise RequestError(
        f"The folder {path} must be a data set saved by `datasets`, or hold one data file ({', '.join(SUFFIXES)}) or "
        f"one named {split!r}. It holds {names}. Name a file."
    )


def _hub(source: str, split: str) -> Iterator[_Located]:
    match = _HUB_NAME.fullmatch(source)
    if match is None or source.startswith(".") or _suffix(source):
        raise RequestError(
            f"No such file or folder: {source}. Expected a file ({', '.join(SUFFIXES)}), a folder, or a data set "
            'on the hub: "owner/name", "owner/name:split" or "owner/name:config:split".'
        )
    import datasets

    name, config, split = match["name"], match["config"], match["split"] or split
    try:
        data = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise RequestError(
            f"No file or folder is named {source}, and the data set {name!r} (split {split!r}) cannot be loaded from "
            f"the hub: {error}. Check the name and the network, or give a local file."
        ) from error
    return undecoded(data, source)
