"""`promptkd exposure-bias`."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from promptkd.cli.inference_run import InferenceRun, held_as
from promptkd.cli.options.exposure_bias import Options
from promptkd.cli.outputs import check_output, data_record, label_of
from promptkd.cli.parsing.parser import merged_config
from promptkd.cli.teacher_context import (
    TEACHER_LIMIT,
    context_note,
    context_notes,
    measured_teacher_prompts,
    recorded_context,
    with_context_text,
)
from promptkd.cli.terminal import progress_lines, say
from promptkd.data import EncodedData
from promptkd.data.encode import EncodedExample
from promptkd.engine import Vocabulary
from promptkd.errors import RequestError
from promptkd.evaluation import ExposureBias, Scoring, exposure_bias, sample_continuations
from promptkd.io.atomic import remove
from promptkd.io.jsonl import ResumableLines
from promptkd.io.lock import locked
from promptkd.memory import peak_memory
from promptkd.models import SoftPrompt, check_positions, model_record, resolve_model
from promptkd.models.positions import PROMPT_LIMIT
from promptkd.models.vocabulary import check_heads, check_row_ids
from promptkd.report.text import text_table
from promptkd.results import Curve, CurvePoint, Metric, Results
from promptkd.training.checkpoint import checkpoints_in

_SETTINGS = ("limit", "template", "max_prompt_length", "max_completion_length", "samples_per_row", "seed", "ended")
Samples = list[list[list[int]]]
Rows = Callable[[str], list[EncodedExample]]  # by the label of their data set


def run(options: Options, training: dict[str, Any]) -> None:
    context, options = context_note(options.teacher_prompt), with_context_text(options)
    check_output(options.out, overwrite=options.overwrite)
    unfinished = options.out.with_name(f"{options.out.stem}.unfinished.jsonl")
    for what, given in (("student", options.student), ("data set", options.data)):
        if len(set(given)) < len(given):
            raise RequestError(f"Each {what} must be given once. Got {' '.join(given)}.")
    with locked(options.out):
        job = _ExposureRun(options, [context] if context else [])
        kept = ResumableLines(
            unfinished, ("student", "data"), settings=job.settings(), check=_kept, overwrite=options.overwrite
        )
        if kept.lines:
            say(f"{len(kept.lines)} curves are measured already; going on with the others.")
        measured: dict[str, ExposureBias] = {}
        for label, path in job.students.items():
            measured |= job.measure(label, path, kept)
        job.results.notes.append(f"Peak memory {peak_memory() / 2**30:.1f} GiB.")
        job.results.write(options.out)
        remove(unfinished)
    print(exposure_table(measured))
    say(f"The record is in {options.out}.")
    job.say_peak()


def _kept(line: Mapping[str, Any]) -> ExposureBias:
    """The curve in a line of what a killed call has measured. Raises ValueError for another line."""
    if not isinstance(line.get("sha256"), str) or not isinstance(line.get("points"), list):
        raise ValueError("expected a curve")
    points = [CurvePoint.model_validate(point) for point in line["points"]]
    return ExposureBias(points, *(Metric.model_validate(line.get(name)) for name in ("on_student", "on_teacher")))


class _ExposureRun(InferenceRun):
    def __init__(self, options: Options, told: list[str]):
        super().__init__(options)
        self.students, soft_prompt, path = _students(options), None, options.prompt
        if path is not None:
            soft_prompt = SoftPrompt.load(path / "prompt" if (path / "prompt").is_dir() else path)
        self.tokenizer, self.sets, self.vocabulary, notes = _requests(self)
        self.teacher = self.load_teacher(options.teacher)
        self.prompt: Tensor | None = None
        if soft_prompt is not None:
            weight = self.teacher.get_input_embeddings().weight
            self.prompt = soft_prompt().detach().to(weight.device)
            if self.prompt.shape[1] != weight.shape[1]:
                widths = f"{self.prompt.shape[1]} numbers, the teacher's embeddings have {weight.shape[1]}"
                advice = "Give the teacher that it was tuned before."
                raise RequestError(f"The soft prompt in {path} has vectors of {widths}. {advice}")
        vectors = 0 if soft_prompt is None else soft_prompt.length
        by = PROMPT_LIMIT if options.teacher_prompt is None else TEACHER_LIMIT
        self._check_rows("teacher", self.teacher, self._for_teacher, soft_prompt=vectors, limit_by=by)
        self.settle_precision()
        measured = "the errors and the teacher's continuations are of"
        runs = dict.fromkeys([*options.student, *([] if path is None else [str(path)])])
        notes += [*told, *context_notes(options, options.teacher, self.sets, runs, measured)]
        for note in notes:
            say(note)
        notes += [*self.row_notes, *self.precision_notes()]
        self.results = Results(kind="exposure-bias", config=merged_config(options, {}), notes=notes)
        self._of_teacher = model_record(options.teacher, self.teacher)
        self._of_teacher.context = recorded_context(options.teacher_prompt, *self.sets.values())
        self.results.models[f"teacher {label_of(options.teacher)}"] = self._of_teacher
        for source, (label, data) in zip(options.data, self.sets.items(), strict=True):
            self.results.data[label] = data_record(source, data)
        self._by_teacher: dict[str, Samples] = {}

    def _rows(self, data: str) -> list[EncodedExample]:
        return self.sets[data].examples

    def _for_teacher(self, data: str) -> list[EncodedExample]:
        return [row.for_teacher() for row in self._rows(data)]

    def _check_rows(self, role: str, model: Any, rows_of: Rows, **how: Any) -> None:
        rows = [row for data in self.sets for row in rows_of(data)]
        check_row_ids(role, model, rows, responses=False)
        longest = max(len(row.prompt_ids) for row in rows)
        check_positions(role, model, longest, self.options.max_completion_length, **how)

    def settings(self) -> dict[str, Any]:
        """What the curves depend on, apart from the students themselves."""
        prompts = {label: [row.prompt_ids for row in data.examples] for label, data in self.sets.items()}
        prompt = None if self.prompt is None else self.prompt.tolist()
        read = {label: [row.prompt_ids for row in self._for_teacher(label)] for label in self.sets}
        contexts = {"contexts_sha256": sha256(repr(read).encode()).hexdigest()} if read != prompts else {}
        students = held_as(self.options.model_dtype or "default", self.options.model_init_kwargs)
        return {
            **{name: vars(self.options)[name] for name in _SETTINGS},
            "teacher_sha256": self._of_teacher.sha256 or self._of_teacher.path,
            "prompt_sha256": sha256(repr(prompt).encode()).hexdigest(),
            "rows_sha256": {label: sha256(repr(ids).encode()).hexdigest() for label, ids in prompts.items()},
            "precision": self.precision,
            "teacher_dtype": self.teacher_dtype,
            **({} if students == "default" else {"model_dtype": students}),
            "vocabulary": [self.vocabulary.size, *self.vocabulary.masked],
            **contexts,
        }

    def on(self, text: str, data: str) -> str:
        return f"{text} on {data}" if len(self.sets) > 1 else text

    def sample(self, title: str, data: str, model: Any, rows_of: Rows, prompt: Tensor | None = None) -> Samples:
        draws, started, title = self.options.samples_per_row, time.perf_counter(), self.on(title, data)
        rows = rows_of(data)
        tell = partial(progress_lines(f"Sampling {title}", len(rows) * draws), "continuations")
        decoding = self.decoding(self.tokenizer, model, seed=self.options.seed)
        decoding = replace(decoding, vocabulary=self.vocabulary.size, masked_ids=self.vocabulary.masked)
        where: dict[str, Any] = {"rows": [row.row for row in rows], "prompt": prompt, "on_batch": tell}
        with self.computing():
            samples = sample_continuations(
                model, [row.prompt_ids for row in rows], decoding, samples_per_row=draws, **where
            )
        self.results.timings[f"sampling {title}"] = time.perf_counter() - started
        return samples

    def by_teacher(self, data: str) -> Samples:
        if data not in self._by_teacher:
            self._by_teacher[data] = self.sample("the teacher", data, self.teacher, self._for_teacher, self.prompt)
        return self._by_teacher[data]

    def measure(self, label: str, path: str, kept: ResumableLines) -> dict[str, ExposureBias]:
        """A student on every data set; what `kept` holds of its very weights, as of a last checkpoint, counts."""
        options, results, student = self.options, self.results, self.load_model(path)
        self._check_rows(f"student {label}", student, self._rows)
        record = results.models[label] = model_record(path, student)
        results.notes += [each for each in self.model_notes if each not in results.notes]
        found, weights = {}, record.sha256 or record.path  # a hub name has no hash
        for data in self.sets:
            if same := [each for (_, on), each in kept.lines.items() if on == data and each["sha256"] == weights]:
                line = {**same[-1], "student": label}
            else:
                measured = self._measure(label, data, student)
                line = {"student": label, "data": data, "sha256": weights}
                line |= {"points": [point.model_dump() for point in measured.points]}
                line |= {name: getattr(measured, name).model_dump() for name in ("on_student", "on_teacher")}
            if kept.lines.get((label, data)) != line:
                kept.append([line])
            found[self.on(label, data)] = measured = _kept(line)
            kl = f"{label}: KL(teacher || student) on"
            results.metrics[self.on(f"{kl} its own continuations, nats/token", data)] = measured.on_student
            results.metrics[self.on(f"{kl} the teacher's, nats/token", data)] = measured.on_teacher
            settings = {
                "teacher": options.teacher,
                "prompt": None if options.prompt is None else str(options.prompt),
                "ended": options.ended,
                "temperature": 1.0,
                "max_new_tokens": options.max_completion_length,
                "seeds": [options.seed + draw for draw in range(options.samples_per_row)],
            }
            if self._of_teacher.context:
                settings["context"] = self._of_teacher.context
            curve = Curve(name="exposure_bias", model=label, data=data, settings=settings, points=measured.points)
            results.curves.append(curve)
        return found

    def _measure(self, label: str, data: str, student: Any) -> ExposureBias:
        options, rows = self.options, self._rows(data)
        theirs, mine = self.by_teacher(data), self.sample(label, data, student, self._rows)
        title, started = self.on(label, data), time.perf_counter()
        tell = progress_lines(f"Scoring {title}", 2 * len(rows) * options.samples_per_row)
        check_heads(self.vocabulary, student=student, teacher=self.teacher)
        prompts, contexts = [row.prompt_ids for row in rows], [row.teacher_prompt_ids for row in rows]
        scoring = Scoring(self.prompt, self.vocabulary, contexts=contexts, on_batch=partial(tell, "continuations"))
        with self.computing():
            measured = exposure_bias(student, self.teacher, prompts, mine, theirs, scoring, ended=options.ended)
        self.results.timings[f"scoring {title}"] = time.perf_counter() - started
        return measured


def exposure_table(measured: Mapping[str, ExposureBias]) -> str:
    """One line per student, intervals below the values, at the highest powers of two that a curve reaches."""
    longest = max(len(each.points) for each in measured.values())
    lengths = [2**power for power in range(longest.bit_length())][-5:]
    lines = [["", "KL on own\nnats/token", "on teacher's\nnats/token", *(f"ExAccErr({x})\n%" for x in lengths)]]
    for label, each in measured.items():
        points = dict(enumerate(each.points, 1))
        kls = [_cell(each.on_student, 3), _cell(each.on_teacher, 3)]
        lines.append([label, *kls, *(_cell(points.get(x), 1) for x in lengths)])
    return text_table(lines)


def _cell(measured: Metric | CurvePoint | None, digits: int) -> str:
    if measured is None or measured.value is None:
        return "-\n"
    value, *interval = (
        "" if each is None else f"{round(each, digits) + 0.0:.{digits}f}"  # + 0.0 takes the sign off a zero
        for each in (measured.value, measured.low, measured.high)
    )
    return f"{value}\n[{', '.join(interval)}]" if all(interval) else f"{value}\n"


def _students(options: Options) -> dict[str, str]:
    """Where each model to measure lies, by its label; a run's checkpoints stand before its student."""
    found: dict[str, str] = {}
    for path in options.student:
        label = label_of(path, options.student)
        if options.every_checkpoint:
            checkpoints = checkpoints_in(Path(path) / "checkpoints")
            if not checkpoints:
                needed = f"--every-checkpoint needs run folders with checkpoints/checkpoint-N. {path} has none."
                raise RequestError(f"{needed} A run keeps its last two unless it is given --keep.")
            found |= {f"{label} step {step}": str(folder) for step, folder in checkpoints.items()}
        found[label] = path
    for path in found.values():
        resolve_model(path)
    return found


def _requests(job: InferenceRun) -> tuple[Any, dict[str, EncodedData], Vocabulary, list[str]]:
    """The tokenizer and the rows, which must be the same for every student; the tokens that all share, with notes."""
    options, contexts = job.options, measured_teacher_prompts(job.options)
    teacher, *tokenizers = map(job.load_tokenizer, (options.teacher, *options.student))
    shared = [job.share(tokenizer, teacher) for tokenizer in tokenizers]
    sets = {}
    for source in options.data:
        first, *others = [job.read_rows(source, each, options.limit, teacher=contexts) for each in tokenizers]
        prompts = [(row.prompt_ids, row.teacher_prompt_ids) for row in first.examples]
        for path, other in zip(options.student[1:], others, strict=True):
            if [(row.prompt_ids, row.teacher_prompt_ids) for row in other.examples] != prompts:
                differing = f"{path} and {options.student[0]} render them differently"
                advice = "Give a --template, or measure them one by one."
                raise RequestError(f"The students must read the same requests: {differing}. {advice}")
        for each in shared:
            each.check(first.examples, source)
        sets[label_of(source, options.data)] = first
    masked = sorted({index for each in shared for index in each.masked})  # one rule for all, with the teacher's samples
    notes = list(dict.fromkeys(note for each in shared for note in each.notes))
    return tokenizers[0], sets, Vocabulary(min(each.size for each in shared), tuple(masked)), notes
