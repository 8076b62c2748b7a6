"""The minimum arithmetic of a PromptKD step, and how fast this machine multiplies matrices."""

from collections.abc import Sequence

import torch
from torch import nn

from benchmarks.clock import median_seconds
from promptkd.data.encode import EncodedExample
from promptkd.engine import unwrap_peft
from promptkd.engine.packed import pack_rows

__all__ = ["matmul_rate", "step_flops"]


def step_flops(
    student: nn.Module, teacher: nn.Module, rows: Sequence[EncodedExample], prompt_length: int
) -> dict[str, float]:
    """Floating-point operations of prompt step and student step together, including attention and heads.

    They are counted over real tokens except the last of each row, which predicts none. A prefix that several rows share
    is counted once. A multiplication with its addition counts as two. The passes are: the student forward once and
    backward; the plain teacher forward; the prompted teacher forward twice (the prompt is updated in between) and
    backward once, only to its inputs. Every distribution is projected once, only at response tokens, and the last layer
    counts only there after its attention. Elementwise operations (norms, softmax, optimizer) are not counted.
    """
    responses = sum(len(row.response_ids) for row in rows)
    pack = pack_rows([[*row.prompt_ids, *row.response_ids[:-1]] for row in rows], share=True)
    positions = pack.positions
    predicting = {
        index
        for row, indices in zip(rows, pack.row_indices, strict=True)
        if row.response_ids
        for index in indices[len(row.prompt_ids) - 1 :]
    }
    further = [*range(prompt_length), *(position + prompt_length for position in positions)]
    linear = (
        3 * _linear(student, len(positions), len(predicting))
        + _linear(teacher, len(positions), len(predicting))
        + 3 * _linear(teacher, len(further), len(predicting))
    )
    attention = 3 * _attention(student, positions) + _attention(teacher, positions) + 4 * _attention(teacher, further)
    # student: forward, backward to inputs and weights; plain: forward; prompted: forward twice, backward to inputs
    head = (3 * _head(student) + 4 * _head(teacher)) * responses
    return {"total": linear + attention + head, "attention": attention, "head": head}


def _linear(model: nn.Module, tokens: int, predicting: int) -> int:
    """FLOPs of the matrices between embedding and head, over all tokens and over those whose states are needed."""
    backbone = unwrap_peft(model).base_model
    layers = [layer for layer in backbone.modules() if not isinstance(layer, nn.Embedding)]
    weights = [weight for layer in layers for weight in layer.parameters(recurse=False) if weight.ndim == 2]
    last = backbone.layers[-1]
    behind_attention = [*last.self_attn.o_proj.parameters(), *last.mlp.parameters()]
    everywhere = sum(weight.numel() for weight in weights)
    spared = sum(weight.numel() for weight in behind_attention if weight.ndim == 2)
    return 2 * (everywhere * tokens - spared * (tokens - predicting))


def _head(model: nn.Module) -> int:
    """FLOPs per token of the head."""
    return 2 * unwrap_peft(model).get_output_embeddings().weight.numel()


def _attention(model: nn.Module, positions: Sequence[int]) -> int:
    """FLOPs of scores and weighted sums: a token attends to itself and those before it. Backward takes twice that."""
    config = unwrap_peft(model).config.get_text_config()
    size = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads  # Qwen2 names none
    width = config.num_attention_heads * size
    return config.num_hidden_layers * 4 * width * sum(position + 1 for position in positions)


def matmul_rate(
    size: int = 2048, repeats: int = 5, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> float:
    """FLOPs per second of a product of two square matrices, the median of `repeats`."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: left @ right, left.device, repeats)
