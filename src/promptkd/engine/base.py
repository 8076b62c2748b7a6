"""What an engine is: ways to score whole rows, ways to decode, and products of the head.

A way is a `Scorer` or a `Decoder`. An engine holds some of each, the fastest first and the reference last; the first
that supports a model, and has been held to the reference once (`verify.py`), runs it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import PreTrainedModel

from promptkd.data.batch import TokenBatch

if TYPE_CHECKING:
    from promptkd.engine.heads import HeadProducts

__all__ = ["DecodeSession", "Decoder", "Engine", "Scorer", "SessionFactory"]


class Scorer(ABC):
    """A way to run whole rows through a model."""

    name: str

    @abstractmethod
    def supports(self, model: PreTrainedModel) -> bool:
        """Whether the model, in the mode and precision that it is in, is of a kind that this way knows. Cheap."""

    @abstractmethod
    def hidden(self, model: PreTrainedModel, batch: TokenBatch, prompt: Tensor | None) -> Tensor:
        """Last hidden states (N, H) that predict the response tokens, in the order of `batch.targets`.

        Args:
            batch: right-padded rows.
            prompt: (n, E) embeddings put before each row, n > 0, or None.
        """


class DecodeSession(ABC):
    """Some rows that one model decodes together."""

    @abstractmethod
    def prefill(self, prompts: Sequence[Sequence[int]], soft_prompt: Tensor | None = None) -> Tensor:
        """Logits (R, V) in float32 or wider behind each prompt.

        Args:
            prompts: R lists of token ids, at least one a row.
            soft_prompt: (n, E) embeddings put before every row, or None.
        """

    @abstractmethod
    def decode(self, tokens: Tensor) -> Tensor:
        """Logits (R, V) behind one more token a row, (R,). They hold until the next call."""

    @abstractmethod
    def select(self, rows: Sequence[int]) -> None:
        """Row i is from now on what row `rows[i]` was. No row moves to a place behind its own."""


SessionFactory = Callable[[int], AbstractContextManager[DecodeSession]]
"""From the most tokens that a row may write to a session, which ends when its context does."""


class Decoder(ABC):
    """A way to decode with a model."""

    name: str

    @abstractmethod
    def supports(self, model: PreTrainedModel) -> bool:
        """Whether the model, in the precision that it is in, is of a kind that this way knows. Cheap."""

    @abstractmethod
    def opened(
        self, model: PreTrainedModel, rows: int, vocabulary: int | None
    ) -> AbstractContextManager[SessionFactory]:
        """Sessions with the weights that the model has now; they must stay as they are while the context is open.

        Args:
            rows: the most rows of a session.
            vocabulary: logits of the first so many tokens; None for all.
        """

    def forget(self, model: PreTrainedModel) -> None:
        """Let go of what is held for the model between calls: this way will not run it."""
        del model  # most hold nothing


@dataclass(frozen=True)
class Engine:
    """How models are run on one kind of device."""

    name: str
    scorers: tuple[Scorer, ...]
    """The fastest first, the reference last."""
    decoders: tuple[Decoder, ...]
    """The fastest first, the reference last."""
    head: "HeadProducts"
    """Products with the head's weights."""
    check_every: int
    """Tokens between two looks at which rows have ended. Each look waits for the device."""
    decode_rows: int
    """Rows that are decoded together, unless someone says another number."""
    shares_passes: bool
    """Whether the student's pass serves the prompt's step too: time saved, for activations held through that step."""
    pass_tokens: int
    """Most tokens of a pass that keeps activations for a soft prompt alone. More make matrix products no faster."""
