"""What is uploaded of a model's folder: files of known names and checked content, without this machine's paths."""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from safetensors import SafetensorError, safe_open

from promptkd.errors import RequestError
from promptkd.io.files import MIB, read_json_object, read_regular
from promptkd.io.redact import environment_secrets, redacted

_SETTINGS = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "adapter_config.json"),
)
_WEIGHTS = re.compile(r"(model|adapter_model)(-\d{5}-of-\d{5})?\.safetensors")
_INDEX = re.compile(r"(model|adapter_model)\.safetensors\.index\.json")
_JSON = ("tokenizer.json", "vocab.json")
_TEXT = re.compile(r"merges\.txt|vocab\.txt|chat_template\.jinja|additional_chat_templates/[\w.-]+\.jinja")
_SENTENCEPIECE = re.compile(r"tokenizer\.model|spiece\.model|sentencepiece\.bpe\.model")
_SOURCES = ("_name_or_path", "name_or_path", "tokenizer_name_or_path")  # where the files came from: no reader needs it
_BASE = "base_model_name_or_path"
_ABSOLUTE = re.compile(r"(?<![\w:/.<-])/[\w.@+-]+(?:/[\w.@+-]+)+")
_MOST_BYTES = 256 * MIB  # of a tokenizer's file
_PICKLES = (*(bytes([0x80, protocol]) for protocol in range(2, 6)), b"PK\x03\x04")


@dataclass
class Bundle:
    """Files by their names in the repository: from the disk as they are, or rewritten."""

    files: dict[str, Path | bytes] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    rewritten: list[str] = field(default_factory=list)
    """Sentences: in which file something was left out or replaced."""

    def size(self, name: str) -> int:
        content = self.files[name]
        return len(content) if isinstance(content, bytes) else content.stat().st_size

    @property
    def is_adapter(self) -> bool:
        return "adapter_config.json" in self.files


def collect(folder: Path, *, base: str | None, secrets: Iterable[str] = ()) -> Bundle:
    """The files of a model or adapter in `folder` that may be uploaded; all others are left out, and named.

    Args:
        base: the hub's name of the model that an adapter belongs to, which replaces the one in its configuration.
        secrets: what no file may hold, beside the secrets of the environment.

    Raises `RequestError` for weights that are missing or no safetensors, and for a file that is not what its name says
    or holds a secret.
    """
    bundle = Bundle()
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        name = path.relative_to(folder).as_posix()
        if name in _SETTINGS:
            bundle.files[name] = _settings(path, base, bundle.rewritten)
        elif _WEIGHTS.fullmatch(name):
            _check_weights(path)
            bundle.files[name] = path
        elif name in _JSON or _INDEX.fullmatch(name):
            read_json_object(path) if _INDEX.fullmatch(name) else _check_json(path)
            bundle.files[name] = path
        elif _TEXT.fullmatch(name) or _SENTENCEPIECE.fullmatch(name):
            _check_text(path, is_text=_TEXT.fullmatch(name) is not None)
            bundle.files[name] = path
        else:
            bundle.left_out.append(name)
    if not any(map(_WEIGHTS.fullmatch, bundle.files)):
        told = f"{folder} holds no weights as safetensors (model.safetensors or adapter_model.safetensors)"
        raise RequestError(f"{told}, and nothing else is uploaded. It holds {', '.join(bundle.left_out) or 'nothing'}.")
    refuse_leaks(bundle, secrets)
    return bundle


def refuse_leaks(bundle: Bundle, secrets: Iterable[str] = ()) -> None:
    """Raise `RequestError` if a file that is no weights holds one of `secrets` or of the environment's."""
    known = [each.encode() for each in (*secrets, *environment_secrets())]
    for name, content in bundle.files.items():
        if not _WEIGHTS.fullmatch(name):
            held = content if isinstance(content, bytes) else content.read_bytes()
            # addresses and tokens are known by their form, but a vocabulary may hold anything
            is_ours = isinstance(content, bytes) and redacted(content.decode()) != content.decode()
            if is_ours or any(secret in held for secret in known):
                raise RequestError(
                    f"{name} holds a token or key of this machine. Nothing was uploaded: remove it there."
                )


def places() -> list[str]:
    """Folders of this machine that a published text must not name: that of the user, and where the command runs."""
    return [str(each) for each in (Path.home(), Path.cwd()) if len(each.parts) > 1]


def names_a_place(text: str) -> bool:
    """Whether a text is an absolute path, or holds one that exists here or lies below one of the `places`."""
    is_path = re.fullmatch(r"(~?/|[A-Za-z]:[\\/])[^\n]*[\\/][^\n]*", text) is not None
    held = any(os.path.exists(path) for path in _ABSOLUTE.findall(text))
    return is_path or held or text in places() or any(f"{place}/" in text for place in places())


def holds_a_path(text: str) -> bool:
    """Whether a text names a place of this machine, or holds an absolute path of any: a run may come from another."""
    return names_a_place(text) or _ABSOLUTE.search(text) is not None


def without_folders(text: str) -> str:
    """A text with the last part of every absolute path in its place, as of a label that is a file's whole path."""
    return _ABSOLUTE.sub(lambda found: PurePath(found[0]).name, text)


def _settings(path: Path, base: str | None, rewritten: list[str]) -> bytes:
    """A JSON file of settings without paths and without where the model came from; of an adapter, with its `base`."""
    settings, removed = read_json_object(path), []

    def cleaned(value: Any, place: str) -> Any:
        if isinstance(value, dict):
            kept = {}
            for key, part in value.items():
                # a token's text, "content", may look as it likes; of the rest, what only this machine knows goes
                is_source = key in _SOURCES and isinstance(part, str)
                is_path = isinstance(part, str) and key != "content" and names_a_place(part)
                if key != _BASE and (is_source or is_path):
                    removed.append(f"{place}{key}")
                else:
                    kept[key] = cleaned(part, f"{place}{key}.")
            return kept
        return [cleaned(part, place) for part in value] if isinstance(value, list) else value

    found = cleaned(settings, "")
    if removed:
        rewritten.append(f"{path.name} is uploaded without {', '.join(removed)}.")
    if path.name == "adapter_config.json":
        if base is None:
            raise RequestError(f"Expected the hub's name of the model that the adapter in {path.parent} belongs to.")
        if found.get(_BASE) != base:
            rewritten.append(f"{path.name} names {base} as its base.")
            found[_BASE] = base
    return (json.dumps(found, indent=2, ensure_ascii=False) + "\n").encode()


def _check_weights(path: Path) -> None:
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise RequestError(f"{path} is no safetensors file: {error}. Nothing was uploaded.") from error
    if told := [key for key, value in metadata.items() if names_a_place(value)]:
        raise RequestError(f"The metadata of {path} ({', '.join(told)}) name a folder of this machine. Save it again.")


def _check_json(path: Path) -> None:
    try:
        json.loads(_regular(path))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not valid JSON: {error}. Nothing was uploaded.") from error


def _check_text(path: Path, *, is_text: bool) -> None:
    content = _regular(path)
    if content.startswith(_PICKLES):
        raise RequestError(f"{path} is a pickle or an archive by its content. Nothing was uploaded.")
    if is_text:
        try:
            content.decode()
        except UnicodeDecodeError as error:
            raise RequestError(f"{path} is not valid UTF-8. Nothing was uploaded.") from error


def _regular(path: Path) -> bytes:
    try:
        return read_regular(path, most=_MOST_BYTES)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}.") from error
