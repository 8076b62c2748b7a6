"""Models on a device, or spread over several by a `device_map` of transformers, where their layers then stay."""

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from promptkd.engine import unwrap_peft
from promptkd.engine.backbone import embedding_device
from promptkd.errors import RequestError


def dispatched_to(model: nn.Module) -> set[str]:
    """Where a `device_map`, if one was given, has put the model's layers."""
    return {str(each) for each in vars(unwrap_peft(model)).get("hf_device_map", {}).values()}  # accelerate's attribute


def is_dispatched(model: nn.Module) -> bool:
    """Whether a `device_map` has put the model's layers on several devices."""
    return len(dispatched_to(model)) > 1


def settle_dispatched(teacher: nn.Module, device: torch.device) -> None:
    """Have a teacher of several devices take and return tensors of `device`, the student's.

    Its layers stay. Embeddings (beside the soft prompt) and head (beside the student's) move to `device`.
    """
    inner = unwrap_peft(teacher)
    ends = (inner.get_input_embeddings(), inner.get_output_embeddings())
    for each in ends:
        remove_hook_from_module(each)
    for each in ends:  # together: tied ones share their weight
        add_hook_to_module(each.to(device), AlignDevicesHook(execution_device=device))
    add_hook_to_module(inner.base_model, AlignDevicesHook(execution_device=device, io_same_device=True), append=True)


def place_to_run(model: nn.Module, device: torch.device, flags: str) -> nn.Module:
    """A model that is only run on `device`, or left where its `device_map` says, with tensors of `device` in and out.

    `flags` say what needs less memory. Raises `RequestError` for a map that leaves layers off the GPUs, or puts the
    whole model on another device.
    """
    places = dispatched_to(model)
    if not places:
        return model.to(device)
    if away := sorted(places & ({"disk"} if device.type == "cpu" else {"cpu", "disk"})):
        told = f"no layer may stay on the CPU or the disk, and it leaves some on the {' and the '.join(away)}"
        raise RequestError(f"Cannot use this device_map: {told}. Give more GPUs, or {flags}.")
    if is_dispatched(model):
        settle_dispatched(model, device)
    elif embedding_device(unwrap_peft(model)) != (own := torch.empty(0, device=device).device):
        told = f"it puts the whole model on {', '.join(places)}, and the command runs on {own}"
        raise RequestError(
            f"Cannot use this device_map: {told}. Leave it out; CUDA_VISIBLE_DEVICES=1 chooses another GPU."
        )
    return model
