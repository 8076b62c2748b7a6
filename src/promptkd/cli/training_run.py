"""What `sft` and `distill` have in common, from the checked folder to the record and the page."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from pickle import UnpicklingError
from statistics import median
from typing import Any

from accelerate.utils import broadcast_object_list

from promptkd.cli.library_logging import quiet_libraries
from promptkd.cli.parsing.parser import merged_config
from promptkd.cli.provenance import data_record, label_of
from promptkd.cli.run_folder import RunFolder
from promptkd.cli.terminal import is_main_process, say
from promptkd.data import Example, encode_examples, read_examples
from promptkd.errors import PromptKDError, RequestError
from promptkd.evaluation.dataset_evaluation import measure_rows
from promptkd.evaluation.measure import evaluation_of
from promptkd.io.atomic import write_atomic
from promptkd.memory import gibibytes, peak_memory
from promptkd.models import load_model, load_tokenizer, model_record
from promptkd.report import render_report, terminal_table
from promptkd.results import Metric, Results, Series, Training, read_history
from promptkd.training.callbacks import CostMeter, MetricsFile, ProgressBar, quiet
from promptkd.training.checkpoint import resumable_checkpoint, set_aside
from promptkd.training.collapse import findings_as_notes
from promptkd.training.distributed import autocast
from promptkd.training.out_of_memory import out_of_memory_told
from promptkd.training.signals import StopOnSignal
from promptkd.training.validation import validation_decoding

_LOWER_IS_BETTER = {"rouge_l": False, "loss": True, "kl_to_teacher": True}
_SET_HERE = {
    "output_dir": "--out",
    "save_total_limit": "--keep",
    "resume_from_checkpoint": "--resume",
    "load_best_model_at_end": "--select",
    "metric_for_best_model": "--select",
    "greater_is_better": "--select",
}
"""Training flags of transformers that would say a second time what an option of the command says."""


class TrainingRun:
    """One run of a training command. The methods are called in the order in which they stand."""

    def __init__(
        self,
        kind: str,
        options: Any,
        training: dict[str, Any],
        read: Callable[..., list[Example]] = read_examples,
    ):
        self.kind, self.options, self.training, self._read = kind, options, training, read
        self.folder = RunFolder(options.out)
        self._mode = {"resume": options.resume, "overwrite": options.overwrite}
        # How a run was started is no setting of it: its config.yaml must serve for resuming, too.
        begun = {*self._mode, "dry_run"}
        self.merged = {k: v for k, v in merged_config(options, training).items() if k not in begun}
        self._examples: dict[str, Any] = {}
        self.data: dict[str, Any] = {}
        self.models: dict[str, Any] = {}
        self.metrics: dict[str, Any] = {}
        self.notes: list[str] = []
        self.timings: dict[str, float] = {}
        self._cost: dict[str, Any] = {}

    def arguments(self, config_class: type) -> Any:
        """The training configuration, once settings, folder and rows are known to be sound; nothing is written."""
        quiet_libraries()
        for name in self.training.keys() & _SET_HERE.keys():
            raise RequestError(f"--{name} is set by {_SET_HERE[name]} here. Give that instead.")
        settings: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "log_level_replica": "error"}
        settings |= self.training
        if self.options.resume and settings.get("save_only_model"):
            raise RequestError("--save_only_model leaves out of the checkpoints what --resume needs.")
        settings["save_total_limit"] = self.options.keep
        settings["output_dir"] = str(self.folder.checkpoints)
        settings |= self._selection(settings)
        try:
            args = config_class(**settings)
        except (ValueError, TypeError) as error:
            raise RequestError(" ".join(str(error).split())) from error
        self.folder.check(self.merged, **self._mode)
        self._examples["train"] = self.options.data, self._read(self.options.data, limit=self.options.limit)
        if (source := self.options.eval_data) is not None:
            self._examples["validation"] = source, self._read(source, limit=self.options.eval_limit)
        return args

    def rows(self) -> int:
        """Training rows that were read; those over a length limit are among them."""
        return len(self._examples["train"][1])

    def tokenizer(self, name: str) -> Any:
        """The tokenizer of a model."""
        return load_tokenizer(name, trust_remote_code=self._trust)

    def encode(self, tokenizer: Any, args: Any, *, need_response: bool = True) -> tuple[Any, Any]:
        """Training and validation rows as tokens; None for validation rows that were not asked for."""
        encoded: dict[str, Any] = {"train": None, "validation": None}
        for name, (_, examples) in self._examples.items():
            encoded[name] = encode_examples(
                examples,
                tokenizer,
                args.template,
                max_prompt_length=args.max_prompt_length,
                max_response_length=args.max_completion_length,
                overlong=args.overlong,
                need_response=need_response or name == "validation",
            )
        for name, (source, _) in self._examples.items():
            rows, dropped = len(encoded[name].examples), encoded[name].dropped
            self.data[name] = data_record(source, rows, dropped)
            say(f"{source}: {rows} rows{f'; {dropped} over a length limit were dropped' if dropped else ''}.")
        self._examples.clear()
        return encoded["train"], encoded["validation"]

    def load(self, role: str, name: str, settings: dict[str, Any] | None = None) -> Any:
        """A model; `settings` are further arguments of `load_model`, `--model_init_kwargs` if None."""
        settings = self.training.get("model_init_kwargs") or {} if settings is None else settings
        model = load_model(name, trust_remote_code=self._trust, **settings)
        self.models[role] = model_record(name, model)
        say(f"Loaded the {role}: {name}.")
        return model

    def opened(self) -> AbstractContextManager[None]:
        """The folder, opened while the trainer is made; see `RunFolder.opened`."""
        return self.folder.opened(self.merged, **self._mode)

    def note(self, text: str) -> None:
        """Say, and keep in the record, what a reader of the metrics must know."""
        say(text)
        self.notes.append(text)

    def tell_trained_share(self, numbers: int, share: float) -> None:
        """Say, and keep in the record, which share of the teacher is trained."""
        if numbers:
            say(f"{numbers:,} parameters of the teacher are trained, {share:.4%} of its parameters.")
            self.metrics["teacher_trained_numbers"] = Metric(value=numbers)
            self.metrics["teacher_trained_share"] = Metric(value=share)

    def train(self, trainer: Any, title: str) -> None:
        """Train, or resume from the last checkpoint, until the end or a signal.

        At the end the peak of memory is said, by phase.

        Raises:
            PromptKDError: where memory runs out; what the checkpoints hold is kept.
            Stopped: after a signal, when a checkpoint is written.
        """

        checkpoint = self._checkpoint() if self.options.resume else None
        if checkpoint is not None:
            trainer.args.eval_on_start = False  # the run began with it
        quiet(trainer)
        bar, meter = ProgressBar(title), CostMeter(trainer.phases)
        trainer.add_callback(meter)
        trainer.add_callback(MetricsFile(self.folder.metrics))
        trainer.add_callback(bar)
        started = time.perf_counter()
        try:
            with StopOnSignal(trainer.accelerator) as stop:
                trainer.add_callback(stop)
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except UnpicklingError as error:
            raise PromptKDError(
                f"{checkpoint} holds more than tensors, and nothing else is unpickled: it is damaged, or no checkpoint "
                "of this run. Remove it to resume from the one before."
            ) from error
        finally:
            bar.close()
        self.timings["train"] = time.perf_counter() - started
        self._cost = {
            "steps": trainer.state.global_step,
            "seconds": meter.seconds,
            "peak_memory_bytes": meter.peak_memory_bytes,
            "peak_memory_by_phase": meter.peak_memory_by_phase,
        }
        say(_peak(meter, sampled=trainer.phases.sampled))

    def _checkpoint(self) -> Path | None:
        """The checkpoint to resume from, which the first process looks for; None to start from scratch."""
        found: list[Path | None] = [None]
        if is_main_process():
            found[0], passed_over = resumable_checkpoint(self.folder.checkpoints)
            for each, problem in passed_over.items():
                say(f"{each.name} is passed over and stays as passed-over-{each.name}: {problem}.")
            set_aside(passed_over)
        broadcast_object_list(found)
        say("There is no checkpoint yet: starting from scratch." if found[0] is None else f"Resuming from {found[0]}.")
        return found[0]

    def save(self, trainer: Any, name: str) -> None:
        """Write the finished model."""
        trainer.save_student(self.folder.path / name)

    def record(self, trainer: Any, name: str) -> None:
        """Measure the finished model on the validation rows, write the record and the page, and print the table."""
        trainer.accelerator.wait_for_everyone()
        if not (is_main_process() or trainer.is_sharded):
            return
        evaluations = []

        def measure(model: Any, teacher: Any) -> None:
            if trainer.validation_rows:
                started = time.perf_counter()
                decoding = validation_decoding(trainer)
                results = measure_rows(
                    model,
                    trainer.processing_class,
                    trainer.validation_rows,
                    decoding,
                    teacher=teacher,
                    batch_size=trainer.args.per_device_eval_batch_size,
                )
                evaluations.append(evaluation_of(results, decoding, [decoding.seed], model=name, data="validation"))
                self.timings["evaluate"] = time.perf_counter() - started
            if is_main_process():
                self.models[name] = model_record(self.folder.path / name, model)

        precision = autocast(trainer.accelerator, trainer.args)
        with out_of_memory_told(trainer), trainer.phases("validation"), precision:
            trainer.on_models(measure)
        if not is_main_process():
            return
        history = read_history(self.folder.metrics)
        warnings = self._warnings(trainer, history)
        results = Results(
            kind=self.kind,  # type: ignore[arg-type]
            config=self.merged,
            models=self.models,
            data=self.data,
            evaluations=evaluations,
            metrics=self.metrics,
            training={label_of(str(self.folder.path.absolute())): self._training(trainer.args, history)},
            history=[Series(name=self.kind, points=history)],
            timings=self.timings,
            notes=[*self.notes, f"Peak memory of the process {peak_memory() / 2**30:.1f} GiB.", *warnings],
        )
        results.write(self.folder.results)
        write_atomic(self.folder.report, render_report([results]))
        if evaluations:
            print(terminal_table([results]))
        say(f"The model is in {self.folder.path / name}, the page in {self.folder.report}.")

    def _warnings(self, trainer: Any, history: list[dict[str, Any]]) -> list[str]:
        """What a reader must know of how the training went; the skipped steps also as a metric."""
        skipped, steps = trainer.guard.skipped, trainer.state.global_step
        if not skipped:
            return findings_as_notes(history)
        self.metrics["skipped_steps"] = Metric(value=skipped)
        note = f"{skipped} of {steps} steps were skipped: their loss or gradient was NaN or infinite."
        return [note, *findings_as_notes(history)]

    def _training(self, args: Any, history: list[dict[str, Any]]) -> Training:
        """What the run cost; tokens per second where its steps log them."""
        speeds = [entry["tokens_per_second"] for entry in history if "tokens_per_second" in entry]
        method = args.algorithm if self.kind == "distill" else self.kind
        return Training(method=method, tokens_per_second=median(speeds) if speeds else None, **self._cost)

    @property
    def _trust(self) -> bool:
        return bool(self.training.get("trust_remote_code", False))

    def _selection(self, settings: dict[str, Any]) -> dict[str, Any]:
        """When to validate, and settings that keep the best checkpoint by it."""
        if self.options.eval_data is None:
            if settings.get("eval_strategy", "no") != "no" or "eval_steps" in settings:
                raise RequestError("Validation needs rows: give --eval-data, or leave --eval_strategy out.")
            return {}
        strategy = settings.get("eval_strategy", "steps" if "eval_steps" in settings else "epoch")
        if strategy == "steps" and "eval_steps" not in settings:
            raise RequestError("--eval_strategy steps needs --eval_steps, the optimizer steps between validations.")
        chosen: dict[str, Any] = {"eval_strategy": strategy}
        if self.options.select == "last" or strategy == "no":
            return chosen
        # The best model can come at any validation, and transformers finds it only where a checkpoint was written.
        saving = {"save_strategy": strategy} | ({"save_steps": settings["eval_steps"]} if strategy == "steps" else {})
        for name in ("save_strategy", "save_steps"):
            if name in settings and settings[name] != saving.get(name):
                raise RequestError(
                    f"--select {self.options.select} keeps the best of the checkpoints, so one is written at each "
                    f"validation. Got --{name} {settings[name]} with --eval_strategy {strategy}; leave it out, "
                    "validate as often by --eval_steps, or give --select last."
                )
        chosen |= saving
        chosen["load_best_model_at_end"] = True
        chosen["metric_for_best_model"] = self.options.select
        chosen["greater_is_better"] = not _LOWER_IS_BETTER[self.options.select]
        return chosen


def _peak(meter: CostMeter, *, sampled: bool) -> str:
    """The peak as a sentence, by phase, the largest first. `sampled` peaks are what was held at the ends of phases."""
    if not meter.peak_memory_by_phase:
        return f"Peak memory {gibibytes(meter.peak_memory_bytes)}."
    by_size = sorted(meter.peak_memory_by_phase.items(), key=lambda each: each[1], reverse=True)
    phases = ", ".join(f"{name} {gibibytes(size)}" for name, size in by_size)
    where = "at the ends of phases: " if sampled else ""
    return f"Peak memory {gibibytes(meter.peak_memory_bytes)} ({where}{phases})."
