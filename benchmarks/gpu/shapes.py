"""Models with random weights, a tokenizer built in memory, and rows of random tokens."""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.gpu.bench import Bench
from promptkd.data.encode import EncodedExample

__all__ = ["TOKENS", "lengths_around", "qwen", "random_rows", "sharp_model", "vocabulary_of", "words"]

TOKENS = 151_665
"""Tokens of Qwen2.5's tokenizers. The models' heads have more columns, which are padding."""
_UNKNOWN, _END = "<unknown>", "<end>"

_QWEN = {  # hidden, intermediate, layers, heads, key-value heads, columns of the head, tied
    "0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936, True),
    "7B": (3584, 18_944, 28, 28, 4, 152_064, False),
}
_TINY = {
    "0.5B": (32, 64, 2, 4, 2, 512, True),
    "1.5B": (48, 96, 2, 6, 2, 512, True),
    "7B": (64, 96, 2, 4, 2, 520, False),
}


def vocabulary_of(bench: Bench) -> int:
    """Vocabulary size that the models of `qwen` share."""
    return 500 if bench.tiny else TOKENS


def qwen(size: str, bench: Bench, dtype: torch.dtype) -> PreTrainedModel:
    """A model with Qwen2.5's shapes on the device, with transformers' random initial weights.

    Args:
        size: "0.5B", "1.5B" or "7B".
    """
    hidden, intermediate, layers, heads, groups, columns, tied = (_TINY if bench.tiny else _QWEN)[size]
    config = CONFIG_MAPPING["qwen2"](
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=columns,
        tie_word_embeddings=tied,
        max_position_embeddings=32_768,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    with bench.device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def sharp_model(
    architecture: str, bench: Bench, *, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: object
) -> PreTrainedModel:
    """A small model whose biases, norms and positions matter, and whose logits spread over several nats.

    In a freshly initialized model they do not matter, and errors in them would not show. The model is the same on every
    device.

    Args:
        settings: fields of the architecture's configuration that extend or override those here.
    """
    hidden, layers = (32, 2) if bench.tiny else (256, 4)
    fields = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": hidden // 4,
        "vocab_size": 320,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[architecture](**{**fields, **settings}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.add_(0.2 * noise)
            else:
                weight.copy_(noise * weight.shape[1] ** -0.5)
        model.get_output_embeddings().weight.mul_(2)
        for weight in model.parameters():  # not the buffers, such as rotary frequencies, which keep their precision
            weight.data = weight.data.to(dtype)
    return model.to(bench.device).eval()


def words(size: int) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with `size` tokens."""
    vocabulary = {_UNKNOWN: 0, _END: 1} | {f"t{index}": index for index in range(2, size)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=_UNKNOWN, eos_token=_END, pad_token=_END, padding_side="left"
    )


def lengths_around(mean: int, rows: int, *, seed: int = 0) -> list[int]:
    """Random lengths within a quarter of `mean`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(mean - mean // 4, mean + mean // 4 + 1, (rows,), generator=generator).tolist()


def random_rows(
    prompts: Sequence[int], responses: Sequence[int], vocabulary: int, *, seed: int = 0
) -> list[EncodedExample]:
    """Rows of random tokens, with these numbers of tokens per prompt and response."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> list[int]:
        return torch.randint(2, vocabulary, (length,), generator=generator).tolist()

    return [
        EncodedExample(tokens(prompt), tokens(response), ("",), "", row)
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]
