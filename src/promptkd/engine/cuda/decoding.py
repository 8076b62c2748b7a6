"""Decoding on CUDA: everything stays on the device, each step is one CUDA graph, and shapes come in few sizes.

Graphs read and write fixed addresses. So weights in the precision of products, the key-value cache and the current
tokens, positions and column are kept in `_Buffers` as long as the model lives, and updated in place.
"""

import copy
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from promptkd.data.batch import on_device
from promptkd.engine.attention import AttentionSettings
from promptkd.engine.backbone import embedding_device, model_matmul_dtype
from promptkd.engine.base import Decoder, DecodeSession, SessionFactory
from promptkd.engine.cuda.graphs import Graphs
from promptkd.engine.cuda.head import rounded_up
from promptkd.engine.fused_decoder import CastLinear, FusedDecoder, JoinedLinear, supports_fused_decoder
from promptkd.engine.heads import HeadBackend, head_logits, linear_head
from promptkd.engine.packed import PackedScorer, is_sharded
from promptkd.engine.static_cache import (
    Allocation,
    CachedAttention,
    DecodeBackbone,
    LayerCache,
    StaticCacheSession,
    attend_to_columns,
    outside_inference_mode,
    own_layers,
)

_PROMPT_COLUMNS = 64  # prompts end at a multiple of it
_SPAN = 128  # a step attends to a multiple of so many columns
_ROWS = (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)  # rows of a step; beyond, multiples of 32


def _row_bucket(rows: int) -> int:
    return next((each for each in _ROWS if each >= rows), rounded_up(rows, 32))


class CudaDecoder(Decoder):
    """Decodes under CUDA graphs, by the model's own layers or by `FusedDecoder`; `packed` packs the prompts."""

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
        head = linear_head(model)
        if head is None:
            project, address = partial(head_logits, model, vocabulary=vocabulary), 0
        else:
            projection = self._head.projection(head.limited_to(vocabulary), model_matmul_dtype(model))
            project, address = projection.logits, projection.weight.data_ptr()

        @contextmanager
        def session(max_new_tokens: int) -> Iterator[DecodeSession]:
            if buffers.in_use:
                raise RuntimeError("One model decodes one batch at a time on CUDA: end the session that is open.")
            buffers.in_use = True
            try:
                settings = max_new_tokens, buffers, (vocabulary, address)
                yield _CudaSession(model, self._packed, buffers.backbone, project, *settings)
            finally:
                buffers.in_use = False

        yield session


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
        self.in_use = False  # by a session
        self.rows = self.columns = 0
        self.layers: dict[int, LayerCache] = {}
        self._logits: dict[int, Tensor] = {}  # by vocabulary
        self._copies: list[tuple[Tensor, Tensor]] = []  # of weights, with the weight
        self.backbone: DecodeBackbone = FusedDecoder(model, self._join) if fused else self._cast_layers(model)

    def _join(self, layers: Sequence[nn.Linear]) -> JoinedLinear:
        if all(layer.weight.dtype == self.dtype for layer in layers):  # a copy would only cost memory
            return partial(_side_by_side, layers)
        joined = CastLinear(layers, self.dtype)
        self._copies += joined.copies
        return joined

    @outside_inference_mode
    def _cast_layers(self, model: PreTrainedModel) -> DecodeBackbone:
        """The model's own layers with their matrices cast: no others, as rows are sampled from what is scored."""
        original, dtype = model.base_model, self.dtype
        tables = {id(module.weight) for module in original.modules() if isinstance(module, nn.Embedding)}
        matrices = [
            weight
            for weight in original.parameters()
            if weight.ndim >= 2 and weight.dtype not in (dtype, torch.float64) and id(weight) not in tables
        ]
        copies = {id(weight): nn.Parameter(weight.detach().to(dtype), requires_grad=False) for weight in matrices}
        self._copies = [(copies[id(weight)], weight) for weight in matrices]
        shared = {id(each): each for each in (*original.parameters(), *original.buffers())}  # all that is not cast
        return partial(_run_layers, copy.deepcopy(original, shared | copies).eval() if matrices else original, dtype)

    @outside_inference_mode
    def refill(self) -> None:
        """Copy the model's current weights."""
        for mine, weight in self._copies:
            mine.copy_(weight)

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
        rows, columns = _row_bucket(rows), rounded_up(columns, _SPAN)
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


def _side_by_side(layers: Sequence[nn.Linear], inputs: Tensor, plus: Tensor | None) -> Tensor:
    """A `JoinedLinear` of the layers' own weights."""
    parts = [linear(inputs.to(each.weight.dtype), each.weight, each.bias) for each in layers]
    outputs = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return outputs if plus is None else plus + outputs


def _run_layers(
    backbone: PreTrainedModel, dtype: torch.dtype, tokens: Tensor, positions: Tensor, attend: CachedAttention
) -> Tensor:
    """A `DecodeBackbone` with products in `dtype`."""
    layers = own_layers(backbone)
    if dtype not in (torch.bfloat16, torch.float16):
        return layers(tokens, positions, attend)
    # autocast's cache of casts would outlive the graph that they were made in
    with torch.autocast(tokens.device.type, dtype=dtype, cache_enabled=False):
        return layers(tokens, positions, attend)


@dataclass
class _CudaSession(StaticCacheSession):
    buffers: _Buffers
    head: tuple[int | None, int]  # what distinguishes the projections that graphs hold

    def allocate(self, lengths: Sequence[int], device: torch.device) -> Allocation:
        buffers, width = self.buffers, rounded_up(max(lengths), _PROMPT_COLUMNS)
        buffers.allocate(len(lengths), width + self.max_new_tokens)
        # rows that only fill a bucket begin at the first new column, and see nothing else
        unused = buffers.rows - len(lengths)
        starts = [width - length for length in lengths] + [width] * unused
        positions, first = on_device([[*lengths, *[0] * unused], starts], device)
        buffers.positions.copy_(positions)
        buffers.first.copy_(first)
        buffers.column.fill_(width)
        return width, buffers.layers, buffers.positions, buffers.first

    @outside_inference_mode
    def layer(self, index: int, key: Tensor, value: Tensor, settings: AttentionSettings) -> LayerCache:
        if index not in self.layers:
            buffers = self.buffers
            sizes = [(buffers.rows, each.shape[1], buffers.columns, each.shape[-1]) for each in (key, value)]
            keys, values = (torch.zeros(size, dtype=buffers.dtype, device=buffers.device) for size in sizes)
            self.layers[index] = LayerCache(keys, values, settings)
        return self.layers[index]

    def decode(self, tokens: Tensor) -> Tensor:
        buffers = self.buffers
        self.width += 1
        buffers.tokens[: self.rows].copy_(tokens)
        rows, span = _row_bucket(self.rows), min(rounded_up(self.width, _SPAN), buffers.columns)
        logits = buffers.graphs.run((rows, span, self.head), buffers.device, lambda: self._step(rows, span))
        buffers.positions[: self.rows].add_(1)  # no further, or rows that have left would exceed the position table
        buffers.column.add_(1)
        return logits[: self.rows]

    def _step(self, rows: int, span: int) -> Tensor:
        """Logits of the first `rows` rows over `span` columns. It advances nothing, since it may run twice."""
        buffers = self.buffers
        columns = torch.arange(span, device=buffers.device)
        mask = (columns >= buffers.first[:rows, None]) & (columns <= buffers.column)  # (rows, span)
        self._masks: dict[int | None, Tensor] = {None: mask[:, None, None]}  # by sliding window
        with torch.autocast(buffers.device.type, enabled=False):
            hidden = self.backbone(buffers.tokens[:rows], buffers.positions[:rows], self.attend_to_cache)
            return buffers.keep(self.project(hidden))

    def attend_to_cache(self, index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        buffers, layer, rows = self.buffers, self.layers[index], query.shape[0]
        mask = self._mask(layer.settings.sliding_window)
        span = mask.shape[-1]
        keys, values = layer.keys[:rows], layer.values[:rows]
        keys.index_copy_(2, buffers.column, key.to(buffers.dtype))
        values.index_copy_(2, buffers.column, value.to(buffers.dtype))
        return attend_to_columns(layer, query, keys[:, :, :span], values[:, :, :span], mask)

    def _mask(self, window: int | None) -> Tensor:
        """(rows, 1, 1, span), True where a row sees a column within a sliding window."""
        if window is not None and window not in self._masks:
            full = self._masks[None]
            columns = torch.arange(full.shape[-1], device=full.device)
            self._masks[window] = full & (columns > self.buffers.column - window)
        return self._masks[window]
