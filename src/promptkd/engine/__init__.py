"""How models are run: scoring whole rows, decoding, products of the head. One interface, an engine for each device.

`response_hidden`, `decoding` and `head_logits` are all that the rest of promptkd calls; `docs/architecture.md` tells an
engine's life in ten lines.
"""

from contextlib import AbstractContextManager

from torch import Tensor, nn

from promptkd.data.batch import TokenBatch
from promptkd.engine.backbone import (
    applies_dropout,
    compute_dtype,
    disable_dropout,
    embedding_device,
    evaluating,
    unwrap_peft,
)
from promptkd.engine.base import DecodeSession, Engine, SessionFactory
from promptkd.engine.chunked_loss import ChunkedLoss, chunked_cross_entropy, chunked_objective, chunked_prompt_loss
from promptkd.engine.heads import Head, check_scoring, head_logits, head_size, linear_head
from promptkd.engine.resolve import engine_for
from promptkd.engine.verify import first_verified

__all__ = [
    "ChunkedLoss",
    "DecodeSession",
    "Engine",
    "Head",
    "SessionFactory",
    "applies_dropout",
    "check_scoring",
    "chunked_cross_entropy",
    "chunked_objective",
    "chunked_prompt_loss",
    "compute_dtype",
    "decoding",
    "disable_dropout",
    "embedding_device",
    "engine_for",
    "evaluating",
    "head_logits",
    "head_size",
    "linear_head",
    "response_hidden",
    "response_logits",
    "unwrap_peft",
]


def response_hidden(model: nn.Module, batch: TokenBatch, prompt: Tensor | None = None) -> Tensor:
    """Last hidden states that predict the response tokens.

    Args:
        model: a causal model of transformers, or a PeftModel of one.
        batch: right-padded rows.
        prompt: (n, E) embeddings put before each row, or None. Rows follow it at positions n, n + 1, …

    Returns:
        (N, H), one row per response token, in the order of `batch.targets`.
    """
    inner = unwrap_peft(model)
    if prompt is not None and prompt.shape[0] == 0:
        prompt = None
    scorers = engine_for(embedding_device(inner)).scorers
    return first_verified(scorers, inner).hidden(inner, batch, prompt)


def response_logits(
    model: nn.Module, batch: TokenBatch, prompt: Tensor | None = None, *, vocabulary: int | None = None
) -> Tensor:
    """Logits that predict the response tokens, (N, V) in float32 or wider; the first `vocabulary` columns if given."""
    return head_logits(model, response_hidden(model, batch, prompt), vocabulary=vocabulary)


def decoding(model: nn.Module, rows: int, *, vocabulary: int | None = None) -> AbstractContextManager[SessionFactory]:
    """Sessions that decode with `model` as it is now; its weights must stay so while the context is open.

    Args:
        model: a causal model of transformers or a PeftModel of one, in evaluation mode.
        rows: the most rows of a session.
        vocabulary: logits of the first so many tokens; None for all.
    """
    inner = unwrap_peft(model)
    decoders = engine_for(embedding_device(inner)).decoders
    return first_verified(decoders, inner).opened(inner, rows, vocabulary)
