"""Labels of models and data, and what a record says of where they come from."""

from collections.abc import Sequence
from pathlib import Path

from promptkd.cli.terminal import say
from promptkd.data.encode import EncodedData
from promptkd.data.sources import SUFFIXES
from promptkd.results import DataRecord, Results, Training, file_sha256


def data_record(path: str, rows: int, dropped: int) -> DataRecord:
    """Provenance of a data set: hash of the file, or of nothing for a hub name."""
    file = Path(path)
    return DataRecord(path=path, rows=rows, dropped=dropped, sha256=file_sha256(file) if file.is_file() else "")


def say_rows(path: str, data: EncodedData) -> None:
    dropped = f"; {data.dropped} over a length limit were dropped" if data.dropped else ""
    say(f"{path}: {len(data.examples)} rows{dropped}.")


def label_of(path: str, among: Sequence[str] = ()) -> str:
    """A short name: the last part of the path without its suffix, or the whole path where that would be ambiguous."""
    name = Path(path).name
    suffix = next((each for each in (*SUFFIXES, ".gguf") if name.lower().endswith(each)), "")  # not Qwen2.5's
    short = name[: len(name) - len(suffix)] or path
    return path if any(each != path and label_of(each) == short for each in among) else short


def training_cost(model: str) -> Training | None:
    """What the training of `model` cost, if it is a run's folder whose record says so."""
    folder = Path(model).expanduser()
    if not (folder / "config.yaml").is_file() or not (folder / "results.json").is_file():
        return None
    known = Results.read(folder / "results.json").training
    return next(iter(known.values())) if len(known) == 1 else known.get(label_of(model))
