"""A transformers model as a GGUF file, in the conventions of llama.cpp's converter."""

from collections.abc import Iterator
from pathlib import Path

import gguf
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from promptkd.models.gguf_vocabulary import add_vocabulary, why_not_vocabulary

__all__ = ["stored_type", "why_not_gguf", "write_gguf"]

_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gpt2": gguf.MODEL_ARCH.GPT2,
}
_FILE_TYPES = {
    torch.float32: gguf.LlamaFileType.ALL_F32,
    torch.float16: gguf.LlamaFileType.MOSTLY_F16,
    torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16,
}


def why_not_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What keeps the model out of a GGUF file that `write_gguf` can write; [] if nothing does."""
    config = model.config
    if config.model_type not in _ARCHITECTURES:
        return [f"{config.model_type} is none of the architectures {', '.join(_ARCHITECTURES)}"]
    problems = _gpt2_problems(config) if config.model_type == "gpt2" else _rotary_problems(config)
    return problems + why_not_vocabulary(tokenizer)


def write_gguf(
    file: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, title: str
) -> None:
    """Write a model that `why_not_gguf` finds nothing against.

    Args:
        dtype: float32, float16 or bfloat16, for what `stored_type` does not keep in float32.
        title: what serving tools call the model.

    Raises:
        RequestError: if the tokenizer has an id that the embedding has no row for.
    """
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[_ARCHITECTURES[model.config.model_type]])
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(title)
        writer.add_file_type(_FILE_TYPES[dtype])
        (_add_gpt2 if model.config.model_type == "gpt2" else _add_rotary)(writer, model.config)
        size = model.get_input_embeddings().weight.shape[0]
        writer.add_vocab_size(size)
        add_vocabulary(writer, tokenizer, size)
        for name, weight in _tensors(model, dtype):
            if weight.dtype == torch.bfloat16:  # which NumPy does not know
                bits = weight.view(torch.uint8).numpy()
                writer.add_tensor(name, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
            else:
                writer.add_tensor(name, weight.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def stored_type(name: str, weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Vectors, and GPT-2's table of positions, stay in float32: llama.cpp adds and multiplies them as such.

    Args:
        name: the weight's name in transformers.
    """
    return torch.float32 if weight.ndim < 2 or name.endswith("wpe.weight") else dtype


def _tensors(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Names and values as the file has them."""
    config = model.config
    architecture = _ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for source, weight in model.state_dict().items():
        base, _, kind = source.rpartition(".")
        if tied and base == "lm_head":
            continue
        target = names.get_name(base)
        assert target is not None, f"{source} has no name in a GGUF file"
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.to_dict().get("num_key_value_heads")}
        part = base.rpartition(".")[2]
        if config.model_type == "llama" and part in heads:
            weight = _neighbours_paired(weight, heads[part])
        elif config.model_type == "gpt2" and kind == "weight" and part in ("c_attn", "c_proj", "c_fc"):
            weight = weight.T  # transformers keeps these as (in, out)
        yield f"{target}.{kind}", weight.detach().cpu().to(stored_type(source, weight, dtype)).contiguous()


def _neighbours_paired(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from transformers' order, in which dimension i turns with i + d/2, to neighbours that turn."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _add_rotary(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    settings = config.to_dict()
    head_size = settings.get("head_dim") or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _rotary_problems(config: PretrainedConfig) -> list[str]:
    settings = config.to_dict()
    checks = [
        (config.rope_parameters["rope_type"] != "default", "its rotary positions are scaled"),
        (config.hidden_act != "silu", f"its activation is {config.hidden_act}"),
        (bool(settings.get("attention_bias") or settings.get("mlp_bias")), "its attention or MLP has biases"),
        (bool(settings.get("use_sliding_window")), "its attention has a sliding window"),
    ]
    return [text for wrong, text in checks if wrong]


def _add_gpt2(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _gpt2_problems(config: PretrainedConfig) -> list[str]:
    checks = [
        (config.activation_function != "gelu_new", f"its activation is {config.activation_function}"),
        (not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx, "its attention is scaled otherwise"),
        (config.n_inner not in (None, 4 * config.n_embd), f"its MLP is {config.n_inner} wide, not 4 x {config.n_embd}"),
        (
            config.n_positions != 1024,
            f"it has {config.n_positions} positions, and transformers reads GPT-2's GGUF files with 1024",
        ),
    ]
    return [text for wrong, text in checks if wrong]
