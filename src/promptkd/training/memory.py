"""How much memory a distillation run will need, by parts, before it starts. An estimate, not a bound.

Weights, gradients and optimiser states follow from the shapes. What autograd keeps of a pass is measured on two short
rows and scaled to the run's, as a · tokens + b · tokens². Responses that a model will write are taken to reach their
limit, those of the data have their own lengths. A step's parts do not stand at the same time: the peak is what stands
throughout and the largest of the phases on top.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from promptkd.data.packing import TokenBatch, right_pad
from promptkd.engine import evaluating, linear_head, response_hidden, unwrap_peft
from promptkd.engine.recompute import marks_layers, recomputed_layers
from promptkd.responses import ResponseMix, Responses

__all__ = ["MemoryEstimate", "PassCost", "estimate_memory", "pass_cost", "tensor_bytes", "writes_responses"]

switched_on = packs = lambda _: True
_WIDE = 4  # bytes of a float32
_PROBES = (24, 48)  # tokens
_PREPACKED = 4 * 2**30  # most bytes of weights that decoding lays out anew
_DRAWS = 200  # micro-batches among which the largest is looked for


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part."""

    standing: dict[str, int]
    """What is held throughout."""
    phases: dict[str, dict[str, int]]
    """What each phase of an optimiser step holds on top."""

    @property
    def largest(self) -> str:
        """Name of the phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        return sum(self.standing.values()) + sum(self.phases[self.largest].values())


@dataclass(frozen=True)
class PassCost:
    """What autograd keeps of a pass, in bytes: `per_token` · T + `per_square` · T² for a row of T tokens."""

    per_token: float
    per_square: float
    layers: int

    def kept(self, lengths: Sequence[int]) -> int:
        """Bytes of rows of these lengths."""
        return round(sum(self.per_token * length + self.per_square * length**2 for length in lengths))

    def working(self, lengths: Sequence[int]) -> int:
        """Bytes of the layer that is being computed."""
        return self.kept(lengths) // self.layers


def pass_cost(model: nn.Module, *, prompted: bool = False, recomputed: bool = False) -> PassCost:
    """Measure what a pass keeps for backward, weights apart.

    Args:
        model: a causal model, or a PeftModel of one; it is read in evaluation mode.
        prompted: whether the gradient enters by embeddings put before the row, as a soft prompt's does.
        recomputed: whether layers keep their inputs alone.
    """
    layers = unwrap_peft(model).config.get_text_config().num_hidden_layers
    first, second = (_kept_bytes(model, tokens, prompted, recomputed) for tokens in _PROBES)
    short, long = _PROBES
    square = max(0.0, (second / long - first / short) / (long - short))
    return PassCost(first / short - square * short, square, layers)


def _kept_bytes(model: nn.Module, tokens: int, prompted: bool, recomputed: bool) -> int:
    weight = unwrap_peft(model).get_input_embeddings().weight
    prompt = None
    if prompted:
        prompt = torch.zeros(1, weight.shape[1], device=weight.device, requires_grad=True)
        tokens -= 1
    packed = packs(unwrap_peft(model))  # where the last token of a row is not read
    batch = right_pad([[0]], [[0] * (tokens if packed else tokens - 1)], device=weight.device)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with evaluating(model), torch.enable_grad(), recomputed_layers(model) if recomputed else nullcontext(), hooks:
        response_hidden(model, batch, prompt)
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    return sum(each.untyped_storage().nbytes() for place, each in kept.items() if place not in own)


def tensor_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of the distinct storages among `tensors`."""
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def estimate_memory(trainer: Any) -> MemoryEstimate | None:
    """The peak of a `DistillTrainer`'s run in this process; None where FSDP, DeepSpeed or vLLM hold the weights.

    On CPU it is the process's memory, elsewhere the device's. Validation is not looked at.
    """
    if trainer.is_sharded or trainer.is_deepspeed_enabled or trainer.use_vllm:
        return None
    return _Estimate(trainer).whole()


class _Estimate:
    def __init__(self, trainer: Any):
        self.trainer, self.args = trainer, trainer.args
        self.student = trainer.accelerator.unwrap_model(trainer.model)
        self.teacher = trainer.accelerator.unwrap_model(trainer.teacher_model)
        self.on_cpu = trainer.accelerator.device.type == "cpu"
        self.batch = _largest_batch(trainer)
        head = unwrap_peft(self.student).get_output_embeddings().weight
        self.head = tensor_bytes([head]) if head.requires_grad else 0
        self.words = trainer.vocabulary * _WIDE  # bytes of one token's logits
        learned = [each for each in self.student.parameters() if each.requires_grad]
        self.learned = sum(each.numel() * each.element_size() for each in learned)
        self.adapted = [] if trainer.adapter is None else trainer.adapter.parameters()
        with trainer.accelerator.autocast():
            recomputes = self.args.gradient_checkpointing and marks_layers(self.student)
            self.student_cost = pass_cost(self.student, recomputed=bool(recomputes))

    def whole(self) -> MemoryEstimate:
        weights = {
            "student's weights": tensor_bytes([*self.student.parameters(), *self.student.buffers()]),
            "teacher's weights": tensor_bytes([*self.teacher.parameters(), *self.teacher.buffers(), *self.adapted]),
        }
        adapted = sum(each.numel() for each in self.adapted) * _WIDE
        optimiser = {"optimiser states": 2 * (self.learned + adapted)}
        process = max(psutil.Process().memory_info().rss - sum(weights.values()), 0) if self.on_cpu else 0
        phases = {"student step": self._student_step(), "update": self._update()}
        if writes_responses(self.trainer.method.responses):
            phases = {"rollout": self._rollout(), **phases}
        if self.adapted:
            phases["prompt step"] = self._prompt_step() | {"adapter's gradients": adapted}
        return MemoryEstimate({"process": process} | weights | optimiser, phases)

    def _rollout(self) -> dict[str, int]:
        config = unwrap_peft(self.student).config.get_text_config()  # its attributes have one name in all families
        rows = min(self.args.generation_batch_size, len(self.batch.lengths) * self.args.gradient_accumulation_steps)
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        named = config.to_dict()
        width = named.get("head_dim") or config.hidden_size // heads
        shared = named.get("num_key_value_heads") or heads
        columns = self.args.max_prompt_length + self.args.max_completion_length
        cache = 2 * layers * shared * width * columns * rows * unwrap_peft(self.student).dtype.itemsize
        linear = [each.weight for each in self.student.modules() if type(each) is nn.Linear]
        packed = sum(each.numel() * _WIDE for each in linear)
        prepacks = self.on_cpu and switched_on("prepacked") and packed <= _PREPACKED
        parts = {"key-value cache": cache, "logits": 3 * rows * self.words}
        return parts | ({"weights laid out anew": packed} if prepacks else {})

    def _prompt_step(self) -> dict[str, int]:
        trainer, batch = self.trainer, self.batch
        online = trainer.method.teacher_adapter == "online"
        prompted = trainer.method.teacher_adapter == "prompt"
        before = self.args.prompt_length if prompted else 0
        shares = False
        with trainer.accelerator.autocast():
            whole = pass_cost(trainer.adapter.adapted_model(self.teacher), prompted=prompted)
            kept = whole
            if self.args.teacher_gradient_checkpointing:
                kept = pass_cost(trainer.adapter.adapted_model(self.teacher), prompted=prompted, recomputed=True)
        parts = [[length + before for length in _rows(self.teacher, part)] for part in trainer._parts(batch)]
        window = batch.response_tokens * self.args.gradient_accumulation_steps
        keeps = False
        return {
            "activations of the student": self.student_cost.kept(_rows(self.student, batch)) if shares else 0,
            "activations of the teacher": 0 if online else max(kept.kept(part) + whole.working(part) for part in parts),
            "logits": self._chunks(2 if keeps else 3) + (window * self.words if keeps else 0),
        }

    def _student_step(self) -> dict[str, int]:
        rows = _rows(self.student, self.batch)
        accumulates = self.args.gradient_accumulation_steps > 1
        window = self.batch.response_tokens * self.args.gradient_accumulation_steps
        keeps = False
        return {
            "activations of the student": self.student_cost.kept(rows) + self.student_cost.working(rows),
            "logits": self._chunks(1 if keeps else 2) + (window * self.words if keeps else 0),
            # the head's gradient is there before backward has freed any activation
            "gradients": (self.learned if accumulates else 0) + self.head,
        }

    def _update(self) -> dict[str, int]:
        return {"gradients": self.learned + self.head}  # those of embeddings come dense beside the sum

    def _chunks(self, models: int) -> int:
        """Logits of `models` models that are held at a time."""
        tokens, chunk = self.batch.response_tokens, self.args.chunk_tokens
        fused = chunk != 0 and switched_on("fused_head")
        if fused and linear_head(self.student) is not None and linear_head(self.teacher) is not None:
            buffers = models if self.on_cpu else 3 * models  # on CPU a few rows at a time go through the divergence
            return buffers * min(chunk or 256, tokens) * self.words
        return 3 * models * tokens * self.words


def writes_responses(source: Responses) -> bool:
    """Whether a model writes responses while the student trains."""
    return type(source) is not Responses and not (isinstance(source, ResponseMix) and source.student_share == 0)


def _rows(model: nn.Module, batch: TokenBatch) -> list[int]:
    """Tokens of each row that are computed: padding too, where rows are not packed."""
    if packs(unwrap_peft(model)):
        return [max(1, length - 1) for length in batch.lengths]  # nothing is predicted from the last one
    return [batch.input_ids.shape[1]] * len(batch.lengths)


def _largest_batch(trainer: Any) -> TokenBatch:
    """The micro-batch of most tokens among some that are drawn at random, as many as the run has, or `_DRAWS`."""
    rows, size = trainer.train_dataset, trainer.args.per_device_train_batch_size
    limit = trainer.args.max_completion_length if writes_responses(trainer.method.responses) else None
    lengths = [(len(row.prompt_ids), limit or len(row.response_ids)) for row in rows]
    generator = torch.Generator().manual_seed(trainer.args.seed)
    steps = trainer.args.max_steps if trainer.args.max_steps > 0 else _DRAWS
    draws = min(_DRAWS, steps * trainer.args.gradient_accumulation_steps)
    drawn = [torch.randperm(len(rows), generator=generator)[:size].tolist() for _ in range(draws)]
    chosen = max(drawn, key=lambda batch: sum(sum(lengths[row]) for row in batch))
    return right_pad([[0] * lengths[row][0] for row in chosen], [[0] * lengths[row][1] for row in chosen])
