"""Weights that are spread over processes, by FSDP2 or by DeepSpeed ZeRO-3.

Such a model runs only where all processes run it, equally often: each layer's weights are gathered from all of them. In
a training step they do. Decoding does not, since rows end at different tokens on different processes, so the student,
which is the small one, is gathered whole while it decodes or is measured. The teacher stays spread out.

A teacher that was loaded with a `device_map` is run by one process, its layers one after the other where they lie.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from accelerate.utils import DynamoBackend, fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import FSDPModule
from trl.distributed import DistributedBackend
from trl.models import prepare_deepspeed, unwrap_model_for_generation
from trl.models.utils import _ForwardRedirection

from promptkd.engine import unwrap_peft
from promptkd.errors import check_all
from promptkd.models.adapters import TeacherAdapter
from promptkd.models.placement import dispatched_to, is_dispatched
from promptkd.precision import computing

T = TypeVar("T")


def is_sharded(accelerator: Any) -> bool:
    """Whether no process holds all weights of a model."""
    return accelerator.is_fsdp2 or DistributedBackend(accelerator).is_zero3


def autocast(accelerator: Any, args: Any) -> AbstractContextManager[object]:
    """What every model runs in, by `args.bf16`. Under DeepSpeed accelerate's own does nothing for the teacher."""
    if accelerator.native_amp or not args.bf16:
        return accelerator.autocast()
    return computing(accelerator.device, torch.bfloat16)


def check_dispatched(model: nn.Module, accelerator: Any, adapter: type[TeacherAdapter] | None) -> None:
    """Refuse a `device_map` with which the teacher could not be run or trained, with everything that is wrong."""
    if not is_dispatched(model):
        return
    checks = [
        (
            accelerator.num_processes > 1,
            "the other processes need their GPUs; start one process, or shard the teacher by FSDP2",
        ),
        (
            bool(dispatched_to(model) & {"cpu", "disk"}),
            "no layer may stay on the CPU or the disk; give more GPUs, --teacher_dtype bfloat16 or "
            "--teacher_quantization",
        ),
        (
            bool(adapter and adapter.copies_teacher),
            "the whole teacher cannot be trained; train a soft prompt or LoRA weights",
        ),
    ]
    check_all("Cannot use this teacher's device_map", checks)


def check_sharding(
    accelerator: Any,
    *models: nn.Module,
    adapter: type[TeacherAdapter] | None = None,
    needs_generate: bool,
    chunks: bool = True,
) -> None:
    """Refuse launch configurations that would hang, train other weights or save none, with everything that is wrong.

    Args:
        needs_generate: whether responses come from transformers' own `generate`.
        chunks: whether objectives run over chunks of tokens, for which heads are gathered: FSDP2 needs that.
    """
    backend, settings, fsdp2 = DistributedBackend(accelerator), accelerator.state, accelerator.is_fsdp2
    sharded, zero3 = is_sharded(accelerator), backend.is_zero3
    empty = any(each.numel() == 0 for model in models for each in model.parameters())
    checks = [
        (
            settings.dynamo_plugin.backend != DynamoBackend.NO,
            "a compiled model cannot be run in parts; leave dynamo out",
        ),
        (backend.fsdp_version == 1, "FSDP of version 1 does not shard the teacher; set fsdp_version: 2"),
        (
            fsdp2 and settings.fsdp_plugin.cpu_ram_efficient_loading,
            "every process must load the weights; set fsdp_cpu_ram_efficient_loading: false",
        ),
        (
            fsdp2 and "FULL_STATE_DICT" not in str(settings.fsdp_plugin.state_dict_type),
            "the student is saved in full; set fsdp_state_dict_type: FULL_STATE_DICT",
        ),
        (fsdp2 and not chunks, "sharded heads need chunks; leave chunk_tokens out, or set it above 0"),
        (zero3 and empty, "models must be loaded in full before they are sharded; set zero3_init_flag: false"),
        (
            zero3 and not settings.deepspeed_plugin.zero3_save_16bit_model,
            "the student is saved in full; set zero3_save_16bit_model: true",
        ),
        (
            bool(sharded and adapter and adapter.trains_layers),
            "the teacher's own weights cannot be trained; train a soft prompt, or use DDP",
        ),
        (sharded and needs_generate, "min_p, repetition_penalty and generation_kwargs need vLLM or DDP"),
    ]
    check_all("Cannot train on these processes", checks, "See docs/many-processes.md.")


def place_teacher(teacher: nn.Module, accelerator: Any) -> nn.Module:
    """The frozen teacher on this process's device, or where its `device_map` says; sharded under FSDP2 and ZeRO-3."""
    if is_dispatched(teacher):
        return teacher
    if DistributedBackend(accelerator).is_zero3:
        return prepare_deepspeed(teacher, accelerator)
    if not accelerator.is_fsdp2:
        return accelerator.prepare_model(teacher, evaluation_mode=True)
    # accelerate fixes which layers are sharded at the first model it sees; the student's may be of another class
    settings = accelerator.state
    plugin = settings.fsdp_plugin
    before = plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap
    teacher = fsdp2_prepare_model(accelerator, teacher)
    plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = before
    return teacher


def run_whole(work: Callable[[nn.Module], T], wrapped: nn.Module, accelerator: Any) -> T:
    """`work(model)` with all weights on this process, without a gradient. All processes must call it together."""
    if is_fully_sharded(wrapped):
        settings = accelerator.state
        return _run_unsharded(work, wrapped, settings.fsdp_plugin.reshard_after_forward)
    if DistributedBackend(accelerator).is_zero3:
        with unwrap_model_for_generation(wrapped, accelerator) as model:
            return work(model)
    return work(accelerator.unwrap_model(wrapped))


def run_in_forward(work: Callable[[], T], wrapped: nn.Module, accelerator: Any, *, always: bool = False) -> T:
    """`work()` inside the forward of a sharded model's wrapper; `always` inside of DDP's too, for a backward."""
    if always or is_sharded(accelerator):
        return _ForwardRedirection()(wrapped, accelerator.unwrap_model(wrapped), work)
    return work()


def run_inside(work: Callable[[], T], model: nn.Module) -> T:
    """`work()` inside the forward of a model that FSDP2 shards, which else cannot run in parts; without a gradient."""
    if not is_fully_sharded(model):
        return work()
    results: list[T] = []
    with torch.no_grad():
        _ForwardRedirection()(model, model, lambda: results.append(work()))
    return results[0]


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards this model. A trainer's is only once it trains."""
    return isinstance(model, FSDPModule)


def _run_unsharded(work: Callable[[nn.Module], T], model: nn.Module, reshards: bool) -> T:
    units = [each for each in model.modules() if isinstance(each, FSDPModule)]

    def unsharded() -> T:
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        return work(model)

    try:
        return run_inside(unsharded, model)
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(reshards, recurse=False)
        # As accelerate leaves them: the last to be used is the first that backward needs.
        for each in (model, unwrap_peft(model).get_output_embeddings()):
            if isinstance(each, FSDPModule):
                each.set_reshard_after_forward(False, recurse=False)
