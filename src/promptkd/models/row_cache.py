"""Rows of different lengths read by one model without padding, and a key-value store that is written in place.

Inside `rows_of`, the attention of a transformers model is ours: first over whole rows that stand side by side, each
attending to itself alone (`Rows.read`), then a token a row (`Rows.step`), with a `LeanDecoder` if there is one. Keys
and values go into one buffer a layer, aligned at the right end of the prompts, so that a step writes one column for all
rows; transformers' cache copies everything it holds at every step. Whether a model can be read so is tried once against
its own output (`reads_rows`).
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

from promptkd.data.prefixes import Pack
from promptkd.models.lean_decoder import LeanDecoder
from promptkd.models.packed import pack_inputs
from promptkd.models.row_attention import row_attention, softcapped_attention
from promptkd.switches import switched_on

__all__ = ["Rows", "reads_rows", "rows_of"]

_NAME = "promptkd_row_cache"
_reading: list["Rows"] = []  # the rows whose keys and values the running forward reads; the last one counts
_known: weakref.WeakKeyDictionary[PreTrainedModel, dict[bool, bool]] = weakref.WeakKeyDictionary()


@dataclass
class _Layer:
    keys: Tensor
    """(R, G, width + room, D) for R rows and G key-value heads."""
    values: Tensor
    how: dict[str, Any]
    """`scaling`, `sliding_window` and `softcap`, as the layer itself gives them."""


class Rows:
    """The rows of one decode, read by one model. `rows_of` makes them."""

    def __init__(self, model: PreTrainedModel, room: int, lean: LeanDecoder | None = None):
        self.model, self.room, self.lean = model, room, lean
        self.lengths: list[int] = []
        self.width = 0
        """Columns that are filled: the longest prompt, and the tokens since."""
        self._layers: dict[int, _Layer] = {}
        self._pack: Pack | None = None
        self._absent: Tensor | None = None
        self._seen: Tensor | None = None

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
        self._pack, inputs = pack_inputs(self.model, prompts, prompt, share=switched_on("shared_prefixes"))
        hidden = self._forward(**inputs)[0]
        return hidden[[path[-1] for path in self._pack.paths]]

    def step(self, tokens: Tensor) -> Tensor:
        """Hidden states (R, H) behind one more token a row, (R,)."""
        self.width += 1
        assert self._absent is not None
        self._seen = ~self._absent[:, None, None, : self.width]
        positions = torch.tensor(self.lengths, device=tokens.device)
        self.lengths = [length + 1 for length in self.lengths]
        if self.lean is not None:
            return self.lean(tokens, positions, self._attend_to_past)
        return self._forward(input_ids=tokens[:, None], position_ids=positions[:, None])[:, -1]

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

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Attention output (B, T, heads, D) of `query` (B, heads, T, D), B = 1 for whole rows and T = 1 for a step."""
        index = int(module.layer_idx)  # type: ignore[arg-type]
        if index in self._layers:
            return self._attend_to_past(index, query, key, value)
        how = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap}
        self._layers[index] = self._stored(key[0], value[0], how)
        assert self._pack is not None
        return row_attention(query, key, value, self._pack, **how)  # type: ignore[arg-type]

    def _attend_to_past(self, index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(R, 1, heads, D) of one token a row, whose keys and values take the place of the running column."""
        layer, rows, column = self._layers[index], query.shape[0], self.width - 1
        layer.keys[:rows, :, column] = key[:, :, 0]
        layer.values[:rows, :, column] = value[:, :, 0]
        scaling, sliding_window, softcap = (layer.how[name] for name in ("scaling", "sliding_window", "softcap"))
        first = 0 if sliding_window is None else max(0, self.width - sliding_window)
        keys, values = (each[:rows, :, first : self.width] for each in (layer.keys, layer.values))
        assert self._seen is not None
        seen = self._seen[..., first:]
        grouped = query.reshape(rows, keys.shape[1], -1, query.shape[-1])  # heads that share keys stand together
        if softcap is None:
            out = scaled_dot_product_attention(grouped, keys, values, seen, scale=scaling)
        else:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            out = softcapped_attention(grouped, keys, values, seen, scale=scale, softcap=softcap)
        return out.reshape(rows, 1, -1, value.shape[-1])

    def _stored(self, key: Tensor, value: Tensor, how: dict[str, Any]) -> _Layer:
        """The buffers of a layer, with the pack's keys and values (G, S, D) in their rows."""
        assert self._pack is not None
        rows, columns = len(self.lengths), self.width + self.room
        # zeros, for what a row does not see is multiplied by a weight of 0, and NaN times 0 is NaN
        keys, values = (each.new_zeros(rows, each.shape[0], columns, each.shape[-1]) for each in (key, value))
        for row, path in enumerate(self._pack.paths):
            place = slice(self.width - len(path), self.width)
            keys[row, :, place], values[row, :, place] = key[:, path], value[:, path]
        return _Layer(keys, values, how)


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
    how = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap}
    return _reading[-1].attend(module, query, key, value, **how), None  # type: ignore[arg-type]


AttentionInterface.register(_NAME, _attention)


@contextmanager
def rows_of(model: PreTrainedModel, room: int, lean: LeanDecoder | None = None) -> Iterator[Rows]:
    """Rows that `model` reads while this is entered.

    Args:
        model: a decoder of transformers for which `reads_rows` holds, in evaluation mode.
        room: how many tokens may follow a prompt.
        lean: what takes a step in place of the model.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield Rows(model, room, lean)
    finally:
        model.set_attn_implementation(before)


def reads_rows(model: PreTrainedModel, lean: LeanDecoder | None = None) -> bool:
    """Whether `Rows` gives this model's own hidden states, tried once on two rows and a step."""
    if not switched_on("row_cache"):
        return False
    kinds = model.config.get_text_config().to_dict().get("layer_types") or []
    if not set(kinds) <= {"full_attention", "sliding_attention"}:  # two short rows would not show another kind
        return False
    known = _known.setdefault(model, {})
    if (lean is not None) not in known:
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                known[lean is not None] = _agrees(model, lean)
        finally:
            model.train(training)
    return known[lean is not None]


def _agrees(model: PreTrainedModel, lean: LeanDecoder | None) -> bool:
    device = model.get_input_embeddings().weight.device
    prompts, further = [[0, 1, 2], [3, 0]], [1, 2]
    try:
        with rows_of(model, 1, lean) as rows:
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
