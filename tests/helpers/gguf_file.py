"""A GGUF file of a tiny Llama."""

from pathlib import Path

import gguf

from helpers.tiny import BOS_ID, CHAT_TEMPLATE, END_ID, MERGES, SPECIAL, TOKENS, UNKNOWN, token_id

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def write_gguf(file: Path, model) -> Path:
    """A Llama and the tiny tokenizer as llama.cpp's converter would write them, unquantized."""
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token.replace(" ", "Ġ").replace("\n", "Ċ") for token in TOKENS])
    writer.add_token_types([gguf.TokenType.CONTROL if token in SPECIAL else gguf.TokenType.NORMAL for token in TOKENS])
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(BOS_ID)
    writer.add_eos_token_id(END_ID)
    writer.add_unk_token_id(token_id(UNKNOWN))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, weight in model.state_dict().items():
        base = name.removesuffix(".weight")
        if base == "lm_head" and config.tie_word_embeddings:
            continue
        if base.startswith("model.layers."):
            index, _, base = base.removeprefix("model.layers.").partition(".")
            target = f"blk.{index}.{GGUF_NAMES[base]}"
        else:
            target = GGUF_NAMES[base]
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(GGUF_NAMES[base])
        if heads is not None:  # llama.cpp pairs neighbouring dimensions for the rotation
            weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(f"{target}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
