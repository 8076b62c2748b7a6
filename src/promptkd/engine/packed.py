"""Packed rows: several rows side by side in one sequence, so that no padding is computed.

Positions restart with every row, and varlen attention keeps the rows apart (`cpu/scoring.py`, `cuda/scoring.py`).
Soft-prompt vectors are ordinary tokens of a row. Rows may share a prefix (a template, a system turn, several responses
to one request): a causal model gives its tokens the same states in each of them, so they are computed once.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from promptkd.data.batch import TokenBatch, on_device
from promptkd.engine.backbone import (
    Attention,
    applies_dropout,
    backbone_of,
    embedding_device,
    joined,
    use_attention,
)
from promptkd.engine.base import Scorer
from promptkd.engine.fused_layers import fused_forward, supports_fused_forward


@dataclass(frozen=True)
class PackedRows:
    """A sequence of S tokens that holds several rows."""

    tokens: list[int]  # (S,) token ids
    positions: list[int]  # (S,) positions, counted within each row
    row_indices: list[list[int]]  # for each row, the indices of its tokens in the sequence, ascending
    own_lengths: list[int]  # for each row, how many tokens at its end are its own, not shared with an earlier row
    skips_shared: bool = False  # whether rows that share most of their tokens attend from their own alone

    @cached_property
    def row_slices(self) -> list[list[slice]]:
        """`row_indices` as contiguous slices."""
        return [_slices(indices) for indices in self.row_indices]


def _slices(indices: Sequence[int]) -> list[slice]:
    starts = [0, *(index for index in range(1, len(indices)) if indices[index] != indices[index - 1] + 1)]
    ends = [*starts[1:], len(indices)]
    return [slice(indices[start], indices[end - 1] + 1) for start, end in zip(starts, ends, strict=True)]


def pack_rows(rows: Sequence[Sequence[int]], *, share: bool) -> PackedRows:
    """Put rows of at least one token side by side, in their order; with `share`, common prefixes only once."""
    pack = PackedRows([], [], [], [])
    known: dict[tuple[int, int], int] = {}  # (index of the token before, token) to the token's index
    for row in rows:
        first_own = len(pack.tokens)
        indices = [] if share else list(range(first_own, first_own + len(row)))
        if share:
            index = -1
            for position, token in enumerate(row):
                index = known.setdefault((index, token), len(pack.tokens))
                if index == len(pack.tokens):
                    pack.tokens.append(token)
                    pack.positions.append(position)
                indices.append(index)
        else:
            pack.tokens.extend(row)
            pack.positions.extend(range(len(row)))
        pack.row_indices.append(indices)
        pack.own_lengths.append(len(pack.tokens) - first_own)
    return pack


def pack_inputs(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], prompt: Tensor | None, *, share: bool, skip: bool = False
) -> tuple[PackedRows, dict[str, Tensor]]:
    """The rows packed, after the soft prompt (n, E) if there is one, and the arguments to call a backbone with."""
    device = embedding_device(model)
    before = [] if prompt is None else list(range(-prompt.shape[0], 0))  # the vectors, as negative ids
    pack = replace(pack_rows([[*before, *row] for row in rows], share=share), skips_shared=share and skip)
    ids, positions = on_device([pack.tokens, pack.positions], device)
    if prompt is None:
        inputs = {"input_ids": ids[None]}
    else:
        embedded = model.get_input_embeddings()(ids.clamp(min=0))  # (S, E), scaled where the model scales
        vectors = [(index, token) for index, token in enumerate(pack.tokens) if token < 0]
        indices, places = on_device(vectors, device).T
        inputs = {"inputs_embeds": embedded.index_put((indices,), prompt[places].to(embedded.dtype))[None]}
    return pack, inputs | {"position_ids": positions[None]}


class PackedScorer(Scorer):
    """Scores packed rows, at most `max_tokens` at a time, by the model's own layers or by fused ones."""

    def __init__(self, max_tokens: int, *, fused: bool = False):
        self.max_tokens, self.fused = max_tokens, fused
        self.name = "fused layers" if fused else "packed rows"

    @abstractmethod
    def attention(self, pack: PackedRows, device: torch.device) -> Attention:
        """Varlen attention: causal within each row of `pack`."""

    def shares_prefixes(self, model: PreTrainedModel) -> bool:
        """Whether rows share their common prefixes."""
        return False

    def supports(self, model: PreTrainedModel) -> bool:
        fits = not self.fused or (supports_fused_forward(model) and not applies_dropout(model))
        return fits and supports_packing(model)

    def hidden(self, model: PreTrainedModel, batch: TokenBatch, prompt: Tensor | None) -> Tensor:
        # where weights are gathered from all processes, each process must call the model the same number of times
        shares = self.shares_prefixes(model)
        parts = [batch] if is_sharded(model) else batch.split(self.max_tokens, shares=shares)
        return joined([self._part(model, part, prompt) for part in parts])

    def _part(self, model: PreTrainedModel, batch: TokenBatch, prompt: Tensor | None) -> Tensor:
        places = list(zip(*batch.scored_places, strict=True))
        ends = [1] * len(batch.lengths)  # nothing is predicted from the tokens behind
        for row, column in places:
            ends[row] = max(ends[row], column + 1)
        read = [ids[:end] for ids, end in zip(batch.token_ids, ends, strict=True)]
        kinds = {"share": self.shares_prefixes(model), "skip": batch.shared_prefix > 0}
        pack, inputs = pack_inputs(model, read, prompt, **kinds)
        before = 0 if prompt is None else prompt.shape[0]
        indices = [pack.row_indices[row][before + column] for row, column in places]
        return self.states_at(model, pack, inputs, on_device(indices, batch.input_ids.device))

    def states_at(self, model: PreTrainedModel, pack: PackedRows, inputs: dict[str, Tensor], indices: Tensor) -> Tensor:
        """Last hidden states (N, H) at the indices (N,) of a pack. `inputs` are those of `pack_inputs`."""
        attention = self.attention(pack, embedding_device(model))
        if self.fused:
            return fused_forward(model, inputs, attention, indices)
        with use_attention(model, attention):
            return backbone_of(model)(**inputs, use_cache=False).last_hidden_state[0][indices]


def supports_packing(model: PreTrainedModel) -> bool:
    """Whether rows can be kept apart by attention alone: where transformers supports flash attention for the class."""
    # transformers recomputes activations after the pass, when our attention is no longer in use
    recomputes = model.is_activation_checkpointing and torch.is_grad_enabled()
    kinds = model.config.get_text_config().to_dict().get("layer_types") or []
    # a class that also reads images may refuse flash attention for their sake alone (Gemma 3)
    apart = model._supports_flash_attn or model.get_decoder()._supports_flash_attn
    # the trial's few short rows would not reveal other kinds, such as chunked attention
    return apart and not recomputes and set(kinds) <= {"full_attention", "sliding_attention"}


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether the model's weights are gathered from all processes for each pass."""
    fsdp = any(isinstance(module, FSDPModule) for module in model.modules())
    return fsdp or any("ds_id" in vars(weight) for weight in model.parameters())
