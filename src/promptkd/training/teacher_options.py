"""How the teacher is loaded, from the settings of a run, and which of its settings do not go together."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from promptkd.engine.backbone import recomputable_layers
from promptkd.errors import RequestError, check_all
from promptkd.methods import Method
from promptkd.models import load_model, load_tokenizer
from promptkd.models.load import keep_differentiable
from promptkd.precision import teacher_precision


def load_teacher(
    teacher: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, args: Any, method: Method
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The teacher in evaluation mode, and its tokenizer, None for a loaded model that came without.

    Args:
        teacher: a loaded model, or what `load_model` takes.
        tokenizer: the teacher's, if it is known.
        args: a `DistillConfig`.
    """
    if not isinstance(teacher, str | Path):
        keep_differentiable(teacher)
        return teacher.eval(), tokenizer
    loaded = load_model(teacher, trust_remote_code=args.trust_remote_code, **teacher_settings(args, method))
    return loaded, tokenizer or load_tokenizer(teacher, trust_remote_code=args.trust_remote_code)


def teacher_settings(args: Any, method: Method) -> dict[str, Any]:
    """Arguments of `load_model` for the teacher of a `DistillConfig`.

    Raises:
        RequestError: if a setting is given twice, or bitsandbytes is missing.
    """
    given = dict(args.teacher_model_init_kwargs or {})
    for name in ("dtype", "torch_dtype"):
        if name in given:
            raise RequestError(
                f"teacher_model_init_kwargs holds {name}: {given[name]}. Give it as --teacher_dtype instead."
            )
    adapter = method.adapter_class
    trained = adapter is not None and adapter.copies_teacher
    dtype = teacher_precision(args.teacher_dtype, args.device, trained=trained)
    settings = {"dtype": dtype, "revision": args.teacher_model_revision, **given}
    if args.teacher_quantization is None:
        return settings
    if "quantization_config" in given:
        raise RequestError("The teacher's quantization is given twice: by flag and in teacher_model_init_kwargs.")
    if find_spec("bitsandbytes") is None:
        raise RequestError(
            f"--teacher_quantization {args.teacher_quantization} needs the package bitsandbytes, which is not "
            "installed: pip install bitsandbytes. Without it, --teacher_dtype bfloat16 halves the teacher's weights."
        )
    if args.teacher_quantization == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)  # LLM.int8()
    else:  # NormalFloat, multiplied in the precision of the other weights
        computed = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype, torch.float32)
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computed)
    # bitsandbytes quantizes a weight on the device where it is loaded, and does not move it later
    return {"device_map": {"": args.device}, **settings, "quantization_config": config}


def check_teacher_options(args: Any, method: Method, teacher: nn.Module) -> None:
    """Refuse settings of the teacher that would have no effect, or another one than they say.

    Raises:
        RequestError: with everything that is wrong.
    """
    adapter, stale = method.adapter_class, args.prompt_refresh == "stale"
    copied = adapter is not None and adapter.copies_teacher
    recomputes, backpropagates = args.teacher_gradient_checkpointing, adapter is not None and adapter.backpropagates
    is_rounded = any(each.dtype.itemsize < 4 for each in teacher.parameters())
    checks = [
        (stale and copied, "prompt_refresh stale cannot keep a pass of a teacher whose head is trained too"),
        (
            stale and method.objective is None,
            "prompt_refresh stale needs a method with one objective per token, whose pass the two steps share",
        ),
        (
            recomputes and not backpropagates,
            "teacher_gradient_checkpointing has no effect here: no gradient passes through the teacher's layers",
        ),
        (
            copied and is_rounded,
            "a whole teacher is trained in float32 alone: leave teacher_dtype and teacher_quantization out",
        ),
    ]
    check_all("Wrong settings", checks)
    if recomputes:
        recomputable_layers(teacher)
