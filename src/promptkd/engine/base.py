"""The interface of an engine, through which promptkd runs models.

An `Engine` belongs to one kind of device and lists interchangeable implementations of two jobs, the fastest first and
the model's own forward on one row at a time last. The first that supports a model and agrees with the last in a trial
(`resolve.py`) runs it.

Shapes: B rows of T tokens in a batch; N response tokens; R rows of a session; n vectors of a soft prompt; H the width
of hidden states, E that of embeddings; V the vocabulary size.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from promptkd.data.batch import TokenBatch
from promptkd.engine.backbone import UnsupportedError
from promptkd.engine.heads import HeadBackend


class Implementation(ABC):
    """One way to run a model."""

    name: str

    def supports(self, model: PreTrainedModel) -> bool:
        """Whether it can run the model in its mode and precision, as far as class and settings tell."""
        return True

    def forget(self, model: PreTrainedModel) -> None:
        """Release what is kept for the model between calls, since another implementation runs it."""
        del model  # most keep nothing


class Scorer(Implementation):
    """Runs complete rows through a model."""

    @abstractmethod
    def hidden(self, model: PreTrainedModel, batch: TokenBatch, prompt: Tensor | None) -> Tensor:
        """See `promptkd.engine.response_hidden`; a prompt has at least one vector."""


class DecodeSession(ABC):
    """Rows that one model decodes together."""

    @abstractmethod
    def prefill(self, prompts: Sequence[Sequence[int]], soft_prompt: Tensor | None = None) -> Tensor:
        """Read R prompts, each after the embeddings (n, E): logits (R, V) of what follows, in float32 or wider."""

    @abstractmethod
    def decode(self, tokens: Tensor) -> Tensor:
        """Append one token to each row, (R,), and return the logits (R, V) of the next. Valid until the next call."""

    def extend(self, tokens: Tensor) -> Tensor:
        """Append g tokens to each row, (R, g): the logits (R, g, V) of what follows each. Valid until the next call.

        `rollback` may remove them, so that rows come to differ in length; `decode` is not called after it. A session
        that does not know how to raises `UnsupportedError`.
        """
        raise UnsupportedError("its sessions remove no tokens")

    def rollback(self, counts: Sequence[int]) -> None:
        """Remove the last `counts[row]` tokens of each row, all of which `extend` has appended since the last call."""
        raise UnsupportedError("its sessions remove no tokens")

    @abstractmethod
    def select(self, rows: Sequence[int]) -> None:
        """Keep the rows with these indices, in ascending order; row i becomes what row `rows[i]` was."""


SessionFactory = Callable[[int], AbstractContextManager[DecodeSession]]
"""Takes `max_new_tokens`, the most tokens that a row may get, and opens a session."""


class Decoder(Implementation):
    """Decodes with a model, token by token."""

    @abstractmethod
    def open(self, model: PreTrainedModel, rows: int, vocabulary: int | None) -> AbstractContextManager[SessionFactory]:
        """See `promptkd.engine.decoding`."""


@dataclass(frozen=True)
class Engine:
    """How models are run on one kind of device."""

    name: str
    scorers: tuple[Scorer, ...]  # the fastest first; the last is what the others are held to
    decoders: tuple[Decoder, ...]  # the fastest first; the last is what the others are held to
    head: HeadBackend  # matrix products with the model's head, and the divergences that follow
    check_every: int = 1  # decoded tokens between two checks of which rows have ended; each waits for the device
    decode_rows: int = 32  # default number of rows that are decoded together
    shares_passes: bool = False  # whether the student's pass also serves the prompt's step: less time, more memory
    pass_tokens: int = 2**31  # most tokens of a pass that keeps activations only for a soft prompt
