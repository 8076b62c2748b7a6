"""Online knowledge distillation (Rao et al. 2024, arXiv 2409.12512), by our reading: see docs/methods.md."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from promptkd.data.batch import TokenBatch
from promptkd.engine import ChunkedLoss, response_hidden, unwrap_peft
from promptkd.methods.token_method import MixedMethod
from promptkd.models.adapters import ADAPTERS, AdapterFactory, Made, TeacherAdapter, TunerStep
from promptkd.settings import option


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


class OnlineTeacher(TeacherAdapter):
    """A small module between a frozen teacher's last hidden state and its head (after OKD, Rao et al. 2024)."""

    folder = "online_module"
    backpropagates = False
    has_regularizer = False
    module: OnlineModule

    def adapted_hidden(self, teacher: nn.Module, batch: TokenBatch) -> Tensor:
        with torch.no_grad():  # no gradient ever enters the teacher's body, which is what makes OKD cheap
            hidden = response_hidden(teacher, batch)
        return self.module(hidden)

    def loss(self, step: TunerStep) -> ChunkedLoss:
        """-log p(y) + KL(p || q) of the adapted teacher p: it keeps to the data and comes to meet the student q.

        By the loss of PESF-KD (Rao et al. 2022).
        """
        hard = step.pair.cross_entropy("teacher", step.adapted_hidden, step.batch.targets)
        soft = step.pair.prompt_loss(step.adapted_hidden, step.student_hidden, None)
        return ChunkedLoss(hard.total + soft.total, soft.metrics)

    def metrics(self) -> dict[str, float]:
        return {"adapter_distance": float(self.module.up.detach().norm())}

    def save(self, folder: Path, teacher: nn.Module) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Any] = {name: each.detach().cpu().contiguous() for name, each in self.state_dict().items()}
        save_file(tensors, folder / "online_module.safetensors")


@dataclass(frozen=True, kw_only=True)
class OnlineFactory(AdapterFactory):
    adapter_class = OnlineTeacher

    adapter_rank: int = option(16, at_least=1)
    """Rank of a LoRA teacher adapter, or of the online module."""

    def create(self, teacher: nn.Module, tokenizer: Any, *, seed: int, device: torch.device) -> Made:
        width = unwrap_peft(teacher).get_output_embeddings().weight.shape[1]
        return OnlineTeacher(OnlineModule(width, self.adapter_rank, seed).to(device)), teacher


ADAPTERS["online"] = OnlineFactory


class OKD(MixedMethod):
    """Forward KL on the data's responses, with a small online module in the teacher."""

    name = "okd"
    own_objective = "forward_kl"
    own_adapter = OnlineFactory
    own_share = 0.0
