"""Decoding on CUDA: everything stays on the device, each step is one CUDA graph, and shapes come in few sizes.

Graphs read and write fixed addresses. So weights in the precision of products, the key-value cache and the current
tokens, positions and column are kept in `_Buffers` as long as the model lives, and updated in place.
"""

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
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
from promptkd.engine.backbone import backbone_of, model_matmul_dtype
from promptkd.engine.base import Decoder, DecodeSession, SessionFactory
from promptkd.engine.cuda.graphs import Graphs
from promptkd.engine.cuda.scoring import HEAD, CudaPackedScorer, rounded_up
from promptkd.engine.heads import head_logits, linear_head
from promptkd.engine.packed import is_sharded
from promptkd.engine.static_cache import (
    CachedAttention,
    CastLinear,
    DecodeBackbone,
    FusedDecoder,
    JoinedLinear,
    StaticCache,
    StaticCacheSession,
    outside_inference_mode,
    own_layers,
    supports_fused_decoder,
)

_PACKED = CudaPackedScorer(max_tokens=16_384)  # for prompts
_PROMPT_COLUMNS = 64  # prompts end at a multiple of it
_SPAN = 128  # a step attends to a multiple of so many columns
_ROWS = (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)  # rows of a step; beyond, multiples of 32


def _row_bucket(rows: int) -> int:
    return next((each for each in _ROWS if each >= rows), rounded_up(rows, 32))


class CudaDecoder(Decoder):
    """Decodes under CUDA graphs, by the model's own layers or by `FusedDecoder`."""

    def __init__(self, *, fused: bool):
        self.fused = fused
        self.name = "fused decoder" if fused else "static cache"
        self._buffers: weakref.WeakKeyDictionary[PreTrainedModel, _Buffers] = weakref.WeakKeyDictionary()

    def supports(self, model: PreTrainedModel) -> bool:
        if not _PACKED.supports(model) or is_sharded(model):  # sharded weights are gathered at other addresses
            return False
        castable = all(each.is_floating_point() and each.itemsize >= 2 for each in model.parameters())  # not quantized
        return supports_fused_decoder(model) if self.fused else castable

    def forget(self, model: PreTrainedModel) -> None:
        self._buffers.pop(model, None)

    @contextmanager
    def open(self, model: PreTrainedModel, rows: int, vocabulary: int | None) -> Iterator[SessionFactory]:
        buffers = self._buffers.get(model)
        if buffers is None or buffers.signature != _signature(model):
            buffers = self._buffers[model] = _Buffers(model, fused=self.fused)
        buffers.refill()
        project: Callable[[Tensor], Tensor] = partial(head_logits, model, vocabulary=vocabulary)
        head, address = linear_head(model), 0
        if head is not None:
            projection = HEAD.projection(head.limited_to(vocabulary), model_matmul_dtype(model))
            project, address = projection.logits, projection.weight.data_ptr()

        @contextmanager
        def session(max_new_tokens: int) -> Iterator[DecodeSession]:
            if buffers.in_use:
                raise RuntimeError("One model decodes one batch at a time on CUDA: end the session that is open.")
            buffers.in_use = True
            try:
                own = buffers, (vocabulary, address)
                yield _CudaSession(model, _PACKED, buffers.backbone, project, max_new_tokens, *own)
            finally:
                buffers.in_use = False

        yield session


def _signature(model: PreTrainedModel) -> tuple[Any, ...]:
    """What graphs rely on: the precision, the addresses of the weights, and the adapters in effect."""
    tuned = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    adapters = [(each.merged, each.disable_adapters, tuple(each.active_adapters)) for each in tuned]
    return model_matmul_dtype(model), *adapters, *(weight.data_ptr() for weight in model.parameters())


class _Buffers(StaticCache):
    """The tensors that one model's graphs read and write. It holds parts of the model, and never the model itself."""

    def __init__(self, model: PreTrainedModel, *, fused: bool):
        nothing, dtype = torch.zeros(0, dtype=torch.long), model_matmul_dtype(model)
        super().__init__(positions=nothing, first=nothing, columns=0, dtype=dtype)
        self.signature = _signature(model)
        self.graphs = Graphs()
        self.in_use = False  # by a session
        self._logits: dict[tuple[int, int], Tensor] = {}  # by vocabulary and tokens of a row
        self._blocks: dict[int, Tensor] = {}  # by tokens of a row
        self._copies: list[tuple[Tensor, Tensor]] = []  # of weights, with the weight
        join = partial(self._join, dtype)
        self.backbone: DecodeBackbone = FusedDecoder(model, join) if fused else self._cast_layers(model, dtype)

    def _join(self, dtype: torch.dtype, layers: Sequence[nn.Linear]) -> JoinedLinear:
        if all(layer.weight.dtype == dtype for layer in layers):  # a copy would only cost memory
            return partial(_side_by_side, layers)
        joined = CastLinear(layers, dtype)
        self._copies += joined.copies
        return joined

    @outside_inference_mode
    def _cast_layers(self, model: PreTrainedModel, dtype: torch.dtype) -> DecodeBackbone:
        """The model's own layers with their matrices cast: no others, as rows are sampled from what is scored."""
        original = backbone_of(model)
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
        for mine, weight in self._copies:
            mine.copy_(weight)

    @outside_inference_mode
    def keep(self, logits: Tensor, length: int = 1) -> Tensor:
        """Copy logits (R · length, V) to a buffer that graphs share: an output for each would fill gigabytes."""
        size = logits.shape[1], length
        if size not in self._logits:
            shape = len(self.first) * length, logits.shape[1]
            self._logits[size] = torch.empty(shape, dtype=logits.dtype, device=logits.device)
        return self._logits[size][: len(logits)].copy_(logits)

    @outside_inference_mode
    def block(self, length: int) -> Tensor:
        """(R, length) where graphs find the tokens that are appended together."""
        if length not in self._blocks:
            shape = len(self.first), length
            self._blocks[length] = torch.zeros(shape, dtype=torch.long, device=self.first.device)
        return self._blocks[length]

    @outside_inference_mode
    def allocate(self, lengths: Sequence[int], device: torch.device, width: int, columns: int) -> None:
        """An empty cache of so many columns in each layer, of which prompts of these lengths fill `width`."""
        rows, columns = _row_bucket(len(lengths)), rounded_up(columns, _SPAN)
        if rows > len(self.first) or columns > self.columns:
            rows, self.columns = max(rows, len(self.first)), max(columns, self.columns)
            self.layers.clear()
            self.graphs.clear()
            self._logits.clear()
            self._blocks.clear()
            self.tokens, self.positions, self.first = torch.zeros(3, rows, dtype=torch.long, device=device)
            self.column = torch.zeros(1, dtype=torch.long, device=device)
        for layer in self.layers.values():  # a NaN of an earlier session would pass through a weight of 0
            layer.keys.zero_()
            layer.values.zero_()
        # rows that only fill a bucket begin at the first new column, and see nothing else
        lengths = [*lengths, *[0] * (len(self.first) - len(lengths))]
        positions, first = on_device([lengths, [width - length for length in lengths]], device)
        self.positions.copy_(positions)
        self.first.copy_(first)
        self.column.fill_(width)


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


@dataclass(eq=False)
class _CudaSession(StaticCacheSession):
    buffers: _Buffers
    head: tuple[int | None, int]  # what distinguishes the projections that graphs hold

    def allocate(self, lengths: Sequence[int], device: torch.device) -> StaticCache:
        self.width = rounded_up(max(lengths), _PROMPT_COLUMNS)
        self.buffers.allocate(lengths, device, self.width, self.width + self.max_new_tokens)
        return self.buffers

    def select(self, rows: Sequence[int]) -> None:
        super().select(rows)
        # rows that have left may still fill a bucket: from 0 on, they stay within a table of positions
        self.buffers.positions[self.rows :].zero_()

    def decode(self, tokens: Tensor) -> Tensor:
        buffers = self.buffers
        self.width += 1
        buffers.tokens[: self.rows].copy_(tokens)
        rows, span = _row_bucket(self.rows), min(rounded_up(self.width, _SPAN), buffers.columns)
        logits = buffers.graphs.run((rows, span, self.head), buffers.column.device, lambda: self._step(rows, span))
        buffers.positions[: self.rows].add_(1)  # no further, or rows that have left would exceed the position table
        buffers.column.add_(1)
        return logits[: self.rows]

    def extended(self, tokens: Tensor) -> Tensor:
        buffers, length = self.buffers, tokens.shape[1]
        block = buffers.block(length)
        block[: self.rows].copy_(tokens)
        rows, span = _row_bucket(self.rows), min(rounded_up(self.width, _SPAN), buffers.columns)

        def run() -> Tensor:
            with torch.autocast(block.device.type, enabled=False):
                return buffers.keep(self.run_block(block[:rows], span).flatten(0, 1), length)

        logits = buffers.graphs.run((rows, span, self.head, length), block.device, run)
        return logits.unflatten(0, (rows, length))[: self.rows]

    def _step(self, rows: int, span: int) -> Tensor:
        """Logits of the first `rows` rows over `span` columns. It advances nothing, since it may run twice."""
        buffers = self.buffers
        columns = torch.arange(span, device=buffers.column.device)
        mask = (columns >= buffers.first[:rows, None]) & (columns <= buffers.column)  # (rows, span)
        self._masks: dict[int | None, Tensor] = {None: mask[:, None, None]}  # by sliding window
        with torch.autocast(columns.device.type, enabled=False):
            hidden = self.backbone(buffers.tokens[:rows], buffers.positions[:rows], self.attend_to_cache)
            return buffers.keep(self.project(hidden))

    def attend_to_cache(self, index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        layer = self.buffers.layers[index]
        mask = self._mask(layer.settings.sliding_window)
        for cache, states in ((layer.keys, key), (layer.values, value)):
            cache[: len(query)].index_copy_(2, self.buffers.column, states.to(cache.dtype))
        return layer.attend(query, slice(mask.shape[-1]), mask)

    def _mask(self, window: int | None) -> Tensor:
        """(rows, 1, 1, span), True where a row sees a column within a sliding window."""
        if window is not None and window not in self._masks:
            full = self._masks[None]
            columns = torch.arange(full.shape[-1], device=full.device)
            self._masks[window] = full & (columns > self.buffers.column - window)
        return self._masks[window]
