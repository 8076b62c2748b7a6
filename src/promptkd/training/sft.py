"""Supervised fine-tuning on the responses of the data, by TRL's `SFTTrainer`."""

from dataclasses import dataclass
from typing import Any, Literal

from datasets import Dataset
from torch import Tensor
from torch.utils.data import RandomSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from promptkd.data.dataset import stop_ids_of
from promptkd.data.encode import EncodedData, EncodedExample
from promptkd.engine import unwrap_peft
from promptkd.errors import check_all
from promptkd.training.config import (
    BF16,
    DECODED_ROWS,
    ON_NAN,
    UNFILTERED,
    OnNan,
    common_checks,
    fill_in_precision,
    fill_in_rows,
    option,
    use_one_gpu,
)
from promptkd.training.distributed import check_sharding
from promptkd.training.row_order import ShuffledRows
from promptkd.training.validation import RunTrainer

__all__ = ["FinetuneConfig", "FinetuneTrainer"]


@dataclass
class FinetuneConfig(SFTConfig):
    """Arguments of `FinetuneTrainer`: those of `trl.SFTConfig`, and the data and validation settings of promptkd."""

    max_prompt_length: int = option(256, "Most tokens of a prompt, template included; see --overlong.")
    max_completion_length: int = option(256, "Most tokens of a response, its end token included.")
    template: str = option("auto", "auto, alpaca, chat, or a Jinja text with {{ instruction }} and {{ input }}.")
    overlong: Literal["drop", "error"] = option("drop", "Rows over a length limit: drop (and count), or error.")
    on_nan: OnNan = option("stop", ON_NAN)
    eval_temperature: float = option(1.0, "Temperature of validation's responses; 0 decodes greedily.")
    eval_seed: int = option(10, "Seed of validation's sampled responses.")
    generation_batch_size: int | None = option(None, DECODED_ROWS)
    max_length: int | None = option(None, "Unused: rows over max_prompt_length or max_completion_length are dropped.")
    logging_steps: float = option(1, "Optimiser steps between two logged lines.")
    gradient_checkpointing: bool = option(False, "Recompute activations in backward: less memory, more time.")
    logging_nan_inf_filter: bool = option(False, UNFILTERED)
    bf16: bool | None = option(None, BF16)
    ddp_find_unused_parameters: bool | None = option(
        False, "DDP: look for parameters that a step does not reach, as those of experts; costs time."
    )

    def __post_init__(self) -> None:
        fill_in_precision(self)
        super().__post_init__()
        fill_in_rows(self)
        use_one_gpu(self)
        own_checks = [
            (self.overlong not in ("drop", "error"), f"overlong must be drop or error, got {self.overlong!r}"),
            (self.max_length is not None, "max_length would cut rows; use max_prompt_length and max_completion_length"),
            (self.packing, "packing joins rows that must stay apart; leave it off"),
        ]
        check_all("Wrong settings", (*common_checks(self), *own_checks))


class FinetuneTrainer(RunTrainer, SFTTrainer):
    """`SFTTrainer` on encoded rows: the loss counts response tokens alone."""

    _tag_names = ("promptkd", "sft")
    step_phase = "training"

    def __init__(
        self,
        model: PreTrainedModel,
        args: FinetuneConfig,
        train_data: EncodedData,
        eval_data: EncodedData | None,
        processing_class: PreTrainedTokenizerBase,
        **kwargs: Any,
    ):
        self._training = train_data.examples
        self._validation = [] if eval_data is None else eval_data.examples
        self.stop_ids = stop_ids_of(processing_class, unwrap_peft(model).generation_config, template=args.template)
        super().__init__(
            model=model,
            args=args,
            train_dataset=_labelled(train_data.examples),
            eval_dataset=None if eval_data is None else _labelled(eval_data.examples),
            processing_class=processing_class,
            **kwargs,
        )
        check_sharding(self.accelerator, self.model, adapter="none", needs_generate=False)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        return ShuffledRows(len(sampler), self.args.seed) if isinstance(sampler, RandomSampler) else sampler

    def rows_of_micro_batch(self, index: int, inputs: dict[str, Tensor]) -> list[int]:
        """The rows with the same tokens, for TRL's batches say nothing else of theirs."""
        if "attention_mask" in inputs:
            held = [ids[mask == 1] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
        else:  # rows side by side, each counting its positions from 0
            starts = (inputs["position_ids"][0] == 0).nonzero()[1:, 0].tolist()
            held = list(inputs["input_ids"][0].tensor_split(starts))
        tokens = {tuple(ids.tolist()) for ids in held}
        return [row.row for row in self._training if (*row.prompt_ids, *row.response_ids) in tokens]

    def row_lengths(self, inputs: dict[str, Tensor]) -> list[int]:
        """Padding counts: it is computed too."""
        rows, width = inputs["input_ids"].shape
        return [width] * rows

    def validation_rows(self) -> list[EncodedExample]:
        return self._validation


def _labelled(rows: list[EncodedExample]) -> Dataset:
    """Token ids with labels on the response alone; -100 elsewhere."""
    return Dataset.from_list(
        [
            {
                "input_ids": [*row.prompt_ids, *row.response_ids],
                "labels": [*([-100] * len(row.prompt_ids)), *row.response_ids],
            }
            for row in rows
        ]
    )
