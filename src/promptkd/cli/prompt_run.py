"""A finished run with a soft prompt, as `explain-prompt` reads it: its record, prompts, teacher and validation rows."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from promptkd.cli.outputs import sha256_of
from promptkd.errors import RequestError
from promptkd.io.python_file import names_python
from promptkd.models import resolve_model
from promptkd.models.adapters import SoftPromptFactory
from promptkd.models.folder import ADAPTER_CONFIG
from promptkd.models.load import folder_sha256
from promptkd.results import ModelRecord, Results
from promptkd.training.config import teacher_revision
from promptkd.training.own_teacher import EMA, SELF
from promptkd.training.teachers import role_of, teacher_and_place

_OTHERS = {
    "teacher_lora": "LoRA weights in its teacher",
    "teacher": "all weights of its teacher",
    "online_module": "an online module in its teacher",
}  # by the folder that a run keeps them in
_NEEDED = "Expected a run with a soft prompt: of promptkd, or of any method with --teacher_adapter prompt"


@dataclass(frozen=True)
class PromptRun:
    """The folder of a run that trained a soft prompt. `RequestError` for any other folder."""

    folder: Path

    def __post_init__(self) -> None:
        if not (self.folder / "results.json").is_file():
            told = "has no results.json, which a finished run has" if self.folder.is_dir() else "is no folder"
            raise RequestError(f"{_NEEDED}. {self.folder} {told}.")
        if not self.prompts:
            trained = next((what for name, what in _OTHERS.items() if (self.folder / name).is_dir()), None)
            told = "trained nothing in its teacher" if trained is None else f"trained {trained}"
            raise RequestError(f"{_NEEDED}. The run in {self.folder} {told}.")

    @cached_property
    def record(self) -> Results:
        return Results.read(self.folder / "results.json")

    @property
    def prompts(self) -> dict[str, Path]:
        """The folder of each soft prompt by the name of its teacher, which is "" where the run has one."""
        place = self.folder / "prompt"
        if (place / ADAPTER_CONFIG).is_file():
            return {"": place}
        return {each.parent.name: each.parent for each in sorted(place.glob(f"*/{ADAPTER_CONFIG}"))}

    def setting(self, name: str, default: Any) -> Any:
        """A setting of the run, of which its record holds those that were given."""
        value = self.record.config.get(name)
        return default if value is None else value

    @property
    def revision(self) -> str | None:
        """That of the teacher on the hub."""
        names = ("model_init_kwargs", "teacher_model_init_kwargs", "teacher_model_revision")
        args = SimpleNamespace(**{name: self.setting(name, None) for name in names})
        return teacher_revision(args, own=self.setting("teacher", None) == SELF)

    def teacher_settings(self, given: dict[str, Any] | None) -> dict[str, Any]:
        """Further arguments of from_pretrained for the teacher: those that are `given`, or the run's own."""
        own = self.setting("teacher_model_init_kwargs", {}) if given is None else given
        return {name: value for name, value in own.items() if given is not None or name != "revision"}

    def start(self) -> dict[str, Any] | None:
        """Arguments of `SoftPrompt.create` for the start, but for the length; None where the record cannot tell."""
        if names_python(str(self.setting("method", ""))):  # the prompt may be of settings in that file
            return None
        own = {each.name: self.setting(each.name, each.default) for each in fields(SoftPromptFactory)}
        return {"start": own["prompt_start"], "text": own["prompt_text"], "seed": self.setting("seed", 42)}

    def teachers(self, given: str | Sequence[str] | None) -> dict[str, str]:
        """Where each teacher is, by its name: `given` as `--teacher` takes it, or under the path of the record."""
        moved = self._moved([] if given is None else [given] if isinstance(given, str) else given)
        return {name: self.teacher(moved.get(name), name) for name in self.prompts}

    def _moved(self, given: Sequence[str]) -> dict[str, str]:
        if "" in self.prompts:
            if len(given) > 1:
                raise RequestError(f"The run in {self.folder} has one teacher. Give one --teacher PATH.")
            return dict.fromkeys([""], given[0]) if given else {}
        moved: dict[str, str] = {}
        for name, path in map(teacher_and_place, given):
            if name not in self.prompts:
                told = f"The run in {self.folder} has no teacher {name!r}, but {', '.join(self.prompts)}"
                raise RequestError(f"{told}. Say whose place {path} is: {self._flag('NAME')}.")
            if name in moved:
                raise RequestError(f"The teacher {name} is given twice: {moved[name]} and {path}. Give one.")
            moved[name] = path
        return moved

    @staticmethod
    def _flag(name: str) -> str:
        return f"--teacher {name}=PATH" if name else "--teacher PATH"

    def teacher(self, given: str | None, name: str = "") -> str:
        """Where the teacher is, which must be the one that the run trained the prompt for, if its record says which."""
        label = role_of(name)
        known = self.record.models.get(label)
        if self.setting("teacher", None) == EMA:
            told = f"The teacher of the run in {self.folder} was a moving average of its student"
            raise RequestError(f"{told}, whose weights a run does not keep, and its prompt fits no other model.")
        if given is not None:
            place = resolve_model(given)
            if known is not None:
                self._check_same(known, place, given, name)
            return given
        if known is None:
            raise RequestError(f"The record of {self.folder} names no {label}. Give it by {self._flag(name)}.")
        try:
            place = resolve_model(known.path)
        except RequestError as error:
            told = f"The {label} of the run in {self.folder}, {known.path}, cannot be read: {error}"
            raise RequestError(f"{told} If it was moved, give it by {self._flag(name)}.") from error
        self._check_same(known, place, known.path, name)
        return known.path

    def _check_same(self, known: ModelRecord, place: str, path: str, name: str) -> None:
        now = folder_sha256(Path(place)) if Path(place).is_dir() else ""
        if known.sha256 and now and now != known.sha256:
            told = (
                f"{path} is another model than the {role_of(name)} of the run in {self.folder}: SHA-256 {now[:12]}, "
                "and the run"
            )
            raise RequestError(
                f"{told} recorded {known.sha256[:12]}. The prompt fits that one alone: give it by {self._flag(name)}."
            )

    def data(self, given: str | None) -> str:
        """The rows to answer: those that are given, or the run's validation rows if they are what they were."""
        if given is not None:
            return given
        known = self.record.data.get("validation")
        if known is None:
            raise RequestError(f"The run in {self.folder} had no validation rows. Give rows by --data FILE.")
        if known.sha256 and not Path(known.path).is_file():
            told = f"The validation rows of the run in {self.folder}, {known.path}, are not there"
            raise RequestError(f"{told}. Start from the folder where the run was started, or give rows by --data FILE.")
        if known.sha256 and sha256_of(known.path) != known.sha256:
            told = f"{known.path} has changed since the run in {self.folder} validated on it"
            raise RequestError(f"{told}. To use it as it is now: --data {known.path}.")
        return known.path
