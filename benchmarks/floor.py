"""The arithmetic that a PromptKD step cannot do without, and how fast this machine multiplies matrices."""

import statistics
import time
from collections.abc import Sequence

import torch
from torch import nn

from promptkd.data.encode import EncodedExample
from promptkd.models.scoring import text_model

__all__ = ["matmul_rate", "step_flops"]


def step_flops(
    student: nn.Module, teacher: nn.Module, rows: Sequence[EncodedExample], prompt_length: int
) -> dict[str, float]:
    """Floating-point operations of prompt step and student step together, attention's and the heads' among them.

    Counted over real tokens, two for a multiplication with its addition: the student forward once and backward; the
    plain teacher forward; the prompted teacher forward twice (the prompt has moved in between) and backward once, to
    its inputs alone; every distribution projected once, at response tokens alone. What runs element by element
    (norms, softmax, optimiser) counts nothing.
    """
    tokens = sum(len(row.prompt_ids) + len(row.response_ids) for row in rows)
    responses = sum(len(row.response_ids) for row in rows)
    lengths = [len(row.prompt_ids) + len(row.response_ids) for row in rows]
    longer = [length + prompt_length for length in lengths]
    linear = 3 * _linear(student) * tokens + _linear(teacher) * (tokens + 3 * sum(longer))
    attention = 3 * _attention(student, lengths) + _attention(teacher, lengths) + 4 * _attention(teacher, longer)
    # student: forward, backward to inputs and weights; plain: forward; prompted: forward twice, backward to inputs
    head = (3 * _head(student) + 4 * _head(teacher)) * responses
    return {"total": linear + attention + head, "attention": attention, "head": head}


def _linear(model: nn.Module) -> int:
    """FLOPs a token of the matrices between embedding and head."""
    backbone = text_model(model).base_model
    layers = [layer for layer in backbone.modules() if not isinstance(layer, nn.Embedding)]
    weights = [weight for layer in layers for weight in layer.parameters(recurse=False) if weight.ndim == 2]
    return 2 * sum(weight.numel() for weight in weights)


def _head(model: nn.Module) -> int:
    """FLOPs a token of the head."""
    return 2 * text_model(model).get_output_embeddings().weight.numel()


def _attention(model: nn.Module, lengths: Sequence[int]) -> int:
    """FLOPs of scores and mixtures, causal: a token sees half of its row on average. Backward takes twice that."""
    config = text_model(model).config.get_text_config()
    width = config.num_attention_heads * (config.head_dim or config.hidden_size // config.num_attention_heads)
    return config.num_hidden_layers * sum(2 * length * (length + 1) * width for length in lengths)


def matmul_rate(size: int = 2048, repeats: int = 5) -> float:
    """FLOPs a second of a float32 product of two square matrices, the median of `repeats`."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    seconds = []
    for _ in range(repeats + 1):  # the first one is not counted
        started = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds[1:])
