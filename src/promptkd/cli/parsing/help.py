"""The text of `promptkd --help` and of a command's `--help` and `--help-all`.

One flag a line, with what it does in sentences below it: narrow terminals and screen readers take it as it stands.
"""

import inspect
import json
import textwrap
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from promptkd.cli.parsing.annotations import MOST_CHOICES_SHOWN, choices, metavar, takes_switch, takes_values
from promptkd.cli.parsing.fields import Field, common_fields, own_fields, positional, training_fields
from promptkd.cli.parsing.values import plain

__all__ = ["command_help", "overview"]

_WIDTH = 100

_EVERY_COMMAND = (
    ("--config FILE.yaml", "Take values from a YAML file, its keys spelled as the flags. Flags win over the file."),
    ("--debug", "Show the traceback if the command fails."),
    ("--help", "Show the flags in common use."),
    ("--help-all", "Show every flag."),
)


def overview(commands: Mapping[str, str]) -> str:
    """What `promptkd --help` prints."""
    lines = [
        "promptkd compresses generative language models: it distils a large one into a small one.",
        "",
        "Usage: promptkd COMMAND [flags]",
        "",
        "Commands",
    ]
    width = max(map(len, commands)) + 2
    lines += [f"  {name:<{width}}{summary}" for name, summary in commands.items()]
    lines += [
        "",
        "promptkd COMMAND --help explains a command's flags; promptkd --version prints the version.",
        "Several processes: accelerate launch -m promptkd COMMAND [flags].",
        "Exit status: 0 done, 1 the run failed, 2 the request was wrong, 130 interrupted, 143 terminated.",
        "",
        "Try it, offline, in some minutes: promptkd demo",
    ]
    return "\n".join(lines) + "\n"


def command_help(name: str, command: ModuleType, *, every_flag: bool = False) -> str:
    """What `promptkd NAME --help` prints, or, with `every_flag` (which imports the training config), `--help-all`."""
    summary, _, rest = inspect.cleandoc(command.__doc__ or "").partition("\n")
    own = own_fields(command)
    loose = positional(command)
    blocks = [_wrap(f"promptkd {name}: {summary}", ""), _usage(name, own, loose)]
    blocks += [_paragraph(text) for text in rest.strip("\n").split("\n\n") if text.strip()]
    required = [_entry(field, loose) for field in own.values() if field.required]
    optional = [_entry(field, loose) for field in own.values() if not field.required]
    blocks += [_group("Required", required), _group("Options", optional), *_training(command, own, every_flag)]
    blocks.append(_group("With every command", _EVERY_COMMAND))
    return "\n\n".join(block for block in blocks if block) + "\n"


def _usage(name: str, own: dict[str, Field], loose: str | None) -> str:
    words = [_loose(field) for field in own.values() if field.name == loose]
    words += [
        f"{field.flag} {metavar(field.annotation)}" for field in own.values() if field.required and field.name != loose
    ]
    return _wrap(" ".join([f"Usage: promptkd {name}", *words, "[flags]"]), "", "    ")


def _training(command: ModuleType, own: dict[str, Field], every_flag: bool) -> list[str]:
    if every_flag:
        # --debug is the program's own; the field of that name can be set in the file alone
        fields = [field for field in training_fields(command).values() if field.name not in own]
        entries = [_entry(field, None) for field in fields if field.name != "debug"]
        return [_group("Training flags", entries)]
    if "TRAINING_CONFIG" not in vars(command):
        return []
    entries = [_entry(field, None) for field in common_fields(command)]
    entries.append(("and every other training flag of transformers and TRL", "--help-all lists them."))
    return [_group("Training flags in common use", entries)]


def _entry(field: Field, loose: str | None) -> tuple[str, str]:
    """A field's flag and its sentences."""
    head = f"{field.flag} {metavar(field.annotation)}"
    if field.name == loose:
        head = f"{_loose(field)} (or {head})"
    elif takes_switch(field.annotation) and field.annotation is bool:
        head = f"{field.flag}, --no-{field.flag[2:]}"
    sentences = [_sentence(field.help)] if field.help else []
    if len(admitted := choices(field.annotation)) > MOST_CHOICES_SHOWN:
        sentences.append(f"One of {', '.join(admitted)}.")
    if not field.required:
        sentences.append(f"Default: {_default(plain(field.default))}.")
    return head, " ".join(sentences)


def _loose(field: Field) -> str:
    """The option that takes arguments without a flag, as they stand on the command line."""
    return field.name.upper() + (" ..." if takes_values(field.annotation) else "")


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?", ":")) else text + "."


def _default(value: Any) -> str:
    match value:
        case None | []:
            return "none"
        case "":
            return "empty"
        case bool():
            return str(value).lower()
        case dict():
            return json.dumps(value)
        case list():
            return " ".join(str(part) for part in value)
    return str(value)


def _group(title: str, entries: Iterable[tuple[str, str]]) -> str:
    lines = [f"{_wrap(head, '  ', '      ')}\n{_wrap(text, '      ')}".rstrip() for head, text in entries]
    return "\n".join([title, *lines]) if lines else ""


def _paragraph(text: str) -> str:
    """Prose is filled anew; lines that are indented, such as examples, stay as they are."""
    return text if any(line.startswith(" ") for line in text.splitlines()) else _wrap(" ".join(text.split()), "")


def _wrap(text: str, indent: str, hanging: str | None = None) -> str:
    further = indent if hanging is None else hanging
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=further,
        break_on_hyphens=False,
        break_long_words=False,
    )
