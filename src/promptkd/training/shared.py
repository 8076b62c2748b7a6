"""What distillation and fine-tuning share: validation, whole checkpoints, and the folder of the finished model."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from promptkd.data.encode import EncodedData
from promptkd.errors import RequestError
from promptkd.evaluation.measure import Decoding, measure_rows, summarize
from promptkd.training.checkpoints import staged_checkpoint
from promptkd.training.finite import FiniteSteps

__all__ = ["RunTrainer"]


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

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Validation loss, ROUGE-L, KL to the teacher and more, decoded as `promptkd evaluate` decodes.

        Each process measures its part of the rows; the figures are those of all rows.
        """
        rows = self.validation_rows() if eval_dataset is None else eval_dataset
        if isinstance(rows, EncodedData):
            rows = rows.examples
        if not rows:
            raise RequestError("Validation needs rows: give an eval_dataset.")
        started = time.perf_counter()
        index, count = self.accelerator.process_index, self.accelerator.num_processes
        with self.plain_teacher() as teacher, self.accelerator.autocast():
            scored = measure_rows(
                self.accelerator.unwrap_model(self.model_wrapped),
                self.processing_class,
                rows[index::count],
                self.decoding(),
                stop_ids=self.stop_ids,
                teacher=teacher,
                batch_size=self.args.per_device_eval_batch_size,
            )
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

    @contextmanager
    def plain_teacher(self) -> Iterator[nn.Module | None]:
        """The teacher as it came, whose KL validation reports; None if there is none."""
        yield None

    def save_method_state(self, folder: Path) -> None:
        """Write what a checkpoint holds beyond transformers' own."""

    def decoding(self) -> Decoding:
        """How validation decodes."""
        return Decoding(
            temperature=self.args.eval_temperature,
            max_new_tokens=self.args.max_completion_length,
            seed=self.args.eval_seed,
            batch_size=self.args.generation_batch_size,
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with staged_checkpoint(self) as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
                self.save_method_state(staging / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            finally:
                self._staging = None

    def _get_output_dir(self, trial: Any) -> str:
        if self._staging is not None:
            return str(self._staging)
        return super()._get_output_dir(trial)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card: the run's record and report say what was done."""

    def save_student(self, folder: str | Path) -> None:
        """Write model and tokenizer as safetensors that transformers and vLLM load."""
        self.save_model(str(folder), _internal_call=True)
        if self.args.should_save:
            (Path(folder) / "training_args.bin").unlink(missing_ok=True)  # a pickle has no place beside a model
