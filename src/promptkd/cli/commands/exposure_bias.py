"""`promptkd exposure-bias`."""

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from promptkd.cli.inference_run import InferenceRun
from promptkd.cli.options.exposure_bias import Options
from promptkd.cli.outputs import check_output, data_record, label_of
from promptkd.cli.parsing.parser import merged_config
from promptkd.cli.terminal import progress_lines, say
from promptkd.data import EncodedData
from promptkd.engine import Vocabulary
from promptkd.errors import RequestError
from promptkd.evaluation import ExposureBias, Scoring, exposure_bias, sample_continuations
from promptkd.memory import peak_memory
from promptkd.models import SoftPrompt, check_positions, model_record, resolve_model
from promptkd.models.vocabulary import check_heads
from promptkd.report.text import text_table
from promptkd.results import Curve, CurvePoint, Metric, Results
from promptkd.training.checkpoint import checkpoints_in


def run(options: Options, training: dict[str, Any]) -> None:
    check_output(options.out, overwrite=options.overwrite)
    if len(set(options.student)) < len(options.student):
        raise RequestError(f"Each student must be given once. Got {' '.join(options.student)}.")
    job = _ExposureRun(options)
    samples = job.sample("the teacher", job.teacher, job.prompt)
    measured = {label: job.measure(label, path, samples) for label, path in job.students.items()}
    job.results.notes.append(f"Peak memory {peak_memory() / 2**30:.1f} GiB.")
    job.results.write(options.out)
    print(exposure_table(measured))
    say(f"The record is in {options.out}.")
    job.say_peak()


class _ExposureRun(InferenceRun):
    def __init__(self, options: Options):
        super().__init__(options)
        self.students, soft_prompt, path = _students(options), None, options.prompt
        if path is not None:
            soft_prompt = SoftPrompt.load(path / "prompt" if (path / "prompt").is_dir() else path)
        self.tokenizer, data, self.vocabulary, notes = _requests(self)
        self.rows, self.prompts = data.examples, [row.prompt_ids for row in data.examples]
        self.teacher = self.load_teacher(options.teacher)
        self.prompt: Tensor | None = None
        if soft_prompt is not None:
            weight = self.teacher.get_input_embeddings().weight
            self.prompt = soft_prompt().detach().to(weight.device)
            if self.prompt.shape[1] != weight.shape[1]:
                widths = f"{self.prompt.shape[1]} numbers, the teacher's embeddings have {weight.shape[1]}"
                advice = "Give the teacher that it was tuned before."
                raise RequestError(f"The soft prompt in {path} has vectors of {widths}. {advice}")
        self._longest = max(map(len, self.prompts))
        vectors = 0 if soft_prompt is None else soft_prompt.length
        check_positions("teacher", self.teacher, self._longest, options.max_completion_length, soft_prompt=vectors)
        self.settle_precision()
        for note in notes:
            say(note)
        notes += [*self.row_notes, *self.precision_notes()]
        self.results = Results(kind="exposure-bias", config=merged_config(options, {}), notes=notes)
        self.results.models[f"teacher {label_of(options.teacher)}"] = model_record(options.teacher, self.teacher)
        self.results.data[label_of(options.data)] = data_record(options.data, data)

    def sample(self, title: str, model: Any, prompt: Tensor | None = None) -> list[list[list[int]]]:
        draws, started = self.options.samples_per_row, time.perf_counter()
        tell = partial(progress_lines(f"Sampling {title}", len(self.rows) * draws), "continuations")
        decoding, rows = self.decoding(self.tokenizer, model, seed=self.options.seed), [row.row for row in self.rows]
        decoding = replace(decoding, vocabulary=self.vocabulary.size, masked_ids=self.vocabulary.masked)
        with self.computing():
            samples = sample_continuations(
                model, self.prompts, decoding, samples_per_row=draws, rows=rows, prompt=prompt, on_batch=tell
            )
        self.results.timings[f"sampling {title}"] = time.perf_counter() - started
        return samples

    def measure(self, label: str, path: str, teacher_samples: list[list[list[int]]]) -> ExposureBias:
        options, results, student = self.options, self.results, self.load_model(path)
        check_positions(f"student {label}", student, self._longest, options.max_completion_length)
        results.models[label] = model_record(path, student)
        results.notes += [each for each in self.merged if each not in results.notes]
        samples, started = self.sample(label, student), time.perf_counter()
        tell = progress_lines(f"Scoring {label}", 2 * len(self.rows) * options.samples_per_row)
        check_heads(self.vocabulary, student=student, teacher=self.teacher)
        scoring = Scoring(self.prompt, self.vocabulary, on_batch=partial(tell, "continuations"))
        models = (student, self.teacher)
        with self.computing():
            measured = exposure_bias(*models, self.prompts, samples, teacher_samples, scoring, ended=options.ended)
        results.timings[f"scoring {label}"] = time.perf_counter() - started
        kl = f"{label}: KL(teacher || student) on"
        results.metrics[f"{kl} its own continuations, nats/token"] = measured.on_student
        results.metrics[f"{kl} the teacher's, nats/token"] = measured.on_teacher
        settings = {
            "teacher": options.teacher,
            "prompt": None if options.prompt is None else str(options.prompt),
            "ended": options.ended,
            "temperature": 1.0,
            "max_new_tokens": options.max_completion_length,
            "seeds": [options.seed + draw for draw in range(options.samples_per_row)],
        }
        data, points = label_of(options.data), measured.points
        curve = Curve(name="exposure_bias", model=label, data=data, settings=settings, points=points)
        results.curves.append(curve)
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


def _requests(job: InferenceRun) -> tuple[Any, EncodedData, Vocabulary, list[str]]:
    """The tokenizer and the rows, which must be the same for every student; the tokens that all share, with notes."""
    options = job.options
    teacher, *tokenizers = map(job.load_tokenizer, (options.teacher, *options.student))
    shared = [job.share(tokenizer, teacher) for tokenizer in tokenizers]
    first, *others = [job.read_rows(options.data, tokenizer, options.limit) for tokenizer in tokenizers]
    prompts = [row.prompt_ids for row in first.examples]
    for path, other in zip(options.student[1:], others, strict=True):
        if [row.prompt_ids for row in other.examples] != prompts:
            differing = f"{path} and {options.student[0]} render them differently"
            advice = "Give a --template, or measure them one by one."
            raise RequestError(f"The students must read the same requests: {differing}. {advice}")
    for each in shared:
        each.check(first.examples, options.data)
    masked = sorted({index for each in shared for index in each.masked})  # one rule for all, with the teacher's samples
    notes = list(dict.fromkeys(note for each in shared for note in each.notes))
    return tokenizers[0], first, Vocabulary(min(each.size for each in shared), tuple(masked)), notes
