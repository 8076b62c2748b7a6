"""The interface of an engine: everything that promptkd asks of a model goes through these classes.

An `Engine` belongs to one kind of device (CPU, CUDA) and lists interchangeable implementations of two jobs, the fastest
first and the plain reference last:

- a `Scorer` runs complete rows and returns the hidden states that predict their response tokens;
- a `Decoder` generates token by token. It opens sessions: `prefill` reads the prompts, `decode` appends one token to
  each row, `select` keeps some of the rows.

The first implementation that supports a model and agrees with the reference in a trial (`resolve.py`) runs it. From
hidden states to logits (the projection by the model's head) and to losses is the job of `Engine.head` (`heads.py`).

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
from promptkd.engine.heads import HeadBackend


class Implementation(ABC):
    """One way to run a model."""

    name: str

    @abstractmethod
    def supports(self, model: PreTrainedModel) -> bool:
        """Whether it can run the model in its current mode and precision, as far as class and settings tell.

        Called before every pass, so it must be cheap.
        """


class Scorer(Implementation):
    """Runs complete rows through a model."""

    @abstractmethod
    def hidden(self, model: PreTrainedModel, batch: TokenBatch, prompt: Tensor | None) -> Tensor:
        """Last hidden states (N, H) that predict the response tokens, in the order of `batch.targets`.

        Args:
            batch: right-padded rows.
            prompt: a soft prompt (n, E), n > 0, put before each row; or None.
        """


class DecodeSession(ABC):
    """Rows that one model decodes together."""

    @abstractmethod
    def prefill(self, prompts: Sequence[Sequence[int]], soft_prompt: Tensor | None = None) -> Tensor:
        """Read the prompts, and return the logits (R, V) of the token that follows each, in float32 or wider.

        Args:
            prompts: R lists of at least one token id.
            soft_prompt: (n, E) embeddings put before every row, or None.
        """

    @abstractmethod
    def decode(self, tokens: Tensor) -> Tensor:
        """Append one token to each row, (R,), and return the logits (R, V) of the next. Valid until the next call."""

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

    def forget(self, model: PreTrainedModel) -> None:
        """Release what is kept for the model between calls, since this decoder will not run it."""
        del model  # most decoders keep nothing


@dataclass(frozen=True)
class Engine:
    """How models are run on one kind of device."""

    name: str
    scorers: tuple[Scorer, ...]  # the fastest first, the reference last
    decoders: tuple[Decoder, ...]  # the fastest first, the reference last
    head: HeadBackend  # matrix products with the model's head, and the divergences that follow
    check_every: int  # decoded tokens between two checks of which rows have ended; each waits for the device
    decode_rows: int  # default number of rows that are decoded together
    shares_passes: bool  # whether the student's pass also serves the prompt's step: less time, more memory
    pass_tokens: int  # most tokens of a pass that keeps activations only for a soft prompt
