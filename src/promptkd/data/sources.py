"""Where rows come from: a file, a folder, or a data set on the hub.

The rule for a name, in this order:
1. A path that exists is read: a file by its suffix (.jsonl, .jsonl.gz, .json, .parquet, .csv); a folder that
   `datasets.save_to_disk` wrote; any other folder if it holds one such file, or one named after the split.
2. What looks like a path (begins with ".", "/" or "~", or ends in one of the suffixes) and does not exist is an error.
3. "owner/name" is a data set on the hub; "owner/name:split" picks its split, "owner/name:config:split" also its
   configuration.
"""

import gzip
import re
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from promptkd.data.formats import (
    SUFFIXES,
    Located,
    data_suffix,
    file_rows,
    is_saved_dataset,
    saved_rows,
    undecoded_rows,
)
from promptkd.data.rows import Example, example_from_row
from promptkd.errors import RequestError
from promptkd.io.files import not_regular

_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[^:/]+)(?=:))?(:(?P<split>[^:/]+))?")


def read_examples(source: str | Path, *, split: str = "train", limit: int | None = None) -> list[Example]:
    """Read the rows of `source`: a file, a folder or a hub name, by the rule at the top of this file.

    Args:
        split: which split of a folder or a hub data set, where the name itself does not say.
        limit: read only so many rows, the first ones.

    Raises:
        RequestError: if there is no such source, it cannot be read, it is empty, or a row is wrong; with the line or
            the row.
    """
    located = read_objects(source, split=split, limit=limit)
    return [example_from_row(row, location=location, row=index) for index, (location, row) in enumerate(located)]


def read_objects(source: str | Path, *, split: str = "train", limit: int | None = None) -> list[Located]:
    """The rows of `source` in any form, each with its location. Arguments and errors as for `read_examples`."""
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
        return _folder(path, split)
    if path.is_file():
        return file_rows(path)
    if source and (kind := not_regular(path)):
        raise RequestError(f"{source} is {kind}. Expected a regular file, for data are read more than once.")
    return _hub(source, split)


def _folder(path: Path, split: str) -> Iterator[Located]:
    if is_saved_dataset(path):
        return saved_rows(path, split)
    files = sorted(file for file in path.iterdir() if file.is_file() and data_suffix(file.name))
    named = [file for file in files if file.name.lower().removesuffix(str(data_suffix(file.name))) == split]
    if len(named) == 1 or len(files) == 1:
        return file_rows((named or files)[0])
    names = ", ".join(file.name for file in files) or "no such file"
    raise RequestError(
        f"The folder {path} must be a data set saved by `datasets`, or hold one data file ({', '.join(SUFFIXES)}) or "
        f"one named {split!r}. It holds {names}. Name a file."
    )


def _hub(source: str, split: str) -> Iterator[Located]:
    match = _HUB_NAME.fullmatch(source)
    if match is None or source.startswith(".") or data_suffix(source):
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
    return undecoded_rows(data, source)
