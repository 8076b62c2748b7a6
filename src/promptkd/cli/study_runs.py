"""The runs of a study as commands, checked all together, with what the disk already holds of them."""

import math
from collections.abc import Callable, Iterator
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
from promptkd.data import Example, read_examples
from promptkd.errors import RequestError
from promptkd.results import Results
from promptkd.study.plan import Planned, arguments_of, plan_runs, told
from promptkd.study.processes import Job
from promptkd.study.progress import read_results
from promptkd.study.table import Phase, Row

_ALIKE = ("template", "max_prompt_length", "max_completion_length", "trust_remote_code")
"""Settings of training that evaluation has too, and takes over unless it is told otherwise."""
_NOT_EVALUATED = {"model": "each run's student is measured", "out": "the study names the records"}
_FREE = {"out": None, "overwrite": None}
"""Options of an evaluation on which nothing in its record depends."""


@dataclass
class StudyRun:
    planned: Planned
    folder: Path
    job: Job
    """Without commands if the run is done."""
    row: Row
    results: Path
    """The record in which its student is measured."""
    trained: Results | None
    """The record of its training, if that is done."""


Read = Callable[..., list[Example]]


@dataclass
class _Stage:
    """A command of a run."""

    arguments: tuple[str, ...]
    done: Results | None
    """Its record, if there is one of these settings."""
    steps: int = 0


def checked_runs(options: Options) -> list[StudyRun]:
    """Every run of the study. Raises one `RequestError` that lists everything that is wrong; nothing is written."""
    planned = plan_runs(options.base, options.methods, options.seeds, options.grid, read_file=read_config)
    problems, read = _Problems(options.out), _reading_once()
    groups = list(dict.fromkeys(each.group for each in planned))
    if options.baseline is not None and options.baseline not in groups:
        problems.add(f"--baseline must be one of {', '.join(groups)}. Got {options.baseline}.")
    for key in sorted(options.evaluate.keys() & _NOT_EVALUATED.keys()):
        problems.add(f"evaluate sets {key}, but {_NOT_EVALUATED[key]}.")
    shared = _shared_settings(planned, options.evaluate, problems) if options.evaluate else {}
    runs: list[StudyRun] = []
    for each in planned:
        folder, stages = options.out / each.name, []
        results = options.out / "evaluations" / each.name / "results.json" if options.evaluate else None
        with problems.of(each.name):
            stages.append(_training(each, folder, read))
        if results is not None:
            with problems.of(each.name):
                stages.append(_evaluation(folder, shared | options.evaluate, results, read))
        if not problems.found:
            # a student that is trained again is measured again
            commands = tuple(stage.arguments for stage in stages if stages[0].done is None or stage.done is None)
            job = Job(each.name, commands, options.out / "logs" / f"{each.name}.log")
            row = Row(each.name, folder, stages[0].steps, phase=Phase.WAITING if commands else Phase.DONE)
            runs.append(StudyRun(each, folder, job, row, results or folder / "results.json", stages[0].done))
    problems.raise_all(len(planned))
    return runs


def _reading_once() -> Read:
    """`read_examples` that reads each data set once, whether it is sound or not: most runs of a study share theirs."""
    held: dict[tuple[str, int | None], list[Example] | RequestError] = {}

    def read(source: str, *, limit: int | None = None) -> list[Example]:
        if (source, limit) not in held:
            try:
                held[source, limit] = read_examples(source, limit=limit)
            except RequestError as error:
                held[source, limit] = error
        found = held[source, limit]
        if isinstance(found, RequestError):
            raise found
        return found

    return read


class _Problems:
    """What is wrong, each once, with the runs that it is wrong with."""

    def __init__(self, out: Path):
        self._out = out
        self.found: dict[str, list[str]] = {}

    def add(self, text: str) -> None:
        self.found.setdefault(text, [])

    @contextmanager
    def of(self, run: str) -> Iterator[None]:
        try:
            yield
        except RequestError as error:
            # a run's own folder would make one problem of all runs look like many
            self.found.setdefault(str(error).replace(str(self._out / run), f"{self._out}/RUN"), []).append(run)

    def raise_all(self, count: int) -> None:
        if self.found:
            raise RequestError(told([_of_runs(names, count) + text for text, names in self.found.items()]))


def _of_runs(names: list[str], count: int) -> str:
    if not names:
        return ""
    if len(names) == count:
        return f"all {count} runs: " if count > 1 else f"{names[0]}: "
    return f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: "


def _shared_settings(planned: list[Planned], given: dict[str, Any], problems: _Problems) -> dict[str, Any]:
    """What evaluation takes over from training. It must be the same in all runs, or they are not measured alike."""
    named = {key.replace("-", "_") for key in given}
    shared = {}
    for key in _ALIKE:
        values = [run.settings[key] for run in planned if key in run.settings]
        if key in named or not values:
            continue
        if len(values) < len(planned) or any(value != values[0] for value in values):
            problems.add(f"The runs differ in {key}. Say in `evaluate` with which one all of them are measured.")
        shared[key] = values[0]
    return shared


def _training(planned: Planned, folder: Path, read: Read) -> _Stage:
    # Without config.yaml it is what a run left that was killed while it opened its folder, or no run's and refused.
    torn = folder.is_dir() and any(folder.iterdir()) and not (folder / "config.yaml").is_file()
    mode = "--overwrite" if torn else "--resume"
    arguments = ("distill", *arguments_of(planned.settings), "--out", str(folder), mode)
    parsed = parse_options("distill", promptkd.cli.options.distill, arguments[1:])
    job, args, _ = checked(parsed.options, parsed.training, read)  # and that its settings are the same
    return _Stage(arguments, read_results(folder / "results.json"), _steps(args, job.rows()))


def _evaluation(model: Path, settings: dict[str, Any], results: Path, read: Read) -> _Stage:
    own = {key: value for key, value in settings.items() if key not in _NOT_EVALUATED}
    arguments = ("evaluate", "--model", str(model), *arguments_of(own), "--out", str(results))
    parsed = parse_options("evaluate", promptkd.cli.options.evaluate, arguments[1:])
    check(parsed.options)
    for source in parsed.options.data:
        read(source, limit=parsed.options.limit)
    record, asked = read_results(results), merged_config(parsed.options, {})
    same = record is not None and {**record.config, **_FREE} == {**asked, **_FREE}
    return _Stage(arguments, record if same else None)


def _steps(args: Any, rows: int) -> int:
    """Optimizer steps of a run; a few less if rows over a length limit are dropped."""
    if args.max_steps > 0:
        return int(args.max_steps)
    cut: Callable[[float], int] = math.floor if args.dataloader_drop_last else math.ceil
    batches = cut(rows / args.per_device_train_batch_size)
    return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))
