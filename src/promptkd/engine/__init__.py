"""Running a model: `response_hidden`, `decoding`, `head_logits` and chunked losses, by the engine of its device.

`base.py` has the interface of an engine; docs/architecture.md follows a call through it.
"""

from contextlib import AbstractContextManager

from torch import Tensor, nn

from promptkd.data.batch import TokenBatch
from promptkd.engine.backbone import disable_dropout, embedding_device, evaluating, unwrap_peft
from promptkd.engine.base import DecodeSession, SessionFactory
from promptkd.engine.checks import check_scoring, check_soft_prompt
from promptkd.engine.chunked_loss import (
    ChunkedLoss,
    chunked_coarse,
    chunked_cross_entropy,
    chunked_log_probs,
    chunked_objective,
    chunked_on_policy_gradient,
    chunked_prompt_loss,
    chunked_skew_kl,
    chunked_weighted,
)
from promptkd.engine.heads import Head, Vocabulary, head_logits, head_size, linear_head
from promptkd.engine.resolve import engine_for, first_verified, rolls_back


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
    prompt = None if prompt is None or prompt.shape[0] == 0 else prompt
    if prompt is not None:
        check_soft_prompt(inner)
    return first_verified(engine_for(embedding_device(inner)).scorers, inner).hidden(inner, batch, prompt)


def decoding(model: nn.Module, rows: int, *, vocabulary: int | None = None) -> AbstractContextManager[SessionFactory]:
    """Open sessions that decode with the model's current weights, which must not change while the context is open.

    Args:
        model: a causal model of transformers or a PeftModel of one, in evaluation mode.
        rows: the most rows of a session.
        vocabulary: how many columns of logits to return; None for all.
    """
    inner = unwrap_peft(model)
    return first_verified(engine_for(embedding_device(inner)).decoders, inner).open(inner, rows, vocabulary)


def can_roll_back(model: nn.Module) -> bool:
    """Whether sessions of `decoding` may `extend` and `rollback`; the log says once why a model's may not."""
    inner = unwrap_peft(model)
    return rolls_back(engine_for(embedding_device(inner)).decoders, inner)


def release(model: nn.Module) -> None:
    """Free what decoders keep for `model` between calls (caches, graphs), where it will not decode again soon."""
    inner = unwrap_peft(model)
    for each in engine_for(embedding_device(inner)).decoders:
        each.forget(inner)
