"""What of the teacher is trained along with the student, and how the teacher is read with and without it."""

import copy
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from promptkd.data.batch import TokenBatch
from promptkd.engine import response_hidden, unwrap_peft
from promptkd.errors import RequestError
from promptkd.models.soft_prompt import SoftPrompt

__all__ = [
    "FullTeacher",
    "LoraTeacher",
    "ModuleAdapter",
    "OnlineModule",
    "OnlineTeacher",
    "SoftPromptAdapter",
    "TeacherAdapter",
]


class TeacherAdapter(Protocol):
    """The trainable part of a teacher."""

    folder: str
    """Name of the folder in the run that `save` is given."""

    def adapted_hidden(self, teacher: nn.Module, batch: TokenBatch) -> Tensor:
        """(N, H) hidden states of the adapted teacher at the positions that predict response tokens."""

    def plain_hidden(self, teacher: nn.Module, batch: TokenBatch) -> Tensor:
        """(N, H) the same of the teacher as it came."""

    def adapted_model(self, teacher: nn.Module) -> nn.Module:
        """The model whose head reads `adapted_hidden`."""

    def switched_off(self) -> AbstractContextManager[None]:
        """While it is entered, the teacher is the plain one."""

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must hold."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from `state`."""

    def figures(self) -> dict[str, float]:
        """What to log of the adapter's state."""

    def save(self, folder: Path, teacher: nn.Module) -> None:
        """Write the adapter for use without promptkd."""


class ModuleAdapter:
    """What a trained module beside a frozen teacher needs, but for `adapted_hidden`, `figures` and `save`."""

    def __init__(self, module: nn.Module):
        self.module = module

    def plain_hidden(self, teacher: nn.Module, batch: TokenBatch) -> Tensor:
        return response_hidden(teacher, batch)

    def adapted_model(self, teacher: nn.Module) -> nn.Module:
        return teacher

    def switched_off(self) -> AbstractContextManager[None]:
        return nullcontext()

    def parameters(self) -> list[nn.Parameter]:
        return list(self.module.parameters())

    def state_dict(self) -> dict[str, Tensor]:
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.module.load_state_dict(state)


class SoftPromptAdapter(ModuleAdapter):
    """A soft prompt before a frozen teacher: PromptKD's choice."""

    folder = "prompt"
    module: SoftPrompt

    def adapted_hidden(self, teacher: nn.Module, batch: TokenBatch) -> Tensor:
        return response_hidden(teacher, batch, self.module())

    def figures(self) -> dict[str, float]:
        return {"prompt_norm": self.module.norm(), "prompt_distance": self.module.distance()}

    def save(self, folder: Path, teacher: nn.Module) -> None:
        self.module.save(folder, teacher)


class _TrainedWeights:
    """What LoRA and full tuning share: named weights and how far they have moved from their start."""

    def __init__(self, named: dict[str, nn.Parameter], start: dict[str, Tensor]):
        self._named, self._start = named, start

    def switched_off(self) -> AbstractContextManager[None]:
        return nullcontext()

    def parameters(self) -> list[nn.Parameter]:
        return list(self._named.values())

    def state_dict(self) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in self._named.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state.keys() != self._named.keys():
            raise RequestError("The checkpoint's teacher weights are others than those that are trained now.")
        with torch.no_grad():
            for name, weight in self._named.items():
                weight.copy_(state[name])

    def figures(self) -> dict[str, float]:
        squares = [(weight.detach() - self._start[name]).square().sum() for name, weight in self._named.items()]
        here = squares[0].device  # a teacher's layers may lie on several
        return {"adapter_distance": float(torch.stack([each.to(here) for each in squares]).sum().sqrt())}


class LoraTeacher(_TrainedWeights):
    """Low-rank weights beside those of a frozen teacher (PEFT's LoRA on every linear layer but the head)."""

    folder = "teacher_lora"

    def __init__(self, wrapped: PeftModel):
        self._wrapped = wrapped
        named = {name: weight for name, weight in wrapped.named_parameters() if weight.requires_grad}
        super().__init__(named, {name: weight.detach().clone() for name, weight in named.items()})

    def switched_off(self) -> AbstractContextManager[None]:
        return self._wrapped.disable_adapter()

    @classmethod
    def wrap(cls, teacher: nn.Module, *, rank: int, alpha: float, seed: int) -> tuple["LoraTeacher", PeftModel]:
        """The adapter, and the teacher in PEFT's wrapper, which is to be used in its place."""
        if rank < 1:
            raise RequestError(f"LoRA's rank must be at least 1. Got {rank}.")
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            wrapped = get_peft_model(unwrap_peft(teacher), config)
        return cls(wrapped), wrapped.eval()

    def adapted_hidden(self, teacher: nn.Module, batch: TokenBatch) -> Tensor:
        return response_hidden(teacher, batch)

    def plain_hidden(self, teacher: nn.Module, batch: TokenBatch) -> Tensor:
        with self._wrapped.disable_adapter():
            return response_hidden(teacher, batch)

    def adapted_model(self, teacher: nn.Module) -> nn.Module:
        return teacher

    def save(self, folder: Path, teacher: nn.Module) -> None:
        self._wrapped.save_pretrained(str(folder))


class FullTeacher(_TrainedWeights):
    """A trained copy of the whole teacher; the original stays as the plain one, at twice the memory."""

    folder = "teacher"

    def __init__(self, teacher: nn.Module):
        plain = unwrap_peft(teacher)
        self.copy = copy.deepcopy(plain).requires_grad_(True).eval()
        super().__init__(dict(self.copy.named_parameters()), dict(plain.named_parameters()))

    def adapted_hidden(self, teacher: nn.Module, batch: TokenBatch) -> Tensor:
        return response_hidden(self.copy, batch)

    def plain_hidden(self, teacher: nn.Module, batch: TokenBatch) -> Tensor:
        return response_hidden(teacher, batch)

    def adapted_model(self, teacher: nn.Module) -> nn.Module:
        return self.copy

    def save(self, folder: Path, teacher: nn.Module) -> None:
        self.copy.save_pretrained(str(folder))


class OnlineModule(nn.Module):
    """h + W_up gelu(W_down h): starts as the identity, since W_up starts at 0."""

    def __init__(self, width: int, rank: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.down = nn.Parameter(torch.randn(rank, width, generator=generator) / width**0.5)
        self.up = nn.Parameter(torch.zeros(width, rank))

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, H) to (N, H)."""
        inner = torch.nn.functional.gelu(hidden @ self.down.to(hidden.dtype).T)
        return hidden + inner @ self.up.to(hidden.dtype).T


class OnlineTeacher(ModuleAdapter):
    """A small module between a frozen teacher's last hidden state and its head (after OKD, Rao et al. 2024)."""

    folder = "online_module"
    module: OnlineModule

    def __init__(self, teacher: nn.Module, *, rank: int, seed: int):
        if rank < 1:
            raise RequestError(f"The online module's rank must be at least 1. Got {rank}.")
        head = unwrap_peft(teacher).get_output_embeddings().weight
        super().__init__(OnlineModule(head.shape[1], rank, seed).to(head.device))

    def adapted_hidden(self, teacher: nn.Module, batch: TokenBatch) -> Tensor:
        with torch.no_grad():  # no gradient ever enters the teacher's body, which is what makes OKD cheap
            hidden = response_hidden(teacher, batch)
        return self.module(hidden)

    def figures(self) -> dict[str, float]:
        return {"adapter_distance": float(self.module.up.detach().norm())}

    def save(self, folder: Path, teacher: nn.Module) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Any] = {name: each.detach().cpu().contiguous() for name, each in self.state_dict().items()}
        save_file(tensors, folder / "online_module.safetensors")
