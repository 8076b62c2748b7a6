"""What `sft` and `distill` have in common, from the checked folder to the record and the page."""

import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from pickle import UnpicklingError
from statistics import median
from typing import Any

from accelerate.utils import broadcast_object_list

from promptkd.cli.headline import compare_within, measure_speed
from promptkd.cli.outputs import RunFolder, data_record, label_of, say_rows
from promptkd.cli.parsing.parser import merged_config
from promptkd.cli.terminal import is_main_process, quiet_libraries, say
from promptkd.cli.trained_template import as_trained
from promptkd.data import EncodedData, Example, encode_examples, read_columns, read_examples, resolve_template
from promptkd.data.summary import limits_named, template_note
from promptkd.data.teacher_prompt import TeacherPrompts
from promptkd.errors import PromptKDError, RequestError
from promptkd.evaluation.measure import evaluation_of
from promptkd.evaluation.rouge_tokenizer import rouge_tokens
from promptkd.io.atomic import write_atomic
from promptkd.io.python_file import names_python, python_file
from promptkd.memory import gibibytes, peak_memory
from promptkd.models import load_adapted, load_model, load_tokenizer, model_record
from promptkd.models.vocabulary import vocabulary_without
from promptkd.report import render_report, terminal_table
from promptkd.report.formatting import estimate, joined
from promptkd.report.metrics import metric_info
from promptkd.report.preflight import preflight_advice, preflight_lines
from promptkd.responses import writes_responses
from promptkd.results import BEFORE, Evaluation, Kind, Metric, Results, Series, Training, file_sha256, now, read_history
from promptkd.training.baselines import TEACHER, Baselines
from promptkd.training.callbacks import CostMeter, MetricsFile, ProgressBar, quiet
from promptkd.training.checkpoint import chosen_from, kept_step, resumable_checkpoint, set_aside
from promptkd.training.collapse import findings_as_notes
from promptkd.training.config import student_revision
from promptkd.training.distributed import autocast
from promptkd.training.out_of_memory import out_of_memory_told
from promptkd.training.own_teacher import SELF, is_own
from promptkd.training.preflight import preflight
from promptkd.training.setup import rows_of_teachers
from promptkd.training.signals import StopOnSignal
from promptkd.training.trackers import LiveCurves
from promptkd.training.validation import Validated, kl_by_teacher, measure_kept, validation_decoding

_SET_HERE = {
    "output_dir": "--out",
    "save_total_limit": "--keep",
    "resume_from_checkpoint": "--resume",
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), "--select"),
}  # flags of transformers that would say a second time what an option of the command says
Read = Callable[..., list[Example]]


class TrainingRun:
    """One run of a training command. The methods are called in the order in which they stand."""

    def __init__(self, kind: Kind, options: Any, training: dict[str, Any], read: Read = read_examples):
        self.kind, self.options, self.training, self._read = kind, options, training, read
        begun = ("resume", "overwrite", "dry_run")  # no settings: config.yaml must serve for resuming, too
        self._config = {k: v for k, v in merged_config(options, training).items() if k not in begun}
        own = str(training.get("method", ""))
        if names_python(own) and "method_sha256" not in training and python_file(own).is_file():
            self._config["method_sha256"] = file_sha256(python_file(own))  # the record names the code that ran
        self.folder = RunFolder(options.out, self._config, resume=options.resume, overwrite=options.overwrite)
        self._trust = bool(training.get("trust_remote_code", False))
        self._examples: dict[str, tuple[str, list[Example]]] = {}

    @cached_property  # late: a study checks all of its runs, and a record asks git for the version of the code
    def results(self) -> Results:
        return Results(kind=self.kind, config=self._config)

    def arguments(self, config_class: type) -> Any:
        """The training configuration, once settings, folder and rows are known to be sound; nothing is written."""
        quiet_libraries()
        options = self.options
        if self.training.get("hub_token"):
            say("--hub_token is not used: models and data are read with HF_TOKEN or the login of `hf auth login`.")
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
        self._shows_curves = "tensorboard" in args.report_to  # transformers would put them among the checkpoints
        args.report_to = [name for name in args.report_to if name != "tensorboard"]
        self.folder.check()
        columns = read_columns(args.columns)
        sources = {"train": (options.data, options.limit), "validation": (options.eval_data, options.eval_limit)}
        for name, (source, limit) in sources.items():
            if source is not None:
                self._examples[name] = source, self._read(source, limit=limit, columns=columns)
        return args

    def rows(self) -> int:
        return len(self._examples["train"][1])

    def tokenizer(self, name: str, revision: str | None) -> Any:
        return as_trained(load_tokenizer(name, trust_remote_code=self._trust, revision=revision), name)

    def encode(
        self,
        tokenizer: Any,
        args: Any,
        owner: str,
        *,
        need_response: bool = True,
        teacher: TeacherPrompts | None = None,
        teacher_names: Sequence[str] = ("",),
    ) -> tuple[Any, Any]:
        """Training and validation rows as tokens; a chat template is said to be that of `owner`."""
        template = resolve_template(args.template, tokenizer, args.chat_template_kwargs, teacher)
        settings: dict[str, Any] = {"overlong": args.overlong, "max_prompt_length": args.max_prompt_length}
        settings["max_response_length"] = args.max_completion_length
        encoded: dict[str, EncodedData] = {}
        for name, (_, examples) in self._examples.items():
            settings["need_response"] = need_response or name == "validation"
            settings["turns"] = "last" if name == "validation" else args.turns
            with limits_named():
                made = encode_examples(examples, tokenizer, template, **settings)
            is_train = name == "train"
            encoded[name] = rows_of_teachers(made, teacher_names, f"the {name} data", all_used=is_train)
        self.note(template_note(template, owner, args.turns, saved_with=tokenizer))
        for name, data in encoded.items():
            source, _ = self._examples.pop(name)
            self.results.data[name] = data_record(source, data)
            self.results.notes += say_rows(source, data)
        return encoded["train"], encoded.get("validation")

    def load(self, role: str, name: str, settings: dict[str, Any] | None = None, *, adapted: bool = False) -> Any:
        """A model; `settings` are further arguments of `load_model`, `--model_init_kwargs` if None.

        `adapted`: a LoRA folder whose adapter will be trained on, in place of the merged model.
        """
        settings = self.training.get("model_init_kwargs") or {} if settings is None else settings
        model = (load_adapted if adapted else load_model)(name, trust_remote_code=self._trust, **settings)
        self.results.models[role] = model_record(name, model, revision=settings.get("revision"))
        say(f"Loaded the {role}: {name}.")
        return model

    def own_teacher(self, trainer: Any, told: str) -> None:
        """Record a teacher that is made of the student; `told` says how."""
        revision = student_revision(trainer.args)
        record = model_record(self.options.student, trainer.teacher.model, about=told, revision=revision)
        self.note(f"Teacher: {told}.")
        of_no_file: dict[str, Any] = {"sha256": "", "bytes_on_disk": None, "base": None, "adapters": []}
        is_start = self.options.teacher == SELF
        self.results.models[TEACHER] = record if is_start else record.model_copy(update=of_no_file)

    def note(self, text: str) -> None:
        say(text)
        self.results.notes.append(text)

    def preflight(self, trainer: Any, train: EncodedData, *, own_teacher: bool) -> None:
        """Say and record what student and teacher look like before training, with advice, also for a resumed run."""
        if is_main_process():
            with out_of_memory_told(trainer):
                seen = self.results.preflight = preflight(trainer, train, own_teacher=own_teacher)
            if trainer.teacher_names:
                self.note(
                    f"Before training, of the teachers only {trainer.teacher.name} was measured, on its own rows."
                )
            say("Before training:")
            for name, value in preflight_lines(seen):
                say(f"  {name:<26}{value}")
            notes = [f"Before training: {advice}" for advice in preflight_advice(seen)]
            for note in notes:
                self.note(note)
            Results(kind=self.kind, preflight=seen, notes=notes).write(self.folder.preflight)
        trainer.accelerator.wait_for_everyone()

    def keep_preflight(self) -> None:
        """Take over into the record what the run saw before its first step, if it looked."""
        if is_main_process() and self.folder.preflight.is_file():
            kept = Results.read(self.folder.preflight)
            self.results.preflight = kept.preflight
            self.results.notes += kept.notes

    def train(self, trainer: Any, title: str) -> None:
        """Train, or resume from the last checkpoint, until the end or a signal; then say the peak of memory."""
        checkpoint = self._checkpoint() if self.options.resume else None
        if checkpoint is not None:
            trainer.args.eval_on_start = False  # the run began with it
        quiet(trainer)
        if self._has_baselines(trainer):
            reads_more = any(row.teacher_prompt_ids is not None for row in trainer.validation_rows)
            apart = reads_more or not is_own(self.options.teacher)  # else it is the student before training
            trainer.add_callback(Baselines(trainer, self.folder.baselines, say, with_teacher=apart))
        samples = self.kind != "distill" or writes_responses(trainer.method.responses)
        unused = () if samples else ("rollout",)  # it passes on the data's responses
        bar, self._meter = ProgressBar(title), CostMeter(trainer.phases, without=unused)
        started = time.perf_counter()
        try:
            with StopOnSignal(trainer.accelerator) as stop:
                for callback in (self._meter, MetricsFile(self.folder.metrics), bar, stop):
                    trainer.add_callback(callback)
                if self._shows_curves:
                    trainer.add_callback(LiveCurves(self.folder.curves))
                    say(f"Live curves: tensorboard --logdir {self.folder.curves}")
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except UnpicklingError as error:
            reason = "nothing else is unpickled: it is damaged, or no checkpoint of this run"
            advice = "Remove it to resume from the one before."
            raise PromptKDError(f"{checkpoint} holds more than tensors, and {reason}. {advice}") from error
        finally:
            bar.close()
        self.results.timings["train"] = time.perf_counter() - started
        self._note_kept(trainer)
        by_size = sorted(self._meter.peak_memory_by_phase.items(), key=lambda each: -each[1])
        where = "at the ends of phases: " if trainer.phases.sampled else ""
        listed = ", ".join(f"{phase} {gibibytes(size)}" for phase, size in by_size)
        say(f"Peak memory {gibibytes(self._meter.peak_memory_bytes)}{f' ({where}{listed})' if listed else ''}.")

    def _note_kept(self, trainer: Any) -> None:
        """Say which step's weights the run keeps, and why."""
        chosen_by, value = trainer.args.metric_for_best_model, trainer.state.best_metric
        if not trainer.args.load_best_model_at_end or value is None:
            return
        info = metric_info(chosen_by.removeprefix("eval_"))
        by = joined(info.label, estimate(info, Metric(value=value))[0], by=" ")
        ties = "" if info is metric_info("loss") else ", ties by loss"
        self.note(f"Kept step {kept_step(trainer):,} of {trainer.state.global_step:,}, by {by}{ties}.")

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
        with out_of_memory_told(trainer), trainer.phases("validation"), autocast(trainer.accelerator, trainer.args):
            kept = measure_kept(trainer) if trainer.validation_rows else None
            measure = partial(self._measure, trainer, name, kept)
            results.evaluations = trainer.on_models(measure)
        if not is_main_process():
            return
        if self._has_baselines(trainer):
            self._add_baselines(name, chosen_from(trainer))
        history = read_history(self.folder.metrics)
        results.notes.append(f"Peak memory of the process {peak_memory() / 2**30:.1f} GiB.")
        steps = trainer.state.global_step
        if skipped := trainer.guard.skipped:
            results.metrics["skipped_steps"] = Metric(value=skipped)
            reason = "their loss or gradient was NaN or infinite"
            results.notes.append(f"{skipped} of {steps} steps were skipped: {reason}.")
        results.notes += findings_as_notes(history)
        results.history = [Series(name=self.kind, points=history)]
        speeds = [entry["tokens_per_second"] for entry in history if "tokens_per_second" in entry]
        results.training[label_of(str(self.folder.path.absolute()))] = Training(
            method=trainer.args.algorithm if self.kind == "distill" else self.kind,
            steps=steps,
            seconds=self._meter.seconds,
            peak_memory_bytes=self._meter.peak_memory_bytes,
            peak_memory_by_phase=self._meter.peak_memory_by_phase,
            tokens_per_second=median(speeds) if speeds else None,
            chosen_from=chosen_from(trainer),
        )
        results.created = now()
        results.write(self.folder.results)
        write_atomic(self.folder.report, render_report([results]))
        if results.evaluations:
            print(terminal_table([results]))
        say(f"The model is in {self.folder.path / name}, the page in {self.folder.report}.")

    def _measure(self, trainer: Any, name: str, kept: Validated | None, model: Any, teacher: Any) -> list[Evaluation]:
        if is_main_process():
            if self._has_baselines(trainer):
                self.results.models[BEFORE] = self.results.models[name]
            done = trainer.args.algorithm if self.kind == "distill" else self.kind
            of, steps = kept_step(trainer), trainer.state.global_step
            after = "1 step" if steps == 1 else f"{steps:,} steps" if of == steps else f"{of:,} of {steps:,} steps"
            about = f"the {name} after {after} of {done}"
            self.results.models[name] = model_record(self.folder.path / name, model, about=about)
        if kept is None:
            return []
        decoding, rows = validation_decoding(trainer), trainer.validation_rows
        scored, self.results.timings["evaluate"] = kept
        self.results.metrics |= kl_by_teacher(trainer, scored, rows)
        tokens = rouge_tokens(trainer.args.rouge_tokenizer, trainer.processing_class)
        labels = {"model": name, "data": "validation", "rouge_tokenizer": tokens.name}
        evaluation = evaluation_of(scored, decoding, [decoding.seed], **labels)
        skipped = bool(trainer.teacher_names) or (self.kind == "distill" and is_own(self.options.teacher))
        if self._has_baselines(trainer) and not skipped and teacher is not None and not trainer.is_sharded:
            tokenizer = trainer.processing_class
            size = vocabulary_without(tokenizer, decoding.masked_ids).size
            workload = {"rows": decoding.batch_size, "vocabulary": size}
            workload["new_tokens"] = min(32, trainer.args.max_completion_length)
            measure_speed(self.results, {name: model, TEACHER: teacher}, rows, workload)
        return [evaluation]

    def _has_baselines(self, trainer: Any) -> bool:
        """Whether the student before training and the teacher are measured too."""
        return self.kind == "distill" and self.options.measure == "all" and bool(trainer.validation_rows)

    def _add_baselines(self, name: str, validations: int) -> None:
        """What was measured before the first step, and the differences from it."""
        kept = Results.read(self.folder.baselines) if self.folder.baselines.is_file() else Results(kind="distill")
        self.results.evaluations += kept.evaluations
        self.results.timings |= kept.timings
        self.results.notes += kept.notes
        if kept.evaluations:
            labels = [*(each.model for each in kept.evaluations), name]
            compare_within(self.results, labels, chosen_from=validations)
        if BEFORE not in [each.model for each in kept.evaluations]:
            self.results.models.pop(BEFORE, None)

    def _selection(self, settings: dict[str, Any]) -> dict[str, Any]:
        """When to validate, and settings that keep the best checkpoint by it."""
        select, has_steps = self.options.select, "eval_steps" in settings
        if self.options.eval_data is None:
            if settings.get("eval_strategy", "no") != "no" or has_steps:
                raise RequestError("Validation needs rows: give --eval-data, or leave --eval_strategy out.")
            return {}
        strategy = settings.get("eval_strategy", "steps" if has_steps else "epoch")
        if strategy == "steps" and not has_steps:
            raise RequestError("--eval_strategy steps needs --eval_steps, the optimizer steps between validations.")
        if strategy == "no":
            return {"eval_strategy": strategy}
        saving = {"save_strategy": strategy} | ({"save_steps": settings["eval_steps"]} if strategy == "steps" else {})
        if select == "last":
            return {"eval_strategy": strategy} | ({} if {"save_strategy", "save_steps"} & {*settings} else saving)
        # The best model can come at any validation, and transformers finds it only where a checkpoint was written.
        for name in ("save_strategy", "save_steps"):
            if name in settings and settings[name] != saving.get(name):
                reason = "keeps the best of the checkpoints, so one is written at each validation"
                got = f"Got --{name} {settings[name]} with --eval_strategy {strategy}"
                advice = "leave it out, validate as often by --eval_steps, or give --select last"
                raise RequestError(f"--select {select} {reason}. {got}; {advice}.")
        best = {"metric_for_best_model": select, "greater_is_better": metric_info(select).better == "higher"}
        return {"eval_strategy": strategy, **saving, "load_best_model_at_end": True, **best}
