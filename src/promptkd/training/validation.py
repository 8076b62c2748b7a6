"""What distillation and fine-tuning share: precision, validation, whole checkpoints, the finished model's folder."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor, nn
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from promptkd.data.encode import EncodedData
from promptkd.errors import PromptKDError, RequestError
from promptkd.evaluation.measure import measure_rows, summarize
from promptkd.generation import Decoding
from promptkd.results import RowResult
from promptkd.training.checkpoint import staged_checkpoint, whole_folder
from promptkd.training.distributed import autocast, is_sharded, run_whole
from promptkd.training.guard import FiniteSteps
from promptkd.training.manifest import damage
from promptkd.training.out_of_memory import Savings, out_of_memory_told
from promptkd.training.phases import Phases, UpdatePhase
from promptkd.training.resuming import ExactResuming

__all__ = ["RunTrainer"]

T = TypeVar("T")
_logger = logging.getLogger(__name__)


class RunTrainer(FiniteSteps):
    """Put before a TRL trainer among the bases of a class."""

    args: Any
    accelerator: Any
    model: Any
    model_wrapped: Any
    state: Any
    control: Any
    callback_handler: Any
    eval_dataset: Any
    processing_class: Any
    stop_ids: tuple[int, ...]
    _staging: Path | None = None
    step_phase = "student"
    """What `phases` calls a forward and backward pass of the trained model."""
    is_trial = False
    """Whether this is a trial, which writes no checkpoint and cannot be resumed."""
    _tr_loss: Any
    _globalstep_last_logged: int
    _metrics: Any
    _total_train_tokens: int
    notes: list[str]
    """What a reader of the run's figures must know of where and in which precision it computes."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.notes = _notes(self.args, raise_to_float32(self.model))
        for note in self.notes[1:]:
            _logger.warning(note)
        self._resuming = ExactResuming(self)
        self.add_callback(self._resuming)
        self.phases = Phases(self.accelerator.device)
        self.add_callback(UpdatePhase(self.phases))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'. Raises `PromptKDError` with one message where memory runs out."""
        self.phases.restart()
        with out_of_memory_told(self):
            return super().train(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        # The last micro-batch of an optimizer step waits for the device, and so for the work of those before it.
        with self.phases(self.step_phase, synchronize=self.accelerator.sync_gradients):
            self.phases.works_on(self.row_lengths(inputs))
            return super().training_step(model, inputs, num_items_in_batch)

    def row_lengths(self, inputs: Any) -> Sequence[int]:
        """Tokens of each row in `training_step`'s inputs, found without waiting for the device; () if unknown."""
        return ()

    def savings(self) -> Savings:
        """Which settings of the models would still save memory, for the message where it runs out."""
        return Savings()

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Validation loss, ROUGE-L, KL to the teacher and more, decoded as `promptkd evaluate` decodes.

        Each process measures its part of the rows (all of them where weights are sharded); the figures are of all rows.
        """
        rows = self.validation_rows() if eval_dataset is None else eval_dataset
        if isinstance(rows, EncodedData):
            rows = rows.examples
        if not rows:
            raise RequestError("Validation needs rows: give an eval_dataset.")
        started = time.perf_counter()
        index, count = self.accelerator.process_index, self.accelerator.num_processes
        if is_sharded(self.accelerator):
            index, count = 0, 1  # a sharded teacher runs on all processes together, so each measures all rows

        def measured(model: nn.Module, teacher: nn.Module | None) -> list[RowResult]:
            with autocast(self.accelerator, self.args):
                return measure_rows(
                    model,
                    self.processing_class,
                    rows[index::count],
                    self.decoding(),
                    teacher=teacher,
                    batch_size=self.args.per_device_eval_batch_size,
                )

        with out_of_memory_told(self), self.phases("validation"):
            scored = self.on_models(measured)
        scored = gather_object(scored) if count > 1 else scored
        metrics = {f"{metric_key_prefix}_{name}": metric.value for name, metric in summarize(scored).items()}
        metrics[f"{metric_key_prefix}_seconds"] = time.perf_counter() - started
        self.model.eval()  # TRL files what is logged in training mode under training
        self.log(dict(metrics))
        self.model.train()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def validation_rows(self) -> Any:
        """Encoded rows to validate on."""
        return self.eval_dataset

    @property
    def is_sharded(self) -> bool:
        """Whether validation needs all processes, since none has all weights."""
        return is_sharded(self.accelerator)

    def on_models(self, work: Callable[[nn.Module, nn.Module | None], T]) -> T:
        """`work(model, teacher)` with the model whole and the teacher as it came, None if there is none.

        With sharded weights every process must come here together, and run the teacher equally often.
        """
        return run_whole(lambda model: work(model, None), self.model_wrapped, self.accelerator)

    def save_method_state(self, folder: Path) -> None:
        """Write what a checkpoint holds beyond transformers' own."""

    def decoding(self) -> Decoding:
        """How validation decodes."""
        return Decoding(
            temperature=self.args.eval_temperature,
            max_new_tokens=self.args.max_completion_length,
            stop_ids=self.stop_ids,
            seed=self.args.eval_seed,
            batch_size=self.args.generation_batch_size,
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._resuming.keep_log()
        with staged_checkpoint(self) as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
                folder = staging / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
                (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # nothing reads it, and --hub_token stands in it
                self.save_method_state(folder)
            finally:
                self._staging = None

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:  # else transformers would take a step beyond the last one
            super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        if self._staging is not None:
            return str(self._staging)
        return super()._get_output_dir(trial)

    def _load_best_model(self) -> None:
        """The best checkpoint is one of this run's own, wherever a resumed checkpoint says that it lies."""
        best = Path(self.args.output_dir) / Path(str(self.state.best_model_checkpoint)).name
        if not best.is_dir():
            raise RequestError(
                f"The best checkpoint, {best.name}, is not in {self.args.output_dir}. Give --select last."
            )
        if self.accelerator.is_main_process and (problem := damage(best)):
            raise PromptKDError(
                f"The best checkpoint, {best}, was damaged while training went on: {problem}. Put the file back and go "
                "on by --resume, which passes over what it cannot trust."
            )
        self.state.best_model_checkpoint = str(best)
        super()._load_best_model()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card: the run's record and report say what was done."""

    def save_student(self, folder: str | Path) -> None:
        """Write model and tokenizer as safetensors that transformers and vLLM load."""
        with whole_folder(Path(folder), writes=self.args.should_save) as partial:
            self.save_model(str(partial), _internal_call=True)
            if self.args.should_save:
                (partial / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle has no place beside a model


def raise_to_float32(model: nn.Module) -> torch.dtype | None:
    """Make the trained weights float32; return the lower precision that they had, None if they had none.

    The weights that stand beside them go with them, but not those below an adapter of PEFT.
    """
    low = [each for each in model.parameters() if each.requires_grad and each.dtype.itemsize < 4]
    if not low:
        return None
    before = low[0].dtype
    if isinstance(model, PeftModel):
        for each in low:
            each.data = each.data.float()
    else:
        model.float()
    return before


def _notes(args: Any, raised_from: torch.dtype | None) -> list[str]:
    """Sentences on the precision, on weights that were raised, and on GPUs that are not used."""
    computes = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    notes = [f"Computed in {computes}, with trained weights in float32, on {args.device.type}."]
    if raised_from is not None:
        notes.append(
            f"The weights to train came in {str(raised_from).removeprefix('torch.')} and were raised to float32: lower "
            "precision loses small updates."
        )
    visible = torch.cuda.device_count() if args.device.type == "cuda" and args.world_size == 1 else 1
    if visible > 1:
        notes.append(
            f"{visible} GPUs are visible and one is trained on. To train on all: accelerate launch --num_processes "
            f"{visible} -m promptkd, and the same arguments."
        )
    return notes
