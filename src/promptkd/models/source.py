"""What a model's name stands for: a folder or a hub name, and the adapters of PEFT that are merged into it."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers.utils import find_adapter_config_file

from promptkd.errors import RequestError, at
from promptkd.io.files import not_regular, read_json_object
from promptkd.models.folder import ADAPTER_CONFIG, adapter_base, check_model_folder, clear_load_errors, similar_here
from promptkd.models.gguf_format import converted_gguf

BASE_NOTE = "base_model.json"  # beside an adapter: where its base lies as seen from it, so that both may be moved
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_EXPECTED = "Expected a model folder, a GGUF file or a hub name."
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "tekken.json")
_OF_ADAPTERS = (ADAPTER_CONFIG, "adapter_model.safetensors", BASE_NOTE, "generation_config.json")
_DOWNLOADED = [*_OF_ADAPTERS, *_VOCABULARIES, "tokenizer*", "*tokens*.json", "merges.txt", "chat_template*"]


@dataclass(frozen=True)
class Adapter:
    name: str  # a hub name or an absolute folder
    folder: Path

    @property
    def has_tokenizer(self) -> bool:
        return any(each.is_file() for pattern in _VOCABULARIES for each in self.folder.glob(pattern))

    @property
    def config(self) -> dict[str, Any]:
        return read_json_object(self.folder / ADAPTER_CONFIG)


@dataclass(frozen=True)
class Source:
    """A whole model and the adapters on it, in the order in which they are merged: none for a plain model."""

    base: str  # a folder or a hub name
    revision: str | None = None  # of a hub name
    adapters: tuple[Adapter, ...] = ()

    @property
    def tokenizer(self) -> tuple[str, str | None]:
        """Where the tokenizer lies, and the revision there: with the last adapter that has one, else with the base."""
        own = [each.folder for each in self.adapters if each.has_tokenizer]
        return (str(own[-1]), None) if own else (self.base, self.revision)


def resolve_model(name: str | Path) -> str:
    """Where its files are: a folder (converted from GGUF if necessary) or a hub name, else `RequestError`."""
    place = _place(name)
    _source(place, None, ask_hub=False)  # an adapter that lacks its base is refused here
    return place


def _place(name: str | Path) -> str:
    text, path = str(name), Path(name).expanduser()
    is_gguf = path.suffix.lower() == ".gguf"
    try:
        is_folder = path.is_dir()
    except OSError as error:  # a name that is too long, or a folder that may not be entered
        raise RequestError(f"No such model: {text:.200}: {error.strerror}.") from error
    if is_folder:
        return str(_model_folder(path))
    if path.is_file():
        if is_gguf:
            return str(converted_gguf(path))
        raise RequestError(f"{_EXPECTED} Got the file {path}.")
    if kind := not_regular(path):
        raise RequestError(f"{_EXPECTED} {path} is {kind}.")
    if text.startswith((".", "/", "~")) or is_gguf or not _HUB_NAME.fullmatch(text):
        listed = f" (similar: {', '.join(similar)})" if (similar := similar_here(path)) else ""
        advice = "Give a folder, a GGUF file or a hub name (owner/name)."
        raise RequestError(f"No such model: {text} does not exist{listed}. {advice}")
    return text


def model_source(name: str | Path, revision: str | None = None) -> Source:
    """The whole model that `name` comes down to, and the adapters on it; of the hub, adapters alone are downloaded.

    `RequestError` for a missing base, adapters that belong to each other, and an adapter that is a soft prompt.
    """
    return _source(_place(name), revision)


def absolute_name(name: str) -> str:
    """A model's name as it is found from any working directory: an absolute folder, or the hub name that it is."""
    place = Path(name).expanduser()
    return os.path.abspath(place) if name and place.exists() else name


def _source(place: str, revision: str | None, seen: Sequence[str] = (), *, ask_hub: bool = True) -> Source:
    """The source of a place that `resolve_model` found; `seen` are the adapters that led to it."""
    folder, name = Path(place), absolute_name(place)
    is_local = folder.is_dir()
    if not is_local:
        found = _downloaded_adapter(place, revision) if ask_hub else None
        if found is None:
            return Source(place, revision)
        folder = found
    named = adapter_base(folder)
    if named is None:
        return Source(place)
    if name in seen:
        raise RequestError(f"The adapters in {' and '.join(seen)} belong to each other, and to no model.")
    adapter = Adapter(name, folder)
    if _is_soft_prompt(adapter.config):
        problem = f"{folder} is a soft prompt, which is no part of a model's weights"
        raise RequestError(f"{problem}. Give the model that it belongs to: {named}.")
    if any(folder.glob("model*.safetensors")):
        problem = f"{folder} holds a whole model and an adapter, and does not say whether they are merged"
        raise RequestError(f"{problem}. Move the files of one of them to another folder.")
    with at(f"The adapter in {folder} belongs to the model {named}"):
        base_revision = adapter.config.get("revision") or (revision if is_local else None)
        base = _source(_base_place(folder, named), base_revision, (*seen, name), ask_hub=ask_hub)
    return Source(base.base, base.revision, (*base.adapters, adapter))


def _base_place(folder: Path, named: str) -> str:
    """Where the model lies that the adapter in `folder` names as its base.

    A relative name is one of the working directory, as for PEFT, or of a folder above the adapter. Where an absolute
    one is gone, `base_model.json` tells where it lay as seen from the adapter.
    """
    path = Path(named).expanduser()
    if path.is_absolute():
        if not path.exists() and (moved := _as_seen_from(folder)) is not None:
            return _place(moved)
        return _place(path)
    beside = [above / path for above in (folder.absolute(), *folder.absolute().parents)]
    candidates = [Path.cwd() / path, next((each for each in beside if _is_model(each)), None)]
    found = list(dict.fromkeys(os.path.realpath(each) for each in candidates if each is not None and _is_model(each)))
    if len(found) > 1:
        advice = "Write the one that is meant as an absolute path into adapter_config.json"
        raise RequestError(f"that may be {found[0]} or {found[1]}. {advice}.")
    return _place(found[0] if found else named)


def _is_model(place: Path) -> bool:
    inside = (place / each for each in ("", "student", "model"))
    return any((each / name).is_file() for each in inside for name in ("config.json", ADAPTER_CONFIG))


def _as_seen_from(folder: Path) -> Path | None:
    note = folder / BASE_NOTE
    seen = read_json_object(note).get("relative_path") if note.is_file() else None
    place = Path(os.path.normpath(folder.absolute() / seen)) if isinstance(seen, str) else None
    return place if place is not None and place.exists() else None


def _is_soft_prompt(config: dict[str, Any]) -> bool:
    return config.get("num_virtual_tokens") is not None or config.get("peft_type") == "ADAPTION_PROMPT"


def _downloaded_adapter(name: str, revision: str | None) -> Path | None:
    """The folder of the hub's adapter of this name; None if the hub has a whole model there, or cannot be asked."""
    with clear_load_errors(name):
        if find_adapter_config_file(name, revision=revision) is None:
            return None
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=_DOWNLOADED))
    check_model_folder(folder)
    return folder


def _model_folder(folder: Path) -> Path:
    for inside in ("", "student", "model"):  # the latter two are what `distill` and `sft` leave in a run's folder
        candidate = folder / inside
        if (candidate / "config.json").is_file() or (candidate / ADAPTER_CONFIG).is_file():
            check_model_folder(candidate)
            return candidate
    found = sorted(entry.name for entry in folder.iterdir())
    expected = "config.json (or adapter_config.json) in it, or a run's student/ folder"
    raise RequestError(f"{folder} is no model: expected {expected}. It holds {', '.join(found[:8]) or 'nothing'}.")
