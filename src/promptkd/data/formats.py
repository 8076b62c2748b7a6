"""File formats: rows of JSONL, JSON, CSV, Parquet and data sets that `datasets` saved, each with its location.

Files are read within limits, lest a small one fill the memory: `MOST_LINE_BYTES`, `MOST_JSON_BYTES`, and
`_allowance` for a compressed one.
"""

import csv
import gzip
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import IO, Any, cast

from promptkd.errors import RequestError
from promptkd.io.files import MIB, is_plain_name, json_value, read_json_object, read_regular

MOST_LINE_BYTES = 16 * MIB
"""Of a line of JSONL or CSV."""
MOST_JSON_BYTES = 256 * MIB
"""Of a .json file, which is read at once; JSONL has no such limit."""

_UTF16 = (BOM_UTF16_LE, BOM_UTF16_BE)
_NUL = "holds a NUL byte. Expected text in UTF-8."

Located = tuple[str, Any]
"""The place of a row, and the row."""


def file_rows(path: Path) -> Iterator[Located]:
    """The rows of a file, by its suffix."""
    suffix = data_suffix(path.name)
    if suffix is None:
        raise RequestError(f"{path} must be a data file that ends in one of {', '.join(SUFFIXES)}.")
    return _READERS[suffix](path)


def data_suffix(name: str) -> str | None:
    return next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), None)


def _allowance(path: Path) -> int:
    """Most bytes that a compressed file may unpack to."""
    return 64 * MIB + 100 * path.stat().st_size


def _check_unpacked(path: Path, unpacked: int, allowed: int) -> None:
    if unpacked > allowed:
        raise RequestError(
            f"{path} unpacks to more than {allowed // MIB} MiB: 64 MiB and a hundred times its size are allowed. Write "
            "it as uncompressed JSONL if that is meant."
        )


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a text file, line ends included, each with its location."""
    packed, unpacked, allowed = path.suffix.lower() == ".gz", 0, _allowance(path)
    with cast(IO[bytes], gzip.open(path, "rb") if packed else path.open("rb")) as file:
        for number, line in enumerate(iter(lambda: file.readline(MOST_LINE_BYTES + 1), b""), start=1):
            location = f"{path}, line {number}"
            if len(line) > MOST_LINE_BYTES:
                raise RequestError(f"{location}: is longer than {MOST_LINE_BYTES // MIB} MiB. Expected a row per line.")
            if packed:
                unpacked += len(line)
                _check_unpacked(path, unpacked, allowed)
            if b"\0" in line and not line.startswith(_UTF16):
                raise RequestError(f"{location}: {_NUL}")
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


def _jsonl(path: Path) -> Iterator[Located]:
    for location, line in _lines(path):
        if line.strip():
            row = _parsed(line, location)
            if isinstance(row, list):
                raise RequestError(f"{location}: expected an object, got a list. One list of objects is a .json file.")
            yield location, row


def _json(path: Path) -> Iterator[Located]:
    text = _utf8(read_regular(path, most=MOST_JSON_BYTES).removeprefix(BOM_UTF8), str(path))
    if "\0" in text:
        raise RequestError(f"{path}: {_NUL}")
    if not text.strip():
        return
    rows = _parsed(text, str(path))
    if not isinstance(rows, list):
        raise RequestError(f"{path}: expected a list of objects. One object per line is a .jsonl file.")
    for index, row in enumerate(rows):
        yield f"{path}, row {index}", row


def _parsed(text: str, location: str) -> Any:
    try:
        return json_value(text)
    except JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        reason = f"{error.msg} ({line}character {error.colno})"
        raise RequestError(f"{location}: not valid JSON: {reason}.") from error
    except ValueError as error:
        raise RequestError(f"{location}: not valid JSON: {error}.") from error


def _csv(path: Path) -> Iterator[Located]:
    """Every cell is text, as it is; an empty cell is a missing field."""
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


def _parquet(path: Path) -> Iterator[Located]:
    import pyarrow
    import pyarrow.parquet

    index, unpacked, allowed = 0, 0, _allowance(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            groups = range(file.metadata.num_row_groups)
            _check_unpacked(path, sum(file.metadata.row_group(group).total_byte_size for group in groups), allowed)
            for batch in file.iter_batches(batch_size=1024):
                unpacked += batch.nbytes
                _check_unpacked(path, unpacked, allowed)
                for row in batch.to_pylist():
                    yield f"{path}, row {index}", row
                    index += 1
    except RequestError:
        raise
    except (pyarrow.ArrowException, ValueError, OverflowError, OSError) as error:
        raise RequestError(f"{path} is not a readable Parquet file (after {index} rows): {error}.") from error


_READERS: dict[str, Callable[[Path], Iterator[Located]]] = {
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
}
SUFFIXES = tuple(_READERS)


def is_saved_dataset(path: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote the folder."""
    return any((path / marker).is_file() for marker in ("dataset_dict.json", "state.json"))


def saved_rows(path: Path, split: str) -> Iterator[Located]:
    """The rows of a folder that `datasets.save_to_disk` wrote."""
    import datasets

    _check_inside(path)
    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, datasets.exceptions.DatasetsError) as error:
        raise RequestError(f"The data set saved in {path} cannot be read: {error}") from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise RequestError(f"The data set saved in {path} has no split {split!r}. It has: {', '.join(data)}.")
        data = data[split]
    return undecoded_rows(data, str(path))


def _check_inside(path: Path) -> None:
    """Refuse a saved data set with parts outside of its folder."""
    folders = [path]
    if (path / "dataset_dict.json").is_file():
        splits = read_json_object(path / "dataset_dict.json").get("splits")
        if not isinstance(splits, list) or not all(map(is_plain_name, splits)):
            raise RequestError(f"{path / 'dataset_dict.json'} must list splits by name. Got {splits!r:.200}.")
        folders = [path / split for split in splits]
    for folder in folders:
        files = read_json_object(folder / "state.json").get("_data_files")
        names = [each.get("filename") if isinstance(each, dict) else each for each in files or ()]
        if not isinstance(files, list) or not all(map(is_plain_name, names)):
            raise RequestError(f"{folder / 'state.json'} must list files of its own folder. Got {names!r:.200}.")


def undecoded_rows(data: Any, name: str) -> Iterator[Located]:
    """Rows of a `datasets.Dataset` as stored: decoding images or sound would open any path or address that a row
    holds."""
    import pyarrow

    index = 0
    try:
        for table in data.with_format("arrow").iter(1024):
            for row in table.to_pylist():
                yield f"{name}, row {index}", row
                index += 1
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise RequestError(f"The data set {name} cannot be read (after {index} rows): {error}.") from error
