"""The trainable parts of a teacher, and how the teacher is read with and without them.

A `TeacherAdapter` is the trained thing; an `AdapterFactory` holds its settings and makes it for a teacher.
"""

import copy
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from promptkd.data.batch import TokenBatch
from promptkd.engine import ChunkedLoss, response_hidden, unwrap_peft
from promptkd.errors import RequestError
from promptkd.models.pair import Directions, Pair
from promptkd.models.soft_prompt import DEFAULT_TEXT, SoftPrompt
from promptkd.objectives import regularizer_weight
from promptkd.settings import Settings, accept_old_name, option

Made = tuple["TeacherAdapter", nn.Module]
"""An adapter, and the teacher to use with it in place of the one that it was made for."""


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
        schedule = self.regularizer_schedule
        return regularizer_weight(step, steps, coefficient=self.regularizer_coefficient, schedule=schedule)


@dataclass(frozen=True)
class TunerStep:
    """One micro-batch as an adapter's loss sees it."""

    pair: Pair
    batch: TokenBatch
    adapted_hidden: Tensor
    """(N, H_t) states of the adapted teacher, with the adapter's graph; the others have none."""
    student_hidden: Tensor
    plain_hidden: Tensor | None
    """None where `weight` is 0 and the step is not logged."""
    weight: float
    """λ of this optimizer step."""
    settings: PromptLossSettings


class TeacherAdapter(ABC):
    """The trainable part of a teacher."""

    folder: ClassVar[str]
    """Name of the folder in the run that `save` is given."""
    backpropagates: ClassVar[bool] = True
    """Whether gradients pass through the teacher's layers, whose activations are held for them."""
    trains_layers: ClassVar[bool] = False
    """Whether weights inside of the teacher's layers are trained, which shards of a teacher do not allow."""
    copies_teacher: ClassVar[bool] = False
    """Whether a copy of the whole teacher is trained, its head too: in float32 alone, on one device."""
    has_regularizer: ClassVar[bool] = True
    """Whether `loss` reads the plain teacher and `PromptLossSettings`."""
    extra_positions: int = 0
    """Positions of the teacher that the adapter takes before a request."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        accept_old_name(cls, "figures", "metrics")
        accept_old_name(cls, "switched_off", "disabled")

    @classmethod
    def create(cls, teacher: nn.Module, tokenizer: Any, *, seed: int, device: torch.device) -> Made:
        """The adapter of a class that a `Method` was given itself: the class is called with the teacher."""
        return cls(teacher), teacher  # type: ignore[call-arg]

    def adapted_hidden(self, teacher: nn.Module, batch: TokenBatch) -> Tensor:
        """(N, H) hidden states of the adapted teacher at the positions that predict response tokens."""
        return response_hidden(self.adapted_model(teacher), batch)

    def plain_hidden(self, teacher: nn.Module, batch: TokenBatch) -> Tensor:
        """(N, H) the same of the teacher as it came."""
        with self.disabled():
            return response_hidden(teacher, batch)

    def adapted_model(self, teacher: nn.Module) -> nn.Module:
        """The model whose head reads `adapted_hidden`."""
        return teacher

    def disabled(self) -> AbstractContextManager[None]:
        """While it is entered, the teacher is the plain one."""
        return nullcontext()

    def loss(self, step: TunerStep) -> ChunkedLoss:
        """What the adapter minimizes, summed over the tokens: PromptKD's loss unless overridden."""
        states = (step.adapted_hidden, step.student_hidden, step.plain_hidden)
        settings = step.settings
        directions = Directions(student_direction=settings.prompt_kl, plain_direction=settings.regularizer_kl)
        return step.pair.prompt_loss(*states, weight=step.weight, **directions)

    def metrics(self) -> dict[str, float]:
        """What to log of the adapter's state."""
        return {}

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must hold."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Resume from `state`."""

    @abstractmethod
    def save(self, folder: Path, teacher: nn.Module) -> None:
        """Write the adapter for use without promptkd."""


@dataclass(frozen=True, kw_only=True)
class AdapterFactory(Settings, ABC):
    """The settings of an adapter, which make it for a teacher."""

    adapter_class: ClassVar[type[TeacherAdapter]]

    @property
    def trains_nothing(self) -> bool:
        """Whether these settings stand for no adapter at all."""
        return False

    @abstractmethod
    def create(self, teacher: nn.Module, tokenizer: Any, *, seed: int, device: torch.device) -> Made:
        """The adapter for `teacher`, which is frozen, with its own tensors on `device`."""


class ModuleAdapter(TeacherAdapter):
    """A trained module beside a frozen teacher: what is left to write is `adapted_hidden` and `save`."""

    def __init__(self, module: nn.Module):
        self.module = module

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

    @property
    def trains_nothing(self) -> bool:
        return self.prompt_length == 0

    def create(self, teacher: nn.Module, tokenizer: Any, *, seed: int, device: torch.device) -> Made:
        prompt = SoftPrompt.create(
            teacher, tokenizer, length=self.prompt_length, start=self.prompt_start, text=self.prompt_text, seed=seed
        )
        return SoftPromptAdapter(prompt.to(device)), teacher


class _TrainedWeights(TeacherAdapter):
    """Named weights, and how far they have moved from their start: LoRA and full tuning."""

    def __init__(self, named: dict[str, nn.Parameter], start: dict[str, Tensor]):
        self._named, self._start = named, start

    def parameters(self) -> list[nn.Parameter]:
        return list(self._named.values())

    def state_dict(self) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in self._named.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state.keys() != self._named.keys():
            raise RequestError("The checkpoint holds other teacher weights than those that are trained now.")
        with torch.no_grad():
            for name, weight in self._named.items():
                weight.copy_(state[name])

    def metrics(self) -> dict[str, float]:
        squares = [(weight.detach() - self._start[name]).square().sum() for name, weight in self._named.items()]
        here = squares[0].device  # a teacher's layers may lie on several
        return {"adapter_distance": float(torch.stack([each.to(here) for each in squares]).sum().sqrt())}


class LoraTeacher(_TrainedWeights):
    """Low-rank weights beside those of a frozen teacher, in PEFT's wrapper."""

    folder = "teacher_lora"
    trains_layers = True

    def __init__(self, wrapped: PeftModel):
        self._wrapped = wrapped
        named = {name: weight for name, weight in wrapped.named_parameters() if weight.requires_grad}
        super().__init__(named, {name: weight.detach().clone() for name, weight in named.items()})

    def disabled(self) -> AbstractContextManager[None]:
        return self._wrapped.disable_adapter()

    def save(self, folder: Path, teacher: nn.Module) -> None:
        self._wrapped.save_pretrained(str(folder))


@dataclass(frozen=True, kw_only=True)
class LoraFactory(AdapterFactory):
    """PEFT's LoRA on every linear layer but the head."""

    adapter_class = LoraTeacher

    adapter_rank: int = option(16, at_least=1)
    """Rank of a LoRA teacher adapter, or of the online module."""
    adapter_alpha: float = 32.0
    """LoRA teacher adapter: scale of its weights."""

    def create(self, teacher: nn.Module, tokenizer: Any, *, seed: int, device: torch.device) -> Made:
        config = LoraConfig(
            r=self.adapter_rank, lora_alpha=self.adapter_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            wrapped = get_peft_model(unwrap_peft(teacher), config)
        return LoraTeacher(wrapped), wrapped.eval()


class FullTeacher(_TrainedWeights):
    """A trained copy of the whole teacher; the original stays as the plain one, at twice the memory."""

    folder = "teacher"
    trains_layers = True
    copies_teacher = True

    def __init__(self, teacher: nn.Module):
        plain = unwrap_peft(teacher)
        self.copy = copy.deepcopy(plain).requires_grad_(True).eval()
        super().__init__(dict(self.copy.named_parameters()), dict(plain.named_parameters()))

    def adapted_model(self, teacher: nn.Module) -> nn.Module:
        return self.copy

    def save(self, folder: Path, teacher: nn.Module) -> None:
        self.copy.save_pretrained(str(folder))


@dataclass(frozen=True, kw_only=True)
class FullTeacherFactory(AdapterFactory):
    adapter_class = FullTeacher

    def create(self, teacher: nn.Module, tokenizer: Any, *, seed: int, device: torch.device) -> Made:
        return FullTeacher(teacher), teacher


AdapterName = Literal["none", "prompt", "lora", "full", "online"]
ADAPTERS: dict[str, type[AdapterFactory] | None] = {
    "none": None,
    "prompt": SoftPromptFactory,
    "lora": LoraFactory,
    "full": FullTeacherFactory,
}
"""The factories by their names, to which a method's file may add its own."""
