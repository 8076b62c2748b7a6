"""The trainable parts of a teacher with their settings, and how the teacher is read with and without them."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from promptkd.data.batch import TokenBatch
from promptkd.engine import ChunkedLoss, response_hidden, unwrap_peft
from promptkd.errors import RequestError
from promptkd.models.adapter_files import join_saved, name_base, note_base
from promptkd.models.pair import Pair
from promptkd.models.soft_prompt import DEFAULT_TEXT, SoftPrompt
from promptkd.objectives import regularizer_weight
from promptkd.settings import Settings, accept_old_name, option

Made = tuple["TeacherAdapter", nn.Module]  # an adapter, and the teacher to use with it in place of its own


@dataclass(frozen=True, kw_only=True)
class PromptLossSettings(Settings):
    """The loss of a teacher adapter: a KL with the student and, as its regularizer, one with the plain teacher."""

    prompt_kl: Literal["reverse", "forward"] = "reverse"
    """Direction of the prompt's KL with the student: reverse is KL(prompted || student)."""
    regularizer_kl: Literal["reverse", "forward"] = "reverse"
    """Direction of the regularizer: reverse is KL(prompted || plain teacher)."""
    regularizer_coefficient: float = option(1.0, at_least=0)
    """c, the regularizer's weight at the first step."""
    regularizer_schedule: Literal["linear", "constant", "none"] = "linear"
    """Schedule of the regularizer's weight: linear (c to c/K), constant or none."""

    def weight(self, step: int, steps: int) -> float:
        """λ after `step` of `steps` optimizer steps."""
        coefficient, schedule = self.regularizer_coefficient, self.regularizer_schedule
        return regularizer_weight(step, steps, coefficient=coefficient, schedule=schedule)


@dataclass(frozen=True)
class TunerStep:
    """One micro-batch as an adapter's loss sees it."""

    pair: Pair
    batch: TokenBatch
    adapted_hidden: Tensor  # (N, H_t) states of the adapted teacher, with the adapter's graph; the others have none
    student_hidden: Tensor
    plain_hidden: Tensor | None  # None where `weight` is 0 and the step is not logged
    weight: float  # λ of this optimizer step
    settings: PromptLossSettings


class TeacherAdapter(ABC):
    """The trainable part of a teacher: the parameters of a module that require a gradient."""

    folder: ClassVar[str]  # name of the folder in the run that `save` is given
    backpropagates: ClassVar[bool] = True  # gradients pass the teacher's layers, whose activations are held for them
    trains_layers: ClassVar[bool] = False  # trains weights inside of the layers, which shards of a teacher do not allow
    copies_teacher: ClassVar[bool] = False  # trains a copy of the whole teacher: in float32 alone, on one device
    has_regularizer: ClassVar[bool] = True  # `loss` reads the plain teacher and `PromptLossSettings`
    extra_positions: int = 0  # positions of the teacher that the adapter takes before a request

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        accept_old_name(cls, "figures", "metrics")
        accept_old_name(cls, "switched_off", "disabled")

    def __init__(self, module: nn.Module):
        self.module = module

    @classmethod
    def create(cls, teacher: nn.Module, tokenizer: Any, *, seed: int, device: torch.device) -> Made:
        """The adapter of a class that a `Method` was given itself: the class is called with the teacher."""
        return cls(teacher), teacher

    def adapted_hidden(self, teacher: nn.Module, batch: TokenBatch) -> Tensor:
        """Hidden states (N, H) of the adapted teacher at the positions that predict response tokens."""
        return response_hidden(self.adapted_model(teacher), batch)

    def plain_hidden(self, teacher: nn.Module, batch: TokenBatch) -> Tensor:
        """The same of the plain teacher."""
        with self.disabled():
            return response_hidden(teacher, batch)

    def adapted_model(self, teacher: nn.Module) -> nn.Module:
        """The model whose head reads `adapted_hidden`."""
        return teacher

    def disabled(self) -> AbstractContextManager[None]:
        """A context in which the teacher is the plain one."""
        return nullcontext()

    def loss(self, step: TunerStep) -> ChunkedLoss:
        """What the adapter minimizes, summed over the tokens: PromptKD's loss unless overridden."""
        states, chosen = (step.adapted_hidden, step.student_hidden, step.plain_hidden), step.settings
        directions: dict[str, Any] = {"student_direction": chosen.prompt_kl, "plain_direction": chosen.regularizer_kl}
        return step.pair.prompt_loss(*states, weight=step.weight, **directions)

    def metrics(self) -> dict[str, float]:
        """What to log of the adapter's state."""
        return {}

    def parameters(self) -> list[nn.Parameter]:
        return [each for each in self.module.parameters() if each.requires_grad]

    def state_dict(self) -> dict[str, Tensor]:
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.module.load_state_dict(state)

    @abstractmethod
    def save(self, folder: Path, teacher: nn.Module) -> None:
        """Write the adapter for use without promptkd."""


ModuleAdapter = TeacherAdapter  # its name in adapters of your own


@dataclass(frozen=True, kw_only=True)
class AdapterFactory(Settings):
    """The settings of an adapter, which make it for a teacher."""

    adapter_class: ClassVar[type[TeacherAdapter]]

    def create(self, teacher: nn.Module, tokenizer: Any, *, seed: int, device: torch.device) -> Made:
        """The adapter for `teacher`, which is frozen, with its own tensors on `device`."""
        return self.adapter_class.create(teacher, tokenizer, seed=seed, device=device)


class SoftPromptAdapter(TeacherAdapter):
    """A soft prompt before a frozen teacher: PromptKD's choice."""

    folder = "prompt"
    module: SoftPrompt

    def __init__(self, prompt: SoftPrompt):
        super().__init__(prompt)
        self.extra_positions = prompt.length

    def adapted_hidden(self, teacher: nn.Module, batch: TokenBatch) -> Tensor:
        return response_hidden(teacher, batch, self.module())

    def metrics(self) -> dict[str, float]:
        return {"prompt_norm": self.module.norm(), "prompt_distance": self.module.distance()}

    def save(self, folder: Path, teacher: nn.Module) -> None:
        self.module.save(folder, teacher)


@dataclass(frozen=True, kw_only=True)
class SoftPromptFactory(AdapterFactory):
    adapter_class = SoftPromptAdapter

    prompt_length: int = option(7, at_least=0)
    """Vectors of the soft prompt; 0 for none."""
    prompt_start: Literal["text", "padding", "random"] = "text"
    """What the soft prompt starts from: text, padding or random."""
    prompt_text: str = DEFAULT_TEXT
    """The text it starts from, cut or repeated to prompt_length tokens."""

    def create(self, teacher: nn.Module, tokenizer: Any, *, seed: int, device: torch.device) -> Made:
        length, start, text = self.prompt_length, self.prompt_start, self.prompt_text
        prompt = SoftPrompt.create(teacher, tokenizer, length=length, start=start, text=text, seed=seed)
        return SoftPromptAdapter(prompt.to(device)), teacher


class _TrainedWeights(TeacherAdapter):
    """Weights of a model, and how far they have moved from their start: LoRA and full tuning."""

    trains_layers = True
    module: Any

    def __init__(self, model: nn.Module, start: Mapping[str, Tensor] | None = None):
        super().__init__(model)
        self._trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._start = start or {name: weight.detach().clone() for name, weight in self._trained.items()}

    def parameters(self) -> list[nn.Parameter]:
        return list(self._trained.values())

    def state_dict(self) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in self._trained.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state.keys() != self._trained.keys():
            raise RequestError("The checkpoint holds other teacher weights than those that are trained now.")
        with torch.no_grad():
            for name, weight in self._trained.items():
                weight.copy_(state[name])

    def metrics(self) -> dict[str, float]:
        squares = [(weight.detach() - self._start[name]).square().sum() for name, weight in self._trained.items()]
        here = squares[0].device  # a teacher's layers may lie on several
        return {"adapter_distance": float(torch.stack([each.to(here) for each in squares]).sum().sqrt())}

    def save(self, folder: Path, teacher: nn.Module) -> None:
        self.module.save_pretrained(str(folder))


class LoraTeacher(_TrainedWeights):
    """Low-rank weights beside those of a frozen teacher, in PEFT's wrapper."""

    folder = "teacher_lora"

    def disabled(self) -> AbstractContextManager[None]:
        return self.module.disable_adapter()

    def save(self, folder: Path, teacher: nn.Module) -> None:
        super().save(folder, teacher)
        join_saved(folder, self.module)
        note_base(folder, self.module)


@dataclass(frozen=True, kw_only=True)
class LoraFactory(AdapterFactory):
    """PEFT's LoRA on every linear layer but the head."""

    adapter_class = LoraTeacher

    adapter_rank: int = option(16, at_least=1)
    """Rank of a LoRA teacher adapter, or of the online module."""
    adapter_alpha: float = 32.0
    """LoRA teacher adapter: scale of its weights."""

    def create(self, teacher: nn.Module, tokenizer: Any, *, seed: int, device: torch.device) -> Made:
        rank, alpha = self.adapter_rank, self.adapter_alpha
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            wrapped = get_peft_model(unwrap_peft(teacher), config)
        name_base(wrapped)
        return LoraTeacher(wrapped), wrapped.eval()


class FullTeacher(_TrainedWeights):
    """A trained copy of the whole teacher; the original stays as the plain one, at twice the memory."""

    folder = "teacher"
    copies_teacher = True

    def __init__(self, teacher: nn.Module):
        plain = unwrap_peft(teacher)
        super().__init__(copy.deepcopy(plain).requires_grad_(True).eval(), dict(plain.named_parameters()))

    def adapted_model(self, teacher: nn.Module) -> nn.Module:
        return self.module


@dataclass(frozen=True, kw_only=True)
class FullTeacherFactory(AdapterFactory):
    adapter_class = FullTeacher


AdapterName = Literal["none", "prompt", "lora", "full", "online"]
_FACTORIES = {"prompt": SoftPromptFactory, "lora": LoraFactory, "full": FullTeacherFactory}
ADAPTERS: dict[str, type[AdapterFactory] | None] = {"none": None, **_FACTORIES}  # a method's file may add its own
