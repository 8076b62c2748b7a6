"""`DistillTrainer`: a training step, from the responses to the log (`training_step`), and the parts that it is made of.

Each part has a file: rollout.py (rows to responses), teacher_tuner.py (the teacher's step), student_loss.py (the
student's), guard.py (no step on NaN), state.py (what a checkpoint adds), window.py (what they share). Loop, optimizer,
devices and processes are transformers'.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import set_seed
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

from promptkd.data import EncodedData, EncodedExample
from promptkd.data.kept_logits import KeptLogits
from promptkd.engine import disable_dropout, unwrap_peft
from promptkd.methods import Method
from promptkd.models.end_tokens import keep_end_tokens
from promptkd.objectives import forward_kl, reverse_kl
from promptkd.training import arguments, saving, teachers
from promptkd.training.callbacks import CheckpointTiming, CompletionLog, TrainedWhole, UpdatePhase, logs_step
from promptkd.training.checkpoint import prepare_best, save_model_folder, staged_checkpoint
from promptkd.training.collapse import Watching
from promptkd.training.config import DistillConfig, PromptKDConfig, chosen_method
from promptkd.training.distributed import is_sharded, run_inside, run_whole
from promptkd.training.guard import Guard
from promptkd.training.out_of_memory import out_of_memory_told
from promptkd.training.own_teacher import MovingAverage, no_context_notes
from promptkd.training.phases import Phases
from promptkd.training.rollout import Rollout
from promptkd.training.row_order import EpochOrder
from promptkd.training.setup import check_rows
from promptkd.training.state import ExtraState, PartialLog
from promptkd.training.student import (
    end_notes,
    merge_trained,
    merged_notes,
    precision_notes,
    prepare_student,
    raise_to_float32,
)
from promptkd.training.student_loss import StudentLoss
from promptkd.training.teacher import Teacher
from promptkd.training.teacher_tuner import make_tuner
from promptkd.training.validation import Validated, validate, validation_notes
from promptkd.training.window import MicroBatch, StepMetrics, Window

T = TypeVar("T")


class DistillTrainer(Trainer):
    """Distills a student from a teacher by any `Method`.

    Args:
        model: the student: a hub name, folder, run folder, GGUF file or loaded model.
        teacher_model: the teacher, likewise, frozen; "self" is the student's start, "ema" its moving average; or
            `KeptLogits`. None with `args.kept_logits`. Several are a mapping of names, which rows have in a column.
        args: a `DistillConfig`.
        train_dataset, eval_dataset: rows in any of the forms of docs/data.md, or `EncodedData`; to train on also a
            stream, to validate on also a dictionary of sets (docs/data.md, "From Python").
        processing_class: the tokenizer; by default that of the student's name.
        method: a `Method` of your own in place of the one that `args.method` names.
        teacher_processing_class: the teacher's tokenizer, to compare when the teacher comes as a loaded model.
        peft_config: LoRA weights to train in place of the whole student.
        quantization_config, callbacks, optimizers: as transformers takes them.

    Raises:
        RequestError: for differing vocabularies, unusable rows, too few rows for one optimizer step, arguments that
            only other trainers of transformers and TRL take.
    """

    loss_is_scaled_for_ga = True  # by the tokens of the whole optimizer step, not of the micro-batch
    is_trial = False  # a dry run, which writes no checkpoint and cannot be resumed
    checkpoint_root: Path | None = None
    """Where a checkpoint is being written, before it takes its place."""
    _total_train_tokens = 0

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        teacher_model: str | Path | PreTrainedModel | KeptLogits | Mapping[str, Any] | None,
        args: DistillConfig | None = None,
        train_dataset: Iterable[dict[str, Any]] | EncodedData | None = None,
        eval_dataset: Iterable[dict[str, Any]] | Mapping[str, Any] | EncodedData | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        method: Method | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | Mapping[str, PreTrainedTokenizerBase] | None = None,
        peft_config: PeftConfig | None = None,
        quantization_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        **others: Any,
    ):
        arguments.refuse_others(others, type(self).__name__)
        args = arguments.own_settings(args)
        self.method = chosen_method(args, method)
        own = model, processing_class = arguments.student_and_tokenizer(model, processing_class, args)
        loaded = teachers.load_teachers(teacher_model, teacher_processing_class, args, self.method, own)
        given = arguments.training_rows(train_dataset, args), arguments.evaluation_sets(eval_dataset)
        rows = teachers.prepare_rows(self.method, args, own, loaded, *given)
        self.shared, self.notes, self._ends, self.template = rows.shared, rows.notes, rows.ends, rows.template
        self.notes += no_context_notes(teacher_model, args, self.method, rows.train)
        self.masked_ids = () if self.shared is None else self.shared.masked
        """Tokens that validation never samples, since one of the models does not have them."""
        self.dropped_rows = 0 if rows.train is None else rows.train.dropped
        student = prepare_student(model, args, processing_class, peft_config, quantization_config)
        train = None if rows.train is None else rows.train.examples
        sets = {name: each.examples for name, each in rows.validation.items()}
        taken: Any = {"eval_dataset": sets.get("", sets or None), "callbacks": callbacks, "optimizers": optimizers}
        super().__init__(student, args, list, train, processing_class=processing_class, **taken)  # rows stay rows
        self._make_parts({name: model for name, (model, _, _) in loaded.items()})
        set_seed(args.seed, device_specific=True)  # each process draws responses of its own

    def _make_parts(self, models: dict[str, Any]) -> None:
        """What a step is made of, once transformers has placed the student; without a teacher, its moving average."""
        args, accelerator, student, tokenizer = self.args, self.accelerator, self.model, self.processing_class
        raised = raise_to_float32(student)
        self.guard = Guard(args, accelerator, lambda: {"student": self.model, **teachers.teacher_models(self.teachers)})
        own = models.get("", student) is None
        average = MovingAverage(student, args.teacher_ema_decay, accelerator, self.guard) if own else None
        models = models if average is None else {"": average.model}
        self.notes += precision_notes(args, raised) + merged_notes(student, *models.values())
        self.notes += validation_notes(args, self.eval_dataset, tokenizer)
        check_rows(None if self.train_dataset is None else len(self.train_dataset), args)
        self.stop_ids, notes = self._ends.stops(unwrap_peft(student).generation_config)
        keep_end_tokens(student, self.stop_ids)
        self.notes += notes + end_notes(self.stop_ids, args)
        self.teachers = teachers.make_teachers(self, models, averages=own)
        self.teacher, self.adapter = self.teachers[0], self.teachers[0].adapter
        student.add_model_tags(["promptkd", "distillation"])
        if args.disable_dropout:
            disable_dropout(student)
        self.phases = Phases(accelerator.device)
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list)}  # since the last logged line
        self.window: Window | None = None
        self.validated: dict[int, Validated] = {}
        metrics = self.step_metrics = StepMetrics()
        self.rollout = Rollout(self.method, self.teacher, student, tokenizer, self.stop_ids, args, accelerator, metrics)
        self.teacher_names = self.rollout.teacher_names = tuple(each.name for each in self.teachers if each.name)
        self.tuner = make_tuner(self.teachers, args, accelerator, self.guard, self.phases, metrics)
        self.student_loss = StudentLoss(self.method, self.teachers, args, accelerator, metrics)
        log = PartialLog(self)
        held: Any = {"responses": self.method.responses, "moving": self.method.moving, "average": average}
        self.extra_state = ExtraState(log, self.guard, rows=self.train_dataset, tuner=self.tuner, **held)
        timing, update = CheckpointTiming(self, log), UpdatePhase(self.phases)
        for callback in filter(None, (timing, update, Watching(), TrainedWhole(), average)):
            self.add_callback(callback)
        if args.log_completions:
            self.add_callback(CompletionLog(self.rollout.completions))

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch; with the first one of an optimizer step come its responses and the teacher's step.

        `inputs` are the rows of the whole optimizer step on this process, the same for each micro-batch.
        """
        model.train()
        if self.window is None or self.window.is_done:
            done, total = self.state.global_step, self.state.max_steps
            with self.phases("rollout"):
                self.phases.works_on([len(row.prompt_ids) + self.rollout.limit for row in inputs])
                self.window = self.rollout(inputs, model, step=done, total_steps=total)
            if self.tuner is not None:
                with self.phases("prompt"):
                    logs = logs_step(self.args, self.state, self.args.prompt_every)
                    self.tuner.step(self.window, model, self.student_loss.hidden_for_tuner, step=done, logs=logs)
        micro_batch = self.window.next()
        with self.phases("student", synchronize=self.window.is_done):
            self.phases.works_on(micro_batch.batch.lengths)
            self.guard.begin_micro_batch(micro_batch.row_numbers, self._tr_loss, self._metrics["train"])
            loss = super().training_step(model, micro_batch)  # the forward below, and the backward
            self.guard.note("loss", loss, micro_batch.index)
        if self.window.is_done:
            self._keep_metrics(self.window)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: MicroBatch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        assert self.window is not None
        loss = self.student_loss(model, self.window, inputs)
        return (loss, None) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """After a step's last backward: the guard decides whether the student's optimizer may move."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        step, sums = self.state.global_step + 1, self._metrics["train"]
        if self.guard.end_step(norm, step, self.optimizer, running_loss=self._tr_loss, metrics=sums):
            self.method.moving.end_step(self._means)
        return norm

    def _keep_metrics(self, window: Window) -> None:
        """Keep a step's metrics for the next logged line."""
        metrics = self.step_metrics.means(window, self.accelerator, self.phases.lap())
        self._means = dict(metrics)
        if self.method.objective in (forward_kl, reverse_kl):
            metrics = {name.replace("student_loss", "student_kl"): value for name, value in metrics.items()}
        metrics |= self.method.moving.metrics() | teachers.adapter_metrics(self.teachers)
        for name, value in (metrics | self.method.responses.metrics()).items():
            self._metrics["train"][name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As transformers', with the means over the steps since the last logged line."""
        self.guard.adjust(logs)
        if self.model.training:
            logs |= {name: sum(values) / len(values) for name, values in self._metrics["train"].items()}
            self._metrics["train"].clear()
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', also after a call that ended within a step. Raises `PromptKDError` for no memory or NaN."""
        self.window = None
        self.step_metrics.clear()
        self._metrics["train"].clear()
        self.guard.restart()
        self.phases.restart()
        with out_of_memory_told(self):
            return super().train(*args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """See `validate`."""
        return validate(self, eval_dataset, prefix=metric_key_prefix, method=self.method)

    predict = arguments.refuse_prediction

    # ---- rows ----

    def get_train_dataloader(self) -> DataLoader:
        """Each batch holds this process's rows of a whole optimizer step, and comes once per micro-batch."""
        size, sampler = self._train_batch_size * self.args.gradient_accumulation_steps, self._get_train_sampler
        return self._get_dataloader(self.train_dataset, "Training", size, sampler, is_training=True)

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        rows = self.train_dataset if train_dataset is None else train_dataset
        repeats, shuffle = self.args.gradient_accumulation_steps, self.args.shuffle_dataset
        window = self.args.per_device_train_batch_size * repeats * self.accelerator.num_processes
        settings = {"window": window, "repeats": repeats, "shuffle": shuffle}
        return EpochOrder(len(rows), self.args.seed, lambda: int(self.state.epoch or 0), **settings)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """A `MicroBatch` is on the device already."""
        return inputs

    # ---- checkpoints and models ----

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.tuner is not None:
            self.tuner.start(num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:  # else transformers would take a step beyond the last one
            super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with staged_checkpoint(self):
            super()._save_checkpoint(model, trial)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.checkpoint_root or super()._get_output_dir(trial))

    _determine_best_metric = saving.determine_best
    _save = saving.save_model_files
    _save_optimizer_and_scheduler = saving.save_optimizer
    _save_scaler = saving.save_scaler
    _save_rng_state = saving.save_random_states
    _load_optimizer_and_scheduler = saving.load_states
    _load_rng_state = saving.load_random_states

    def _load_best_model(self) -> None:
        prepare_best(self)
        super()._load_best_model()
        self.extra_state.load_adapter(self.state.best_model_checkpoint)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card: the run's record and report say what was done."""

    def save_student(self, folder: str | Path) -> None:
        """Write student and tokenizer as transformers and vLLM load them; LoRA as an adapter if `can_join`."""
        save_model_folder(self, folder)

    def save_adapter(self, run: str | Path) -> None:
        """Write what was trained of the teacher, if anything, into `run`: a soft prompt into `prompt`, as PEFT does."""
        if self.args.should_save:
            teachers.save_adapters(self.teachers, Path(run))

    def merge_student(self) -> None:
        """Merge a LoRA student's weights into its own, so that it is saved as a plain model."""
        merge_trained(self)

    # ---- what commands and parts ask ----

    @property
    def validation_rows(self) -> Any:
        """Encoded rows to validate on, of several sets by their names; None without."""
        return self.eval_dataset

    @property
    def is_sharded(self) -> bool:
        """Whether validation needs all processes, since none has all weights."""
        return is_sharded(self.accelerator)

    @property
    def compares(self) -> bool:
        """Whether student and teacher can be measured side by side."""
        return self.shared is not None and self.teacher.measurable is not None

    def on_rows(self, work: Callable[..., list[Any]], rows: Sequence[EncodedExample]) -> list[Any]:
        """`work(student, teacher, rows)` for each teacher's rows, as `on_models` does it; what it gives of all rows."""
        turns = teachers.with_rows(self.teachers, rows)
        return [found for each, own in turns for found in self.on_models(partial(work, rows=own), each)]

    def on_models(self, work: Callable[[nn.Module, nn.Module | None], T], teacher: Teacher | None = None) -> T:
        """`work(student, teacher)`: the student whole, the teacher (or the first) plain; None if not compared.

        With sharded weights every process must come here together, and run the teacher equally often.
        """
        chosen = teacher or self.teacher
        chosen.bring()

        def with_teacher(student: nn.Module) -> T:
            with chosen.without_adapter():
                compared = chosen.measurable if self.compares else None
                return run_inside(lambda: work(student, compared), chosen.model)

        return run_whole(with_teacher, self.model_wrapped, self.accelerator)

    def trainable_share(self) -> tuple[int, float]:
        """Trainable parameters of all teachers, and their share of all that these have."""
        return teachers.trainable_share(self.teachers)

    def savings(self) -> dict[str, bool]:
        """Which settings of the models would still save memory, for `out_of_memory.advice`."""
        lora = isinstance(self.accelerator.unwrap_model(self.model), PeftModel)
        return teachers.savings(self.teachers, self.args) | {"lora_student": not lora}


class PromptKDTrainer(DistillTrainer):
    """`DistillTrainer` preset to PromptKD (Kim, Jang, Yang 2024, arXiv 2402.12842)."""

    def __init__(self, model: Any, teacher_model: Any, args: PromptKDConfig | None = None, *others: Any, **kwargs: Any):
        super().__init__(model, teacher_model, arguments.promptkd_settings(args), *others, **kwargs)
