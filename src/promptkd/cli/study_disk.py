"""What a study's finished runs take on the disk, and `keep_models: false`, which deletes it once all is measured."""

from collections.abc import Sequence
from pathlib import Path

from promptkd.io.atomic import remove
from promptkd.study.plan import Planned

# of a run's folder; a soft prompt is small and stays, and so do records, logs, responses and pages
_MODELS = ("checkpoints", "teacher", "teacher_lora", "online_module", "student")


def models_in(folder: Path) -> list[Path]:
    """The weights and checkpoints in a run's folder."""
    return [place for name in _MODELS if (place := folder / name).is_dir()]


def size_of(places: Sequence[Path]) -> int:
    """Bytes of all files below."""
    return sum(file.lstat().st_size for place in places for file in place.rglob("*") if not file.is_dir())


def delete_models(folder: Path) -> str:
    """Delete a run's weights and checkpoints; returns a sentence on what was deleted, "" if there was nothing."""
    held = models_in(folder)
    if not held:
        return ""
    size = size_of(held)
    try:
        for place in held:
            remove(place)
    except OSError as error:
        return f"{folder.name}: its models could not be deleted: {error.strerror or error}."
    names = ", ".join(place.name for place in held)
    return f"{folder.name}: deleted {names} ({size / 1e9:.2f} GB), as keep_models is false; its records stay."


def models_needed_in(out: Path, planned: Sequence[Planned], more: Sequence[object] = ()) -> list[str]:
    """What is wrong with deleting models in `out`: those that runs start or learn from; `more` are read besides."""
    used = [run.settings.get(role) for run in planned for role in ("student", "teacher")]
    texts = {each for given in [*used, *more] for each in (given if isinstance(given, list) else [given])}
    found = []
    for text in sorted(each for each in texts if isinstance(each, str)):
        if Path(text.rpartition("=")[2]).expanduser().resolve().is_relative_to(out.resolve()):
            told = f"keep_models: false deletes the models in {out}, and {text} is one that runs need"
            found.append(f"{told}. Move it elsewhere, or keep the models.")
    return found
