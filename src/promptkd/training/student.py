"""The student made ready to be trained: loaded, in its LoRA wrapper, with weights in float32."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from promptkd.data.kept_logits import KeptLogits
from promptkd.engine import unwrap_peft
from promptkd.engine.devices import CPU_FOR_MPS
from promptkd.errors import RequestError
from promptkd.models import load_model, merged_parts
from promptkd.models.adapter_files import can_join, name_base
from promptkd.models.merge import forget_origin, has_adapter, merge_given
from promptkd.models.source import absolute_name

_LOGGER = logging.getLogger(__name__)


def prepare_student(
    model: str | Path | PreTrainedModel | PeftModel,
    args: Any,
    tokenizer: PreTrainedTokenizerBase,
    peft_config: PeftConfig | None = None,
    quantization_config: Any = None,
) -> nn.Module:
    """The student as the trainer takes it; `args.seed` decides its LoRA weights.

    A tokenizer without a padding token gets its end token for that. An adapter that does not train, or beside which
    `peft_config` asks for another, is merged into its model. Raises `RequestError` for a LoRA configuration that cannot
    be trained.
    """
    set_seed(args.seed)
    if isinstance(model, str | Path):
        settings = dict(args.model_init_kwargs or {})
        if quantization_config is not None:
            settings["quantization_config"] = quantization_config
        model = load_model(model, trust_remote_code=args.trust_remote_code, **settings)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return with_adapter_to_train(model, args, peft_config)


def with_adapter_to_train(model: nn.Module, args: Any, peft_config: PeftConfig | None) -> nn.Module:
    """`model` with what `peft_config` asks for beside its weights, or as it is: see `prepare_student`."""
    if has_adapter(model) and (peft_config is not None or not any(each.requires_grad for each in model.parameters())):
        model = merge_given(model)
    if peft_config is not None:
        if peft_config.is_prompt_learning:
            raise RequestError("The student cannot have a soft prompt of its own. Give a LoraConfig as peft_config.")
        model = get_peft_model(model, peft_config)
    if isinstance(model, PeftModel):
        if isinstance(model.get_output_embeddings(), BaseTunerLayer):
            raise RequestError("The student's head cannot carry LoRA weights. Take lm_head out of target_modules.")
        name_base(model)
        if args.gradient_checkpointing:
            model.enable_input_require_grads()
    return model


def merge_trained(trainer: Any) -> None:
    """Merge the LoRA weights that a trainer trains into the model's own. `RequestError` if there are none."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not isinstance(model, PeftModel):
        raise RequestError("Only a model that was trained with LoRA (peft_config) can be merged.")
    if vars(unwrap_peft(model)).get("is_quantized", False):  # rounded again, so that nothing tells what it is
        merged = model.merge_and_unload()
        forget_origin(merged)
    else:
        merged = merge_given(model)
    trainer.model = trainer.model_wrapped = merged
    trainer.validated = {}  # sums of rounded weights: no longer the model that was measured


def saves_merged(trainer: Any) -> bool:
    """Whether a trainer's adapter can only be saved merged, since no folder holds the weights that it belongs to."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return isinstance(model, PeftModel) and not can_join(model) and not trainer.is_sharded


def merged_notes(student: nn.Module, *teachers: nn.Module | KeptLogits) -> list[str]:
    """Sentences on adapters that were merged into the models, and on how one that is trained on top will be saved."""
    models = [("student" if teachers else "model", student), *(("teacher", each) for each in teachers)]
    known = [(role, merged_parts(each)) for role, each in models if isinstance(each, nn.Module)]
    notes = [f"The {role} is {merged.told}." for role, merged in known if merged is not None]
    if isinstance(student, PeftModel) and (how := _saved_as(student)):
        notes.append(f"The adapter that is trained will be saved {how}.")
    return notes


def _saved_as(student: PeftModel) -> str:
    """How an adapter that is trained will be saved, where that is not by itself."""
    merged = merged_parts(student)
    if merged is not None and can_join(student):
        base = absolute_name(merged.source.base)
        return f"joined with that as one adapter of {base}, whose rank is the sum of theirs"
    if merged is not None and merged.source.base:
        return "merged, as a whole model, since what was merged before is more than LoRA weights"
    whole = "merged, as a whole model, since no folder holds the weights that it is trained on"
    return "" if can_join(student) else whole


def raise_to_float32(model: nn.Module) -> torch.dtype | None:
    """Make the model (of a PeftModel what is trained) float32; return the trained weights' lower precision, if any."""
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


def end_notes(stop_ids: Sequence[int], args: Any) -> list[str]:
    """What ends responses where no token does; it is logged."""
    if stop_ids:
        return []
    limit = f"every response runs to the limit of {args.max_completion_length} tokens"
    note = f"Neither tokenizer, model nor template knows an end token: {limit}, and rows are learned without an end."
    _LOGGER.warning(note)
    return [note]


def precision_notes(args: Any, raised_from: torch.dtype | None) -> list[str]:
    """On the precision, weights that were raised and GPUs that idle, in sentences; all but the first are logged."""
    computes = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    notes = [f"Computed in {computes}, with trained weights in float32, on {args.device.type}."]
    if raised_from is not None:
        notes.append(
            f"The weights to train came in {str(raised_from).removeprefix('torch.')} and were raised to float32: lower "
            "precision loses small updates."
        )
    if args.leaves_mps:
        notes.append(CPU_FOR_MPS)
    visible = torch.cuda.device_count() if args.device.type == "cuda" and args.world_size == 1 else 1
    if visible > 1:
        notes.append(
            f"{visible} GPUs are visible and one is trained on. To train on all: accelerate launch --num_processes "
            f"{visible} -m promptkd, and the same arguments."
        )
    for note in notes[1:]:
        _LOGGER.warning(note)
    return notes
