"""Tiny models of transformers' causal families, and what promptkd does with each: the rows of docs/models.md.

`python -m helpers.families`, with tests/ on the path, prints the table; names behind it choose families.
"""

import sys
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from promptkd.data.batch import right_pad
from promptkd.engine import check_scoring, engine_for, first_verified, head_logits, resolve
from promptkd.engine.checks import reads_embeddings
from promptkd.engine.reference import DECODERS, SCORERS
from promptkd.errors import RequestError
from promptkd.generation import SamplingParams, generate
from promptkd.models import prune_layers

VOCABULARY, LAYERS = 97, 3
# What configurations call their sizes; a family gets those that its configuration has.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "decoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers", "first_k_dense_replace"), 1),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim"), 16),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim", "dff"), 32),
    **dict.fromkeys(("shared_intermediate_size", "d_inner", "dim_ff", "mamba_d_ssm"), 32),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "num_heads"), 2),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "dim_head"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "query_pre_attn_scalar", "sliding_window"), 8),
    **dict.fromkeys(("swa_head_dim", "linear_head_dim", "mem_len", "attention_window", "hc_lowrank"), 8),
    **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads", "rel_extent"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "zero_expert_num"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "moe_router_topk", "num_selected_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("index_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("index_n_heads", "linear_num_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("index_topk", "mamba_chunk_size", "chunk_size", "attention_chunk_size"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "hidden_size_per_layer_input"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_d_state", "d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_expand", "mamba_dt_rank"), 2),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("max_position_embeddings",), 64),
    **{"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0, "is_decoder": True},
}
ALTERNATING = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
# What a family needs beyond that.
SETTINGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("bailing_hybrid", "granitemoehybrid", "kimi_linear"), ALTERNATING),
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), ALTERNATING),
    **dict.fromkeys(("cohere2", "cohere2_moe", "exaone4", "exaone_moe", "gemma3_text", "kolibri1", "olmo3"), SLIDING),
    **dict.fromkeys(("afmoe", "ministral"), SLIDING),
    # its choice of tokens flips at rounding
    **{name: {"index_topk": 64} for name in ("axk2", "deepseek_v32", "dots3_note_text", "glm_moe_dsa", "hy_v4")},
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"n_head": 4, "num_attention_heads": 4, "rotary_dim": 4},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
        "layer_types": ["full_attention"] * LAYERS,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
    "gptj": {"rotary_dim": 4},
    "ctrl": {"dff": 32},
    "cpmant": {"dim_head": 8, "dim_ff": 32, "position_bias_num_buckets": 8},
    "deepseek_v4": {
        "layer_types": ["sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention"],
        "compress_rates": {"heavily_compressed_attention": 8, "compressed_sparse_attention": 4},
        "o_lora_rank": 8,
    },
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    **{name: {"unpadded_vocab_size": VOCABULARY} for name in ("inkling2_loop_text", "inkling2_text")},
    "lfm2": {"full_attn_idxs": [1], "layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm3": {"layer_types": ["conv", "full_attention", "conv"]},
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention", "chunked_attention"]},
    "minimax": {**ALTERNATING, "sliding_window": None},
    "gemma3n_text": {"num_kv_shared_layers": 1, "laurel_rank": 4, "layer_types": ["full_attention"] * LAYERS},
    "phimoe": {"sliding_window": None},
    "mamba2": {"num_heads": 4, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "moe"]},
    "olmo_hybrid": ALTERNATING,
    "recurrent_gemma": {"lru_width": 16, "attention_window_size": 8},
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": 9,
        "shape_embed_dim": 8,
        "shape_vocab_size": 9,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "zaya": {"num_experts_per_tok": 1},
    "gemma3": {"vision_config": {**VISION, "image_size": 28, "patch_size": 14}, "mm_tokens_per_image": 4},
}
# Wrappers, and the family of their text part.
WRAPPERS = {
    "gemma3": "gemma3_text",
    "llama4": "llama4_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}
# Families that are not tried, and why.
LEFT_OUT_FOR = {
    "its images make it too large to build here": (
        *("dots3_note", "emu3", "fuyu", "gemma4", "gemma4_unified", "git", "got_ocr2", "mllama", "phi4_multimodal"),
    ),
    "its sound makes it too large to build here": ("moshi", "moss_transcribe_diarize", "musicgen", "musicgen_melody"),
    "it drafts for another model, whose states it reads": ("gemma4_assistant", "gemma4_unified_assistant"),
    "it reads bytes in patches that a model of its own finds": ("blt",),
    "transformers builds no tiny model of it": ("mimo_v2_flash", "qwen4_exp", "qwen4_exp_text", "zamba"),
    "a step on its cache differs from its own forward by half a percent, in transformers itself": ("zamba2",),
    "its layers pass no gradient in evaluation mode": ("reformer",),
    "its vision tower needs the package timm": ("gemma3n",),
}
LEFT_OUT = {name: reason for reason, names in LEFT_OUT_FOR.items() for name in names}

# A part of the message, and what the table says.
REFUSALS = {
    "computes its logits in a way": "its head is more than a linear layer with a scale and a soft cap",
    "is no causal model": "it is not causal",
}

ROWS = [
    ([5, 9, 17, 30, 2, 44, 61, 8, 13, 3, 3, 40], [7, 21, 35, 60, 4, 70]),
    ([50], [11, 12, 13]),
    ([4, 6, 8], [22, 3]),
]
PROMPTS, LIMITS = [[5, 9, 17, 30, 2, 44, 61, 8, 13, 3, 3], [50, 4, 6], [7], [4, 6, 8]], [4, 3, 5, 1]


@dataclass(frozen=True)
class Outcome:
    """A row of docs/models.md."""

    family: str  # model_type
    class_name: str
    scoring: str = ""  # how rows are run
    decoding: str = ""
    soft_prompt: str = ""
    pruning: str = ""
    refused: str = ""  # why the family is not run at all


def families() -> list[str]:
    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in LEFT_OUT]


def family_model(family: str, **settings: Any) -> PreTrainedModel:
    """A random model in evaluation mode with weights large enough that errors show."""
    config = CONFIG_MAPPING[family](**_fields(family), **settings)
    state = torch.random.get_rng_state()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    torch.random.set_rng_state(state)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(0.2 * noise) if weight.ndim == 1 else weight.copy_(0.3 * noise)
    return model.eval()


def _fields(family: str) -> dict[str, Any]:
    if family in WRAPPERS:
        return {"text_config": _fields(WRAPPERS[family]), **SETTINGS.get(family, {})}
    kind = CONFIG_MAPPING[family]
    known = {name for each in kind.__mro__ for name in vars(each).get("__annotations__", {})} | set(kind.attribute_map)
    sizes = {name: value for name, value in SIZES.items() if name in known}
    return sizes | SETTINGS.get(family, {})


def outcome(family: str) -> Outcome:
    """What promptkd does with a family; AssertionError where that differs from the model's own forward."""
    with pytest.MonkeyPatch.context() as patch:  # each way is held to the reference, whose trial is run once
        for name in ("_score_trial", "_decode_trial"):
            patch.setattr(resolve, name, cache(vars(resolve)[name]))
        return _outcome(family, family_model(family))


def _outcome(family: str, model: PreTrainedModel) -> Outcome:
    name = type(model).__name__
    try:
        check_scoring(model)
    except RequestError as error:
        told = [reason for part, reason in REFUSALS.items() if part in str(error)]
        return Outcome(family, name, refused=told[0] if told else str(error))
    takes_prompt = reads_embeddings(model)
    scoring, decoding = _scoring(model, takes_prompt), _decoding(model, takes_prompt)
    try:
        check_scoring(prune_layers(model, [0, LAYERS - 1]))
        pruning = "yes"
    except RequestError:
        pruning = "no"
    return Outcome(family, name, scoring, decoding, "yes" if takes_prompt else "no", pruning)


def own_logits(model: PreTrainedModel, ids: list[int], prompt: Tensor | None = None) -> Tensor:
    """(T, V) of one row by the model's own forward, after a soft prompt."""
    row = torch.tensor([ids])
    if prompt is None:
        return model(input_ids=row, use_cache=False).logits[0]
    embedded = torch.cat([prompt[None], model.get_input_embeddings()(row)], 1)
    return model(inputs_embeds=embedded, use_cache=False).logits[0, len(prompt) :]


def _verified(model: PreTrainedModel, ways: tuple[Any, ...]) -> list[Any]:
    """The ways that agree with the last in a trial, down to the first of the reference engine."""
    found = []
    for way in ways[:-1]:
        if first_verified((way, ways[-1]), model) is way:
            found.append(way)
            if way in (*SCORERS, *DECODERS):
                break
    return found


def _prompt(model: PreTrainedModel) -> Tensor:
    return model.get_input_embeddings()(torch.tensor([60, 61, 62])).detach().clone().requires_grad_()


def _close(got: Tensor, expected: Tensor, what: str) -> None:
    gap = float((got - expected).norm() / expected.norm().clamp(min=1e-6))
    assert gap < 5e-3, f"{what} differs by {gap:.1e}"


def _scoring(model: PreTrainedModel, takes_prompt: bool) -> str:
    """How rows are scored, once every way that passes its trial gives the model's own logits, and gradients.

    After a soft prompt where the model takes one; without it, each way is held to the reference by its trial.
    """
    batch, ways = right_pad(*zip(*ROWS, strict=True)), engine_for(torch.device("cpu")).scorers
    prompt = _prompt(model) if takes_prompt else None
    rows = [own_logits(model, [*ids, *answer], prompt)[len(ids) - 1 : -1] for ids, answer in ROWS]
    expected = torch.cat(rows).float()
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    gradient = None if prompt is None else torch.autograd.grad((expected * weights).sum(), prompt)[0]
    for way in _verified(model, ways):
        got = head_logits(model, way.hidden(model, batch, prompt))
        _close(got, expected, f"scoring by {way.name}")
        if prompt is not None:
            _close(torch.autograd.grad((got * weights).sum(), prompt)[0], gradient, f"the gradient by {way.name}")
    return first_verified(ways, model).name


@torch.no_grad()
def _decoding(model: PreTrainedModel, takes_prompt: bool) -> str:
    """How rows are decoded, once every way that passes its trial gives the model's own logits as rows end.

    After a soft prompt where the model takes one; without it, the first way is held to the model by greedy decoding.
    """
    ways, prompt = engine_for(torch.device("cpu")).decoders, _prompt(model) if takes_prompt else None
    answers = [[(7 * step + 3 * row) % VOCABULARY for step in range(limit)] for row, limit in enumerate(LIMITS)]
    expected = [
        own_logits(model, ids + answer, prompt)[len(ids) - 1 :].float()
        for ids, answer in zip(PROMPTS, answers, strict=True)
    ]
    for way in _verified(model, ways):
        with way.open(model, len(PROMPTS), None) as sessions, sessions(max(LIMITS)) as session:
            going, logits = list(range(len(PROMPTS))), session.prefill(PROMPTS, prompt)
            for step in range(max(LIMITS)):
                _close(logits, torch.stack([expected[row][step] for row in going]), f"decoding by {way.name}")
                kept = [slot for slot, row in enumerate(going) if step + 1 < LIMITS[row]]
                if not kept:
                    break
                if len(kept) < len(going):
                    session.select(kept)
                    going = [going[slot] for slot in kept]
                logits = session.decode(torch.tensor([answers[row][step] for row in going]))
    params = SamplingParams(temperature=0, max_new_tokens=LIMITS)
    for ids, answer in zip(PROMPTS, generate(model, PROMPTS, params), strict=True):
        assert own_logits(model, ids + answer)[len(ids) - 1 : -1].argmax(-1).tolist() == answer, "greedy decoding"
    return first_verified(ways, model).name


def table_line(row: Outcome) -> str:
    """A row of the table in docs/models.md."""
    if row.refused:
        return f"| {row.family} | {row.class_name} | refused: {row.refused} | | | |"
    return f"| {row.family} | {row.class_name} | {row.scoring} | {row.decoding} | {row.soft_prompt} | {row.pruning} |"


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    for each in sys.argv[1:] or families():
        print(table_line(outcome(each)), flush=True)
