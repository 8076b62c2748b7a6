"""Which model of the hub a local one was made from, by the records of the runs that made it."""

import re
from pathlib import Path

from promptkd.errors import RequestError
from promptkd.results import Results

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FROM = {"prune": "model", "sft": "model", "distill": "student"}  # by the command, the setting that names its start
_OF_TEACHER = ("teacher_lora", "teacher")  # folders in a run of distill
_LONGEST_CHAIN = 8


def is_local(name: str) -> bool:
    """Whether a model or data set of this name is, or was when it was given, a path of this machine."""
    path = Path(name).expanduser()
    if name.startswith((".", "/", "~", "\\")) or path.is_absolute() or path.exists():
        return True
    return len(path.parts) > 1 and path.parent.is_dir()  # runs/gone, beside other runs


def hub_origin(name: str) -> str | None:
    """The hub's name of the model that `name` is or was made from; None where that is not known."""
    for _ in range(_LONGEST_CHAIN):
        if not is_local(name):
            return name if _HUB_NAME.fullmatch(name) else None
        folder = Path(name).expanduser()
        record = record_of(folder)
        setting = _FROM.get(record.kind, "") if record is not None else ""
        if setting == "student" and folder.name in _OF_TEACHER and not (folder / "results.json").is_file():
            setting = "teacher"
        source = None if record is None else record.config.get(setting)
        if not isinstance(source, str):
            return None
        name = source
    return None


def record_of(folder: Path) -> Results | None:
    """The record in a run's or model's folder, or in that of the run whose model it is; None if there is none."""
    for place in (folder, folder.parent):
        file = place / "results.json"
        if file.is_file():
            try:
                return Results.read(file)
            except RequestError:
                return None
    return None
