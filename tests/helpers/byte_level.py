"""Byte-level BPE tokenizers, as SmolLM, GPT-2 and Qwen have them, and tiny models for them: what GGUF can hold."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from helpers.tiny import tiny_model

END, START, PLAIN = "<|im_end|>", "<|im_start|>", "<think>"
MERGES = [("t", "h"), ("th", "e"), ("a", "n"), ("Ġ", "the"), ("Ġ", "Ġ"), ("Ċ", "Ċ"), ("Ġ", "1"), ("1", "2")]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [END, START, *ALPHABET, *("".join(pair) for pair in MERGES), PLAIN]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
SPLITS = {
    "gpt-2": BYTES,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]),
    "qwen2": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}
FIELDS = {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0, "tied": False}


def byte_level(
    split: str = "gpt-2", *, bos: bool = False, chat: bool = True, end: str | None = END
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, as SmolLM, GPT-2 and Qwen have them."""
    vocabulary = {token: index for index, token in enumerate(TOKENS)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    backend.pre_tokenizer, backend.decoder = SPLITS[split], decoders.ByteLevel()
    backend.add_special_tokens([END, START])
    backend.add_tokens([PLAIN])
    if bos:
        backend.post_processor = processors.TemplateProcessing(f"{START} $A", special_tokens=[(START, 1)])
    roles = {"bos_token": START, "eos_token": end, "pad_token": end}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE if chat else None, **roles)


def byte_model(architecture: str = "llama", *, extra: int = 0, **settings):
    """A model for `byte_level()` with `extra` rows of padding in its embedding."""
    special = {"gpt2": {"n_positions": 1024}, "qwen3": {"head_dim": 128}}.get(architecture, {})
    fields = {**FIELDS, **special, **settings}
    if architecture == "qwen3":
        fields |= {"num_key_value_heads": 1, "intermediate_size": 32}
    return tiny_model(architecture, vocabulary=len(TOKENS) + extra, **fields)
