"""Decoding on CPU: rows leave as soon as they end, and each step attends only to the columns filled so far."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from promptkd.engine.attention import AttentionSettings
from promptkd.engine.backbone import embedding_device
from promptkd.engine.base import Decoder, SessionFactory
from promptkd.engine.cpu.attention import CpuPackedScorer
from promptkd.engine.cpu.onednn import OneDNNLinear, copy_is_affordable, join, onednn_linears, onednn_multiplies
from promptkd.engine.fused_decoder import FusedDecoder, supports_fused_decoder
from promptkd.engine.heads import head_logits, linear_head
from promptkd.engine.packed import PackedRows, supports_packing
from promptkd.engine.static_cache import DecodeBackbone, LayerCache, StaticCacheSession, attend_to_columns, own_layers


class CpuDecoder(Decoder):
    """Decodes on a static cache, with weights reordered for oneDNN.

    Args:
        fused: run the layers by `FusedDecoder` instead of the model's own modules.
    """

    def __init__(self, *, fused: bool):
        self.fused = fused
        self.name = "fused decoder" if fused else "static cache"

    def supports(self, model: PreTrainedModel) -> bool:
        if not supports_packing(model):
            return False
        return not self.fused or (supports_fused_decoder(model) and copy_is_affordable(model))

    @contextmanager
    def open(self, model: PreTrainedModel, rows: int, vocabulary: int | None) -> Iterator[SessionFactory]:
        project = _projection(model, rows, vocabulary)
        backbone = FusedDecoder(model, partial(join, rows=rows)) if self.fused else own_layers(model)
        with nullcontext() if self.fused else onednn_linears(model.base_model, rows):
            yield lambda max_new_tokens: nullcontext(_CpuSession(model, max_new_tokens, backbone, project))


def _projection(model: PreTrainedModel, rows: int, vocabulary: int | None) -> Callable[[Tensor], Tensor]:
    """Hidden states (R, H) to logits (R, V) by the head's current weights, in float32 or wider."""
    head = linear_head(model)
    if head is None or not onednn_multiplies(head.logits_dtype):
        return lambda hidden: head_logits(model, hidden, vocabulary=vocabulary)
    head = head.limited_to(vocabulary)
    with torch.no_grad():
        product = OneDNNLinear(*head.weights(), rows)
    return lambda hidden: head.transform_(product(hidden))


class _CpuSession(StaticCacheSession):
    """Args: see `StaticCacheSession`; max_new_tokens: most tokens that may follow a prompt."""

    def __init__(
        self,
        model: PreTrainedModel,
        max_new_tokens: int,
        backbone: DecodeBackbone,
        project: Callable[[Tensor], Tensor],
    ):
        super().__init__(model, CpuPackedScorer(max_tokens=0), backbone, project)
        self.max_new_tokens = max_new_tokens
        self.lengths: list[int] = []
        self.width = 0
        """Filled columns: the longest prompt, and the tokens since."""
        self._absent: Tensor  # (R, columns), True where a row has not begun
        self._mask: Tensor

    def allocate(self, lengths: Sequence[int]) -> None:
        self.lengths, self.width = list(lengths), max(lengths)
        columns = torch.arange(self.width + self.max_new_tokens, device=embedding_device(self.model))
        first = self.width - torch.tensor(self.lengths, device=columns.device)
        self._absent = columns < first[:, None]

    def store(self, index: int, pack: PackedRows, key: Tensor, value: Tensor, settings: AttentionSettings) -> None:
        rows, columns = len(self.lengths), self.width + self.max_new_tokens
        key = key.to(value.dtype)
        # zeros, since what a row does not see is multiplied by a weight of 0, and NaN times 0 is NaN
        keys, values = (each.new_zeros(rows, each.shape[1], columns, each.shape[-1]) for each in (key, value))
        for row, indices in enumerate(pack.row_indices):
            place = slice(self.width - len(indices), self.width)
            keys[row, :, place], values[row, :, place] = key[0, :, indices], value[0, :, indices]
        self.layers[index] = LayerCache(keys, values, settings)

    def decode(self, tokens: Tensor) -> Tensor:
        self.width += 1
        self._mask = ~self._absent[:, None, None, : self.width]
        positions = torch.tensor(self.lengths, device=tokens.device)
        self.lengths = [length + 1 for length in self.lengths]
        return self.project(self.backbone(tokens, positions, self.attend_to_cache))

    def select(self, rows: Sequence[int]) -> None:
        for place, row in enumerate(rows):
            if place != row:
                for layer in self.layers.values():
                    layer.keys[place, :, : self.width] = layer.keys[row, :, : self.width]
                    layer.values[place, :, : self.width] = layer.values[row, :, : self.width]
        self.lengths = [self.lengths[row] for row in rows]
        self._absent = self._absent[list(rows)]

    def attend_to_cache(self, index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        layer, rows, column = self.layers[index], query.shape[0], self.width - 1
        layer.keys[:rows, :, column] = key[:, :, 0]
        layer.values[:rows, :, column] = value[:, :, 0]
        window = layer.settings.sliding_window
        first = 0 if window is None else max(0, self.width - window)
        keys, values = (each[:rows, :, first : self.width] for each in (layer.keys, layer.values))
        return attend_to_columns(layer, query, keys, values, self._mask[..., first:])
