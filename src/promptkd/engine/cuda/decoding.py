"""Decoding on CUDA: everything stays on the device, each step is one CUDA graph, and shapes come in few sizes.

Graphs read and write fixed addresses. So weights in the precision of products, the key-value cache and the current
tokens, positions and column are kept in `_Buffers` as long as the model lives, and updated in place: weights once per
`open`, the rest per session.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from promptkd.data.batch import on_device
from promptkd.engine.attention import AttentionSettings
from promptkd.engine.backbone import embedding_device, model_matmul_dtype
from promptkd.engine.base import Decoder, DecodeSession, SessionFactory
from promptkd.engine.cuda.graphs import Graphs
from promptkd.engine.cuda.weight_copies import CastBackbone, UncopiedLinear
from promptkd.engine.fused_decoder import CastLinear, FusedDecoder, outside_inference_mode, supports_fused_decoder
from promptkd.engine.heads import HeadBackend, head_logits, linear_head
from promptkd.engine.packed import PackedRows, PackedScorer, is_sharded
from promptkd.engine.static_cache import LayerCache, StaticCacheSession, attend_to_columns

_PROMPT_COLUMNS = 64  # prompts end at a multiple of it
_SPAN = 128  # a step attends to a multiple of so many columns
_ROWS = (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)  # rows of a step; beyond, multiples of 32


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _row_bucket(rows: int) -> int:
    return next((each for each in _ROWS if each >= rows), _rounded_up(rows, 32))


class CudaDecoder(Decoder):
    """Decodes under CUDA graphs.

    Args:
        packed: packs the prompts.
        head: how heads are multiplied.
        fused: run the layers by `FusedDecoder` instead of the model's own modules.
    """

    def __init__(self, packed: PackedScorer, head: HeadBackend, *, fused: bool):
        self._packed, self._head, self.fused = packed, head, fused
        self.name = "fused decoder" if fused else "static cache"
        self._buffers: weakref.WeakKeyDictionary[PreTrainedModel, _Buffers] = weakref.WeakKeyDictionary()

    def supports(self, model: PreTrainedModel) -> bool:
        # each pass gathers the weights of a sharded model at other addresses, and quantized ones cannot be cast
        if not self._packed.supports(model) or is_sharded(model):
            return False
        if self.fused:
            return supports_fused_decoder(model)
        return all(each.is_floating_point() and each.itemsize >= 2 for each in model.parameters())

    def forget(self, model: PreTrainedModel) -> None:
        self._buffers.pop(model, None)

    @contextmanager
    def open(self, model: PreTrainedModel, rows: int, vocabulary: int | None) -> Iterator[SessionFactory]:
        buffers = self._buffers.get(model)
        if buffers is None or buffers.signature != _signature(model):
            buffers = self._buffers[model] = _Buffers(model, fused=self.fused)
        buffers.refill()
        project, address = self._projection(model, vocabulary)

        @contextmanager
        def session(max_new_tokens: int) -> Iterator[DecodeSession]:
            with buffers.in_use():
                yield _CudaSession(model, max_new_tokens, self._packed, buffers, project, (vocabulary, address))

        yield session

    def _projection(self, model: PreTrainedModel, vocabulary: int | None) -> tuple[Callable[[Tensor], Tensor], int]:
        """Hidden states (R, H) to logits (R, V) in float32, and the address of the weights that this reads."""
        head = linear_head(model)
        if head is None:
            return lambda hidden: head_logits(model, hidden, vocabulary=vocabulary), 0
        projection = self._head.projection(head.limited_to(vocabulary), model_matmul_dtype(model))
        return projection.logits, projection.weight.data_ptr()


def _signature(model: PreTrainedModel) -> tuple[Any, ...]:
    """What graphs rely on: the precision, the addresses of the weights, and the adapters in effect."""
    adapters = [
        (module.merged, module.disable_adapters, tuple(module.active_adapters))
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
    ]
    return model_matmul_dtype(model), *adapters, *(weight.data_ptr() for weight in model.parameters())


class _Buffers:
    """The tensors that one model's graphs read and write. It holds parts of the model, and never the model itself."""

    def __init__(self, model: PreTrainedModel, *, fused: bool):
        self.signature = _signature(model)
        self.dtype, self.device = model_matmul_dtype(model), embedding_device(model)
        self.graphs = Graphs()
        self.rows = self.columns = 0
        self.layers: dict[int, LayerCache] = {}
        self._logits: dict[int, Tensor] = {}
        self._in_use = False
        self._copies: list[CastLinear | CastBackbone] = []
        if fused:
            self.backbone: FusedDecoder | CastBackbone = FusedDecoder(model, self._join)
        else:
            self.backbone = CastBackbone(model, self.dtype)
            self._copies = [self.backbone]

    def _join(self, layers: Sequence[nn.Linear]) -> CastLinear | UncopiedLinear:
        if all(layer.weight.dtype == self.dtype for layer in layers):
            return UncopiedLinear(layers)
        joined = CastLinear(layers, self.dtype)
        self._copies.append(joined)
        return joined

    def refill(self) -> None:
        """Copy the model's current weights."""
        for each in self._copies:
            each.refill()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """For one session at a time."""
        if self._in_use:
            raise RuntimeError("One model decodes one batch at a time on CUDA: end the session that is open.")
        self._in_use = True
        try:
            yield
        finally:
            self._in_use = False

    @outside_inference_mode
    def keep(self, logits: Tensor) -> Tensor:
        """Copy logits (R, V) to a buffer that all graphs share: an output for each would fill gigabytes."""
        size = logits.shape[1]
        if size not in self._logits:
            self._logits[size] = torch.empty(self.rows, size, dtype=logits.dtype, device=logits.device)
        return self._logits[size][: len(logits)].copy_(logits)

    @outside_inference_mode
    def allocate(self, rows: int, columns: int) -> None:
        """Make room for a session of `rows` rows and `columns` columns, with an empty cache in every layer."""
        rows, columns = _row_bucket(rows), _rounded_up(columns, _SPAN)
        if rows > self.rows or columns > self.columns:
            self.rows, self.columns = max(rows, self.rows), max(columns, self.columns)
            self.layers.clear()
            self.graphs.clear()
            self._logits.clear()
            self.tokens, self.positions, self.first = torch.zeros(3, self.rows, dtype=torch.long, device=self.device)
            self.column = torch.zeros(1, dtype=torch.long, device=self.device)
        for layer in self.layers.values():  # a NaN of an earlier session would pass through a weight of 0
            layer.keys.zero_()
            layer.values.zero_()

    @outside_inference_mode
    def layer(self, index: int, key: Tensor, value: Tensor, settings: AttentionSettings) -> LayerCache:
        """The cache of a layer, for keys and values of these widths."""
        if index not in self.layers:
            keys, values = (
                torch.zeros(
                    self.rows, each.shape[1], self.columns, each.shape[-1], dtype=self.dtype, device=self.device
                )
                for each in (key, value)
            )
            self.layers[index] = LayerCache(keys, values, settings)
        return self.layers[index]


class _CudaSession(StaticCacheSession):
    """Args: see `StaticCacheSession`, and:

    max_new_tokens: most tokens that may follow a prompt.
    head: what distinguishes the projections that graphs hold.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        max_new_tokens: int,
        packed: PackedScorer,
        buffers: _Buffers,
        project: Callable[[Tensor], Tensor],
        head: tuple[int | None, int],
    ):
        super().__init__(model, packed, buffers.backbone, project)
        self.max_new_tokens, self.buffers, self.head = max_new_tokens, buffers, head
        self.count = self.width = 0
        """Rows, and filled columns."""
        self._places: tuple[Tensor, Tensor]  # row and column of each token of the pack
        self._masks: dict[int | None, Tensor] = {}  # by sliding window, within one step

    def allocate(self, lengths: Sequence[int]) -> None:
        self.count, self.width = len(lengths), _rounded_up(max(lengths), _PROMPT_COLUMNS)
        buffers, width = self.buffers, self.width
        buffers.allocate(self.count, width + self.max_new_tokens)
        # rows that only fill a bucket begin at the first new column, and see nothing else
        unused = buffers.rows - self.count
        starts = [width - length for length in lengths] + [width] * unused
        positions, first = on_device([[*lengths, *[0] * unused], starts], buffers.device)
        buffers.positions.copy_(positions)
        buffers.first.copy_(first)
        buffers.column.fill_(width)
        rows = [row for row, length in enumerate(lengths) for _ in range(length)]
        columns = [column for length in lengths for column in range(width - length, width)]
        places = on_device([rows, columns], buffers.device)
        self._places = places[0], places[1]

    @outside_inference_mode
    def store(self, index: int, pack: PackedRows, key: Tensor, value: Tensor, settings: AttentionSettings) -> None:
        layer, dtype = self.buffers.layer(index, key, value, settings), self.buffers.dtype
        rows, columns = self._places
        layer.keys[rows, :, columns] = key[0].transpose(0, 1).to(dtype)  # (S, G, D), row by row
        layer.values[rows, :, columns] = value[0].transpose(0, 1).to(dtype)

    def decode(self, tokens: Tensor) -> Tensor:
        buffers = self.buffers
        self.width += 1
        buffers.tokens[: self.count].copy_(tokens)
        rows, span = _row_bucket(self.count), min(_rounded_up(self.width, _SPAN), buffers.columns)
        logits = buffers.graphs.run((rows, span, self.head), buffers.device, lambda: self._step(rows, span))
        buffers.positions[: self.count].add_(1)  # no further, or rows that have left would exceed the position table
        buffers.column.add_(1)
        return logits[: self.count]

    def _step(self, rows: int, span: int) -> Tensor:
        """Logits of the first `rows` rows over `span` columns. It advances nothing, since it may run twice."""
        buffers = self.buffers
        columns = torch.arange(span, device=buffers.device)
        mask = (columns >= buffers.first[:rows, None]) & (columns <= buffers.column)  # (rows, span)
        self._masks = {None: mask[:, None, None]}
        with torch.autocast(buffers.device.type, enabled=False):
            hidden = self.backbone(buffers.tokens[:rows], buffers.positions[:rows], self.attend_to_cache)
            return buffers.keep(self.project(hidden))

    def attend_to_cache(self, index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        buffers, layer, rows = self.buffers, self.buffers.layers[index], query.shape[0]
        mask = self._mask(layer.settings.sliding_window)
        span = mask.shape[-1]
        keys, values = layer.keys[:rows], layer.values[:rows]
        keys.index_copy_(2, buffers.column, key.to(buffers.dtype))
        values.index_copy_(2, buffers.column, value.to(buffers.dtype))
        return attend_to_columns(layer, query, keys[:, :, :span], values[:, :, :span], mask)

    def _mask(self, window: int | None) -> Tensor:
        """(rows, 1, 1, span), True where a row sees a column within a sliding window."""
        if window not in self._masks:
            assert window is not None
            full = self._masks[None]
            columns = torch.arange(full.shape[-1], device=full.device)
            self._masks[window] = full & (columns > self.buffers.column - window)
        return self._masks[window]

    def select(self, rows: Sequence[int]) -> None:
        buffers = self.buffers
        moves = [(place, row) for place, row in enumerate(rows) if place != row]
        if moves:
            to, source = on_device(moves, buffers.device).T
            for layer in buffers.layers.values():
                for each in (layer.keys, layer.values):
                    each[to, :, : self.width] = each[source, :, : self.width]
            for numbers in (buffers.positions, buffers.first):
                numbers[to] = numbers[source]
        self.count = len(rows)
