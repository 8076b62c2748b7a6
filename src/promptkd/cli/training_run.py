"""What `sft` and `distill` have in common, from the checked folder to the record and the page."""

import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from statistics import median
from typing import Any, Literal

from accelerate.utils import broadcast_object_list

from promptkd.cli.outputs import RunFolder
from promptkd.cli.parsing.parser import merged_config
from promptkd.cli.provenance import data_record, label_of, say_rows
from promptkd.cli.terminal import is_main_process, quiet_libraries, say
from promptkd.data import Example, encode_examples, read_examples
from promptkd.errors import PromptKDError, RequestError
from promptkd.evaluation.dataset_evaluation import measure_rows
from promptkd.evaluation.measure import evaluation_of
from promptkd.io.atomic import write_atomic
from promptkd.memory import gibibytes, peak_memory
from promptkd.models import load_model, load_tokenizer, model_record
from promptkd.report import render_report, terminal_table
from promptkd.report.metrics import metric_info
from promptkd.results import Evaluation, Metric, Results, Series, Training, read_history
from promptkd.training.callbacks import CostMeter, MetricsFile, ProgressBar, quiet
from promptkd.training.checkpoint import resumable_checkpoint, set_aside
from promptkd.training.collapse import findings_as_notes
from promptkd.training.distributed import autocast
from promptkd.training.out_of_memory import out_of_memory_told
from promptkd.training.phases import Phases
from promptkd.training.signals import StopOnSignal
from promptkd.training.validation import validation_decoding

_SET_HERE = {
    "output_dir": "--out",
    "save_total_limit": "--keep",
    "resume_from_checkpoint": "--resume",
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), "--select"),
}
"""Training flags of transformers that would say a second time what an option of the command says."""


class TrainingRun:
    """One run of a training command. The methods are called in the order in which they stand."""

    def __init__(
        self,
        kind: Literal["distill", "sft"],
        options: Any,
        training: dict[str, Any],
        read: Callable[..., list[Example]] = read_examples,
    ):
        self.kind, self.options, self.training, self._read = kind, options, training, read
        # How a run was started is no setting of it: its config.yaml must serve for resuming, too.
        begun = ("resume", "overwrite", "dry_run")
        self._config = {k: v for k, v in merged_config(options, training).items() if k not in begun}
        self.folder = RunFolder(options.out, self._config, resume=options.resume, overwrite=options.overwrite)
        self._trust = bool(training.get("trust_remote_code", False))
        self._examples: dict[str, tuple[str, list[Example]]] = {}

    @cached_property
    def results(self) -> Results:
        """The record, which fills up on the way."""
        return Results(kind=self.kind, config=self._config)

    def arguments(self, config_class: type) -> Any:
        """The training configuration, once settings, folder and rows are known to be sound; nothing is written."""
        quiet_libraries()
        options = self.options
        for name in self.training.keys() & _SET_HERE.keys():
            raise RequestError(f"--{name} is set by {_SET_HERE[name]} here. Give that instead.")
        settings = {"report_to": "none", "disable_tqdm": True, "log_level_replica": "error", **self.training}
        if options.resume and settings.get("save_only_model"):
            raise RequestError("--save_only_model leaves out of the checkpoints what --resume needs.")
        settings |= {"save_total_limit": options.keep, "output_dir": str(self.folder.checkpoints)}
        settings |= self._selection(settings)
        try:
            args = config_class(**settings)
        except (ValueError, TypeError) as error:
            raise RequestError(" ".join(str(error).split())) from error
        self.folder.check()
        self._examples["train"] = options.data, self._read(options.data, limit=options.limit)
        if options.eval_data is not None:
            self._examples["validation"] = options.eval_data, self._read(options.eval_data, limit=options.eval_limit)
        return args

    def rows(self) -> int:
        """Training rows that were read; those over a length limit are among them."""
        return len(self._examples["train"][1])

    def tokenizer(self, name: str) -> Any:
        return load_tokenizer(name, trust_remote_code=self._trust)

    def encode(self, tokenizer: Any, args: Any, *, need_response: bool = True) -> tuple[Any, Any]:
        """Training and validation rows as tokens; None for validation rows that were not asked for."""
        encoded = {
            name: encode_examples(
                examples,
                tokenizer,
                args.template,
                max_prompt_length=args.max_prompt_length,
                max_response_length=args.max_completion_length,
                overlong=args.overlong,
                need_response=need_response or name == "validation",
            )
            for name, (_, examples) in self._examples.items()
        }
        for name, data in encoded.items():
            source, _ = self._examples.pop(name)
            self.results.data[name] = data_record(source, len(data.examples), data.dropped)
            say_rows(source, data)
        return encoded["train"], encoded.get("validation")

    def load(self, role: str, name: str, settings: dict[str, Any] | None = None) -> Any:
        """A model; `settings` are further arguments of `load_model`, `--model_init_kwargs` if None."""
        settings = self.training.get("model_init_kwargs") or {} if settings is None else settings
        model = load_model(name, trust_remote_code=self._trust, **settings)
        self.results.models[role] = model_record(name, model)
        say(f"Loaded the {role}: {name}.")
        return model

    def note(self, text: str) -> None:
        """Say, and keep in the record, what a reader of the metrics must know."""
        say(text)
        self.results.notes.append(text)

    def train(self, trainer: Any, title: str) -> None:
        """Train, or resume from the last checkpoint, until the end or a signal; then say the peak of memory."""
        checkpoint = self._checkpoint() if self.options.resume else None
        if checkpoint is not None:
            trainer.args.eval_on_start = False  # the run began with it
        quiet(trainer)
        bar, self._meter = ProgressBar(title), CostMeter(trainer.phases)
        started = time.perf_counter()
        try:
            with StopOnSignal(trainer.accelerator) as stop:
                for callback in (self._meter, MetricsFile(self.folder.metrics), bar, stop):
                    trainer.add_callback(callback)
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except UnpicklingError as error:
            raise PromptKDError(
                f"{checkpoint} holds more than tensors, and nothing else is unpickled: it is damaged, or no checkpoint "
                "of this run. Remove it to resume from the one before."
            ) from error
        finally:
            bar.close()
        self.results.timings["train"] = time.perf_counter() - started
        say(_peak(self._meter, trainer.phases))

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

    def record(self, trainer: Any, name: str) -> None:
        """Measure the finished model on the validation rows, write the record and the page, and print the table."""
        trainer.accelerator.wait_for_everyone()
        if not (is_main_process() or trainer.is_sharded):
            return
        results = self.results
        precision = autocast(trainer.accelerator, trainer.args)
        with out_of_memory_told(trainer), trainer.phases("validation"), precision:
            results.evaluations = trainer.on_models(lambda model, teacher: self._measure(trainer, name, model, teacher))
        if not is_main_process():
            return
        history = read_history(self.folder.metrics)
        results.notes.append(f"Peak memory of the process {peak_memory() / 2**30:.1f} GiB.")
        if skipped := trainer.guard.skipped:
            results.metrics["skipped_steps"] = Metric(value=skipped)
            steps = f"{skipped} of {trainer.state.global_step} steps"
            results.notes.append(f"{steps} were skipped: their loss or gradient was NaN or infinite.")
        results.notes += findings_as_notes(history)
        results.history = [Series(name=self.kind, points=history)]
        speeds = [entry["tokens_per_second"] for entry in history if "tokens_per_second" in entry]
        results.training[label_of(str(self.folder.path.absolute()))] = Training(
            method=trainer.args.algorithm if self.kind == "distill" else self.kind,
            steps=trainer.state.global_step,
            seconds=self._meter.seconds,
            peak_memory_bytes=self._meter.peak_memory_bytes,
            peak_memory_by_phase=self._meter.peak_memory_by_phase,
            tokens_per_second=median(speeds) if speeds else None,
        )
        results.write(self.folder.results)
        write_atomic(self.folder.report, render_report([results]))
        if results.evaluations:
            print(terminal_table([results]))
        say(f"The model is in {self.folder.path / name}, the page in {self.folder.report}.")

    def _measure(self, trainer: Any, name: str, model: Any, teacher: Any) -> list[Evaluation]:
        """The evaluation on the validation rows, if there are any; the model's hash goes into the record."""
        if is_main_process():
            self.results.models[name] = model_record(self.folder.path / name, model)
        if not trainer.validation_rows:
            return []
        started, decoding = time.perf_counter(), validation_decoding(trainer)
        results = measure_rows(
            model,
            trainer.processing_class,
            trainer.validation_rows,
            decoding,
            teacher=teacher,
            batch_size=trainer.args.per_device_eval_batch_size,
        )
        evaluation = evaluation_of(results, decoding, [decoding.seed], model=name, data="validation")
        self.results.timings["evaluate"] = time.perf_counter() - started
        return [evaluation]

    def _selection(self, settings: dict[str, Any]) -> dict[str, Any]:
        """When to validate, and settings that keep the best checkpoint by it."""
        select = self.options.select
        strategy = settings.get("eval_strategy", "steps" if "eval_steps" in settings else "epoch")
        if self.options.eval_data is None:
            if settings.get("eval_strategy", "no") != "no" or "eval_steps" in settings:
                raise RequestError("Validation needs rows: give --eval-data, or leave --eval_strategy out.")
            return {}
        if strategy == "steps" and "eval_steps" not in settings:
            raise RequestError("--eval_strategy steps needs --eval_steps, the optimizer steps between validations.")
        if select == "last" or strategy == "no":
            return {"eval_strategy": strategy}
        # The best model can come at any validation, and transformers finds it only where a checkpoint was written.
        saving = {"save_strategy": strategy} | ({"save_steps": settings["eval_steps"]} if strategy == "steps" else {})
        for name in ("save_strategy", "save_steps"):
            if name in settings and settings[name] != saving.get(name):
                raise RequestError(
                    f"--select {select} keeps the best of the checkpoints, so one is written at each validation. Got "
                    f"--{name} {settings[name]} with --eval_strategy {strategy}; leave it out, validate as often by "
                    "--eval_steps, or give --select last."
                )
        best = {"metric_for_best_model": select, "greater_is_better": metric_info(select).better == "higher"}
        return {"eval_strategy": strategy, **saving, "load_best_model_at_end": True, **best}


def _peak(meter: CostMeter, phases: Phases) -> str:
    """The peak as a sentence, by phase, the largest first."""
    by_size = sorted(meter.peak_memory_by_phase.items(), key=lambda each: -each[1])
    where = "at the ends of phases: " if phases.sampled else ""
    listed = ", ".join(f"{name} {gibibytes(size)}" for name, size in by_size)
    return f"Peak memory {gibibytes(meter.peak_memory_bytes)}{f' ({where}{listed})' if listed else ''}."
