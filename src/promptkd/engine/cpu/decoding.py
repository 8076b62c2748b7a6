"""Decoding on a CPU: rows leave as soon as they end, and a step sees no more columns than there are."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from promptkd.data.prefixes import Pack
from promptkd.engine.backbone import embedding_device
from promptkd.engine.base import Decoder, DecodeSession, SessionFactory
from promptkd.engine.cpu.attention import CpuPackedScorer
from promptkd.engine.cpu.onednn import PackedLinear, fits_twice, joined, onednn_multiplies, prepacked_linears
from promptkd.engine.fused_decoder import FusedDecoder, supports_fused_decoder
from promptkd.engine.heads import head_logits, linear_head
from promptkd.engine.static_cache import Backbone, Layer, RowSession, attend_to_columns, supports_rows

__all__ = ["CpuDecoder"]


class CpuDecoder(Decoder):
    """Decodes on a key-value store of our own, with weights laid out for the processor.

    Args:
        fused: whether the layers are those of Llama's family as `FusedDecoder` has them, or the model's own.
    """

    def __init__(self, *, fused: bool):
        self.fused = fused
        self.name = "fused decoder" if fused else "rows in place"

    def supports(self, model: PreTrainedModel) -> bool:
        return supports_rows(model) and (not self.fused or (supports_fused_decoder(model) and fits_twice(model)))

    @contextmanager
    def opened(self, model: PreTrainedModel, rows: int, vocabulary: int | None) -> Iterator[SessionFactory]:
        project = _projection(model, rows, vocabulary)
        backbone = FusedDecoder(model, partial(joined, rows=rows)) if self.fused else None

        @contextmanager
        def session(max_new_tokens: int) -> Iterator[DecodeSession]:
            yield CpuSession(model, max_new_tokens, backbone, project)

        if self.fused:
            yield session
            return
        with prepacked_linears(model.base_model, rows):
            yield session


def _projection(model: PreTrainedModel, rows: int, vocabulary: int | None) -> Callable[[Tensor], Tensor]:
    """Hidden states (R, H) to logits (R, V) by the head as it is now, in float32 or wider."""
    head = linear_head(model)
    if head is None or not onednn_multiplies(head.wide):
        return lambda hidden: head_logits(model, hidden, vocabulary=vocabulary)
    head = head.of(vocabulary)
    weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()[: head.vocabulary]
    packed = PackedLinear(weight[: head.vocabulary].to(head.wide), None if bias is None else bias.to(head.wide), rows)
    return lambda hidden: head.transformed(packed(hidden))


class CpuSession(RowSession):
    """The rows of one decode on a CPU.

    Args: see `RowSession`.
        max_new_tokens: how many tokens may follow a prompt.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        max_new_tokens: int,
        backbone: Backbone | None,
        project: Callable[[Tensor], Tensor],
    ):
        super().__init__(model, CpuPackedScorer(longest=0), backbone, project)
        self.max_new_tokens = max_new_tokens
        self.lengths: list[int] = []
        self.width = 0
        """Columns that are filled: the longest prompt, and the tokens since."""
        self._absent: Tensor
        self._seen: Tensor

    def begin(self, lengths: Sequence[int]) -> None:
        self.lengths, self.width = list(lengths), max(lengths)
        columns = torch.arange(self.width + self.max_new_tokens, device=embedding_device(self.model))
        first = self.width - torch.tensor(self.lengths, device=columns.device)
        self._absent = columns < first[:, None]  # (R, columns) where a row has not begun

    def store(self, index: int, pack: Pack, key: Tensor, value: Tensor, **settings: Any) -> None:
        rows, columns = len(self.lengths), self.width + self.max_new_tokens
        key = key.to(value.dtype)
        # zeros, for what a row does not see is multiplied by a weight of 0, and NaN times 0 is NaN
        keys, values = (each.new_zeros(rows, each.shape[1], columns, each.shape[-1]) for each in (key, value))
        for row, path in enumerate(pack.paths):
            place = slice(self.width - len(path), self.width)
            keys[row, :, place], values[row, :, place] = key[0, :, path], value[0, :, path]
        self.layers[index] = Layer(keys, values, **settings)

    def decode(self, tokens: Tensor) -> Tensor:
        self.width += 1
        self._seen = ~self._absent[:, None, None, : self.width]
        positions = torch.tensor(self.lengths, device=tokens.device)
        self.lengths = [length + 1 for length in self.lengths]
        return self.project(self.states(tokens, positions))

    def select(self, rows: Sequence[int]) -> None:
        for place, row in enumerate(rows):
            if place != row:
                for layer in self.layers.values():
                    layer.keys[place, :, : self.width] = layer.keys[row, :, : self.width]
                    layer.values[place, :, : self.width] = layer.values[row, :, : self.width]
        self.lengths = [self.lengths[row] for row in rows]
        self._absent = self._absent[list(rows)]

    def attend_to_past(self, index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        layer, rows, column = self.layers[index], query.shape[0], self.width - 1
        layer.keys[:rows, :, column] = key[:, :, 0]
        layer.values[:rows, :, column] = value[:, :, 0]
        first = 0 if layer.sliding_window is None else max(0, self.width - layer.sliding_window)
        keys, values = (each[:rows, :, first : self.width] for each in (layer.keys, layer.values))
        return attend_to_columns(layer, query, keys, values, self._seen[..., first:])
