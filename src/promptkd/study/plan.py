"""The runs of a study: method x setting x seed. What a setting means is known to the commands alone."""

import hashlib
import itertools
import json
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promptkd.errors import RequestError, raise_together
from promptkd.io.python_file import names_python

Settings = dict[str, Any]
Grid = dict[str, list[Any]]

REFERENCES = {"teacher": "teacher", "student": "untrained"}  # models that a study measures once: by setting, the label
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LONGEST_VALUE = 24
_SET_HERE = {  # settings of a run that the study decides
    "seed": "`seeds` lists the seeds",
    "out": "the study names each run's folder",
    "resume": "a study resumes every run by itself",
    "overwrite": "a study replaces no run",
    "dry_run": "`--dry-run` is a flag of the study",
    "hub_token": "the study's file and commands are no place for a secret; put it into HF_TOKEN",
}


@dataclass(frozen=True)
class Planned:
    group: str  # what its runs under other seeds share: method and setting of the grid, as in "kd-learning_rate-5e-05"
    seed: int
    settings: Settings  # every setting of `promptkd distill` but the folder
    note: str = ""  # what the base sets otherwise than the file of the run's method

    @property
    def name(self) -> str:
        return f"{self.group}-seed-{self.seed}"


def plan_runs(
    base: Mapping[str, Any],
    methods: Sequence[Any],
    seeds: Sequence[int],
    grid: Mapping[str, Sequence[Any]],
    *,
    read_file: Callable[[Path], Settings],
) -> list[Planned]:
    """Every method under every setting of the grid and every seed; all runs of the first seed come first.

    A run's settings are, the later winning: the files that `config` names in the method and in `base`, the base, the
    method's own, the grid's, the seed. A name depends on the method, the grid's keys and the run's own values alone,
    so that a study which grows keeps the names of the runs it has. `methods` are names, or mappings with `name`, `grid`
    (of this method alone) and settings; `method` is the name unless it is given.
    """
    reader = _Reader(read_file)
    common, defaults = reader.settings("base", base)
    varied = reader.grid("grid", grid, common, "base")
    negative = [seed for seed in seeds if seed < 0]
    repeated = sorted(seed for seed, count in Counter(seeds).items() if count > 1)
    checks = (
        (not methods, "methods must name at least one method. Got none."),
        (not seeds, "seeds must hold at least one seed. Got none."),
        (bool(negative), f"seeds must be 0 or more. Got {', '.join(map(str, negative))}."),
        (bool(repeated), f"Each seed must be given once. {', '.join(map(str, repeated))} is there twice."),
        ("method" in common, "base sets method, but `methods` lists the methods."),
    )
    reader.problems += [problem for is_wrong, problem in checks if is_wrong]
    points = [point for each in methods for point in reader.points(each, common, defaults, varied)]
    # what is done first can be compared first
    runs = [Planned(group, seed, given | {"seed": seed}, note) for seed in seeds for group, given, note in points]
    names = Counter(run.name.casefold() for run in runs)  # folders of some systems know no case
    if not reader.problems and (twice := sorted({run.name for run in runs if names[run.name.casefold()] > 1})):
        told = f"Each run must have a name of its own. Two are called {', '.join(twice[:5])}"
        reader.problems.append(f"{told}: give methods a `name`, and list each value once.")
    raise_together(reader.problems, "study")
    return runs


def arguments_of(settings: Mapping[str, Any]) -> list[str]:
    """Settings as the flags of a command, which reads them as the same settings."""
    arguments = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        texts = [_text(part) for part in value] if isinstance(value, list) else [_text(value)]
        lonely = len(texts) == 1 and (not texts[0] or texts[0].startswith("-"))
        arguments += [f"{flag}={texts[0]}"] if lonely else [flag, *texts]
    return arguments


class _Reader:
    def __init__(self, read_file: Callable[[Path], Settings]):
        self._read_file = read_file
        self.problems: list[str] = []

    def points(self, given: Any, common: Settings, defaults: Settings, grid: Grid) -> list[tuple[str, Settings, str]]:
        """A method's settings at every point of the grid, with the name of each and the method's note."""
        entry = {"name": given} if isinstance(given, str) else given
        if isinstance(given, str) and names_python(given):
            entry = {"name": given.rpartition(":")[2], "method": given}
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            expected = "expected names, or mappings with a name such as {name: kd, beta: 0.5}"
            self.problems.append(f"methods: {expected}. Got {given!r}.")
            return []
        if not _NAME.fullmatch(name):
            expected = "a name becomes a folder's, so it takes letters, digits, `-`, `_` and `.`"
            self.problems.append(f"methods: {expected}. Got {name!r}.")
            return []
        if name.partition(".")[0] in REFERENCES.values():
            told = f"{name} would be taken for a model that the study measures beside its methods"
            self.problems.append(f"methods: {told}. Give it another `name`.")
            return []
        settings = {key: value for key, value in entry.items() if key not in ("name", "grid")}
        own, own_defaults = self.settings(name, settings)
        self.problems += [
            f"{name} sets {key}, which the grid varies. Take it out of one of them." for key in own.keys() & grid.keys()
        ]
        varied = grid | self.grid(f"{name}: grid", entry.get("grid", {}), common | own, f"{name} or base")
        method = {"method": own.get("method", own_defaults.get("method", name))}
        fixed = own_defaults | defaults | common | own | method  # the base is what all methods share
        note = _note(name, own_defaults, {key: fixed[key] for key in fixed.keys() - own.keys() - varied.keys()})
        points = [dict(zip(varied, values, strict=True)) for values in itertools.product(*varied.values())]
        return [
            ("-".join([name, *(f"{key}-{slug(each[key])}" for key in each)]), fixed | each, note) for each in points
        ]

    def settings(self, place: str, given: Mapping[str, Any]) -> tuple[Settings, Settings]:
        """The settings given in one place, and those in the file that `config` names there."""
        settings = self._named(place, given)
        file = settings.pop("config", None)
        defaults: Settings = {}
        if isinstance(file, str):
            try:
                defaults = self._read_file(Path(file).expanduser())
            except RequestError as error:
                self.problems.append(f"{place}: {error}")
        elif file is not None:
            self.problems.append(f"{place}: config expects the path of a YAML file. Got {file!r}.")
        self.problems += [f"{place} sets {key}, but {_SET_HERE[key]}." for key in settings.keys() & _SET_HERE.keys()]
        return settings, {key: value for key, value in defaults.items() if key not in _SET_HERE}

    def grid(self, place: str, given: Any, fixed: Settings, where: str) -> Grid:
        if not isinstance(given, Mapping):
            self.problems.append(f"{place}: expected a mapping such as {{learning_rate: [5e-5, 1e-4]}}. Got {given!r}.")
            return {}
        grid = {k: value if isinstance(value, list) else [value] for k, value in self._named(place, given).items()}
        for key, values in grid.items():
            if not values:
                self.problems.append(f"{place}: {key} needs at least one value. Got none.")
            if key in _SET_HERE:
                self.problems.append(f"{place} varies {key}, but {_SET_HERE[key]}.")
            if key in ("config", "method", "name", "grid"):
                self.problems.append(f"{place} varies {key}; list several methods for that.")
            if key in fixed:
                self.problems.append(f"{where} sets {key}, which {place} varies. Take it out of one of them.")
        return grid

    def _named(self, place: str, given: Mapping[Any, Any]) -> Settings:
        """With underscores in place of dashes, as every configuration file is read."""
        named: Settings = {}
        for key, value in given.items():
            name = str(key).replace("-", "_")
            if name in named:
                self.problems.append(f"{place}: duplicate key {name}, once spelled {key}. Keep one of them.")
            named[name] = value
        return named


def _note(name: str, file: Settings, used: Settings) -> str:
    """Says where a method's file is overruled; empty where it is not."""
    differing = [key for key, value in file.items() if key in used and used[key] != value]
    told = ", ".join(f"{key} {_short(used[key])} (not {_short(file[key])})" for key in differing)
    return (
        told and f"{name} takes from the base and not from its own config: {told}. Set it in the method to change it."
    )


def _short(value: Any) -> str:
    return textwrap.shorten(_text(value), _LONGEST_VALUE, placeholder="…") or "''"


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, dict | list):
        return str(value)
    return re.sub(r"[^\x00-\x7e]", _escaped, json.dumps(value, ensure_ascii=False))


def _escaped(character: re.Match[str]) -> str:
    """As YAML, by which commands read mappings, writes it: JSON's pairs of surrogates mean nothing there."""
    point = ord(character[0])
    return f"\\u{point:04x}" if point < 0x10000 else f"\\U{point:08x}"


def slug(value: Any) -> str:
    """A value as part of a folder's name; where that changes or shortens it, its hash tells it from others."""
    text = _text(value)
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", text)[-_LONGEST_VALUE:].strip("-.")
    return safe if safe == text else f"{safe}-{hashlib.sha256(text.encode()).hexdigest()[:6]}".strip("-")
