"""One of several teachers has its weights on the device at a time; those of the others wait off it.

A teacher for a GPU waits in pinned host memory. One for the CPU waits in a file, from which it is mapped into memory:
what is not read takes none, and the system may drop what was. What is trained of a teacher stays where it is.
"""

from tempfile import TemporaryDirectory
from weakref import WeakKeyDictionary, WeakSet

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from promptkd.engine import unwrap_peft
from promptkd.models.gguf_format import cache_folder


class _Waiting:
    """The frozen weights of a model off the device."""

    def __init__(self, model: nn.Module, device: torch.device):
        self._weights = list(model.parameters())
        self._device = device
        tensors = {str(place): each.data.contiguous() for place, each in enumerate(self._weights)}
        self._host: dict[str, Tensor] = {}
        if device.type == "cpu":
            cache_folder().mkdir(parents=True, exist_ok=True)
            self._folder = TemporaryDirectory(dir=cache_folder(), prefix="teacher-")  # gone with this object
            save_file(tensors, f"{self._folder.name}/weights.safetensors")
        else:
            self._host = {name: each.cpu().pin_memory() for name, each in tensors.items()}

    def leave(self) -> None:
        for weight in self._weights:
            weight.data = weight.data.new_empty(0)

    def enter(self) -> None:
        if self._host:
            for place, weight in enumerate(self._weights):
                weight.data = self._host[str(place)].to(self._device, non_blocking=True)
            return
        with safe_open(f"{self._folder.name}/weights.safetensors", framework="pt") as file:
            for place, weight in enumerate(self._weights):
                weight.data = file.get_tensor(str(place))


_WAITING: "WeakKeyDictionary[nn.Module, _Waiting]" = WeakKeyDictionary()
_THERE: WeakSet[_Waiting] = WeakSet()  # the one whose weights are on the device


def send_away(model: nn.Module, device: torch.device) -> None:
    """Freeze a model, and let its weights wait off the device until `bring` asks for them."""
    inner = unwrap_peft(model.requires_grad_(False))
    if inner in _WAITING:
        return
    _WAITING[inner] = _Waiting(inner, device)
    _WAITING[inner].leave()


def bring(model: nn.Module) -> None:
    """Put a model's weights where they are computed with; the model that was there leaves. Others are left alone."""
    modules = model.modules() if _WAITING else ()
    waiting = next((_WAITING[each] for each in modules if each in _WAITING), None)
    if waiting is None or waiting in _THERE:
        return
    for other in list(_THERE):
        other.leave()
    _THERE.clear()
    waiting.enter()
    _THERE.add(waiting)
