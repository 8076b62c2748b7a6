"""The plain way: padded rows through the model's own forward, decoding on transformers' cache. Slow, and the oracle."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from promptkd.data.batch import TokenBatch
from promptkd.engine.backbone import embedding_device
from promptkd.engine.base import Decoder, DecodeSession, Engine, Scorer, SessionFactory
from promptkd.engine.heads import HeadProducts, head_logits
from promptkd.errors import RequestError

__all__ = ["REFERENCE", "CacheDecoder", "CacheSession", "PaddedScorer"]


class PaddedScorer(Scorer):
    """The rectangle as it is: padding is computed, and not looked at."""

    name = "padded rows"

    def supports(self, model: PreTrainedModel) -> bool:
        return True

    def hidden(self, model: PreTrainedModel, batch: TokenBatch, prompt: Tensor | None) -> Tensor:
        positions = batch.position_ids
        if prompt is None:
            length, inputs = 0, {"input_ids": batch.input_ids}
        else:
            length = prompt.shape[0]
            embedded = model.get_input_embeddings()(batch.input_ids)  # (B, T, E), scaled where the model scales
            before = prompt.to(embedded.dtype).expand(embedded.shape[0], -1, -1)
            inputs = {"inputs_embeds": torch.cat([before, embedded], dim=1)}
            leading = torch.arange(length, device=positions.device).expand(positions.shape[0], -1)
            positions = torch.cat([leading, positions + length], dim=1)
        hidden = model.base_model(**inputs, position_ids=positions, use_cache=False).last_hidden_state
        rows, columns = (each.to(hidden.device) for each in (batch.rows, batch.columns))
        return hidden[rows, columns + length]


class CacheSession(DecodeSession):
    """Rows on transformers' cache, padded on the left."""

    mask: Tensor
    positions: Tensor

    def __init__(self, model: PreTrainedModel, vocabulary: int | None):
        if "past_key_values" not in inspect.signature(model.base_model.forward).parameters:
            raise RequestError(f"{type(model).__name__} keeps no key-value cache; promptkd cannot decode with it.")
        self.model, self.vocabulary = model, vocabulary
        self.cache = DynamicCache(config=model.config)

    def prefill(self, prompts: Sequence[Sequence[int]], soft_prompt: Tensor | None = None) -> Tensor:
        length = 0 if soft_prompt is None else len(soft_prompt)
        places = [[0] * length + list(each) for each in prompts]  # the vectors' places, and the request's ids
        ids, self.mask = _left_pad(places, embedding_device(self.model))
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        if soft_prompt is None:
            return self._forward(input_ids=ids)
        return self._forward(inputs_embeds=self._embedded(ids, soft_prompt))

    def decode(self, tokens: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        self.positions = self.positions[:, -1:] + 1
        return self._forward(input_ids=tokens[:, None])

    def select(self, rows: Sequence[int]) -> None:
        chosen = torch.tensor(rows, device=self.mask.device)
        self.cache.batch_select_indices(chosen)
        self.mask, self.positions = self.mask[chosen], self.positions[chosen]

    def _embedded(self, ids: Tensor, soft_prompt: Tensor) -> Tensor:
        """(R, T, E) embeddings of left-padded rows, the soft prompt in the first n places behind the padding."""
        embedded = self.model.get_input_embeddings()(ids)  # scaled where the model scales
        first = (self.mask == 0).sum(-1, keepdim=True)  # (R, 1)
        columns = first + torch.arange(len(soft_prompt), device=ids.device)  # (R, n)
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        return embedded.index_put((rows, columns), soft_prompt.to(embedded))

    def _forward(self, **inputs: Tensor) -> Tensor:
        hidden = self.model.base_model(
            **inputs,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        return head_logits(self.model, hidden, vocabulary=self.vocabulary)


class CacheDecoder(Decoder):
    """Decodes on transformers' cache, which copies all that it holds with every token."""

    name = "transformers' cache"

    def supports(self, model: PreTrainedModel) -> bool:
        return True

    @contextmanager
    def opened(self, model: PreTrainedModel, rows: int, vocabulary: int | None) -> Iterator[SessionFactory]:
        @contextmanager
        def session(max_new_tokens: int) -> Iterator[DecodeSession]:
            yield CacheSession(model, vocabulary)

        yield session


def _left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


REFERENCE = Engine(
    name="reference",
    scorers=(PaddedScorer(),),
    decoders=(CacheDecoder(),),
    head=HeadProducts(),
    check_every=1,
    decode_rows=32,
    shares_passes=False,
    pass_tokens=2**31,
)
