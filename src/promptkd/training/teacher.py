"""The frozen teacher of a run: how it is loaded, where it stands, how it is read with and without its adapter."""

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl.models.utils import _ForwardRedirection

from promptkd.data.batch import TokenBatch
from promptkd.data.kept_logits import KeptLogits
from promptkd.engine import Vocabulary, embedding_device, engine_for, response_hidden, unwrap_peft
from promptkd.engine.backbone import recomputable_layers, recomputed_layers
from promptkd.errors import RequestError, check_all
from promptkd.methods import Method
from promptkd.models import load_model, load_tokenizer
from promptkd.models.adapters import TeacherAdapter
from promptkd.models.load import keep_differentiable
from promptkd.models.merge import merge_given, twin
from promptkd.models.pair import Pair
from promptkd.models.placement import is_dispatched
from promptkd.precision import teacher_precision
from promptkd.training.config import teacher_revision
from promptkd.training.distributed import is_sharded, place_teacher
from promptkd.training.own_teacher import EMA, check_own_teacher, is_own, start_of
from promptkd.training.residence import bring


class Teacher:
    """The teacher on this process's devices, sharded under FSDP2 and ZeRO-3.

    Args:
        args: a `DistillConfig`; `chunk_tokens` and `teacher_gradient_checkpointing` are read.
        vocabulary: what it shares with the student, or how many ids.
        averages: whether it is a moving average of the student.
        parameters: how many it had before its adapter was made, which DeepSpeed's shards do not tell.
        name: that of one of several, by which rows are its own; "" for the only one.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: TeacherAdapter | None,
        accelerator: Accelerator,
        args: Any,
        vocabulary: Vocabulary | int,
        parameters: int = 0,
        *,
        averages: bool = False,
        name: str = "",
    ):
        self.adapter, self.parameters, self.name = adapter, parameters, name
        self.vocabulary = vocabulary if isinstance(vocabulary, Vocabulary) else Vocabulary(vocabulary)
        self.placed = place_teacher(model, accelerator)
        self.model: nn.Module = accelerator.unwrap_model(self.placed)
        self._chunk_tokens, self._recomputes = args.chunk_tokens, args.teacher_gradient_checkpointing
        self._is_sharded = is_sharded(accelerator)
        self.averages = averages
        self.generation_config = self.backbone.generation_config

    def bring(self) -> None:
        """Have its weights on the device, where several teachers take turns there."""
        if self.name:
            bring(self.model)

    @property
    def backbone(self) -> PreTrainedModel:
        """The transformers model itself."""
        return unwrap_peft(self.model)

    @property
    def measurable(self) -> nn.Module | None:
        """The model, where there is one that can be measured beside the student."""
        return self.model

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
        """`batch` in the pieces that `trained_hidden` takes, which bounds activations; of a sharded teacher, whole."""
        return [batch] if self._is_sharded else batch.split(engine_for(embedding_device(self.backbone)).pass_tokens)

    def pair(self, student: nn.Module) -> Pair:
        """Student and adapted teacher, whose distributions are compared."""
        adapted = None if self.adapter is None else self.adapter.adapted_model(self.model)
        return Pair(student, self.model, self.vocabulary, chunk=self._chunk_tokens, adapted=adapted)

    def without_adapter(self) -> AbstractContextManager[None]:
        """While it is entered, `model` is the plain teacher."""
        return nullcontext() if self.adapter is None else self.adapter.disabled()

    def savings(self) -> dict[str, bool]:
        """Which of its settings would still save memory, for `out_of_memory.advice`."""
        adapter, in_float32 = self.adapter, all(each.dtype.itemsize >= 4 for each in self.model.parameters())
        fixed = self.averages or (adapter is not None and adapter.copies_teacher)  # in float32
        keeps_activations = bool(adapter and adapter.backpropagates) and not self._recomputes
        return {"recompute_teacher": keeps_activations, "lower_teacher": in_float32 and not fixed}

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


def load_teacher(
    teacher: str | Path | PreTrainedModel | KeptLogits | None,
    tokenizer: PreTrainedTokenizerBase | None,
    args: Any,
    method: Method,
    student: tuple[str | Path | PreTrainedModel, PreTrainedTokenizerBase],
) -> tuple[PreTrainedModel | KeptLogits | None, PreTrainedTokenizerBase | None]:
    """The teacher in evaluation mode, and its tokenizer, None for a loaded model that came without.

    No model for the moving average of the `student`, a model with its tokenizer: that is made when the student is.
    The adapter of a loaded `PeftModel` is merged in place, where the method trains weights in the teacher's layers.
    With `args.kept_logits`, the kept logits, and nothing is loaded.
    """
    if isinstance(teacher, KeptLogits):
        return teacher, None
    if args.kept_logits is not None:
        if teacher is not None:
            raise RequestError("Expected None as `teacher_model` beside `kept_logits`, which take its place. Got one.")
        return KeptLogits(args.kept_logits), None
    if teacher is None:
        raise RequestError("Expected a teacher as `teacher_model`, or its logits as `kept_logits`. Got None.")
    check_own_teacher(teacher, args, method, loaded=not isinstance(student[0], str | Path))
    is_start = is_own(teacher)
    if is_start:
        if teacher == EMA:
            return None, student[1]
        own, tokenizer = student
        teacher = own if isinstance(own, str | Path) else start_of(own)
    if not isinstance(teacher, str | Path):
        keep_differentiable(teacher)
        return _with_free_layers(teacher, args, method).eval(), tokenizer
    settings = teacher_settings(args, method, own=is_start)
    loaded = load_model(teacher, trust_remote_code=args.trust_remote_code, **settings)
    revision = settings["revision"]
    return loaded, tokenizer or load_tokenizer(teacher, trust_remote_code=args.trust_remote_code, revision=revision)


def _with_free_layers(teacher: Any, args: Any, method: Method) -> Any:
    """A loaded teacher into whose layers the method's adapter may go, which the caller's own then stays without.

    Not so of one that is quantized, spread over devices, or takes turns with others: those are not doubled. An adapter
    that it came with is merged into the caller's own.
    """
    adapter = method.adapter_class
    if adapter is None or not adapter.trains_layers:
        return teacher
    plain: Any = merge_given(teacher)
    is_spread = is_dispatched(plain) or vars(plain).get("is_quantized", False) or args.teachers_resident == "one"
    return plain if adapter.copies_teacher or is_spread else twin(plain)


def teacher_settings(args: Any, method: Method, *, own: bool = False) -> dict[str, Any]:
    """Arguments of `load_model` for the teacher, `own` for the student's start.

    Raises `RequestError` if one is duplicated or bitsandbytes missing.
    """
    given = dict(args.teacher_model_init_kwargs or {})
    for name in ("dtype", "torch_dtype"):
        if name in given:
            raise RequestError(
                f"teacher_model_init_kwargs holds {name}: {given[name]}. Give it as --teacher_dtype instead."
            )
    adapter = method.adapter_class
    trained = adapter is not None and adapter.copies_teacher
    dtype = teacher_precision(args.teacher_dtype, args.device, trained=trained)
    settings = {"dtype": dtype, **given, "revision": teacher_revision(args, own=own)}
    if args.teacher_quantization is None:
        return settings
    if "quantization_config" in given:
        raise RequestError("The teacher's quantization is given twice: by flag and in teacher_model_init_kwargs.")
    if find_spec("bitsandbytes") is None:
        raise RequestError(
            f"--teacher_quantization {args.teacher_quantization} needs the package bitsandbytes, which is not "
            "installed: pip install bitsandbytes. Without it, --teacher_dtype bfloat16 halves the teacher's weights."
        )
    if args.teacher_quantization == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)  # LLM.int8()
    else:  # NormalFloat, multiplied in the precision of the other weights
        computed = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype, torch.float32)
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computed)
    # bitsandbytes quantizes a weight on the device where it is loaded, and does not move it later
    return {"device_map": {"": args.device}, **settings, "quantization_config": config}


def check_teacher_options(args: Any, method: Method, teacher: nn.Module) -> None:
    """Refuse settings of the teacher that would have no effect, or another one than they say."""
    adapter, stale = method.adapter_class, args.prompt_refresh == "stale"
    copied = adapter is not None and adapter.copies_teacher
    recomputes, backpropagates = args.teacher_gradient_checkpointing, adapter is not None and adapter.backpropagates
    is_rounded = any(each.dtype.itemsize < 4 for each in teacher.parameters())
    checks = [
        (stale and copied, "prompt_refresh stale cannot keep a pass of a teacher whose head is trained too"),
        (
            stale and method.objective is None,
            "prompt_refresh stale needs a method with one objective per token, whose pass the two steps share",
        ),
        (
            recomputes and not backpropagates,
            "teacher_gradient_checkpointing has no effect here: no gradient passes through the teacher's layers",
        ),
        (
            copied and is_rounded,
            "a whole teacher is trained in float32 alone: leave teacher_dtype and teacher_quantization out",
        ),
    ]
    check_all("Wrong settings", checks)
    if recomputes:
        recomputable_layers(teacher)
