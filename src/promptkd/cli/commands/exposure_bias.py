"""`promptkd exposure-bias`."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from promptkd.cli.exposure_table import exposure_table
from promptkd.cli.library_logging import quiet_libraries
from promptkd.cli.measuring_device import (
    computing_in,
    load_subject,
    measured_rows,
    precision_notes,
    say_peak,
    settled_precision,
    settled_rows,
    teacher_precision_here,
)
from promptkd.cli.option_checks import check_output
from promptkd.cli.options.exposure_bias import Options
from promptkd.cli.parsing.parser import merged_config
from promptkd.cli.provenance import data_record, label_of
from promptkd.cli.terminal import progress_lines, say
from promptkd.data import stop_token_ids
from promptkd.errors import RequestError
from promptkd.evaluation import Scoring, exposure_bias, sample_continuations
from promptkd.evaluation.exposure_bias import ExposureBias
from promptkd.generation import Decoding
from promptkd.memory import peak_memory
from promptkd.models import (
    SoftPrompt,
    check_same_vocabulary,
    load_tokenizer,
    model_record,
    resolve_model,
    shared_vocabulary_size,
    vocabulary_size,
)
from promptkd.results import Curve, Results
from promptkd.training.checkpoint import checkpoints_in


def run(options: Options, training: dict[str, Any]) -> None:
    check_output(options.out, overwrite=options.overwrite)
    if len(set(options.student)) < len(options.student):
        raise RequestError(f"Each student must be given once. Got {' '.join(options.student)}.")
    quiet_libraries()
    students = _students(options)
    soft_prompt = _soft_prompt(options.prompt)
    tokenizer, data = _requests(options)
    weights = teacher_precision_here(options.teacher_dtype)
    teacher = load_subject(options.teacher, options.trust_remote_code, weights)
    prompt = _placed(soft_prompt, teacher, options.prompt)
    precision = settled_precision(options.dtype)
    results = Results(kind="exposure-bias", config=merged_config(options, {}))
    results.notes += precision_notes(precision, weights)
    results.models[f"teacher {label_of(options.teacher)}"] = model_record(options.teacher, teacher)
    results.data[label_of(options.data)] = data_record(options.data, len(data.examples), data.dropped)
    job = _Job(options, results, tokenizer, data.examples, teacher, prompt)
    with computing_in(precision):
        samples = job.sample("the teacher", teacher, prompt)
    measured = {}
    for label, path in students.items():  # each under an autocast of its own, which keeps copies of its weights
        with computing_in(precision):
            measured[label] = job.measure(label, path, samples)
    results.notes.append(f"Peak memory {peak_memory() / 2**30:.1f} GiB.")
    results.write(options.out)
    print(exposure_table(measured))
    say(f"The record is in {options.out}.")
    say_peak()


@dataclass
class _Job:
    """What is measured alike for every student."""

    options: Options
    results: Results
    tokenizer: Any
    rows: list[Any]
    teacher: Any
    prompt: Tensor | None

    def sample(self, title: str, model: Any, prompt: Tensor | None = None) -> list[list[list[int]]]:
        """The model's continuations of every request."""
        options, started = self.options, time.perf_counter()
        tell = progress_lines(f"Sampling {title}", len(self.rows) * options.samples_per_row)
        samples = sample_continuations(
            model,
            [row.prompt_ids for row in self.rows],
            Decoding(
                max_new_tokens=options.max_completion_length,
                stop_ids=stop_token_ids(self.tokenizer, model.generation_config, options.template),
                vocabulary=vocabulary_size(self.tokenizer),
                seed=options.seed,
                batch_size=settled_rows(options.batch_size),
            ),
            samples_per_row=options.samples_per_row,
            rows=[row.row for row in self.rows],
            prompt=prompt,
            on_batch=lambda done: tell("continuations", done),
        )
        self.results.timings[f"sampling {title}"] = time.perf_counter() - started
        return samples

    def measure(self, label: str, path: str, teacher_samples: list[list[list[int]]]) -> ExposureBias:
        """One student, loaded for as long as this takes; its curve goes into the record."""
        student = load_subject(path, self.options.trust_remote_code)
        self.results.models[label] = model_record(path, student)
        samples = self.sample(label, student)
        started = time.perf_counter()
        tell = progress_lines(f"Scoring {label}", 2 * len(self.rows) * self.options.samples_per_row)
        measured = exposure_bias(
            student,
            self.teacher,
            [row.prompt_ids for row in self.rows],
            samples,
            teacher_samples,
            Scoring(
                self.prompt,
                vocabulary=shared_vocabulary_size(student, self.teacher, self.tokenizer),
                on_batch=lambda done: tell("continuations", done),
            ),
            ended=self.options.ended,
        )
        self.results.timings[f"scoring {label}"] = time.perf_counter() - started
        self.results.metrics[f"{label}: KL(teacher || student) on its own continuations, nats/token"] = (
            measured.on_student
        )
        self.results.metrics[f"{label}: KL(teacher || student) on the teacher's, nats/token"] = measured.on_teacher
        self.results.curves.append(
            Curve(
                name="exposure_bias",
                model=label,
                data=label_of(self.options.data),
                settings=_settings(self.options),
                points=measured.points,
            )
        )
        return measured


def _settings(options: Options) -> dict[str, Any]:
    """What the curves depend on."""
    return {
        "teacher": options.teacher,
        "prompt": None if options.prompt is None else str(options.prompt),
        "ended": options.ended,
        "temperature": 1.0,
        "max_new_tokens": options.max_completion_length,
        "seeds": [options.seed + draw for draw in range(options.samples_per_row)],
    }


def _students(options: Options) -> dict[str, str]:
    """Where each model to measure lies, by its label; a run's checkpoints stand before its student."""
    found: dict[str, str] = {}
    for path in options.student:
        label = label_of(path, options.student)
        if options.every_checkpoint:
            checkpoints = checkpoints_in(Path(path) / "checkpoints")
            if not checkpoints:
                raise RequestError(
                    f"--every-checkpoint needs run folders with checkpoints/checkpoint-N. {path} has none. A run keeps "
                    "its last two unless it is given --keep."
                )
            found |= {f"{label} step {step}": str(folder) for step, folder in checkpoints.items()}
        found[label] = path
    for path in found.values():
        resolve_model(path)
    return found


def _requests(options: Options) -> tuple[Any, Any]:
    """The tokenizer and the encoded rows, which must be the same for every student."""
    trust = options.trust_remote_code
    teacher = load_tokenizer(options.teacher, trust_remote_code=trust)
    tokenizers = [load_tokenizer(path, trust_remote_code=trust) for path in options.student]
    for tokenizer in tokenizers:
        check_same_vocabulary(tokenizer, teacher)
    encoded = [measured_rows(options, options.data, tokenizer, need_response=False) for tokenizer in tokenizers]
    for path, data in zip(options.student, encoded, strict=True):
        if [row.prompt_ids for row in data.examples] != [row.prompt_ids for row in encoded[0].examples]:
            raise RequestError(
                f"The students must read the same requests: {path} and {options.student[0]} render them differently. "
                "Give a --template, or measure them one by one."
            )
    return tokenizers[0], encoded[0]


def _soft_prompt(path: Path | None) -> Any:
    if path is None:
        return None
    return SoftPrompt.load(path / "prompt" if (path / "prompt").is_dir() else path)


def _placed(soft_prompt: Any, teacher: Any, path: Path | None) -> Tensor | None:
    """The prompt's vectors beside the teacher that reads them."""
    if soft_prompt is None:
        return None
    weight = teacher.get_input_embeddings().weight
    vectors = soft_prompt().detach().to(weight.device)
    if vectors.shape[1] != weight.shape[1]:
        raise RequestError(
            f"The soft prompt in {path} has vectors of {vectors.shape[1]} numbers, the teacher's embeddings have "
            f"{weight.shape[1]}. Give the teacher that it was tuned before."
        )
    return vectors
