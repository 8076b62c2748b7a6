"""The runs of a study as commands, checked all together, with what the disk already holds of them."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promptkd.cli.options.distill
import promptkd.cli.options.evaluate
from promptkd.cli.commands.distill import checked
from promptkd.cli.commands.evaluate import check
from promptkd.cli.options.study import Options
from promptkd.cli.parsing.config_file import read_config
from promptkd.cli.parsing.parser import merged_config, parse_options
from promptkd.cli.study_files import file_of, hashes_of_files
from promptkd.data import Example, read_columns, read_examples
from promptkd.errors import RequestError, raise_together
from promptkd.evaluation.function_metric import label_of_metric
from promptkd.evaluation.measure import MEASURED
from promptkd.report.text import text_table
from promptkd.results import Results, metric_named
from promptkd.study.loop import clock
from promptkd.study.plan import Planned, Settings, arguments_of, plan_runs, slug
from promptkd.study.processes import Command, Job, Phase, shell_line
from promptkd.training.own_teacher import EMA, SELF, is_own

# settings of training that evaluation has too, and takes over unless it is told otherwise
_ALIKE = (
    "template",
    "columns",
    "chat_template_kwargs",
    "max_prompt_length",
    "max_completion_length",
    "trust_remote_code",
    "rouge_tokenizer",
)
_NOT_EVALUATED = {"model": "each run's student is measured", "out": "the study names the records"}
_FREE = {"out": None, "overwrite": None}  # options of an evaluation on which nothing in its record depends

REFERENCES = {"teacher": "teacher", "student": "untrained"}  # models that a study measures once: by setting, the label

Read = Callable[..., list[Example]]
Problems = defaultdict[str, list[str]]  # each once, with the runs it is wrong with; without any if it is the study's


@dataclass
class StudyRun:
    planned: Planned
    job: Job  # without commands if the run is done
    results: Path  # the record in which its student is measured
    trained: Results | None  # the record of its training, if that is done


def checked_runs(options: Options) -> tuple[list[StudyRun], list[Job]]:
    """Every run of the study, and the evaluations of its `REFERENCES`.

    Raises one `RequestError` that lists everything that is wrong; nothing is written.
    """
    planned = plan_runs(options.base, options.methods, options.seeds, options.grid, read_file=read_config)
    options.file_sha256 = hashes_of_files(options, planned)
    problems: Problems = defaultdict(list)
    read, groups = _reading_once(), list(dict.fromkeys(each.group for each in planned))
    if options.baseline is not None and options.baseline not in groups:
        problems[f"--baseline must be one of {', '.join(groups)}. Got {options.baseline}."] = []
    for key in sorted(options.evaluate.keys() & _NOT_EVALUATED.keys()):
        problems[f"evaluate sets {key}, but {_NOT_EVALUATED[key]}."] = []
    shared = _shared_settings(planned, options.evaluate, problems) if options.evaluate else {}
    options.metrics = _checked_metrics(options, problems)
    runs: list[StudyRun] = []
    for each in planned:
        folder, results = options.out / each.name, options.out / "evaluations" / each.name / "results.json"
        job = Job(each.name, folder, (), options.out / "logs" / f"{each.name}.log", phase=Phase.DONE)
        trained = _record(folder / "results.json")
        with _noting(problems, each.name, options.out):
            command, job.steps = _training(each, folder, read, options.file_sha256)
            job.commands = () if trained else (command,)
        with _noting(problems, each.name, options.out):
            if options.evaluate:
                settings = shared | _teacher_of(each, options) | options.evaluate
                command, is_done = _evaluation(str(folder), settings, results, read)
                # a student that is trained again is measured again
                job.commands += () if trained and is_done else (command,)
        if job.commands:
            job.phase = Phase.WAITING
        runs.append(StudyRun(each, job, results if options.evaluate else folder / "results.json", trained))
    references = [] if problems or not options.references else _references(options, planned, shared, read)
    told = []
    for text, names in problems.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        which = f"all {len(names)} runs" if len(names) == len(planned) > 1 else names[0] + more if names else ""
        told.append(f"{which}: {text}" if which else text)
    raise_together(told, "study")
    return runs, references


def _checked_metrics(options: Options, problems: Problems) -> list[str]:
    """The metrics to compare, under the names that records have for them; those that nothing will measure are wrong."""
    more = options.evaluate.get("metrics", [])
    own: dict[str, str] = {}
    for name in map(str, more if isinstance(more, list) else [more]):
        try:
            own[name] = label_of_metric(name)
        except RequestError as error:
            problems[f"evaluate: {error}"] = []
            own[name] = name
    known = [*MEASURED, "kl_to_teacher", *own.values()]
    asked = [own.get(name) or metric_named(name, known) or name for name in options.metrics]
    if unknown := [name for name in asked if name not in known]:
        told = f"metrics asks for {', '.join(unknown)}, which nothing measures: there are {', '.join(known)}"
        problems[f"{told}. More are measured by `metrics` in `evaluate`."] = []
    return asked


def _teacher_of(planned: Planned, options: Options) -> Settings:
    """What evaluation needs for the KL to a run's own teacher, where that is to be compared."""
    if "kl_to_teacher" not in options.metrics:
        return {}
    given = {name: planned.settings[name] for name in ("teacher", "teacher_dtype") if name in planned.settings}
    if isinstance(given.get("teacher"), list):
        told = "kl_to_teacher is measured against one teacher, and the run has several"
        raise RequestError(f"{told}. Leave it out of metrics.")
    if given.get("teacher") == EMA:
        raise RequestError(
            "kl_to_teacher cannot be measured after a run whose teacher was the moving average of its student: no "
            "folder holds it. Leave kl_to_teacher out of metrics."
        )
    return given | ({"teacher": planned.settings["student"]} if given.get("teacher") == SELF else {})


def _references(options: Options, planned: list[Planned], shared: Settings, read: Read) -> list[Job]:
    """The evaluations of the teacher and of the students before training, each measured once, as the students are."""
    jobs = []
    for setting, label in REFERENCES.items() if options.evaluate else ():
        named = [run for run in planned if run.settings.get(setting) and not is_own(run.settings[setting])]
        named = [run for run in named if not isinstance(run.settings[setting], list)]
        models = {str(run.settings[setting]): run for run in named}
        for name, run in models.items():
            settings = shared | _teacher_of(run, options) | options.evaluate
            if setting == "teacher":
                settings = {key: value for key, value in settings.items() if key not in ("teacher", "teacher_dtype")}
            called = label if len(models) == 1 else f"{label}.{slug(name)}"
            results = options.out / "evaluations" / called / "results.json"
            command, is_done = _evaluation(name, settings, results, read)
            job = Job(called, results.parent, (command,), options.out / "logs" / f"{called}.log", phase=Phase.WAITING)
            if is_done:
                job.commands, job.phase = (), Phase.DONE
            jobs.append(job)
    return jobs


@contextmanager
def _noting(problems: Problems, run: str, out: Path) -> Iterator[None]:
    try:
        yield
    except RequestError as error:
        # a run's own folder would make one problem of all runs look like many
        problems[str(error).replace(str(out / run), f"{out}/RUN")].append(run)


def _reading_once() -> Read:
    """`read_examples` that reads each data set once, whether it is sound or not: most runs of a study share theirs."""
    outcomes: dict[tuple[str, int | None, str], list[Example] | RequestError] = {}

    def read(source: str, *, limit: int | None = None, columns: Mapping[str, str] | None = None) -> list[Example]:
        key = source, limit, repr(columns or {})
        if key not in outcomes:
            try:
                outcomes[key] = read_examples(source, limit=limit, columns=columns)
            except RequestError as error:
                outcomes[key] = error
        if isinstance(found := outcomes[key], RequestError):
            raise found
        return found

    return read


def _shared_settings(planned: list[Planned], given: dict[str, Any], problems: Problems) -> dict[str, Any]:
    """What evaluation takes over from training. It must be the same in all runs, or they are not measured alike."""
    named = {key.replace("-", "_") for key in given}
    shared = {}
    for key in _ALIKE:
        values = [run.settings[key] for run in planned if key in run.settings]
        if key in named or not values:
            continue
        if len(values) < len(planned) or any(value != values[0] for value in values):
            problems[f"The runs differ in {key}. Say in `evaluate` with which one all of them are measured."] = []
        shared[key] = "chat" if (key, values[0]) == ("template", "teacher") else values[0]  # the student has it by then
    return shared


def _training(planned: Planned, folder: Path, read: Read, files: Mapping[str, str]) -> tuple[Command, int]:
    """The command, and its optimizer steps; a few less if rows over a length limit are dropped."""
    # Without config.yaml it is what a run left that was killed while it opened its folder, or no run's and refused.
    torn = folder.is_dir() and any(folder.iterdir()) and not (folder / "config.yaml").is_file()
    mode = "--overwrite" if torn else "--resume"
    settings = {"measure": "student", **planned.settings}  # runs beside each other have no speeds of their own
    if (file := file_of(settings.get("method"))) and file in files:  # that each of them trains by the same code
        settings["method_sha256"] = files[file]
    command = ("distill", *arguments_of(settings), "--out", str(folder), mode)
    parsed = parse_options("distill", promptkd.cli.options.distill, command[1:])
    job, args, _ = checked(parsed.options, parsed.training, read)  # and that its settings are the same
    if args.max_steps > 0:
        return command, int(args.max_steps)
    cut: Callable[[float], int] = math.floor if args.dataloader_drop_last else math.ceil
    batches = cut(job.rows() / args.per_device_train_batch_size)
    return command, math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))


def _evaluation(model: str, settings: dict[str, Any], results: Path, read: Read) -> tuple[Command, bool]:
    """The command, and whether there is a record of these settings."""
    own = {"measure": "student"} | {key: value for key, value in settings.items() if key not in _NOT_EVALUATED}
    command = ("evaluate", "--model", model, *arguments_of(own), "--out", str(results))
    parsed = parse_options("evaluate", promptkd.cli.options.evaluate, command[1:])
    check(parsed.options)
    for source in parsed.options.data:
        read(source, limit=parsed.options.limit, columns=read_columns(parsed.options.columns))
    record, asked = _record(results), merged_config(parsed.options, {})
    return command, record is not None and {**record.config, **_FREE} == {**asked, **_FREE}


def _record(path: Path) -> Results | None:
    """The record at `path`; None if there is none, or one that this version does not read."""
    try:
        return Results.read(path)
    except RequestError:
        return None


def plan_text(runs: Sequence[StudyRun], references: Sequence[Job], workers: int) -> str:
    """A line per run, the sum, and the commands of what is not done, to be copied."""
    lines, times = [("run", "state", "steps", "about")], []
    for each in runs:
        step, _ = each.job.progress()
        state = "to evaluate" if each.trained else f"begun, step {step}" if step else "new"
        pace, left = _pace(each, runs), 0 if each.trained else each.job.steps
        about = clock(pace * left) if pace is not None and left else ""
        lines.append((each.job.name, state if each.job.commands else "done", f"{each.job.steps:,}", about))
        if each.job.commands:
            times.append((left, pace))
    total = f"{len(times)} of {len(runs)} runs to do, {sum(left for left, _ in times):,} steps."
    seconds = [left * pace for left, pace in times if pace is not None]
    if times and len(seconds) == len(times):
        with_workers = f" with {workers} workers" if workers > 1 else ""
        about = f"{clock(sum(seconds) / min(workers, len(times)))} of training{with_workers}, by the finished runs"
        total += f" About {about}; loading, validation and evaluation come on top."
    elif times:
        total += " Seconds per step are known once a run of each method is done."
    jobs = [*(run.job for run in runs), *references]
    commands = [shell_line(arguments) for job in jobs for arguments in job.commands]
    if names := [job.name for job in references if job.commands]:
        total += f" Measured beside them: {', '.join(names)}."
    return "\n\n".join(filter(None, [text_table(lines, left=(0, 1)), total, "\n".join(commands)]))


def _pace(run: StudyRun, runs: Sequence[StudyRun]) -> float | None:
    """Seconds per step, by finished runs of the same group, else of the same method; None if there is none."""
    keys: list[Callable[[Planned], str]] = [lambda each: each.group, lambda each: each.settings["method"]]
    for key in keys:
        alike = [each.trained for each in runs if each.trained and key(each.planned) == key(run.planned)]
        costs = [cost for record in alike for cost in record.training.values()]
        if steps := sum(cost.steps for cost in costs):
            return sum(cost.seconds for cost in costs) / steps
    return None
