"""What a method consists of, what a loss function is given, and the base of methods that have a name."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from promptkd.data.batch import TokenBatch
from promptkd.data.encode import EncodedExample
from promptkd.engine import ChunkedLoss
from promptkd.models.adapters import ADAPTERS, AdapterFactory, AdapterName, SoftPromptFactory, TeacherAdapter
from promptkd.models.pair import Objective, Pair
from promptkd.objectives.moving import Moving
from promptkd.responses import Responses
from promptkd.settings import Reader, Settings, warn_of_old_name


@dataclass(frozen=True)
class Step:
    """One micro-batch, as a loss function is given it."""

    pair: Pair
    rows: Sequence[EncodedExample]  # of the data; their own responses are `row.response_ids`
    batch: TokenBatch  # the rows' prompts with the responses that the method took
    student_hidden: Tensor  # (N, H_s) states that predict `batch.targets`, with the student's graph
    teacher_hidden: Callable[[TokenBatch], Tensor]  # (N, H_t) of the (adapted) teacher for any batch, without a graph
    hidden_of_student: Callable[[TokenBatch], Tensor]  # (N, H_s) for any batch, with the student's graph
    progress: float  # k / K, of the k optimizer steps that are done and the K of the training


StudentLoss = Callable[[Step], ChunkedLoss]  # summed over tokens, or over rows (`Method.per_row`)


_STILL = Moving()


@dataclass(frozen=True)
class Method:
    """What makes a method of distillation."""

    responses: Responses
    objective: Objective | None = None  # what the student minimizes, one value per response token; or give `loss`
    adapter: AdapterFactory | type[AdapterFactory] | type[TeacherAdapter] | None = None
    """The trainable part of the teacher: an adapter's factory, or its class, whose settings are then the run's, or an
    adapter class of your own, which is called with the teacher; None trains nothing."""
    loss: StudentLoss | None = None
    per_row: bool = False  # whether the loss is a mean over rows, not over tokens
    own_metrics: tuple[str, ...] = ()  # of `loss`, logged as means over rows or tokens, beside "entropy" and the like
    teacher_adapter: InitVar[str | None] = None  # deprecated: the name of an adapter
    reads_teacher: bool = True
    """Whether anything is learned from the teacher's distribution, so that both must share a vocabulary."""
    moving: Moving = _STILL
    """What a training tells of its steps, as for a coefficient that moves: the objective, if it is a `Moving`."""

    def __post_init__(self, teacher_adapter: str | None) -> None:
        if (self.objective is None) == (self.loss is None):
            raise ValueError("A method needs either an objective or a loss.")
        adapter: Any = self.adapter if teacher_adapter is None else teacher_adapter
        if isinstance(adapter, str):
            name, adapter = adapter, ADAPTERS[adapter]
            new = f"Method(adapter={adapter.__name__})" if adapter else "Method(adapter=None)"
            warn_of_old_name(f"Method(teacher_adapter={name!r})", new, stacklevel=3)
        if isinstance(adapter, SoftPromptFactory) and adapter.prompt_length == 0:
            adapter = None
        object.__setattr__(self, "adapter", adapter)
        if self.moving is _STILL and isinstance(self.objective, Moving):
            object.__setattr__(self, "moving", self.objective)

    @property
    def adapter_class(self) -> type[TeacherAdapter] | None:
        if self.adapter is None or (isinstance(self.adapter, type) and issubclass(self.adapter, TeacherAdapter)):
            return self.adapter
        return self.adapter.adapter_class

    def with_settings(self, read: Reader) -> "Method":
        """The method with an adapter that was given as a class of factories made from the settings of the run."""
        if isinstance(self.adapter, AdapterFactory):
            read.read_equal(self.adapter)
        elif isinstance(self.adapter, type) and issubclass(self.adapter, AdapterFactory):
            return replace(self, adapter=read(self.adapter))
        return self

    def student_loss(self, step: Step) -> ChunkedLoss:
        if self.loss is not None:
            return self.loss(step)
        assert self.objective is not None
        return step.pair.student_loss(self.objective, step.student_hidden, step.teacher_hidden(step.batch))


METHODS: dict[str, "type[NamedMethod] | Callable[[Any], Method]"] = {}  # those that the command line knows


@dataclass(frozen=True, kw_only=True)
class NamedMethod(Settings, ABC):
    """The settings of a method, which builds it. The command line knows a subclass by its `name`."""

    name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls):
            METHODS[cls.name] = cls

    @abstractmethod
    def build(self, take: Reader) -> Method:
        """The method; `take` gives the settings of a further class, such as those of an adapter, out of the run's."""


@dataclass(frozen=True, kw_only=True)
class AdaptedMethod(NamedMethod):
    """A method that reads the teacher, of which a part may be trained."""

    own_adapter: ClassVar[type[AdapterFactory] | None] = None
    teacher_adapter: AdapterName | None = None
    """Trainable part of the teacher, in place of the method's own."""

    def adapter(self, take: Reader) -> AdapterFactory | None:
        factory = self.own_adapter if self.teacher_adapter is None else ADAPTERS[self.teacher_adapter]
        return None if factory is None else take(factory)
