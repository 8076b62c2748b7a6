"""Tiny random models and one tokenizer for every test that needs real ones.

All models share one vocabulary of 97 tokens (a prime, so that no other size of a model equals it), and every variant
of the tokenizer gives the same ids; the variants differ only in which tokens have a role.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

ARCHITECTURES = ("gpt2", "opt", "llama", "qwen2", "gemma", "gemma2")
POSITIONS = 512  # the longest row that the models with a position table take

END, BOS, PAD, UNKNOWN = "<|end|>", "<s>", "<pad>", "<unk>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"
SPECIAL = (END, BOS, PAD, UNKNOWN, USER, ASSISTANT)
MERGES = (("t", "h"), ("th", "e"), ("a", "n"))
CHARACTERS = (
    " \nabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    ".,:;!?'\"()-#%/<>|=+_&*"  # what the Alpaca text needs is among them
)
TOKENS = (*CHARACTERS, *("".join(pair) for pair in MERGES), *SPECIAL, "<spare1>", "<spare2>")
VOCABULARY = len(TOKENS)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def token_id(token: str) -> int:
    return TOKENS.index(token)


END_ID, BOS_ID, PAD_ID = token_id(END), token_id(BOS), token_id(PAD)


def tiny_tokenizer(
    *,
    eos: bool = True,
    bos: bool = False,
    pad: str | None = "eos",
    chat: bool = False,
    merges: tuple[tuple[str, str], ...] = MERGES,
) -> PreTrainedTokenizerFast:
    """A character tokenizer with three merges.

    Args:
        eos: whether `<|end|>` ends a text.
        bos: whether `<s>` is put before every text that is encoded with special tokens.
        pad: "eos" (as with GPT-2; no padding token without EOS), "own" (`<pad>`) or None.
        chat: whether it carries a chat template.
        merges: fewer merges cut text differently under the same vocabulary.
    """
    vocabulary = {token: index for index, token in enumerate(TOKENS)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges), unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(list(SPECIAL))
    if bos:
        backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    roles = {"unk_token": UNKNOWN}
    if eos:
        roles["eos_token"] = END
    if bos:
        roles["bos_token"] = BOS
    if pad == "own":
        roles["pad_token"] = PAD
    elif pad == "eos" and eos:
        roles["pad_token"] = END
    template = {"chat_template": CHAT_TEMPLATE} if chat else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=POSITIONS, **roles, **template)


def tiny_model(
    architecture: str = "llama",
    *,
    layers: int = 3,
    hidden: int = 16,
    vocabulary: int = VOCABULARY,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    dropout: float = 0.0,
    **settings: object,
) -> PreTrainedModel:
    """A random model in evaluation mode.

    Its weights are far larger than a fresh model's: logits spread over several nats, and biases, norms and positions
    matter, so that an error in any of them shows. The global random state is left alone.

    Args:
        architecture: one of `ARCHITECTURES`, or "cohere" and "granite" (logit scales).
        settings: further fields of the architecture's configuration.
    """
    fields = {**_fields(architecture, layers, hidden, dropout), "vocab_size": vocabulary, "tie_word_embeddings": tied}
    roles = {"bos_token_id": BOS_ID, "eos_token_id": END_ID, "pad_token_id": END_ID}
    config = CONFIG_MAPPING[architecture](**{**fields, **roles, **settings})
    state = torch.random.get_rng_state()
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # `.to` would round the rotary frequencies as well
    torch.random.set_rng_state(state)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():  # a tied weight comes once
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.add_(0.2 * noise)
            else:
                weight.copy_(0.3 * noise)
    return model.eval()


def save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    """Write a model folder, as transformers and promptkd load it; with `tiny_tokenizer()` unless one is given."""
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def _fields(architecture: str, layers: int, hidden: int, dropout: float) -> dict[str, object]:
    if architecture == "gpt2":
        rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
        return {"n_layer": layers, "n_embd": hidden, "n_head": 2, "n_positions": POSITIONS, **rates}
    common = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": 2,
        "max_position_embeddings": POSITIONS,
        "attention_dropout": dropout,
    }
    if architecture == "opt":
        return {**common, "ffn_dim": 2 * hidden, "dropout": dropout, "word_embed_proj_dim": hidden}
    common |= {"intermediate_size": 2 * hidden, "num_key_value_heads": 1}
    if architecture == "gemma":
        return {**common, "head_dim": 8}
    if architecture == "gemma2":
        # a soft cap that the random logits reach, and a window shorter than the tests' rows
        return {
            **common,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 8,
            "final_logit_softcapping": 3.0,
        }
    return common
