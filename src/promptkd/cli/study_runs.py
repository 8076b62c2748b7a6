"""The runs of a study as commands, checked all together, with what the disk already holds of them."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import promptkd.cli.options.distill
from promptkd.cli.commands.distill import checked
from promptkd.cli.options.study import Options
from promptkd.cli.parsing.config_file import read_config
from promptkd.cli.parsing.parser import parse_options
from promptkd.cli.study_disk import models_in, models_needed_in, size_of
from promptkd.cli.study_files import file_of, hashes_of_files
from promptkd.cli.study_measurements import EVALUATION, EXPOSURE_BIAS, Measuring, Problems, Read, record_at
from promptkd.data import Example, read_examples
from promptkd.errors import RequestError, raise_together
from promptkd.evaluation.function_metric import label_of_metric
from promptkd.evaluation.measure import MEASURED
from promptkd.report.text import text_table
from promptkd.results import Results, metric_named
from promptkd.study.loop import clock
from promptkd.study.plan import Planned, Settings, arguments_of, plan_runs
from promptkd.study.processes import Command, Job, Phase, shell_line

_NEEDED = ("student", "data")  # settings that every run has


@dataclass
class StudyRun:
    planned: Planned
    job: Job  # without commands if the run is done
    results: Path  # the record in which its student is measured
    trained: Results | None  # the record of its training, if that is done
    exposure: Path | None = None  # the record of its exposure bias, if the study measures it
    notes: tuple[str, ...] = ()  # what must be said of how all runs are measured


def checked_runs(options: Options) -> tuple[list[StudyRun], list[Job]]:
    """Every run of the study, and the measurements of its `REFERENCES`.

    Raises one `RequestError` that lists everything that is wrong; nothing is written.
    """
    planned = plan_runs(options.base, options.methods, options.seeds, options.grid, read_file=read_config)
    options.file_sha256 = hashes_of_files(options, planned)
    problems: Problems = defaultdict(list)
    read, groups = _reading_once(), list(dict.fromkeys(each.group for each in planned))
    if options.baseline is not None and options.baseline not in groups:
        problems[f"--baseline must be one of {', '.join(groups)}. Got {options.baseline}."] = []
    measuring = Measuring(options, planned, problems)
    options.metrics = _checked_metrics(options, planned, problems)
    runs: list[StudyRun] = []
    for each in planned:
        if missing := [name for name in _NEEDED if not each.settings.get(name)]:
            problems[f"`base` names no {' and no '.join(missing)}. Give {' and '.join(missing)} there."].append(
                each.name
            )
            continue
        folder = options.out / each.name
        log = options.out / "logs" / f"{each.name}.log"
        job = Job(each.name, folder, (), log, group=each.group, phase=Phase.DONE)
        trained = record_at(folder / "results.json")
        with _noting(problems, each.name, options.out):
            command, job.steps = _training(each, folder, read, options.file_sha256)
            job.commands = () if trained else (command,)
        with _noting(problems, each.name, options.out):
            job.commands += tuple(measuring.of_run(each, read, trained))
        if job.commands:
            job.phase = Phase.WAITING
        results = measuring.results(EVALUATION, each.name) if options.evaluate else folder / "results.json"
        exposure = measuring.results(EXPOSURE_BIAS, each.name) if options.exposure_bias else None
        runs.append(StudyRun(each, job, results, trained, exposure, tuple(measuring.notes)))
    if not options.keep_models:
        if unmeasured := [each.name for each in planned if not _is_measured(options, each)]:
            advice = "Give `eval_data` in `base`, or `evaluate` with its data, or `exposure_bias`"
            problems[f"keep_models: false would delete its student, which nothing measures. {advice}."] = unmeasured
        teachers = [each.get("teacher") for each in (options.evaluate, options.exposure_bias)]
        problems |= {text: [] for text in models_needed_in(options.out, planned, teachers)}
    references = [] if problems or not options.references else measuring.of_references(planned, read)
    told = []
    for text, names in problems.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        which = f"all {len(names)} runs" if len(names) == len(planned) > 1 else names[0] + more if names else ""
        told.append(f"{which}: {text}" if which else text)
    raise_together(told, "study")
    return runs, references


def _is_measured(options: Options, planned: Planned) -> bool:
    return bool(options.evaluate or options.exposure_bias or planned.settings.get("eval_data"))


def _checked_metrics(options: Options, planned: Sequence[Planned], problems: Problems) -> list[str]:
    """The metrics to compare, under the names that records have for them; those that nothing will measure are wrong."""
    more = options.evaluate.get("metrics", [])
    own: dict[str, str] = {}
    for name in map(str, more if isinstance(more, list) else [more]):
        try:
            own[name] = label_of_metric(name)
        except RequestError as error:
            problems[f"evaluate: {error}"] = []
            own[name] = name
    settings = [each.settings for each in planned]
    known = list(own.values())
    if options.evaluate or all(each.get("eval_data") for each in settings):
        known = [*MEASURED, *known]
        if options.evaluate.get("teacher") or all(_has_teacher(each, options) for each in settings):
            known.append("kl_to_teacher")
    known += ["exposure_bias"] if options.exposure_bias else []
    asked = [own.get(name) or metric_named(name, known) or name for name in options.metrics]
    if unknown := [name for name in asked if name not in known]:
        held = f"there are {', '.join(known) or 'none'}"
        told = f"metrics asks for {', '.join(unknown)}, which is not measured of every run: {held}"
        advice = (
            "`evaluate` measures the usual ones on its `data`, more by its `metrics`, kl_to_teacher by its `teacher`"
        )
        problems[f"{told}. {advice}."] = []
    return asked


def _has_teacher(settings: Settings, options: Options) -> bool:
    """Whether a run's student is measured beside the run's teacher; by its validation only if that is loaded."""
    return bool(settings.get("teacher") and (options.evaluate or not settings.get("kept_logits")))


@contextmanager
def _noting(problems: Problems, run: str, out: Path) -> Iterator[None]:
    try:
        yield
    except RequestError as error:
        # a run's own folder would make one problem of all runs look like many
        runs = problems[str(error).replace(str(out / run), f"{out}/RUN")]
        if run not in runs:  # both of its training and of what measures it
            runs.append(run)


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


def plan_text(runs: Sequence[StudyRun], references: Sequence[Job], workers: int, *, keep_models: bool) -> str:
    """The commands of what is not done, to be copied, a line per run, and the sum."""
    lines, times = [("run", "state", "steps", "about")], []
    for each in runs:
        step, _ = each.job.progress()
        state = "to measure" if each.trained else f"begun, step {step}" if step else "new"
        pace, left = _pace(each, runs), 0 if each.trained else each.job.steps
        about = clock(pace * left) if pace is not None and left else ""
        lines.append((each.job.name, state if each.job.commands else "done", f"{each.job.steps:,}", about))
        if each.job.commands:
            times.append((left, pace))
    total = f"{len(times)} of {len(runs)} runs to do, {sum(left for left, _ in times):,} steps."
    seconds = [left * pace for left, pace in times if pace is not None]
    if times and len(seconds) == len(times):
        with_workers = f" with {workers} workers" if workers > 1 else ""
        beside = min(workers, len(times))
        about = f"{clock(sum(seconds) / beside)} of training{with_workers}"
        if measuring := _seconds_of_measuring(runs):
            about += f" and {clock(measuring * len(times) / beside)} of measuring"
        more = "loading" if measuring else "loading, measuring"
        total += f" About {about}, by the finished runs; {more} and validation come on top."
    elif times:
        total += " Seconds per step are known once a run of each method is done."
    jobs = [*references, *(run.job for run in runs)]
    commands = [shell_line(arguments) for job in jobs for arguments in job.commands]
    if names := [job.name for job in references if job.commands]:
        total += f" Measured before them: {', '.join(names)}."
    if held := [size for each in runs if not each.job.commands and (size := size_of(models_in(each.job.folder)))]:
        then = "keep_models: false deletes them at once" if not keep_models else "keep_models: false would delete them"
        total += f" The models and checkpoints of {len(held)} finished runs take {sum(held) / 1e9:.2f} GB; {then}."
    parts = ["\n".join(commands), text_table(lines, left=(0, 1)), "\n".join(notes_on(runs)), total]
    return "\n\n".join(filter(None, parts))


def notes_on(runs: Sequence[StudyRun]) -> list[str]:
    every = [*(each.planned.note for each in runs), *(note for each in runs for note in each.notes)]
    return [note for note in dict.fromkeys(every) if note]


def _seconds_of_measuring(runs: Sequence[StudyRun]) -> float:
    """What measuring a finished run took on average; 0 if none is measured by itself."""
    done = [run for run in runs if not run.job.commands]
    places = [(run.job.folder, [run.results, *([run.exposure] if run.exposure else [])]) for run in done]
    each = [sum(sum(Results.read(f).timings.values()) for f in files if f.parent != own) for own, files in places]
    return sum(each) / len(each) if each else 0.0


def _pace(run: StudyRun, runs: Sequence[StudyRun]) -> float | None:
    """Seconds per step, by finished runs of the same group, else of the same method; None if there is none."""
    keys: list[Callable[[Planned], str]] = [lambda each: each.group, lambda each: each.settings["method"]]
    for key in keys:
        alike = [each.trained for each in runs if each.trained and key(each.planned) == key(run.planned)]
        costs = [cost for record in alike for cost in record.training.values()]
        if steps := sum(cost.steps for cost in costs):
            return sum(cost.seconds for cost in costs) / steps
    return None
