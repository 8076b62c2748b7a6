"""A command's options from defaults, a YAML file and flags, the later winning; all that is wrong is told at once."""

import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from promptkd.cli.parsing.config_file import read_config
from promptkd.cli.parsing.fields import (
    LARGEST_INTEGER,
    Field,
    choices,
    convert,
    describe,
    nearest,
    own_fields,
    plain,
    positional_names,
    training_fields,
)
from promptkd.errors import RequestError, raise_together
from promptkd.io.python_file import names_python
from promptkd.io.redact import is_secret, redacted, without_secret_values
from promptkd.settings import beyond_limits

_PROGRAM_FLAGS = ("config", "debug", "help", "help_all", "version")
_NUMBER = re.compile(r"-[0-9.]")
_LONGEST_SHOWN = 200


class Parsed(NamedTuple):
    options: Any  # the command's `Options`
    training: dict[str, Any]  # the values of the training configuration that the user gave, and no others


def merged_config(options: Any, training: dict[str, Any]) -> dict[str, Any]:
    """Every option and every training value that was given, as plain data for `write_config`; secrets are left out."""
    return without_secret_values({name: plain(value) for name, value in (vars(options) | training).items()})


def parse_options(name: str, command: ModuleType, arguments: Sequence[str]) -> Parsed:
    """Read the arguments of command `name`. Raises one `RequestError` that lists everything that is wrong."""
    request = _Request(command)
    request.read(arguments)
    raise_together(request.problems, "request", f"`promptkd {name} --help` explains the flags.")
    own = {key: value for key, value in request.values.items() if key in request.own}
    training = {key: value for key, value in request.values.items() if key not in request.own}
    return Parsed(command.Options(**own), training)


class _Request:
    def __init__(self, command: ModuleType) -> None:
        self.command, self.own = command, own_fields(command)
        self.positional = positional_names(command)
        self.values: dict[str, Any] = {}
        self.problems: list[str] = []
        self._given: dict[str, str] = {}  # by name: how it was spelled, its value right or wrong
        self._loose: list[str] = []  # for the positional options
        self._config: Path | None = None
        self._has_own_method = False

    def read(self, arguments: Sequence[str]) -> None:
        self._has_own_method = any(names_python(each.partition("method=")[2] or each) for each in arguments)
        groups: list[list[str]] = [[]]  # each flag with all that follows it up to the next one
        for argument in arguments:
            if argument.startswith("--") and len(argument) > 2:
                groups.append([argument])
            elif argument.startswith("-") and len(argument) > 1 and not _NUMBER.match(argument):
                told = f"{argument} is no flag: flags begin with two dashes and a name."
                self.problems.append(f"{told} A value that begins with a dash is written --flag=VALUE.")
            else:
                groups[-1].append(argument)
        self._surplus(groups[0], "every value follows a flag")
        for flag, *values in groups[1:]:
            spelled, equals, value = flag.partition("=")
            self._take_flag(spelled, [value, *values] if equals else values, joined=bool(equals))
        self._take_loose()
        if "config" in self.own:  # the file is what the command is about
            self._config = self._config or self.values.get("config")
            self.values |= {"config": self._config} if self._config else {}
        if self._config is None or self._take_file(self._config):
            missing = self._missing()
            if missing and self.values.get("resume") and "out" in self.values:
                self._take_run(self.values["out"], missing)
                return
            for field in missing:
                spelled = field.name.upper() if field.name in self.positional else field.flag
                self.problems.append(f"{spelled} is missing: {field.help or describe(field.annotation)}")

    def _missing(self) -> list[Field]:
        return [field for field in self.own.values() if field.required and field.name not in self._given]

    def _take_loose(self) -> None:
        """Give the positional options their values, one each; the last one takes all that are left."""
        *names, last = self.positional or ("",)
        values = [self._loose[at : at + 1] for at in range(len(names))] + [self._loose[len(names) :]]
        for name, given in zip([*names, last], values, strict=True):
            if given and self._is_first(name, " ".join(given)):
                self._set(self.own[name], given if len(given) > 1 else given[0], name.upper())

    def _take_flag(self, spelled: str, values: list[str], joined: bool) -> None:
        """`joined`: the first value was written behind an equals sign."""
        name = spelled[2:].replace("-", "_")
        if name == "debug":
            told = "--debug takes no value: it shows the traceback of a failure."
            self.problems.append(f"{told} The training setting of that name goes into the --config file.")
        elif name == "config":
            if not values:
                self.problems.append("--config expects a YAML file. Got no value.")
            elif self._is_first(name, spelled, "Put everything into one file."):
                self._config = Path(values[0]).expanduser()
                self._surplus(values[1:], "--config takes one file")
        elif field := self._find(name):
            advice = "Give the values together: --flag A B." if field.takes_several else "Give it once."
            before = self.values.get(name) if name in self._given else None
            if before is not None and name in vars(self.command).get("REPEATABLE", ()):
                known = before if isinstance(before, list) else [before]
                self._take_values(field, spelled, [*known, *values], False)
            elif self._is_first(name, spelled, advice):
                self._take_values(field, spelled, values, joined)
        elif not (name.startswith("no_") and (field := self._find(name[3:]))):
            self.problems.append(f"{spelled} is unknown.{self._suggest(name, '--', '-')}")
        elif not field.is_switch:
            self.problems.append(f"{spelled} is unknown: {field.flag} expects {describe(field.annotation)}.")
        elif self._is_first(field.name, spelled):
            self.values[field.name] = False
            self._surplus(values, f"{spelled} takes no value")

    def _take_values(self, field: Field, spelled: str, values: list[str], joined: bool) -> None:
        count = 1 if joined or not field.takes_several else len(values)
        own, surplus = values[:count], values[count:]
        if field.is_switch and not joined:
            if self.positional and own and own[0].lower() not in ("true", "false"):
                own, surplus = [], values
            own = own or ["true"]
        self._surplus(surplus, f"{spelled} takes one value")
        if own:
            self._set(field, own if len(own) > 1 else own[0], spelled)
        else:
            self.problems.append(f"{spelled} expects {describe(field.annotation)}. Got no value.")

    def _surplus(self, values: list[str], reason: str) -> None:
        if self.positional:
            self._loose += values
        elif values:
            self.problems.append(f"Did not expect {_show(values)}: {reason}.")

    def _take_file(self, path: Path) -> bool:
        """Take from the file what no flag has given; return whether the file could be read."""
        try:
            values = read_config(path)
        except RequestError as error:
            self.problems.append(str(error))
            return False
        self._take_values_of(path, values)
        return True

    def _take_run(self, run: Path, missing: list[Field]) -> None:
        """Take from the configuration of the run that is resumed what no flag has given."""
        path, listed = run / "config.yaml", ", ".join(field.flag for field in missing)
        if not path.is_file():
            problem = f"--resume without {listed} takes the settings of the run in --out, but {path} is not there"
            self.problems.append(
                f"{problem}. Give the folder of a run that has started, or every setting of a new run."
            )
            return
        try:
            values = read_config(path)
        except RequestError as error:
            self.problems.append(str(error))
            return
        if lacking := [field.name for field in missing if field.name not in values]:
            foreign = [name for name in values if not self._find(name)]
            held = f"holds {', '.join(foreign[:5])} and no" if foreign else "holds no"
            problem = f"{path} {held} {', '.join(lacking)}, so another command wrote it"
            self.problems.append(f"{problem}. Resume a run with the command that started it.")
            return
        self._take_values_of(path, values)

    def _take_values_of(self, path: Path, values: dict[str, Any]) -> None:
        for name, value in values.items():
            field = None if name == "config" else self._find(name)
            if field:  # a wrong value is reported even where a flag wins over it
                self._set(field, value, f"{path}: {name}", keep=name not in self._given)
            else:
                self.problems.append(f"{path}: the key {name} is unknown.{self._suggest(name, '', '_')}")
        self._given = dict.fromkeys(values, str(path)) | self._given

    def _set(self, field: Field, value: Any, source: str, *, keep: bool = True) -> None:
        if not _is_utf8(value):
            self.problems.append(f"{source} is not valid UTF-8 (it holds half a surrogate pair). Type it again.")
            return
        try:
            converted = convert(value, field.annotation, default=field.default)
        except (ValueError, RecursionError):
            expected = describe(field.annotation)
            got = "a secret" if is_secret(field.name) else _show(value)
            self.problems.append(f"{source} expects {expected}. Got {got}.{_hint(value, expected, field)}")
            return
        values = converted if isinstance(converted, list) else [converted]
        wrong = {beyond_limits(field.limits, each) for each in values if each is not None} - {""}
        self.problems += [f"{source} {limit}. Got {_show(value).strip(chr(39))}." for limit in sorted(wrong)]
        if keep:
            self.values[field.name] = converted

    def _is_first(self, name: str, spelled: str, advice: str = "Give it once.") -> bool:
        if name in self._given:
            other = "" if self._given[name] == spelled else f", first as {self._given[name]}"
            self.problems.append(f"{spelled} is given twice{other}. {advice}")
            return False
        self._given[name] = spelled
        return True

    def _find(self, name: str) -> Field | None:
        return self.own.get(name) or training_fields(self.command).get(name)

    def _suggest(self, name: str, prefix: str, dash: str) -> str:
        if prefix and self._has_own_method and "method_settings" in training_fields(self.command):
            return f""" A setting of your own method is given as --method_settings '{{"{name}": VALUE}}'."""
        guess = nearest(name, [*self.own, *training_fields(self.command), *(_PROGRAM_FLAGS if prefix else ())])
        return f" Did you mean {prefix}{guess.replace('_', dash)}?" if guess else " --help-all lists every name."


def _hint(value: Any, expected: str, field: Field) -> str:
    if isinstance(value, str) and (guess := nearest(value, choices(field.annotation))):
        return f" Did you mean {guess}?"
    if isinstance(value, bool | int | float) and "text" in expected:
        return " Put it in quotes."
    if "whole number" in expected and re.fullmatch(r"[-+]?\d{19,}", _show(value).strip("'")):
        return f" It may be at most {LARGEST_INTEGER}."
    return ""


def _is_utf8(value: Any) -> bool:
    """Whether every text in `value` can be written as UTF-8; an argument in another encoding cannot."""
    if isinstance(value, str):
        return not any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, dict):
        return all(_is_utf8(key) and _is_utf8(part) for key, part in value.items())
    return all(map(_is_utf8, value)) if isinstance(value, list) else True


def _show(value: Any) -> str:
    if isinstance(value, list):
        text = " ".join(str(part) for part in value) or "no value"
    elif isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST_INTEGER:
        text = "a number that is far larger" if value.bit_length() > 10_000 else str(value)
    else:
        text = "nothing" if value is None or value == "" else repr(value)
    text = redacted(text)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]} … ({len(text)} characters)"
