"""The files that stay as they were when a study began: Python of its own methods and metrics, and its runs' data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from promptkd.cli.options.study import Options
from promptkd.cli.outputs import took_no_step
from promptkd.cli.parsing.config_file import read_config
from promptkd.cli.study_measurements import record_at
from promptkd.cli.terminal import say
from promptkd.errors import RequestError
from promptkd.io.python_file import names_python, python_file
from promptkd.results import file_sha256
from promptkd.study.plan import Planned


def hashes_of_files(options: Options, planned: Sequence[Planned]) -> dict[str, str]:
    """SHA-256 of those files by their paths, for the study's config.yaml.

    Raises `RequestError` if one has changed since the study began and something that was made with it is there.
    """
    users = _users(options, planned)
    now = {file: file_sha256(Path(file)) for file in users if Path(file).is_file()}  # a missing one is told by its run
    kept = _kept(options.out, planned)
    for file in now:
        made = [folder for folder in users[file] if _is_made(folder)]
        if kept.get(file) not in (None, now[file]):
            told = f"{file} has changed since this study began"
        elif made := [folder for folder in made if _is_of_another(folder, file, now[file])]:
            told = f"{file} is another than that of some finished runs"  # which were copied here
        else:
            continue
        if made:
            more = f" and {len(made) - 3} more" if len(made) > 3 else ""
            advice = f"give another --out, or delete what was made with the file: {', '.join(map(str, made[:3]))}{more}"
            raise RequestError(f"{told}. Put it back, {advice}.")
        say(f"{told}. Nothing has been made with it yet: its runs take it as it is now.")
    return now


def file_of(method: object) -> str | None:
    """The file of a method or metric of one's own; None for any other."""
    return str(python_file(method)) if isinstance(method, str) and names_python(method) else None


def _users(options: Options, planned: Sequence[Planned]) -> dict[str, list[Path]]:
    """By file, the folders of what is made with it."""
    users: dict[str, list[Path]] = {}
    for each in planned:
        if file := file_of(each.settings.get("method")):
            users.setdefault(file, []).append(options.out / each.name)
        for source in (each.settings.get("data"), each.settings.get("eval_data")):
            if isinstance(source, str):  # no hash of a folder, or of the hub's
                users.setdefault(source, []).append(options.out / each.name)
    metrics = options.evaluate.get("metrics", [])
    for metric in metrics if isinstance(metrics, list) else [metrics]:
        if file := file_of(metric):
            users.setdefault(file, []).append(options.out / "evaluations")
    return users


def _kept(out: Path, planned: Sequence[Planned]) -> dict[str, Any]:
    """What the study kept at its start, or its first run where it is of a version that kept nothing."""
    kept: dict[str, Any] = {}
    for each in planned:
        folder, file = out / each.name, file_of(each.settings.get("method"))
        if file and _is_made(folder) and (folder / "config.yaml").is_file():
            kept.setdefault(file, read_config(folder / "config.yaml").get("method_sha256"))
        if (record := record_at(folder / "results.json")) is not None:
            for data in record.data.values():
                kept.setdefault(data.path, data.sha256 or None)
    config = out / "config.yaml"
    return kept | (read_config(config).get("file_sha256", {}) if config.is_file() else {})


def _is_of_another(folder: Path, file: str, sha256: str) -> bool:
    """Whether a finished run's own record names another version of a file of data."""
    record = record_at(folder / "results.json")
    return record is not None and any(
        each.path == file and each.sha256 not in ("", sha256) for each in record.data.values()
    )


def _is_made(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir()) and not took_no_step(folder)
