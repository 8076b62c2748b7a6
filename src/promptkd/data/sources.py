"""Where rows come from: a file, a folder, or a data set on the hub.

The rule for a name, in this order:
1. A path that exists is read: a file by its suffix (.jsonl, .jsonl.gz, .json, .parquet, .csv); a folder that
   `datasets.save_to_disk` wrote; any other folder if it holds one such file, or one named after the split.
2. What looks like a path (begins with ".", "/" or "~", or ends in one of the suffixes) and does not exist is an error.
3. "owner/name" is a data set on the hub; "owner/name:split" picks its split, "owner/name:config:split" also its
   configuration.
"""

import csv
import gzip
import re
import zlib
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from json import JSONDecodeError
from pathlib import Path
from typing import IO, Any, cast

from promptkd.data.cells import Cell
from promptkd.data.messages import without_nulls
from promptkd.data.rows import Example, examples_from_objects
from promptkd.errors import RequestError, at
from promptkd.io.files import MIB, is_plain_name, json_value, not_regular, read_json_object, read_regular

_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[^:/]+)(?=:))?(:(?P<split>[^:/]+))?")
_MOST_LINE_MIB = 16  # of JSONL or CSV, lest a small file fill the memory
_MOST_JSON_BYTES = 256 * MIB  # of a .json file, which is read at once; JSONL has no such limit

Located = tuple[str, Any]  # the place of a row, and the row


def read_examples(
    source: str | Path,
    *,
    split: str = "train",
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[Example]:
    """The first `limit` rows of `source`: a file, a folder or a hub name, by the rule at the top of this file.

    `split` is that of a folder or a hub data set whose name does not say; `columns` maps names of columns to those that
    a form of row knows. `RequestError`, with the line or the row, if `source` cannot be read or is empty, or a row is
    wrong.
    """
    return examples_from_objects(read_objects(source, split=split, limit=limit), columns, str(source))


def read_objects(source: str | Path, *, split: str = "train", limit: int | None = None) -> list[Located]:
    """As `read_examples`, but the rows in any form, each with its location."""
    if limit is not None and limit < 1:
        raise RequestError(f"The number of rows to read must be at least 1. Got {limit}.")
    try:
        rows = list(islice(_located_rows(str(source), split), limit))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RequestError(f"{source} is not a complete gzip file: {error}. Compress it again.") from error
    except OSError as error:
        raise RequestError(f"{source} cannot be read: {error.strerror or error}.") from error
    if not rows:
        raise RequestError(f"{source} holds no rows. Expected at least one.")
    return rows


def _located_rows(source: str, split: str) -> Iterator[Located]:
    path = Path(source).expanduser()
    if source and path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _dataset_rows(_saved(path, split), str(path))
        files = sorted(file for file in path.iterdir() if file.is_file() and _suffix(file.name))
        named = [file for file in files if file.name.lower().removesuffix(_suffix(file.name)) == split]
        if len(named) != 1 and len(files) != 1:
            expected = f"or hold one data file ({', '.join(SUFFIXES)}) or one named {split!r}"
            names = ", ".join(file.name for file in files) or "no such file"
            problem = f"The folder {path} must be a data set saved by `datasets`, {expected}"
            raise RequestError(f"{problem}. It holds {names}. Name a file.")
        path = (named or files)[0]
    if path.is_file():
        if suffix := _suffix(path.name):
            return _READERS[suffix](path)
        raise RequestError(f"{path} must be a data file that ends in one of {', '.join(SUFFIXES)}.")
    if source and (kind := not_regular(path)):
        raise RequestError(f"{source} is {kind}. Expected a regular file, for data are read more than once.")
    return _dataset_rows(_hub(source, split), source)


def _suffix(name: str) -> str:
    return next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")


def _saved(path: Path, split: str) -> Any:
    """The data set that `datasets` saved in `path`; refused if it has parts outside of that folder."""
    import datasets

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
    broken = (OSError, ValueError, KeyError, TypeError, AttributeError, datasets.exceptions.DatasetsError)
    with at(f"The data set saved in {path} cannot be read", broken):
        data = datasets.load_from_disk(str(path))
    if not isinstance(data, datasets.DatasetDict):
        return data
    if split not in data:
        raise RequestError(f"The data set saved in {path} has no split {split!r}. It has: {', '.join(data)}.")
    return data[split]


def _hub(source: str, split: str) -> Any:
    match = _HUB_NAME.fullmatch(source)
    if match is None or source.startswith(".") or _suffix(source):
        names = '"owner/name", "owner/name:split" or "owner/name:config:split"'
        expected = f"a file ({', '.join(SUFFIXES)}), a folder, or a data set on the hub: {names}"
        raise RequestError(f"No such file or folder: {source}. Expected {expected}.")
    import datasets

    name, config, split = match["name"], match["config"], match["split"] or split
    try:
        return datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        problem = f"the data set {name!r} (split {split!r}) cannot be loaded from the hub: {error}"
        advice = "Check the name and the network, or give a local file."
        raise RequestError(f"No file or folder is named {source}, and {problem}. {advice}") from error


def _dataset_rows(data: Any, name: str) -> Iterator[Located]:
    """Rows of a `datasets.Dataset` as stored: decoding images or sound would open any path that a row holds."""
    return _arrow_rows(data.with_format("arrow").iter(1024), name, f"The data set {name} cannot be read")


def _parquet(path: Path) -> Iterator[Located]:
    from pyarrow.parquet import ParquetFile

    def batches() -> Iterator[Any]:
        unpacked = 0
        with ParquetFile(path) as file:
            groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
            _check_unpacked(path, sum(group.total_byte_size for group in groups))
            for batch in file.iter_batches(batch_size=1024):
                unpacked += batch.nbytes
                _check_unpacked(path, unpacked)
                yield batch

    return _arrow_rows(batches(), str(path), f"{path} is not a readable Parquet file")


def _arrow_rows(batches: Iterable[Any], name: str, problem: str) -> Iterator[Located]:
    from pyarrow import ArrowException

    index = -1
    try:
        for index, row in enumerate(row for batch in batches for row in batch.to_pylist()):
            yield f"{name}, row {index}", without_nulls(row)  # each struct has the fields of all others
    except RequestError:
        raise
    except (ArrowException, ValueError, OverflowError, OSError) as error:
        raise RequestError(f"{problem} (after {index + 1} rows): {error}.") from error


def _check_unpacked(path: Path, unpacked: int) -> None:
    if unpacked > 64 * MIB and unpacked > (allowed := 64 * MIB + 100 * path.stat().st_size):
        limit = f"{allowed // MIB} MiB: 64 MiB and a hundred times its size are allowed"
        raise RequestError(f"{path} unpacks to more than {limit}. Write it as uncompressed JSONL if that is meant.")


def _lines(path: Path) -> Iterator[Located]:
    packed, unpacked = path.suffix.lower() == ".gz", 0
    with cast(IO[bytes], gzip.open(path, "rb") if packed else path.open("rb")) as file:
        for number, line in enumerate(iter(lambda: file.readline(_MOST_LINE_MIB * MIB + 1), b""), start=1):
            location = f"{path}, line {number}"
            unpacked += len(line)
            if len(line) > _MOST_LINE_MIB * MIB:
                raise RequestError(f"{location}: is longer than {_MOST_LINE_MIB} MiB. Expected a row per line.")
            if packed:
                _check_unpacked(path, unpacked)
            yield location, _decoded(line.removeprefix(BOM_UTF8) if number == 1 else line, location)


def _decoded(data: bytes, location: str) -> str:
    if data.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        raise RequestError(f"{location}: is UTF-16. Save the file as UTF-8.")
    if b"\0" in data:
        raise RequestError(f"{location}: holds a NUL byte. Expected text in UTF-8.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte {data[error.start]:#04x} at {error.start}"
        raise RequestError(f"{location}: not valid UTF-8 ({where}). Save the file as UTF-8.") from error


def _jsonl(path: Path) -> Iterator[Located]:
    for location, line in _lines(path):
        if line.strip():
            row = _parsed(line, location)
            if isinstance(row, list):
                raise RequestError(f"{location}: expected an object, got a list. One list of objects is a .json file.")
            yield location, row


def _json(path: Path) -> Iterator[Located]:
    text = _decoded(read_regular(path, most=_MOST_JSON_BYTES).removeprefix(BOM_UTF8), str(path))
    rows = _parsed(text, str(path)) if text.strip() else []
    if not isinstance(rows, list):
        raise RequestError(f"{path}: expected a list of objects. One object per line is a .jsonl file.")
    return ((f"{path}, row {index}", row) for index, row in enumerate(rows))


def _parsed(text: str, location: str) -> Any:
    try:
        return json_value(text)
    except ValueError as error:
        reason = str(error)
        if isinstance(error, JSONDecodeError):
            line = f"line {error.lineno}, " if "\n" in text.strip() else ""
            reason = f"{error.msg} ({line}character {error.colno})"
        raise RequestError(f"{location}: not valid JSON: {reason}.") from error


def _csv(path: Path) -> Iterator[Located]:
    """Cells are text, of which cells.py reads some as JSON; an empty one is a missing field."""
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    try:
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise RequestError(f"{path}: the header names a column twice: {', '.join(names)}.")
        first = reader.line_num + 1
        for cells in reader:
            location, first = f"{path}, line {first}", reader.line_num + 1
            if len(cells) not in (0, len(names)):
                problem = f"expected {len(names)} cells as in the header, got {len(cells)}"
                raise RequestError(f"{location}: {problem}. A cell with a comma or a line break needs quotes.")
            if cells:
                yield location, {name: Cell(cell) for name, cell in zip(names, cells, strict=True) if cell}
    except csv.Error as error:
        raise RequestError(f"{path}, line {reader.line_num}: not valid CSV: {error}.") from error


_READERS = {".jsonl": _jsonl, ".jsonl.gz": _jsonl, ".json": _json, ".parquet": _parquet, ".csv": _csv}
SUFFIXES = tuple(_READERS)
