"""Running a model: scoring complete rows, decoding token by token, and projecting hidden states to logits and losses.

The rest of promptkd calls `response_hidden`, `decoding`, `head_logits` and the chunked losses, which pick the engine
for the model's device. `base.py` has the interface of an engine; docs/architecture.md follows a call through it.
"""

from contextlib import AbstractContextManager

from torch import Tensor, nn

from promptkd.data.batch import TokenBatch
from promptkd.engine.backbone import applies_dropout, disable_dropout, embedding_device, evaluating, unwrap_peft
from promptkd.engine.base import DecodeSession, Engine, SessionFactory
from promptkd.engine.chunked_loss import ChunkedLoss, chunked_cross_entropy, chunked_objective, chunked_prompt_loss
from promptkd.engine.heads import Head, head_logits, head_size, linear_head
from promptkd.engine.resolve import engine_for
from promptkd.engine.verify import check_scoring, first_verified


def response_hidden(model: nn.Module, batch: TokenBatch, prompt: Tensor | None = None) -> Tensor:
    """Last hidden states that predict the response tokens.

    Args:
        model: a causal model of transformers, or a PeftModel of one.
        batch: right-padded rows.
        prompt: (n, E) embeddings put before each row, or None. The row follows at positions n, n + 1, …

    Returns:
        (N, H), one state per response token, in the order of `batch.targets`.
    """
    inner = unwrap_peft(model)
    if prompt is not None and prompt.shape[0] == 0:
        prompt = None
    scorers = engine_for(embedding_device(inner)).scorers
    return first_verified(scorers, inner).hidden(inner, batch, prompt)


def response_logits(
    model: nn.Module, batch: TokenBatch, prompt: Tensor | None = None, *, vocabulary: int | None = None
) -> Tensor:
    """Logits (N, V) that predict the response tokens, in float32 or wider; the first `vocabulary` columns if given."""
    return head_logits(model, response_hidden(model, batch, prompt), vocabulary=vocabulary)


def decoding(model: nn.Module, rows: int, *, vocabulary: int | None = None) -> AbstractContextManager[SessionFactory]:
    """Open sessions that decode with the model's current weights, which must not change while the context is open.

    Args:
        model: a causal model of transformers or a PeftModel of one, in evaluation mode.
        rows: the most rows of a session.
        vocabulary: how many tokens to return logits for, from id 0 on; None for all.
    """
    inner = unwrap_peft(model)
    decoders = engine_for(embedding_device(inner)).decoders
    return first_verified(decoders, inner).open(inner, rows, vocabulary)
