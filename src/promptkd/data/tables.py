"""Rows from Parquet files and from what `datasets` saved or downloaded, with their locations."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from promptkd.errors import RequestError
from promptkd.io.files import MIB, is_plain_name, read_json_object

__all__ = ["allowance", "parquet_rows", "saved_rows", "undecoded", "unpacks_too_far"]

Located = tuple[str, Any]
"""Where a row stands, and the row."""


def allowance(compressed: int) -> int:
    """Most bytes that a compressed file of so many bytes may unpack to: 64 MiB and a hundred times its size."""
    return 64 * MIB + 100 * compressed


def unpacks_too_far(path: Path) -> RequestError:
    """What to say of a file that exceeds its `allowance`."""
    return RequestError(
        f"{path} unpacks to more than {allowance(path.stat().st_size) // MIB} MiB: 64 MiB and a hundred times its size "
        "are allowed. Write it as uncompressed JSONL if that is meant."
    )


def parquet_rows(path: Path) -> Iterator[Located]:
    """The rows of a Parquet file with their locations."""
    import pyarrow
    import pyarrow.parquet

    index, left = 0, allowance(path.stat().st_size)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            groups = range(file.metadata.num_row_groups)
            if sum(file.metadata.row_group(group).total_byte_size for group in groups) > left:
                raise unpacks_too_far(path)
            for batch in file.iter_batches(batch_size=1024):
                if (left := left - batch.nbytes) < 0:
                    raise unpacks_too_far(path)
                for row in batch.to_pylist():
                    yield f"{path}, row {index}", row
                    index += 1
    except RequestError:
        raise
    except (pyarrow.ArrowException, ValueError, OverflowError, OSError) as error:
        raise RequestError(f"{path} is not a readable Parquet file (after {index} rows): {error}.") from error


def saved_rows(path: Path, split: str) -> Iterator[Located]:
    """The rows of a folder that `datasets` saved."""
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
    return undecoded(data, str(path))


def _check_inside(path: Path) -> None:
    """Refuse a saved data set whose parts are elsewhere than in its folder."""
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


def undecoded(data: Any, name: str) -> Iterator[Located]:
    """Rows as they are stored: no image or sound is decoded, which would open whatever path or address a row holds."""
    import pyarrow

    index = 0
    try:
        for table in data.with_format("arrow").iter(1024):
            for row in table.to_pylist():
                yield f"{name}, row {index}", row
                index += 1
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise RequestError(f"The data set {name} cannot be read (after {index} rows): {error}.") from error
