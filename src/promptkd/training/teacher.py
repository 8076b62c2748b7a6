"""The frozen teacher of a run: where it stands, and how it is read with and without what is trained of it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.models.utils import _ForwardRedirection

from promptkd.data.batch import TokenBatch
from promptkd.engine import embedding_device, engine_for, response_hidden, unwrap_peft
from promptkd.engine.backbone import recomputed_layers
from promptkd.models.adapters import TeacherAdapter
from promptkd.models.pair import Pair
from promptkd.training.distributed import is_sharded, place_teacher


class Teacher:
    """The teacher on this process's devices, sharded under FSDP2 and ZeRO-3.

    Args:
        model: as it was loaded, or in its adapter's wrapper.
        adapter: what is trained of it; None for nothing.
        args: a `DistillConfig`; `chunk_tokens` and `teacher_gradient_checkpointing` are read.
        vocabulary: size V of the vocabulary that it shares with the student.
    """

    def __init__(
        self, model: nn.Module, adapter: TeacherAdapter | None, accelerator: Accelerator, args: Any, vocabulary: int
    ):
        self.adapter, self.vocabulary = adapter, vocabulary
        self.placed = place_teacher(model, accelerator)
        self.model: nn.Module = accelerator.unwrap_model(self.placed)
        self._chunk_tokens, self._recomputes = args.chunk_tokens, args.teacher_gradient_checkpointing
        self._is_sharded = is_sharded(accelerator)

    @property
    def backbone(self) -> PreTrainedModel:
        """The transformers model itself."""
        return unwrap_peft(self.model)

    def plain_hidden(self, batch: TokenBatch) -> Tensor:
        """(N, H) states of the teacher as it came, at the positions that predict response tokens; without a graph."""
        with torch.no_grad():
            return self._hidden(batch, adapted=False)

    def adapted_hidden(self, batch: TokenBatch) -> Tensor:
        """(N, H) the same of the adapted teacher; without a graph."""
        with torch.no_grad():
            return self._hidden(batch, adapted=True)

    def trained_hidden(self, batch: TokenBatch) -> Tensor:
        """(N, H) the same of the adapted teacher, with the graph of the adapter's parameters."""
        assert self.adapter is not None
        with recomputed_layers(self.adapter.adapted_model(self.model)) if self._recomputes else nullcontext():
            return self._hidden(batch, adapted=True)

    def parts(self, batch: TokenBatch) -> list[TokenBatch]:
        """`batch` in the pieces that `trained_hidden` takes one at a time, which bounds the activations that are held.

        Processes that share a teacher's weights must call it equally often, so they cut nothing.
        """
        return [batch] if self._is_sharded else batch.split(engine_for(embedding_device(self.backbone)).pass_tokens)

    def pair(self, student: nn.Module) -> Pair:
        """Student and adapted teacher, whose distributions are compared."""
        adapted = None if self.adapter is None else self.adapter.adapted_model(self.model)
        return Pair(student, self.model, self.vocabulary, chunk=self._chunk_tokens, adapted=adapted)

    def without_adapter(self) -> AbstractContextManager[None]:
        """While it is entered, `model` is the plain teacher."""
        return nullcontext() if self.adapter is None else self.adapter.disabled()

    def _hidden(self, batch: TokenBatch, *, adapted: bool) -> Tensor:
        def run() -> Tensor:
            if self.adapter is None:
                return response_hidden(self.model, batch)
            return (self.adapter.adapted_hidden if adapted else self.adapter.plain_hidden)(self.model, batch)

        if self.placed is self.model:
            return _ForwardRedirection()(self.model, self.model, run)
        # DeepSpeed lets nothing that its wrapper returned take part in a backward other than the wrapper's own.
        hidden: list[Tensor] = []
        _ForwardRedirection()(self.placed, self.model, lambda: hidden.append(run()))
        return hidden[0]
