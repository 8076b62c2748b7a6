"""Supervised fine-tuning on the responses of the data: TRL's `SFTTrainer`, with the loss of our own engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import RandomSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from promptkd.data.batch import TokenBatch, right_pad
from promptkd.data.encode import EncodedData, EncodedExample, stop_token_ids
from promptkd.data.summary import prompt_notes
from promptkd.engine import ChunkedLoss, check_scoring, response_hidden, unwrap_peft
from promptkd.models.end_tokens import keep_end_tokens
from promptkd.models.pair import token_cross_entropy
from promptkd.models.positions import check_rows_fit
from promptkd.settings import no_effect, option
from promptkd.training import saving
from promptkd.training.arguments import template_to_save
from promptkd.training.callbacks import CheckpointTiming, TrainedWhole, UpdatePhase
from promptkd.training.checkpoint import prepare_best, save_model_folder, staged_checkpoint
from promptkd.training.collapse import Watching
from promptkd.training.config import BaseConfig
from promptkd.training.distributed import autocast, check_sharding, is_sharded, run_in_forward, run_whole
from promptkd.training.guard import Guard
from promptkd.training.out_of_memory import out_of_memory_told
from promptkd.training.phases import Phases
from promptkd.training.row_order import EpochOrder
from promptkd.training.state import ExtraState, PartialLog
from promptkd.training.student import (
    end_notes,
    merge_trained,
    merged_notes,
    precision_notes,
    raise_to_float32,
    with_adapter_to_train,
)
from promptkd.training.validation import Validated, validate, validation_notes

T = TypeVar("T")


_READ_BY_US = "rows are read and encoded by promptkd; "
_INSTEAD = {  # of TRL
    "assistant_only_loss": 'the loss counts responses alone; turns="all" (--turns all) trains every assistant turn',
    "chat_template_path": f"{_READ_BY_US}give a template (--template)",
    "dataset_kwargs": f"{_READ_BY_US}leave it out",
    "dataset_num_proc": f"{_READ_BY_US}leave it out",
    "dataset_text_field": f"{_READ_BY_US}give columns (--columns OLD=NEW)",
    "eos_token": f"{_READ_BY_US}rows end with the template's end token, or the tokenizer's EOS",
    "eval_packing": "rows stay apart; leave it out",
    "packing_strategy": "rows are not packed; leave it out",
    "pad_token": "masks tell padding; leave it out",
    "padding_free": "rows are packed without padding where the model allows it; leave it out",
    "truncation_mode": "rows are never cut; use max_prompt_length and max_completion_length",
}


@dataclass
class FinetuneConfig(BaseConfig, SFTConfig):
    """Arguments of `FinetuneTrainer`: those of `trl.SFTConfig`, and the data and validation settings of promptkd."""

    learning_rate: float = option(2e-5, at_least=0)
    """Peak learning rate."""
    max_length: int | None = None
    """Unused: rows over max_prompt_length or max_completion_length are dropped."""

    def checks(self) -> list[tuple[bool, str]]:
        """See `BaseConfig.checks`."""
        return [
            *super().checks(),
            (self.max_length is not None, "max_length would cut rows; use max_prompt_length and max_completion_length"),
            (self.packing, "packing joins rows that must stay apart; leave it off"),
            (
                self.completion_only_loss is False,
                "completion_only_loss False would train prompts too, and the loss counts responses alone; leave it out",
            ),
            *no_effect(self, SFTConfig, _INSTEAD),
        ]


class FinetuneTrainer(SFTTrainer):
    """`SFTTrainer` on encoded rows: the loss counts response tokens alone."""

    _tag_names = ("promptkd", "sft")
    is_trial = False
    shared, teacher_names = None, ()
    checkpoint_root: Path | None = None
    """Where a checkpoint is being written, before it takes its place."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: FinetuneConfig,
        train_data: EncodedData,
        eval_data: EncodedData | None,
        processing_class: PreTrainedTokenizerBase,
        *,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ):
        set_seed(args.seed)  # decides the LoRA weights
        model = with_adapter_to_train(model, args, peft_config)
        self._training = train_data.examples
        self.template = template_to_save(train_data, args, processing_class)
        self.validation_rows = [] if eval_data is None else eval_data.examples
        self.masked_ids: tuple[int, ...] = ()
        self.validated: dict[int, Validated] = {}
        check_scoring(model)
        check_rows_fit("model", model, self._training, 0)
        if self.validation_rows:  # answers are written to these
            check_rows_fit("model", model, self.validation_rows, args.max_completion_length or 0)
        self.stop_ids = stop_token_ids(processing_class, unwrap_peft(model).generation_config, args.template)
        keep_end_tokens(model, self.stop_ids)
        # any id pads, since masks tell padding; TRL would ask for a padding token and make it the model's
        collator = DataCollatorForLanguageModeling(pad_token_id=0, pad_to_multiple_of=args.pad_to_multiple_of)
        super().__init__(
            model=model,
            args=args,
            train_dataset=_labeled(train_data.examples),
            eval_dataset=None if eval_data is None else _labeled(eval_data.examples),
            processing_class=processing_class,
            data_collator=collator,
            **kwargs,
        )
        self.notes = precision_notes(args, raise_to_float32(self.model)) + end_notes(self.stop_ids, args)
        self.notes += merged_notes(self.model) + validation_notes(args, self.validation_rows, processing_class)
        self.notes += prompt_notes(train_data, eval_data)
        """Sentences that a reader of the run's metrics must know, on precision, devices, ends, adapters and ROUGE."""
        check_sharding(self.accelerator, self.model, needs_generate=False)
        self.phases = Phases(self.accelerator.device)
        self.guard = Guard(args, self.accelerator, lambda: {"model": self.model})
        log = PartialLog(self)
        self.extra_state = ExtraState(log, self.guard, rows=self._training)
        for callback in (CheckpointTiming(self, log), UpdatePhase(self.phases), Watching(), TrainedWhole()):
            self.add_callback(callback)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', also after a call that ended within a step."""
        self._metrics["train"].clear()
        self.guard.restart()
        self.phases.restart()
        with out_of_memory_told(self):
            return super().train(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        with self.phases("training", synchronize=self.accelerator.sync_gradients):
            index = self.guard.begin_micro_batch(lambda: self._rows_in(inputs), self._tr_loss, self._metrics["train"])
            loss = super().training_step(model, inputs, num_items_in_batch)
            self.guard.note("loss", loss, index)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The micro-batch's part of the step's mean cross-entropy over response tokens, as TRL divides it."""
        if return_outputs or not self.model.training or self._needs_trls_loss():
            rows, width = inputs["input_ids"].shape
            self.phases.works_on([width] * rows)  # padding is computed too
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch, student = _token_batch(inputs), self.accelerator.unwrap_model(model)
        self.phases.works_on(batch.lengths)

        def loss_and_metrics() -> tuple[Tensor, dict[str, Tensor]]:
            with autocast(self.accelerator, self.args):  # the redirected forward runs outside of accelerate's own
                hidden = response_hidden(student, batch)
                loss = token_cross_entropy(student, hidden, batch.targets, accuracy=True)
            return loss.total, loss.metrics

        loss = ChunkedLoss(*run_in_forward(loss_and_metrics, model, self.accelerator, always=True))
        self._keep_metrics(batch, loss.metrics)
        if num_items_in_batch is None:  # transformers divides by the accumulated micro-batches
            return loss.total / max(1, len(batch.targets))
        # Processes average their gradients; `num_items_in_batch` counts the tokens of all of them.
        share = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return loss.total * share / torch.as_tensor(num_items_in_batch).clamp(min=1)

    def _needs_trls_loss(self) -> bool:
        """Whether settings or model ask for what only TRL's forward of the padded rectangle computes."""
        return (
            self.args.loss_type != "nll"
            or self.label_smoother is not None
            or self.compute_loss_func is not None
            or self.aux_loss_enabled  # the routers' load balance, of mixtures of experts
            or self.args.neftune_noise_alpha is not None  # its noise depends on the rectangle's width
            or self.accelerator.parallelism_config is not None
        )

    def _keep_metrics(self, batch: TokenBatch, metrics: dict[str, Tensor]) -> None:
        """Keep TRL's metrics of a micro-batch, of all processes, for the next logged line."""
        counts = [float(len(batch.targets)), float(sum(batch.lengths))]
        sums = torch.stack([metrics.get(name, batch.targets.new_zeros(())).double() for name in ("entropy", "correct")])
        own = torch.cat([sums, sums.new_tensor(counts)])
        entropy, correct, tokens, processed = self.accelerator.reduce(own, reduction="sum").tolist()
        logged = self._metrics["train"]
        logged["entropy"].append(entropy / max(1.0, tokens))
        logged["mean_token_accuracy"].append(correct / max(1.0, tokens))
        self._total_train_tokens += int(processed)
        logged["num_tokens"] = [self._total_train_tokens]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        step, sums = self.state.global_step + 1, self._metrics["train"]
        self.guard.end_step(norm, step, self.optimizer, running_loss=self._tr_loss, metrics=sums)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.guard.adjust(logs)
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """See `validate`."""
        return validate(self, eval_dataset, prefix=metric_key_prefix)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, RandomSampler):
            return sampler
        return EpochOrder(len(sampler), self.args.seed, lambda: int(self.state.epoch or 0))

    def _rows_in(self, inputs: dict[str, Tensor]) -> list[int]:
        """The rows with the same tokens, for TRL's batches say nothing else of theirs."""
        tokens = {tuple(ids) for ids, _ in _held(inputs)}
        return [row.row for row in self._training if (*row.prompt_ids, *row.response_ids) in tokens]

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

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card: the run's record and report say what was done."""

    def save_student(self, folder: str | Path) -> None:
        """Write model and tokenizer as safetensors that transformers and vLLM load, a LoRA model as an adapter."""
        save_model_folder(self, folder)

    def merge_student(self) -> None:
        """Merge a LoRA model's weights into its own, so that it is saved as a plain model."""
        merge_trained(self)

    @property
    def is_sharded(self) -> bool:
        """Whether validation needs all processes, since none has all weights."""
        return is_sharded(self.accelerator)

    def on_models(self, work: Callable[[nn.Module, nn.Module | None], T]) -> T:
        """`work(model, None)` with all of the model's weights on this process."""
        return run_whole(lambda model: work(model, None), self.model_wrapped, self.accelerator)

    def on_rows(self, work: Callable[..., list[Any]], rows: Sequence[EncodedExample]) -> list[Any]:
        """`work(model, None, rows)` likewise."""
        return self.on_models(lambda model, teacher: work(model, teacher, rows))

    def savings(self) -> dict[str, bool]:
        """No settings of the models but those that every training has would save memory."""
        return {}


def _labeled(rows: list[EncodedExample]) -> Dataset:
    """Token ids with labels on the response alone; -100 elsewhere."""
    ids = [[*row.prompt_ids, *row.response_ids] for row in rows]
    labels = [[-100] * len(row.prompt_ids) + row.response_ids for row in rows]
    return Dataset.from_list([{"input_ids": own, "labels": label} for own, label in zip(ids, labels, strict=True)])


def _held(inputs: dict[str, Tensor]) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of each row of a batch of TRL's, without padding."""
    ids, labels, masks = (inputs[name].cpu() for name in ("input_ids", "labels", "attention_mask"))
    rows = zip(ids, labels, masks == 1, strict=True)
    return [(own[mask].tolist(), label[mask].tolist()) for own, label, mask in rows]


def _token_batch(inputs: dict[str, Tensor]) -> TokenBatch:
    """The same rows as the engine runs them. A first token, which nothing precedes, is never predicted."""
    rows = _held(inputs)
    starts = [max(1, labels.count(-100)) for _, labels in rows]
    cut = [(ids[:start], ids[start:]) for (ids, _), start in zip(rows, starts, strict=True)]
    return right_pad(*zip(*cut, strict=True), device=inputs["input_ids"].device)
