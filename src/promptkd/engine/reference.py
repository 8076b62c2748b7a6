"""The reference engine: plain and slow, the same on every device. All others are held to it (`resolve.py`).

The last scorer and the last decoder are the model's own forward on one row at a time. The others of this engine batch
rows, and are themselves held to it: what padding does to a model depends on its architecture. Recurrent states take
pad tokens in unless the model masks them; positions may be counted from the mask, from the ids or not at all.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, LinearAttentionCacheLayerMixin

from promptkd.data.batch import TokenBatch, on_device
from promptkd.engine.backbone import UnsupportedError, backbone_of, embedding_device, joined
from promptkd.engine.base import Decoder, DecodeSession, Engine, Scorer, SessionFactory
from promptkd.engine.heads import HeadBackend, head_logits


class PaddedScorer(Scorer):
    """Runs the padded rectangle as it is."""

    name = "padded rows"

    def hidden(self, model: PreTrainedModel, batch: TokenBatch, prompt: Tensor | None) -> Tensor:
        positions, length = batch.position_ids, 0
        inputs = {"input_ids": batch.input_ids}
        if prompt is not None:
            length = prompt.shape[0]
            embedded = model.get_input_embeddings()(batch.input_ids)  # (B, T, E), scaled where the model scales
            before = prompt.to(embedded.dtype).expand(embedded.shape[0], -1, -1)
            inputs = {"inputs_embeds": joined([before, embedded], dim=1)}
            leading = torch.arange(length, device=positions.device).expand(positions.shape[0], -1)
            positions = torch.cat([leading, positions + length], dim=1)
        hidden = backbone_of(model)(**inputs, position_ids=positions, use_cache=False).last_hidden_state
        rows, columns = (each.to(hidden.device) for each in (batch.rows, batch.columns))
        return hidden[rows, columns + length]


class RowScorer(Scorer):
    """Runs one row at a time, and leaves positions and masks to the model."""

    name = "one row at a time"

    def hidden(self, model: PreTrainedModel, batch: TokenBatch, prompt: Tensor | None) -> Tensor:
        spans = zip(batch.token_ids, batch.prompt_lengths, strict=True)
        # a row without a response is run too: where weights are sharded, each process must make as many passes
        return joined([row_states(model, ids, prompt)[start - 1 : len(ids) - 1] for ids, start in spans])


def row_states(model: PreTrainedModel, ids: Sequence[int], prompt: Tensor | None = None) -> Tensor:
    """Last hidden states (T, H) of one row of T tokens by the model's own forward, after (n, E) embeddings."""
    inputs = {"input_ids": on_device([list(ids)], embedding_device(model))}
    if prompt is None:
        return backbone_of(model)(**inputs, use_cache=False).last_hidden_state[0]
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    inputs = {"inputs_embeds": joined([prompt.to(embedded)[None], embedded], dim=1)}
    return backbone_of(model)(**inputs, use_cache=False).last_hidden_state[0, len(prompt) :]


class DynamicCacheSession(DecodeSession):
    """Left-padded rows on the cache that transformers gives the model."""

    def __init__(self, model: PreTrainedModel, vocabulary: int | None):
        self.model, self.vocabulary = model, vocabulary
        self._cache_name = cache_argument(model)
        # MiniMax, RWKV and xLSTM make one of their own in the first pass
        makes_own = not type(model)._supports_default_dynamic_cache()
        self.cache: Any = None if makes_own else DynamicCache(config=model.config)

    def prefill(self, prompts: Sequence[Sequence[int]], soft_prompt: Tensor | None = None) -> Tensor:
        length = 0 if soft_prompt is None else len(soft_prompt)
        rows = [[0] * length + list(prompt) for prompt in prompts]  # ids of 0 where the vectors go
        width, device = max(map(len, rows)), embedding_device(self.model)
        kinds = {type(layer) for layer in self.cache.layers} if isinstance(self.cache, Cache) else set()
        if min(map(len, rows)) < width and any(kind.__module__ != Cache.__module__ for kind in kinds):
            # DeepSeek-V4 compresses blocks of columns, of which padding would be a part; short trials do not reach one
            raise UnsupportedError("its cache has layers of its own, in which padding may count")
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
        self.mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        if soft_prompt is None:
            return self._last_logits(input_ids=ids)
        embedded = self.model.get_input_embeddings()(ids)  # scaled where the model scales
        columns = (self.mask == 0).sum(-1, keepdim=True) + torch.arange(length, device=device)  # (R, n)
        indices = torch.arange(len(ids), device=device)[:, None], columns
        return self._last_logits(inputs_embeds=embedded.index_put(indices, soft_prompt.to(embedded)))

    def decode(self, tokens: Tensor) -> Tensor:
        return self._last_logits(input_ids=self._appended(tokens[:, None]))

    def extend(self, tokens: Tensor) -> Tensor:
        return head_logits(self.model, self._states(input_ids=self._appended(tokens)), vocabulary=self.vocabulary)

    def rollback(self, counts: Sequence[int]) -> None:
        kinds = {type(layer) for layer in self.cache.layers} if isinstance(self.cache, Cache) else {type(self.cache)}
        if kinds != {DynamicLayer}:  # a window or a recurrent state has forgotten what came before
            raise UnsupportedError(f"its cache ({', '.join(sorted(each.__name__ for each in kinds))}) keeps no past")
        removed, shared = torch.tensor(counts, device=self.mask.device)[:, None], min(counts)
        if shared:
            self.cache.crop(-shared)
            self.mask = self.mask[:, : self.mask.shape[1] - shared]
        columns = torch.arange(self.mask.shape[1], device=self.mask.device)
        self.mask = self.mask * (columns < len(columns) + shared - removed)  # the rows' own columns stay, as padding
        self.positions = self.positions[:, -1:] - removed

    def select(self, rows: Sequence[int]) -> None:
        chosen = torch.tensor(rows, device=self.mask.device)
        self.cache = _selected(self.cache, chosen)
        self.mask, self.positions = self.mask[chosen], self.positions[chosen]

    def _appended(self, tokens: Tensor) -> Tensor:
        """The tokens (R, g), for which mask and positions are made."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(tokens.shape)], dim=1)
        self.positions = self.positions[:, -1:] + torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        return tokens

    def _last_logits(self, **inputs: Tensor) -> Tensor:
        return head_logits(self.model, self._states(**inputs)[:, -1], vocabulary=self.vocabulary)

    def _states(self, **inputs: Tensor) -> Tensor:
        # beside recurrent states alone, a mask has a column for each token of the pass, and none for those before
        new = slice(-self.positions.shape[1], None) if _keeps_no_past(self.cache) else slice(None)
        places = {"attention_mask": self.mask[:, new], "position_ids": self.positions, self._cache_name: self.cache}
        outputs = backbone_of(self.model)(**inputs, **places, use_cache=True)
        self.cache = outputs[self._cache_name]
        return outputs.last_hidden_state


def cache_argument(model: PreTrainedModel) -> str:
    """What the model's class calls the cache that it takes and returns; "" for none."""
    parameters = inspect.signature(type(model).forward).parameters
    # from transformers 5.24 on it is `cache`; models whose code comes with their weights keep the names of before
    return next((name for name in ("cache", "past_key_values", "cache_params", "state") if name in parameters), "")


def _keeps_no_past(cache: Any) -> bool:
    """Whether a cache is recurrent states alone, as those of Mamba, RWKV and xLSTM."""
    if not isinstance(cache, Cache):
        return True
    recurrent, attention = LinearAttentionCacheLayerMixin, CacheLayerMixin
    kinds = [isinstance(each, recurrent) and not isinstance(each, attention) for each in cache.layers]
    return bool(kinds) and all(kinds)


def _selected(cache: Any, rows: Tensor) -> Any:
    """A cache with some of its rows."""
    if not isinstance(cache, Cache):
        return [each[rows] for each in cache]  # RWKV's states; of other kinds this raises, and the trial ends
    if type(cache).batch_select_indices is not Cache.batch_select_indices:  # MiniMax keeps states beside its layers
        cache.batch_select_indices(rows)
    else:
        # every kind of layer can be reordered; recurrent states are selected by no other method of theirs
        cache.reorder_cache(rows)
    return cache


class SplitSession(DecodeSession):
    """Rows in several sessions, the same for rows with an equal key."""

    def __init__(self, session: Callable[[], DecodeSession], key: Callable[[int, Sequence[int]], int]):
        self._session, self._key = session, key
        self._parts: list[tuple[DecodeSession, list[int]]] = []  # with the places of its rows among all rows

    def prefill(self, prompts: Sequence[Sequence[int]], soft_prompt: Tensor | None = None) -> Tensor:
        groups: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            groups.setdefault(self._key(row, prompt), []).append(row)
        self._parts = [(self._session(), rows) for rows in groups.values()]
        return self._joined([each.prefill([prompts[row] for row in rows], soft_prompt) for each, rows in self._parts])

    def decode(self, tokens: Tensor) -> Tensor:
        return self._joined([each.decode(tokens[rows]) for each, rows in self._parts])

    def extend(self, tokens: Tensor) -> Tensor:
        return self._joined([each.extend(tokens[rows]) for each, rows in self._parts])

    def rollback(self, counts: Sequence[int]) -> None:
        for each, rows in self._parts:
            each.rollback([counts[row] for row in rows])

    def select(self, rows: Sequence[int]) -> None:
        places, parts = {old: new for new, old in enumerate(rows)}, []
        for session, held in self._parts:
            kept = [index for index, row in enumerate(held) if row in places]
            if kept:
                if len(kept) < len(held):
                    session.select(kept)
                parts.append((session, [places[held[index]] for index in kept]))
        self._parts = parts

    def _joined(self, logits: list[Tensor]) -> Tensor:
        order = torch.tensor([row for _, rows in self._parts for row in rows], device=logits[0].device)
        return torch.cat(logits)[order.argsort()]


class RecomputedSession(DecodeSession):
    """Rows without any cache: each token takes a pass over its whole row."""

    def __init__(self, model: PreTrainedModel, vocabulary: int | None):
        self.model, self.vocabulary = model, vocabulary

    def prefill(self, prompts: Sequence[Sequence[int]], soft_prompt: Tensor | None = None) -> Tensor:
        self.rows, self.soft_prompt = [list(prompt) for prompt in prompts], soft_prompt
        return self._logits(1)[:, 0]

    def decode(self, tokens: Tensor) -> Tensor:
        return self.extend(tokens[:, None])[:, 0]

    def extend(self, tokens: Tensor) -> Tensor:
        for row, further in zip(self.rows, tokens.tolist(), strict=True):
            row.extend(further)
        return self._logits(tokens.shape[1])

    def rollback(self, counts: Sequence[int]) -> None:
        self.rows = [row[: len(row) - count] for row, count in zip(self.rows, counts, strict=True)]

    def select(self, rows: Sequence[int]) -> None:
        self.rows = [self.rows[row] for row in rows]

    def _logits(self, last: int) -> Tensor:
        """(R, last, V) behind the last tokens of each row."""
        states = joined([row_states(self.model, row, self.soft_prompt)[-last:] for row in self.rows])
        return head_logits(self.model, states, vocabulary=self.vocabulary).unflatten(0, (-1, last))


class DynamicCacheDecoder(Decoder):
    """Decodes on transformers' cache, which copies all of its contents for every token."""

    name = "transformers' cache"

    def supports(self, model: PreTrainedModel) -> bool:
        return cache_argument(model) != ""

    @contextmanager
    def open(self, model: PreTrainedModel, rows: int, vocabulary: int | None) -> Iterator[SessionFactory]:
        yield lambda max_new_tokens: nullcontext(self.session(model, vocabulary))

    def session(self, model: PreTrainedModel, vocabulary: int | None) -> DecodeSession:
        return DynamicCacheSession(model, vocabulary)


class EqualLengthDecoder(DynamicCacheDecoder):
    """The same without padding: prompts of one length at a time."""

    name = "prompts of equal length on transformers' cache"

    def session(self, model: PreTrainedModel, vocabulary: int | None) -> DecodeSession:
        return SplitSession(lambda: DynamicCacheSession(model, vocabulary), lambda row, prompt: len(prompt))


class RowDecoder(EqualLengthDecoder):
    """The same for one row at a time."""

    name = "single rows on transformers' cache"

    def session(self, model: PreTrainedModel, vocabulary: int | None) -> DecodeSession:
        return SplitSession(lambda: DynamicCacheSession(model, vocabulary), lambda row, prompt: row)


class RecomputingDecoder(DynamicCacheDecoder):
    """Decodes by the model's own forward on one row at a time, from the row's first token on for every token."""

    name = "no cache"

    def supports(self, model: PreTrainedModel) -> bool:
        return True

    def session(self, model: PreTrainedModel, vocabulary: int | None) -> DecodeSession:
        return RecomputedSession(model, vocabulary)


SCORERS = (PaddedScorer(), RowScorer())
DECODERS = (DynamicCacheDecoder(), EqualLengthDecoder(), RowDecoder(), RecomputingDecoder())
REFERENCE = Engine("reference", SCORERS, DECODERS, HeadBackend())
