"""Decoding on CUDA: everything stays on the device, a token is one CUDA graph, and shapes come in few sizes.

What graphs read must stay where it is. So weights in the computing precision, the key-value store and the running
tokens, positions and column live as long as the model, in a `_Store`, and are refilled: weights once per `opened`, the
rest per session.
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
from promptkd.data.prefixes import Pack
from promptkd.engine.backbone import compute_dtype, embedding_device
from promptkd.engine.base import Decoder, DecodeSession, SessionFactory
from promptkd.engine.cuda.graphs import Graphs
from promptkd.engine.cuda.weight_copies import CastLinear, LiveLinear, OwnLayers, lasting
from promptkd.engine.fused_decoder import FusedDecoder, supports_fused_decoder
from promptkd.engine.heads import HeadProducts, head_logits, linear_head
from promptkd.engine.packed import PackedScorer, is_sharded
from promptkd.engine.static_cache import Backbone, Layer, RowSession, attend_to_columns, supports_rows

__all__ = ["CudaDecoder"]

_PROMPT_COLUMNS = 64  # prompts end at a multiple of it
_SPAN = 128  # columns that a step attends to come in multiples of it
_ROWS = (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)  # rows of a step; beyond, multiples of 32


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _row_bucket(rows: int) -> int:
    return next((each for each in _ROWS if each >= rows), _rounded_up(rows, 32))


class CudaDecoder(Decoder):
    """Decodes under CUDA graphs.

    Args:
        packed: how prompts are packed.
        head: how heads are multiplied.
        fused: whether the layers are those of Llama's family as `FusedDecoder` has them, or the model's own.
    """

    def __init__(self, packed: PackedScorer, head: HeadProducts, *, fused: bool):
        self._packed, self._head, self.fused = packed, head, fused
        self.name = "fused decoder" if fused else "rows in place"
        self._stores: weakref.WeakKeyDictionary[PreTrainedModel, _Store] = weakref.WeakKeyDictionary()

    def supports(self, model: PreTrainedModel) -> bool:
        # the weights of a sharded model are gathered elsewhere each time; quantized ones are not to be cast
        if not supports_rows(model) or not self._packed.supports(model) or is_sharded(model):
            return False
        if self.fused:
            return supports_fused_decoder(model)
        return all(each.is_floating_point() and each.itemsize >= 2 for each in model.parameters())

    def forget(self, model: PreTrainedModel) -> None:
        self._stores.pop(model, None)

    @contextmanager
    def opened(self, model: PreTrainedModel, rows: int, vocabulary: int | None) -> Iterator[SessionFactory]:
        store = self._store(model)
        store.refill()
        project, address = self._projection(model, vocabulary)

        @contextmanager
        def session(max_new_tokens: int) -> Iterator[DecodeSession]:
            with store.taken():
                yield _CudaSession(model, max_new_tokens, self._packed, store, project, (vocabulary, address))

        yield session

    def _store(self, model: PreTrainedModel) -> "_Store":
        known = self._stores.get(model)
        if known is None or known.signature != _signature(model):
            known = self._stores[model] = _Store(model, fused=self.fused)
        return known

    def _projection(self, model: PreTrainedModel, vocabulary: int | None) -> tuple[Callable[[Tensor], Tensor], int]:
        """Hidden states (R, H) to logits (R, V) in float32, and the address of the weights that they are read from."""
        head = linear_head(model)
        if head is None:
            return lambda hidden: head_logits(model, hidden, vocabulary=vocabulary), 0
        projection = self._head.projection(head.of(vocabulary), compute_dtype(model))
        return projection.logits, projection.weight.data_ptr()


def _signature(model: PreTrainedModel) -> tuple[Any, ...]:
    """What graphs rely on: the precision, where the weights lie, and which adapters take part."""
    adapters = [
        (each.merged, each.disable_adapters, tuple(each.active_adapters))
        for each in model.modules()
        if isinstance(each, BaseTunerLayer)
    ]
    return compute_dtype(model), *adapters, *(each.data_ptr() for each in model.parameters())


class _Store:
    """What graphs of one model read and write. It holds parts of the model, and never the model itself."""

    def __init__(self, model: PreTrainedModel, *, fused: bool):
        self.signature = _signature(model)
        self.dtype, self.device = compute_dtype(model), embedding_device(model)
        self.graphs = Graphs()
        self.rows = self.columns = 0
        self.layers: dict[int, Layer] = {}
        self._logits: dict[int, Tensor] = {}
        self._is_taken = False
        self._casts: list[CastLinear] = []
        self._own = None if fused else OwnLayers(model, self.dtype)
        self.backbone: Backbone = FusedDecoder(model, self._joined) if self._own is None else self._own

    def _joined(self, layers: Sequence[nn.Linear]) -> CastLinear | LiveLinear:
        if all(each.weight.dtype == self.dtype for each in layers):
            return LiveLinear(layers)
        self._casts.append(CastLinear(layers, self.dtype))
        return self._casts[-1]

    def refill(self) -> None:
        """Take the weights as they are now."""
        for each in self._casts:
            each.refill()
        if self._own is not None:
            self._own.refill()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """For one session at a time."""
        if self._is_taken:
            raise RuntimeError("One model decodes one batch at a time on CUDA: end the session that is open.")
        self._is_taken = True
        try:
            yield
        finally:
            self._is_taken = False

    @lasting
    def kept(self, logits: Tensor) -> Tensor:
        """(R, V) logits in a buffer that all graphs write: each with an output of its own would fill gigabytes."""
        size = logits.shape[1]
        if size not in self._logits:
            self._logits[size] = torch.empty(self.rows, size, dtype=logits.dtype, device=logits.device)
        return self._logits[size][: len(logits)].copy_(logits)

    @lasting
    def make_room(self, rows: int, columns: int) -> None:
        """For a session of `rows` rows and `columns` columns; the store of every layer is empty afterwards."""
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


class _CudaSession(RowSession):
    """Rows of one decode on CUDA.

    Args: see `RowSession`.
        max_new_tokens: how many tokens may follow a prompt.
        store: where weights, keys and values stand.
        head: what tells apart the projections that graphs hold.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        max_new_tokens: int,
        packed: PackedScorer,
        store: _Store,
        project: Callable[[Tensor], Tensor],
        head: tuple[int | None, int],
    ):
        super().__init__(model, packed, store.backbone, project)
        self.max_new_tokens, self.memory, self.head = max_new_tokens, store, head
        self.count = self.width = 0
        """Rows, and columns that are filled."""
        self._places: tuple[Tensor, Tensor] | None = None  # the row and the column of every token of the pack
        self._seen: dict[int | None, Tensor] = {}  # by sliding window, within one step

    def begin(self, lengths: Sequence[int]) -> None:
        self.count, self.width = len(lengths), _rounded_up(max(lengths), _PROMPT_COLUMNS)
        memory, width = self.memory, self.width
        memory.make_room(self.count, width + self.max_new_tokens)
        # rows that only fill a bucket begin where the first new column is: they see that, and nothing else
        unused = memory.rows - self.count
        starts = [width - each for each in lengths] + [width] * unused
        positions, first = on_device([[*lengths, *[0] * unused], starts], memory.device)
        memory.positions.copy_(positions)
        memory.first.copy_(first)
        memory.column.fill_(width)
        rows = [row for row, length in enumerate(lengths) for _ in range(length)]
        columns = [column for length in lengths for column in range(width - length, width)]
        places = on_device([rows, columns], memory.device)
        self._places = places[0], places[1]

    @lasting
    def store(self, index: int, pack: Pack, key: Tensor, value: Tensor, **settings: Any) -> None:
        memory = self.memory
        if index not in memory.layers:
            shape = (memory.rows, value.shape[1], memory.columns)
            keys, values = (
                torch.zeros(*shape, each.shape[-1], dtype=memory.dtype, device=memory.device) for each in (key, value)
            )
            memory.layers[index] = Layer(keys, values, **settings)
        layer = memory.layers[index]
        assert self._places is not None
        rows, columns = self._places
        layer.keys[rows, :, columns] = key[0].transpose(0, 1).to(memory.dtype)  # (S, G, D), a row after the other
        layer.values[rows, :, columns] = value[0].transpose(0, 1).to(memory.dtype)

    def decode(self, tokens: Tensor) -> Tensor:
        memory = self.memory
        self.width += 1
        memory.tokens[: self.count].copy_(tokens)
        rows, span = _row_bucket(self.count), min(_rounded_up(self.width, _SPAN), memory.columns)
        logits = memory.graphs.run((rows, span, self.head), memory.device, lambda: self._step(rows, span))
        memory.positions[: self.count].add_(1)  # of rows that have left, no position leaves the model's table
        memory.column.add_(1)
        return logits[: self.count]

    def _step(self, rows: int, span: int) -> Tensor:
        """Logits of the first `rows` rows over `span` columns. It may run twice: it advances nothing."""
        memory = self.memory
        columns = torch.arange(span, device=memory.device)
        seen = (columns >= memory.first[:rows, None]) & (columns <= memory.column)  # (rows, span)
        self._seen = {None: seen[:, None, None]}
        with torch.autocast(memory.device.type, enabled=False):
            return memory.kept(self.project(self.states(memory.tokens[:rows], memory.positions[:rows])))

    def attend_to_past(self, index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        memory, layer, rows = self.memory, self.memory.layers[index], query.shape[0]
        seen = self._within(layer.sliding_window)
        span = seen.shape[-1]
        keys, values = layer.keys[:rows], layer.values[:rows]
        keys.index_copy_(2, memory.column, key.to(memory.dtype))
        values.index_copy_(2, memory.column, value.to(memory.dtype))
        return attend_to_columns(layer, query, keys[:, :, :span], values[:, :, :span], seen)

    def _within(self, window: int | None) -> Tensor:
        """(rows, 1, 1, span) what each row sees within a sliding window."""
        if window not in self._seen:
            assert window is not None
            whole = self._seen[None]
            columns = torch.arange(whole.shape[-1], device=whole.device)
            self._seen[window] = whole & (columns > self.memory.column - window)
        return self._seen[window]

    def select(self, rows: Sequence[int]) -> None:
        memory, device = self.memory, self.memory.device
        moves = [(place, row) for place, row in enumerate(rows) if place != row]
        if moves:
            to, source = on_device(moves, device).T
            for layer in memory.layers.values():
                for each in (layer.keys, layer.values):
                    each[to, :, : self.width] = each[source, :, : self.width]
            for numbers in (memory.positions, memory.first):
                numbers[to] = numbers[source]
        self.count = len(rows)
