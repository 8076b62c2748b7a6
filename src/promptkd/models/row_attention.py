"""Rows of different lengths read by one model without padding, and a key-value store that is written in place.

Inside `rows_of`, the attention of a transformers model is ours: first over whole rows that stand side by side
(`Rows.read`), each attending to itself alone, then a token a row (`Rows.step`). Keys and values go into one buffer a
layer, aligned at the right end of the prompts, so that a step writes one column for all rows; transformers' cache
copies everything it holds at every step. Whether a model can be read so is tried once against its own output
(`reads_rows`).
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

__all__ = ["Rows", "reads_rows", "rows_of"]

_NAME = "promptkd_rows"
_reading: list["Rows"] = []  # the rows whose keys and values the running forward reads; the last one counts
_known: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()


@dataclass
class _Layer:
    keys: Tensor
    """(R, G, width + room, D) for R rows and G key-value heads."""
    values: Tensor


class Rows:
    """The rows of one decode, read by one model. `rows_of` makes them."""

    def __init__(self, model: PreTrainedModel, room: int):
        self.model, self.room = model, room
        self.lengths: list[int] = []
        self.width = 0
        """Columns that are filled: the longest prompt, and the tokens since."""
        self._layers: dict[int, _Layer] = {}
        self._absent: Tensor | None = None

    def read(self, prompts: Sequence[Sequence[int]], prompt: Tensor | None = None) -> Tensor:
        """Hidden states (R, H) behind the last token of each prompt.

        Args:
            prompts: token ids, at least one a row.
            prompt: (n, E) embeddings put before every row, or None.
        """
        before = 0 if prompt is None else prompt.shape[0]
        device = self.model.get_input_embeddings().weight.device
        self.lengths = [before + len(ids) for ids in prompts]
        self.width = max(self.lengths)
        columns = torch.arange(self.width + self.room, device=device)
        first = self.width - torch.tensor(self.lengths, device=device)
        self._absent = columns < first[:, None]  # (R, columns) where a row has not begun
        ids = torch.tensor([token for row in prompts for token in row], device=device)
        positions = torch.cat([torch.arange(length, device=device) for length in self.lengths])
        if prompt is None:
            inputs = {"input_ids": ids[None]}
        else:
            embedded = self.model.get_input_embeddings()(ids)
            pieces = embedded.split([len(row) for row in prompts])
            joined = [part for piece in pieces for part in (prompt.to(embedded.dtype), piece)]
            inputs = {"inputs_embeds": torch.cat(joined)[None]}
        hidden = self._forward(position_ids=positions[None], **inputs)[0]
        return hidden[torch.tensor(self.lengths, device=device).cumsum(0) - 1]

    def step(self, tokens: Tensor) -> Tensor:
        """Hidden states (R, H) behind one more token a row, (R,)."""
        self.width += 1
        positions = torch.tensor(self.lengths, device=tokens.device)[:, None]
        self.lengths = [length + 1 for length in self.lengths]
        return self._forward(input_ids=tokens[:, None], position_ids=positions)[:, -1]

    def keep(self, slots: Sequence[int]) -> None:
        """Row i is from now on what row `slots[i]` was. No row may move to a place behind its own."""
        for place, slot in enumerate(slots):
            if place != slot:
                for layer in self._layers.values():
                    layer.keys[place, :, : self.width] = layer.keys[slot, :, : self.width]
                    layer.values[place, :, : self.width] = layer.values[slot, :, : self.width]
        self.lengths = [self.lengths[slot] for slot in slots]
        assert self._absent is not None
        self._absent = self._absent[list(slots)]

    def _forward(self, **inputs: Tensor) -> Tensor:
        _reading.append(self)
        try:
            return self.model.base_model(use_cache=False, **inputs).last_hidden_state
        finally:
            _reading.pop()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: "_How") -> Tensor:
        """Attention output (B, T, heads, D) of `query` (B, heads, T, D), B = 1 for whole rows and T = 1 for a step."""
        if layer not in self._layers:
            return self._attend_rows(layer, query, key, value, how)
        held = self._layers[layer]
        rows, column = query.shape[0], self.width - 1
        held.keys[:rows, :, column] = key[:, :, 0]
        held.values[:rows, :, column] = value[:, :, 0]
        first = 0 if how.window is None else max(0, self.width - how.window)
        keys, values = (each[:rows, :, first : self.width] for each in (held.keys, held.values))
        assert self._absent is not None
        seen = ~self._absent[:, None, None, first : self.width]
        grouped = query.reshape(rows, keys.shape[1], -1, query.shape[-1])  # heads that share keys stand together
        return how.attention(grouped, keys, values, seen).reshape(rows, 1, -1, value.shape[-1])

    def _attend_rows(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: "_How") -> Tensor:
        shape = (len(self.lengths), key.shape[1], self.width + self.room)
        held = _Layer(key.new_empty(*shape, key.shape[-1]), value.new_empty(*shape, value.shape[-1]))
        out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])
        start = 0
        for row, length in enumerate(self.lengths):
            part = slice(start, start + length)
            place = slice(self.width - length, self.width)
            held.keys[row, :, place] = key[0, :, part]
            held.values[row, :, place] = value[0, :, part]
            held.keys[row, :, : place.start] = held.values[row, :, : place.start] = 0  # not NaN under a weight of 0
            seen = how.own_past(length, query.device)
            attended = how.attention(query[:, :, part], key[:, :, part], value[:, :, part], seen)
            out[0, part] = attended[0].transpose(0, 1)
            start += length
        self._layers[layer] = held
        return out


@dataclass(frozen=True)
class _How:
    """What an architecture does to its scores."""

    scaling: float | None
    window: int | None
    softcap: float | None

    def own_past(self, length: int, device: torch.device) -> Tensor | None:
        """(length, length), which columns each position sees; None for all up to itself."""
        if (self.window is None or self.window >= length) and self.softcap is None:
            return None
        seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        return seen if self.window is None else seen.triu(1 - self.window)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None) -> Tensor:
        """(B, heads, T, D); None as `seen` is causal attention."""
        many = query.shape[1] != key.shape[1]
        if self.softcap is None:
            return scaled_dot_product_attention(
                query, key, value, attn_mask=seen, is_causal=seen is None, scale=self.scaling, enable_gqa=many
            )
        assert seen is not None
        if many:
            key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], 1) for each in (key, value))
        scale = query.shape[-1] ** -0.5 if self.scaling is None else self.scaling
        scores = torch.tanh(query @ key.transpose(-1, -2) * (scale / self.softcap)) * self.softcap
        weights = scores.float().masked_fill(~seen, -torch.inf).softmax(-1).to(value.dtype)
        return weights @ value


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    # No mask function is registered under this name, so transformers makes no mask: without rows to read, every row
    # would see padding and every other row.
    if not _reading:
        raise RuntimeError("The attention of promptkd's rows was left on outside of a forward of promptkd.")
    how = _How(scaling, sliding_window, softcap)
    return _reading[-1].attend(module.layer_idx, query, key, value, how), None  # type: ignore[arg-type]


AttentionInterface.register(_NAME, _attention)


@contextmanager
def rows_of(model: PreTrainedModel, room: int) -> Iterator[Rows]:
    """Rows that `model` reads while this is entered.

    Args:
        model: a decoder of transformers for which `reads_rows` holds, in evaluation mode.
        room: how many tokens may follow a prompt.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield Rows(model, room)
    finally:
        model.set_attn_implementation(before)


def reads_rows(model: PreTrainedModel) -> bool:
    """Whether `Rows` gives this model's own hidden states, tried once on two rows and a step."""
    kinds = model.config.get_text_config().to_dict().get("layer_types") or []
    if not set(kinds) <= {"full_attention", "sliding_attention"}:  # two short rows would not show another kind
        return False
    if model not in _known:
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                _known[model] = _agrees(model)
        finally:
            model.train(training)
    return _known[model]


def _agrees(model: PreTrainedModel) -> bool:
    device = model.get_input_embeddings().weight.device
    prompts, further = [[0, 1, 2], [3, 0]], [1, 2]
    try:
        with rows_of(model, room=1) as rows:
            got = [rows.read(prompts), rows.step(torch.tensor(further, device=device))]
    except (RuntimeError, TypeError, AttributeError, KeyError, IndexError):  # not of the form that transformers gives
        return False
    for row, (ids, token) in enumerate(zip(prompts, further, strict=True)):
        whole = torch.tensor([[*ids, token]], device=device)
        own = model.base_model(input_ids=whole, use_cache=False).last_hidden_state[0, -2:]
        if not all(
            torch.allclose(each[row], ours, rtol=0, atol=1e-3 * float(own.abs().max()))
            for each, ours in zip(got, own, strict=True)
        ):
            return False
    return True
