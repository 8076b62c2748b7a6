"""What a study measures of each student, as commands that follow its training: `evaluate` and `exposure-bias`."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

import promptkd.cli.options.evaluate
import promptkd.cli.options.exposure_bias
from promptkd.cli.commands.evaluate import SETTLED, check
from promptkd.cli.options.study import Options
from promptkd.cli.outputs import label_of
from promptkd.cli.parsing.parser import merged_config, parse_options
from promptkd.cli.teacher_context import measured_teacher_prompts, with_context_text
from promptkd.data import Example, read_columns
from promptkd.errors import RequestError
from promptkd.results import ModelRecord, Results
from promptkd.study.plan import REFERENCES, Planned, Settings, arguments_of, slug
from promptkd.study.processes import Command, Job, Phase
from promptkd.training.own_teacher import EMA, SELF, is_own

_FREE = {"out", "overwrite"}  # options on which nothing in a record depends
# settings of training that every measurement has too, and takes over unless it is told otherwise
_ALIKE = (
    "template",
    "columns",
    "chat_template_kwargs",
    "max_prompt_length",
    "max_completion_length",
    "trust_remote_code",
)

_CONTEXT = ("teacher_prompt", "max_teacher_prompt_length")  # what the teacher alone reads, as training names it
_OF_TEACHER = ("teacher", "teacher_dtype", "teacher_model_init_kwargs", "kl_seeds", *_CONTEXT)  # flags of `evaluate`
_REVISIONS = ("teacher_model_revision", "teacher_model_init_kwargs", "model_init_kwargs")  # the first is one

Read = Callable[..., list[Example]]
Problems = defaultdict[str, list[str]]  # each once, with the runs it is wrong with; without any if it is the study's


@dataclass(frozen=True)
class Measurement:
    key: str  # of the study, with the command's flags
    command: str
    folder: str  # of its records, in the study's
    model: str  # the flag that names the student
    options: ModuleType
    not_here: Mapping[str, str]  # flags that the study gives itself, and why
    alike: tuple[str, ...] = _ALIKE

    def settings(self, options: Options) -> Settings:
        given: Settings = getattr(options, self.key)
        return {key.replace("-", "_"): value for key, value in given.items()}


EVALUATION = Measurement(
    "evaluate",
    "evaluate",
    "evaluations",
    "model",
    promptkd.cli.options.evaluate,
    {"model": "each run's student is measured", "out": "the study names the records"},
    (*_ALIKE, "rouge_tokenizer"),
)
EXPOSURE_BIAS = Measurement(
    "exposure_bias",
    "exposure-bias",
    "exposure-bias",
    "student",
    promptkd.cli.options.exposure_bias,
    {
        "student": "each run's student is measured",
        "out": "the study names the records",
        "overwrite": "a study measures again what has other settings",
    },
)
MEASUREMENTS = (EVALUATION, EXPOSURE_BIAS)


class Measuring:
    """The measurements that a study asks for, with what they take over from its runs."""

    def __init__(self, options: Options, planned: Sequence[Planned], problems: Problems):
        self.options, self.asked = options, [each for each in MEASUREMENTS if each.settings(options)]
        self._shared: dict[str, Settings] = {}
        self.notes: list[str] = []
        """What must be said of how all runs are measured."""
        for run in planned if self.asked else ():
            for key in _REVISIONS if options.references else _REVISIONS[:2]:
                if _names_revision(key, run.settings.get(key)):
                    told = f"{key} names a revision, and models are measured at the default one of their repository"
                    advice = "Download it (hf download NAME --revision REVISION --local-dir FOLDER) and name FOLDER"
                    problems[f"{told}. {advice}."].append(run.name)
        for each in self.asked:
            given = each.settings(options)
            for key in sorted(given.keys() & each.not_here.keys()):
                problems[f"{each.key} sets {key}, but {each.not_here[key]}."] = []
            self._shared[each.key] = _shared_settings(each, each.alike, planned, given, problems)
            if self._has_teacher(each):
                context, note = _shared_context(each, planned, given, problems)
                self._shared[each.key] |= context
                self.notes += [note] if note else []

    def _has_teacher(self, measurement: Measurement) -> bool:
        by_metric = measurement is EVALUATION and "kl_to_teacher" in self.options.metrics
        return measurement is EXPOSURE_BIAS or by_metric or bool(measurement.settings(self.options).get("teacher"))

    def results(self, measurement: Measurement, name: str) -> Path:
        return self.options.out / measurement.folder / name / "results.json"

    def of_run(self, planned: Planned, read: Read, trained: Results | None) -> list[Command]:
        """The commands that measure a run's student and are still to do; all of them if it is still to be trained."""
        student, held = str(self.options.out / planned.name), None if trained is None else trained.models.get("student")
        commands = []
        for each in self.asked:
            settings = self._settings(each, planned)
            if settings.get("every_checkpoint") and "keep" not in planned.settings:
                told = "every_checkpoint measures the checkpoints that a run keeps, by default its last two"
                raise RequestError(f"{told}. Say in `base` how many: keep: none keeps all.")
            command, missing = self._command(each, student, settings, self.results(each, planned.name), read, held)
            if trained and missing and not (self.options.out / planned.name / "student").exists():
                told = f"its student was deleted once it was measured (keep_models: false), and of {each.key} {missing}"
                raise RequestError(f"{told}. Leave {each.key} as it was, or delete {student} to train it again.")
            if not trained or missing:  # a student that is trained again is measured again
                commands.append(command)
        return commands

    def of_references(self, planned: Sequence[Planned], read: Read) -> list[Job]:
        """The teacher and the students before training, each measured once, as the runs' students are."""
        jobs = []
        for setting, label in REFERENCES.items():
            named = [run for run in planned if run.settings.get(setting) and not is_own(run.settings[setting])]
            named = [run for run in named if not isinstance(run.settings[setting], list)]
            models = {str(run.settings[setting]): run for run in named}
            for name, run in models.items():
                called = label if len(models) == 1 else f"{label}.{slug(name)}"
                commands = self._of_reference(setting, name, called, run, read)
                if commands is not None:
                    log, phase = self.options.out / "logs" / f"{called}.log", Phase.WAITING if commands else Phase.DONE
                    jobs.append(
                        Job(called, self.options.out / "evaluations" / called, tuple(commands), log, phase=phase)
                    )
        return jobs

    def _of_reference(self, setting: str, name: str, called: str, run: Planned, read: Read) -> list[Command] | None:
        """None if nothing is measured of this model."""
        # the teacher errs nowhere: its exposure bias is not defined
        asked = [each for each in self.asked if each is EVALUATION or setting == "student"]
        commands = []
        for each in asked:
            settings = self._settings(each, run)
            left_out = _OF_TEACHER if setting == "teacher" else ("every_checkpoint",)
            settings = {key: value for key, value in settings.items() if key not in left_out}
            command, missing = self._command(each, name, settings, self.results(each, called), read)
            commands += [command] if missing else []
        return commands if asked else None

    def _settings(self, measurement: Measurement, planned: Planned) -> Settings:
        given = measurement.settings(self.options)
        of_teacher = {}
        if measurement is EXPOSURE_BIAS and "teacher" not in given:
            of_teacher = _teacher_of(planned, "exposure_bias", "Name one in `exposure_bias`, or leave it out.")
            if "teacher" not in of_teacher:
                raise RequestError("exposure_bias is measured against a teacher, and the run has none. Name one there.")
        elif measurement is EVALUATION and "kl_to_teacher" in self.options.metrics:
            of_teacher = _teacher_of(planned, "kl_to_teacher", "Leave it out of metrics.")
        own = {"measure": "student"} if measurement is EVALUATION else {}
        return own | self._shared[measurement.key] | of_teacher | given

    def _command(
        self,
        measurement: Measurement,
        model: str,
        settings: Settings,
        results: Path,
        read: Read,
        student: ModelRecord | None = None,
    ) -> tuple[Command, str]:
        """The command, and what its record lacks; "" if there is one of these settings.

        `student` is what is known of a trained model: measured in another folder of the same name, it is still that.
        """
        settings = {key: value for key, value in settings.items() if key not in measurement.not_here}
        command = (measurement.command, f"--{measurement.model}", model, *arguments_of(settings), "--out", str(results))
        parsed = parse_options(measurement.command, measurement.options, command[1:])
        asked, record = merged_config(with_context_text(parsed.options), {}), record_at(results)
        if measurement is EVALUATION:
            check(parsed.options)
        else:
            measured_teacher_prompts(with_context_text(parsed.options))
            command += ("--overwrite",) if results.exists() else ()
        sources = [parsed.options.data] if isinstance(parsed.options.data, str) else parsed.options.data
        for source in sources:
            read(source, limit=parsed.options.limit, columns=read_columns(parsed.options.columns))
        if record is None:
            return command, "there is no record"
        before = record.config
        measured = record.models.get(label_of(model))
        is_same = student is not None and measured is not None and student.sha256 == measured.sha256 != ""
        free = _FREE | ({measurement.model} if is_same else set())
        changed = [name for name in sorted({*before, *asked} - free) if before.get(name) != asked.get(name)]
        told = "; ".join(f"{name} was {before.get(name)!r} and is now {asked.get(name)!r}" for name in changed)
        if measurement is EVALUATION and set(SETTLED).intersection(changed):
            advice = f"Put it back, or delete {results.parent.parent} to measure all again."
            raise RequestError(f"evaluate: the answers of before were made with other settings: {told}. {advice}")
        return command, told


def _names_revision(key: str, given: Any) -> bool:
    """Whether a setting of `_REVISIONS` names one: the first is one itself, the others are mappings, also as JSON."""
    if key == _REVISIONS[0] or given is None:
        return given is not None
    try:
        held = yaml.safe_load(given) if isinstance(given, str) else given
    except yaml.YAMLError:  # which the run's own check tells
        return False
    return isinstance(held, Mapping) and held.get("revision") is not None


def record_at(path: Path) -> Results | None:
    """The record at `path`; None if there is none, or one that this version does not read."""
    try:
        return Results.read(path)
    except RequestError:
        return None


def _teacher_of(planned: Planned, what: str, advice: str) -> Settings:
    """A run's own teacher, with which its student is compared for `what`."""
    given = {name: planned.settings[name] for name in ("teacher", "teacher_dtype") if name in planned.settings}
    if isinstance(given.get("teacher"), list):
        raise RequestError(f"{what} is measured against one teacher, and the run has several. {advice}")
    if given.get("teacher") == EMA:
        raise RequestError(
            f"{what} cannot be measured after a run whose teacher was the moving average of its student: no folder "
            f"holds it. {advice}"
        )
    return given | ({"teacher": planned.settings["student"]} if given.get("teacher") == SELF else {})


def _shared_context(
    measurement: Measurement, planned: Sequence[Planned], given: Settings, problems: Problems
) -> tuple[Settings, str]:
    """What the teacher alone reads, if all runs share it, and what to say: else it is the plain teacher for all."""
    values = [run.settings.get("teacher_prompt") for run in planned]
    if all(value is None for value in values) and "teacher_prompt" not in given:
        return {}, ""
    if "teacher_prompt" in given:
        own = given["teacher_prompt"] is not None
        return (_shared_settings(measurement, _CONTEXT[1:], planned, given, problems) if own else {}), ""
    if any(value != values[0] for value in values):
        told = f"{measurement.key}: the runs differ in teacher_prompt; all are measured against the teacher without it"
        return {}, f"{told}. Give teacher_prompt there to measure all against a teacher that reads it."
    told = f"{measurement.key}: all runs share teacher_prompt; all are measured against the teacher that reads it"
    note = f"{told}. `teacher_prompt: none` there measures against the teacher without it."
    return _shared_settings(measurement, _CONTEXT, planned, given, problems), note


def _shared_settings(
    measurement: Measurement, keys: Sequence[str], planned: Sequence[Planned], given: Settings, problems: Problems
) -> Settings:
    """What it takes over from training. That must be the same in all runs, or they are not measured alike."""
    shared = {}
    for key in keys:
        values = [run.settings[key] for run in planned if key in run.settings]
        if key in given or not values:
            continue
        if len(values) < len(planned) or any(value != values[0] for value in values):
            told = f"Say in `{measurement.key}` with which one all of them are measured."
            problems[f"The runs differ in {key}. {told}"] = []
        shared[key] = "chat" if (key, values[0]) == ("template", "teacher") else values[0]  # the student has it by then
    return shared
