"""The text of `promptkd --help` and of a command's `--help` and `--help-all`: one flag a line, sentences below it."""

import inspect
import json
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType

from promptkd.cli.parsing.fields import (
    Field,
    choices,
    common_fields,
    metavar,
    own_fields,
    plain,
    positional_names,
    training_fields,
)

_WIDTH = 100
_EVERY_COMMAND = (
    (
        "--config FILE.yaml",
        "Take values from a YAML file, its keys spelled as the flags, or a recipe. Flags win.",
    ),
    ("--debug", "Show the traceback if the command fails."),
    ("--help", "Show the flags in common use."),
    ("--help-all", "Show every flag."),
)
_OVERVIEW = """\
promptkd compresses generative language models: it distills a large one into a small one.

Usage: promptkd COMMAND [flags]

Commands
{commands}

promptkd COMMAND --help explains a command's flags; promptkd --version prints the version.
Several processes: accelerate launch -m promptkd COMMAND [flags].
Exit status: 0 done, 1 the run failed, 2 the request was wrong, 130 interrupted, 143 terminated.

Try it, offline, in some minutes: promptkd demo
"""


def overview(commands: Mapping[str, str]) -> str:
    width = max(map(len, commands))
    return _OVERVIEW.format(commands="\n".join(f"  {name:<{width}}  {text}" for name, text in commands.items()))


def command_help(name: str, command: ModuleType, *, every_flag: bool = False) -> str:
    """What `promptkd NAME --help` prints, or, with `every_flag` (which imports the training config), `--help-all`."""
    summary, _, rest = inspect.cleandoc(command.__doc__ or "").partition("\n")
    texts = [text for text in rest.strip("\n").split("\n\n") if text.strip()]
    own, more = own_fields(command), ""
    loose = [own[name] for name in positional_names(command)]
    required = [field for field in own.values() if field.required]
    words = [*map(_loose, loose)]
    words += [f"{field.flag} {metavar(field.annotation)}" for field in required if field not in loose]
    if every_flag:
        # --debug is the program's own; the field of that name can be set in the file alone
        fields = [each for each in training_fields(command).values() if each.name not in {*own, "debug"}]
        more = _group("Training flags", map(_entry, fields))
    elif "TRAINING_CONFIG" in vars(command):
        every = ("and every other training flag of transformers and TRL", "--help-all lists them.")
        more = _group("Training flags in common use", [*map(_entry, common_fields(command)), every])
    blocks = [
        _wrap(f"promptkd {name}: {summary}"),
        _wrap(" ".join([f"Usage: promptkd {name}", *words, "[flags]"]), hanging="    "),
        # indented lines, such as examples, stay as they are
        *(text if re.search("^ ", text, re.MULTILINE) else _wrap(" ".join(text.split())) for text in texts),
        _group("Required", [_entry(field, loose) for field in required]),
        _group("Options", [_entry(field, loose) for field in own.values() if not field.required]),
        more,
        _group("With every command", _EVERY_COMMAND),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _entry(field: Field, loose: Sequence[Field] = ()) -> tuple[str, str]:
    shown = metavar(field.annotation)
    head = f"{field.flag} {shown}"
    if field in loose:
        head = f"{_loose(field)} (or {head})"
    elif field.annotation is bool:
        head = f"{field.flag}, --no-{field.flag[2:]}"
    sentences = [field.help if field.help.endswith((".", "!", "?", ":")) else f"{field.help}."] if field.help else []
    if "NAME" in shown.split("|"):  # too many choices to stand beside the flag
        sentences.append(f"One of {', '.join(choices(field.annotation))}.")
    if not field.required:
        default = plain(field.default)
        text = json.dumps(default) if isinstance(default, bool | dict) else str(default) or "empty"
        if isinstance(default, list) or default is None:
            text = " ".join(map(str, default or ())) or "none"
        sentences.append(f"Default: {text}.")
    return head, " ".join(sentences)


def _loose(field: Field) -> str:
    """The option that takes arguments without a flag."""
    return field.name.upper() + (" ..." if field.takes_several else "")


def _group(title: str, entries: Iterable[tuple[str, str]]) -> str:
    lines = [f"{_wrap(head, '  ', '      ')}\n{_wrap(text, '      ', '      ')}".rstrip() for head, text in entries]
    return "\n".join([title, *lines]) if lines else ""


def _wrap(text: str, indent: str = "", hanging: str = "") -> str:
    wrapper = textwrap.TextWrapper(_WIDTH, indent, hanging, break_on_hyphens=False, break_long_words=False)
    return wrapper.fill(text)
