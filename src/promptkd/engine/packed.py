"""Rows side by side in one sequence, so that no padding is computed.

Positions restart with every row, and attention keeps rows apart. Soft-prompt vectors are ordinary tokens of a row. How
attention knows where rows end differs by device (`cpu/attention.py`, `cuda/attention.py`); the rest is here.
"""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from promptkd.data.batch import TokenBatch, on_device
from promptkd.data.prefixes import Pack, pack_rows
from promptkd.engine.attention import Attention, attention_in_place
from promptkd.engine.backbone import embedding_device
from promptkd.engine.base import Scorer

__all__ = ["PackedScorer", "is_sharded", "pack_inputs", "supports_packing"]


class PackedScorer(Scorer):
    """Scores packed rows by the model's own layers; only its attention is replaced.

    Args:
        longest: most tokens of a pack; a batch of more is cut between rows.
    """

    name = "packed rows"

    def __init__(self, longest: int):
        self.longest = longest

    @abstractmethod
    def attention(self, pack: Pack, device: torch.device) -> Attention:
        """Attention within each row of `pack`."""

    def shares_prefixes(self, model: PreTrainedModel) -> bool:
        """Whether what several rows begin with is read once."""
        return False

    def supports(self, model: PreTrainedModel) -> bool:
        return supports_packing(model)

    def hidden(self, model: PreTrainedModel, batch: TokenBatch, prompt: Tensor | None) -> Tensor:
        # where weights are gathered from all processes, these must call the model equally often
        parts = [batch] if is_sharded(model) else batch.parts(self.longest)
        return torch.cat([self._part(model, part, prompt) for part in parts])

    def states(self, model: PreTrainedModel, pack: Pack, inputs: dict[str, Tensor], places: Tensor) -> Tensor:
        """Last hidden states (N, H) at `places` (N,) of a pack, which `inputs` are as a backbone is called with it."""
        with attention_in_place(model, self.attention(pack, embedding_device(model))):
            return model.base_model(**inputs, use_cache=False).last_hidden_state[0][places]

    def _part(self, model: PreTrainedModel, batch: TokenBatch, prompt: Tensor | None) -> Tensor:
        rows, columns = batch.scored_places
        ends = [1] * len(batch.lengths)  # what follows the last token that predicts one changes nothing
        for row, column in zip(rows, columns, strict=True):
            ends[row] = max(ends[row], column + 1)
        read = [ids[:end] for ids, end in zip(batch.token_ids, ends, strict=True)]
        pack, inputs = pack_inputs(model, read, prompt, share=self.shares_prefixes(model))
        length = 0 if prompt is None else prompt.shape[0]
        places = [pack.paths[row][column + length] for row, column in zip(rows, columns, strict=True)]
        return self.states(model, pack, inputs, on_device(places, batch.input_ids.device))


def supports_packing(model: PreTrainedModel) -> bool:
    """Whether attention can be told where rows end: what transformers says of a class for flash attention."""
    # transformers recomputes activations after the pack, when our attention is no longer in place
    recomputes = model.is_activation_checkpointing and torch.is_grad_enabled()
    kinds = model.config.get_text_config().to_dict().get("layer_types") or []
    # a trial of a few short rows would not show another kind, such as chunks
    return model._supports_flash_attn and not recomputes and set(kinds) <= {"full_attention", "sliding_attention"}


def pack_inputs(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], prompt: Tensor | None, *, share: bool
) -> tuple[Pack, dict[str, Tensor]]:
    """The rows as a pack, and it as what a backbone is called with.

    Args:
        rows: token ids, at least one a row.
        prompt: (n, E) embeddings put before every row, or None.
        share: whether rows have in common what they begin with.
    """
    device = embedding_device(model)
    before = [] if prompt is None else list(range(-prompt.shape[0], 0))  # the vectors, as negative ids
    pack = pack_rows([[*before, *row] for row in rows], share=share)
    ids, positions = on_device([pack.tokens, pack.positions], device)
    if prompt is None:
        inputs = {"input_ids": ids[None]}
    else:
        embedded = model.get_input_embeddings()(ids.clamp(min=0))  # (S, E), scaled where the model scales
        places = [place for place, token in enumerate(pack.tokens) if token < 0]  # type: ignore[operator]
        index, vectors = on_device([places, [pack.tokens[place] for place in places]], device)
        inputs = {"inputs_embeds": embedded.index_put((index,), prompt[vectors].to(embedded.dtype))[None]}
    return pack, inputs | {"position_ids": positions[None]}


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether weights are gathered from all processes."""
    return any(isinstance(each, FSDPModule) for each in model.modules()) or any(
        "ds_id" in vars(each) for each in model.parameters()
    )
