"""The reference engine: plain and slow, the same on every device. The others are held to it (`resolve.py`)."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from promptkd.data.batch import TokenBatch
from promptkd.engine.backbone import embedding_device
from promptkd.engine.base import Decoder, DecodeSession, Engine, Scorer, SessionFactory
from promptkd.engine.heads import HeadBackend, head_logits
from promptkd.errors import RequestError


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
            inputs = {"inputs_embeds": torch.cat([before, embedded], dim=1)}
            leading = torch.arange(length, device=positions.device).expand(positions.shape[0], -1)
            positions = torch.cat([leading, positions + length], dim=1)
        hidden = model.base_model(**inputs, position_ids=positions, use_cache=False).last_hidden_state
        rows, columns = (each.to(hidden.device) for each in (batch.rows, batch.columns))
        return hidden[rows, columns + length]


class DynamicCacheSession(DecodeSession):
    """Left-padded rows on transformers' cache."""

    def __init__(self, model: PreTrainedModel, vocabulary: int | None):
        if "past_key_values" not in inspect.signature(model.base_model.forward).parameters:
            raise RequestError(f"{type(model).__name__} keeps no key-value cache; promptkd cannot decode with it.")
        self.model, self.vocabulary = model, vocabulary
        self.cache = DynamicCache(config=model.config)

    def prefill(self, prompts: Sequence[Sequence[int]], soft_prompt: Tensor | None = None) -> Tensor:
        length = 0 if soft_prompt is None else len(soft_prompt)
        rows = [[0] * length + list(prompt) for prompt in prompts]  # ids of 0 where the vectors go
        width, device = max(map(len, rows)), embedding_device(self.model)
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
        self.mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        if soft_prompt is None:
            return self._forward(input_ids=ids)
        embedded = self.model.get_input_embeddings()(ids)  # scaled where the model scales
        columns = (self.mask == 0).sum(-1, keepdim=True) + torch.arange(length, device=device)  # (R, n)
        indices = torch.arange(len(ids), device=device)[:, None], columns
        return self._forward(inputs_embeds=embedded.index_put(indices, soft_prompt.to(embedded)))

    def decode(self, tokens: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        self.positions = self.positions[:, -1:] + 1
        return self._forward(input_ids=tokens[:, None])

    def select(self, rows: Sequence[int]) -> None:
        chosen = torch.tensor(rows, device=self.mask.device)
        self.cache.batch_select_indices(chosen)
        self.mask, self.positions = self.mask[chosen], self.positions[chosen]

    def _forward(self, **inputs: Tensor) -> Tensor:
        places = {"attention_mask": self.mask, "position_ids": self.positions}
        outputs = self.model.base_model(**inputs, **places, past_key_values=self.cache, use_cache=True)
        return head_logits(self.model, outputs.last_hidden_state[:, -1], vocabulary=self.vocabulary)


class DynamicCacheDecoder(Decoder):
    """Decodes on transformers' cache, which copies all of its contents for every token."""

    name = "transformers' cache"

    @contextmanager
    def open(self, model: PreTrainedModel, rows: int, vocabulary: int | None) -> Iterator[SessionFactory]:
        yield lambda max_new_tokens: nullcontext(DynamicCacheSession(model, vocabulary))


REFERENCE = Engine("reference", (PaddedScorer(),), (DynamicCacheDecoder(),), HeadBackend())
