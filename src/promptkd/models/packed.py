"""Rows side by side in one sequence, so that no padding is computed, nor twice what several rows begin with.

Positions begin anew with every row. On CPU attention runs row by row, by `row_attention`, which is in place only while
a pack runs: it needs no mask, and decoding, which does need one, must never meet it. On GPUs flash attention reads the
rows' ends, the `cu_seq_lens` that transformers hands to its attention functions; there every row stands whole.

Whether a model keeps the rows of a pack apart is tried once, on a few tokens; the others are scored padded. On CPU
those of Llama's family run through `lean_states`.
"""

import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import AttentionInterface, PreTrainedModel

from promptkd.data.packing import TokenBatch
from promptkd.data.prefixes import Pack, pack_rows
from promptkd.models.dropout import applies_dropout
from promptkd.models.lean_layers import is_lean, lean_states
from promptkd.models.row_attention import row_attention
from promptkd.switches import switched_on

__all__ = ["in_place_again", "pack_inputs", "packed_hidden", "packs"]

_ROWS = "promptkd_rows"
_LONGEST = 2048  # tokens in a pack on CPU: more make the matrix products no faster

_TRIAL = [[0, 1, 2], [0, 3]]  # rows of tokens
_known: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()
_known_lean: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()
_running: list[Pack] = []  # the packs whose forward runs; the last one counts
_logger = logging.getLogger(__name__)


def packs(inner: PreTrainedModel) -> bool:
    """Whether rows that stand side by side in one sequence do not see each other in this model."""
    if not switched_on("packing") or not _has_row_attention(inner):
        return False
    if inner not in _known:
        _known[inner] = _keeps_rows_apart(inner)
        _logger.info("%s scores rows %s.", type(inner).__name__, "packed" if _known[inner] else "padded")
    return _known[inner]


def _has_row_attention(inner: PreTrainedModel) -> bool:
    """Whether attention can be told where rows end: what transformers says of a class for flash attention."""
    if inner.get_input_embeddings().weight.device.type == "cpu":
        # transformers recomputes activations after the pack, when `row_attention` is no longer in place.
        recomputes = inner.is_activation_checkpointing and torch.is_grad_enabled()
        return inner._supports_flash_attn and not recomputes
    return "flash_attention" in str(inner.config._attn_implementation)


def _keeps_rows_apart(inner: PreTrainedModel) -> bool:
    device = inner.get_input_embeddings().weight.device
    training = inner.training
    inner.eval()
    try:
        with torch.no_grad():
            pack, inputs = _pack(inner, _TRIAL, None)
            both, alone = _states(inner, pack, inputs), torch.tensor(_TRIAL[1:], device=device)
            expected = inner.base_model(input_ids=alone, use_cache=False).last_hidden_state[0]
    finally:
        inner.train(training)
    tolerance = max(1e-3, torch.finfo(expected.dtype).eps ** 0.5)
    return float((both[pack.paths[1]] - expected).abs().max()) <= tolerance * float(expected.abs().max())


def packed_hidden(inner: PreTrainedModel, batch: TokenBatch, prompt: Tensor | None) -> Tensor:
    """`response_hidden` without padding: (N, H), in the order of `batch.targets`."""
    splits = batch.input_ids.device.type == "cpu" and not _is_sharded(inner)
    parts = batch.parts(_LONGEST) if splits else [batch]
    return torch.cat([_response_states(inner, part, prompt) for part in parts])


def _is_sharded(inner: PreTrainedModel) -> bool:
    """Whether weights are gathered from all processes, which must then call the model equally often."""
    return any(isinstance(each, FSDPModule) for each in inner.modules()) or any(
        "ds_id" in vars(each) for each in inner.parameters()
    )


def _response_states(inner: PreTrainedModel, batch: TokenBatch, prompt: Tensor | None) -> Tensor:
    rows, columns = batch.rows.tolist(), batch.columns.tolist()
    ends = [1] * len(batch.lengths)  # what stands behind the last token that predicts one changes nothing
    for row, column in zip(rows, columns, strict=True):
        ends[row] = max(ends[row], column + 1)
    pack, inputs = _pack(inner, [row[:end] for row, end in zip(batch.input_ids.tolist(), ends, strict=True)], prompt)
    length = 0 if prompt is None else prompt.shape[0]
    places = [pack.paths[row][column + length] for row, column in zip(rows, columns, strict=True)]
    wanted = torch.tensor(places, dtype=torch.long, device=batch.input_ids.device)
    if _reads_lean(inner):
        return lean_states(inner, pack, inputs, wanted)
    return _states(inner, pack, inputs)[wanted]


def _reads_lean(inner: PreTrainedModel) -> bool:
    """Whether `lean_states` gives this model's own states."""
    if not switched_on("lean_layers") or not is_lean(inner) or applies_dropout(inner):
        return False
    if inner not in _known_lean:
        pack, inputs = _pack(inner, _TRIAL, None)
        places = torch.arange(len(pack.tokens))
        with torch.no_grad():
            expected, got = _states(inner, pack, inputs), lean_states(inner, pack, inputs, places)
        _known_lean[inner] = torch.allclose(got, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
    return _known_lean[inner]


def _pack(
    inner: PreTrainedModel, rows: Sequence[Sequence[int]], prompt: Tensor | None
) -> tuple[Pack, dict[str, Tensor]]:
    """The rows as a pack, the prompt's vectors at their beginnings, and what the backbone is called with."""
    on_cpu = inner.get_input_embeddings().weight.device.type == "cpu"
    share = on_cpu and switched_on("shared_prefixes") and not applies_dropout(inner)
    return pack_inputs(inner, rows, prompt, share=share)


def _states(inner: PreTrainedModel, pack: Pack, inputs: dict[str, Tensor]) -> Tensor:
    """The last hidden states (S, H) of a pack's places, by the model's own layers."""
    device = inner.get_input_embeddings().weight.device
    if device.type == "cpu":
        with _row_attention_in_place(inner, pack):
            return inner.base_model(**inputs, use_cache=False).last_hidden_state[0]
    return inner.base_model(**inputs, use_cache=False, **_row_ends(pack, device)).last_hidden_state[0]


def pack_inputs(
    inner: PreTrainedModel, rows: Sequence[Sequence[int]], prompt: Tensor | None, *, share: bool
) -> tuple[Pack, dict[str, Tensor]]:
    """The rows as a pack, and it as what a backbone is called with.

    Args:
        rows: token ids, at least one a row.
        prompt: (n, E) embeddings put before every row, or None.
        share: whether rows have in common what they begin with.
    """
    device = inner.get_input_embeddings().weight.device
    before = [] if prompt is None else list(range(-prompt.shape[0], 0))  # the vectors, as negative ids
    pack = pack_rows([[*before, *row] for row in rows], share=share)
    ids = torch.tensor(pack.tokens, device=device)
    if prompt is None:
        inputs = {"input_ids": ids[None]}
    else:
        embedded = inner.get_input_embeddings()(ids.clamp(min=0))  # (S, E), scaled where the model scales
        vectors = (ids < 0).nonzero()[:, 0]
        inputs = {"inputs_embeds": embedded.index_put((vectors,), prompt[ids[vectors]].to(embedded.dtype))[None]}
    return pack, inputs | {"position_ids": torch.tensor(pack.positions, device=device)[None]}


def _row_ends(pack: Pack, device: torch.device) -> dict[str, Any]:
    """What flash attention must know of rows that stand whole."""
    ends = torch.tensor([0, *pack.owned], device=device).cumsum(0, dtype=torch.int32)
    longest = max(pack.owned)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def in_place_again(inner: PreTrainedModel) -> AbstractContextManager[None]:
    """What is in place for the pass of `inner` that runs now, for its layers to be computed again when it is over."""
    return _row_attention_in_place(inner, _running[-1]) if inner.config._attn_implementation == _ROWS else nullcontext()


@contextmanager
def _row_attention_in_place(inner: PreTrainedModel, pack: Pack) -> Iterator[None]:
    before = inner.config._attn_implementation
    inner.config._attn_implementation = _ROWS
    _running.append(pack)
    try:
        yield
    finally:
        _running.pop()
        inner.config._attn_implementation = before


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **settings: Any
) -> tuple[Tensor, None]:
    if not _running:
        raise RuntimeError("The attention of promptkd's packs was left on outside of a forward of promptkd.")
    return row_attention(query, key, value, _running[-1], **settings), None


AttentionInterface.register(_ROWS, _attention)
