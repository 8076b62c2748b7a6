"""Students cut from a teacher's layers: the right layers, the right weights, and the teacher as it was."""

from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from helpers.tiny import ARCHITECTURES, END_ID, save_model, tiny_model
from promptkd.data.batch import TokenBatch, right_pad
from promptkd.errors import RequestError
from promptkd.models import block_influence, evenly_spaced, most_influential, prune_layers
from promptkd.models.prune import decoder_layers

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)

# Longer than Gemma 2's window of 8 in `tiny_model`, so that a layer with another window than its own shows.
ROWS = [([5, 9, 17, 30, 2, 44, 61, 8, 13, 3, 3, 40], [7, 21, 35, END_ID]), ([50], [11, 12, 13]), ([4, 6], [END_ID])]
IDS = torch.tensor([ROWS[0][0] + ROWS[0][1]])
LAYER_LISTS = {"gpt2": "transformer.h", "opt": "model.decoder.layers"}
NORMS = {"gpt2": "transformer.ln_f", "opt": "model.decoder.final_layer_norm"}
WRITES_TO_THE_STREAM = ("c_proj", "out_proj", "fc2", "o_proj", "down_proj")


def batch_of(rows) -> TokenBatch:
    return right_pad([prompt for prompt, _ in rows], [response for _, response in rows])


def layers_of(model) -> nn.ModuleList:
    return model.get_submodule(LAYER_LISTS.get(model.config.model_type, "model.layers"))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@contextmanager
def skipping(model, kept):
    """`model` with every other layer handing its input through: what a student of the `kept` layers computes."""

    def hand_through(module, args, output):
        return args[0] if isinstance(output, torch.Tensor) else (args[0], *output[1:])

    dropped = [layer for index, layer in enumerate(layers_of(model)) if index not in kept]
    handles = [layer.register_forward_hook(hand_through) for layer in dropped]
    yield model
    for handle in handles:
        handle.remove()


# ------------------------------------------------------------------------------------------------------ the student


@every_architecture
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kept", [[0, 1, 2, 3], [0, 2], [1, 2, 3], [3]])
def test_the_student_computes_what_its_layers_compute_in_the_teacher(architecture, tied, kept):
    teacher = tiny_model(architecture, layers=4, tied=tied)
    student = prune_layers(teacher, kept)
    with skipping(teacher, kept):
        expected = logits(teacher)
    assert torch.equal(logits(student), expected)
    assert len(kept) == 4 or (expected - logits(teacher)).abs().max() > 0.1
    assert student.config.num_hidden_layers == len(layers_of(student)) == len(kept)
    assert type(student) is type(teacher)
    assert not student.training


def test_a_llama_cut_by_hand():
    """No hooks: embedding, two layers, norm and head called one by one."""
    teacher = tiny_model("llama", layers=4)
    backbone = teacher.model
    with torch.no_grad():
        hidden = backbone.embed_tokens(IDS)
        positions = backbone.rotary_emb(hidden, torch.arange(IDS.shape[1])[None])
        for index in (1, 3):  # without a mask, attention is causal
            output = backbone.layers[index](hidden, position_embeddings=positions, attention_mask=None)
            hidden = output if isinstance(output, torch.Tensor) else output[0]
        expected = teacher.lm_head(backbone.norm(hidden))
    torch.testing.assert_close(logits(prune_layers(teacher, [1, 3])), expected, rtol=1e-6, atol=1e-6)


@every_architecture
def test_the_teacher_is_untouched_and_shares_no_memory(architecture):
    teacher, fresh = (tiny_model(architecture, layers=4) for _ in range(2))
    student = prune_layers(teacher, [0, 3])
    with torch.no_grad():
        for weight in student.parameters():
            weight.fill_(7.0)
    student.config.vocab_size = 1
    student.generation_config.max_new_tokens = 1
    assert teacher.config.to_dict() == fresh.config.to_dict()
    assert teacher.generation_config.to_dict() == fresh.generation_config.to_dict()
    for (name, weight), expected in zip(teacher.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert torch.equal(weight, expected), name
    assert torch.equal(logits(teacher), logits(fresh))


@every_architecture
@pytest.mark.parametrize("tied", [True, False])
def test_the_student_loads_back_from_disk(architecture, tied, tmp_path):
    student = prune_layers(tiny_model(architecture, layers=4, tied=tied), [0, 2, 3])
    save_model(tmp_path, student)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(student)
    assert torch.equal(logits(loaded), logits(student))
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    assert loaded.config.num_hidden_layers == 3


def test_settings_of_a_layer_go_with_it(tmp_path):
    teacher = tiny_model("gemma2", layers=4)
    assert teacher.config.layer_types == ["sliding_attention", "full_attention"] * 2
    for kept in ([0, 2], [1, 3], [0, 3]):
        student = prune_layers(teacher, kept)
        assert student.config.layer_types == [teacher.config.layer_types[index] for index in kept]
    qwen = tiny_model("qwen2", layers=4, use_sliding_window=True, sliding_window=5, max_window_layers=2)
    assert qwen.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    student = prune_layers(qwen, [1, 2])
    save_model(tmp_path, student)
    with skipping(qwen, [1, 2]):
        expected = logits(qwen)
    assert torch.equal(logits(student), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


def test_smollm3s_layers_without_rotation_stay_so():
    no_rope = {"no_rope_layers": [1, 1, 0, 0], "no_rope_layer_interval": 4, "use_sliding_window": False}
    teacher = tiny_model("smollm3", layers=4, **no_rope)
    with skipping(teacher, [1, 2]):
        expected = logits(teacher)
    assert torch.equal(logits(prune_layers(teacher, [1, 2])), expected)


def test_a_student_that_would_compute_otherwise_is_refused_or_right():
    teacher = tiny_model("gpt2", layers=4, scale_attn_by_inverse_layer_idx=True)
    with skipping(teacher, [1, 3]):
        expected = logits(teacher)
    try:
        student = prune_layers(teacher, [1, 3])
    except RequestError:
        return
    assert torch.equal(logits(student), expected)


@every_architecture
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_student_has_the_teachers_precision(architecture, dtype):
    """In its weights and in its buffers: rotary frequencies stay float32 under bfloat16 weights."""
    teacher = tiny_model(architecture, layers=4, dtype=dtype)
    student = prune_layers(teacher, range(4))
    assert student.dtype == dtype
    assert {name: each.dtype for name, each in student.named_buffers()} == {
        name: each.dtype for name, each in teacher.named_buffers()
    }
    assert torch.equal(logits(student), logits(teacher))


def test_the_student_can_be_trained_though_the_teacher_is_frozen():
    student = prune_layers(tiny_model("llama").requires_grad_(False), [0, 2])
    assert all(weight.requires_grad for weight in student.parameters())


def test_the_generation_settings_are_kept():
    teacher = tiny_model("llama")
    teacher.generation_config.eos_token_id = [END_ID, 3]
    assert prune_layers(teacher, [0]).generation_config.eos_token_id == [END_ID, 3]


# ---------------------------------------------------------------------------------------------------------- influence


def influence_by_hand(model, rows) -> list[float]:
    """From `output_hidden_states`, row by row without padding; without the final norm, which sits in the last state."""
    backbone, _, norm = NORMS.get(model.config.model_type, "model.norm").rpartition(".")
    setattr(model.get_submodule(backbone), norm, nn.Identity())
    sums, tokens = 0.0, 0
    for prompt, response in rows:
        with torch.no_grad():
            states = model(input_ids=torch.tensor([[*prompt, *response]]), output_hidden_states=True).hidden_states
        states = torch.cat(states).double()  # (layers + 1, T, H)
        before, after = states[:-1], states[1:]
        cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
        sums, tokens = sums + (1 - cosine).sum(-1), tokens + states.shape[1]
    return (sums / tokens).tolist()


@every_architecture
def test_influence_is_that_of_output_hidden_states(architecture):
    model = tiny_model(architecture, layers=4)
    expected = influence_by_hand(tiny_model(architecture, layers=4), ROWS)
    assert block_influence(model, [batch_of(ROWS)]) == pytest.approx(expected, abs=1e-5)
    assert all(value > 0.01 for value in expected)


@every_architecture
def test_padding_and_batching_do_not_change_influence(architecture):
    model = tiny_model(architecture, layers=3)
    expected = block_influence(model, [batch_of(ROWS)])
    assert block_influence(model, [batch_of([row]) for row in ROWS]) == pytest.approx(expected, abs=1e-6)
    whole = batch_of(ROWS)
    wider = torch.cat([whole.input_ids, torch.full((3, 9), 41)], dim=1)
    padded = replace(whole, input_ids=wider)
    assert block_influence(model, [padded]) == pytest.approx(expected, abs=1e-6)


@every_architecture
@pytest.mark.parametrize("idle", [0, 2, 3])
def test_a_layer_that_changes_nothing_has_no_influence_and_goes_first(architecture, idle):
    model = tiny_model(architecture, layers=4)
    with torch.no_grad():
        for name, weight in layers_of(model)[idle].named_parameters():
            if any(each in name for each in WRITES_TO_THE_STREAM):
                weight.zero_()
    influence = block_influence(model, [batch_of(ROWS)])
    assert influence[idle] == pytest.approx(0, abs=1e-6)
    kept = most_influential(influence, 3)
    assert kept == [index for index in range(4) if index != idle]
    torch.testing.assert_close(logits(prune_layers(model, kept)), logits(model), rtol=1e-5, atol=1e-5)


def test_influence_leaves_the_model_as_it_was():
    model = tiny_model("gpt2", dropout=0.5).train()
    calm = block_influence(tiny_model("gpt2"), [batch_of(ROWS)])
    assert block_influence(model, [batch_of(ROWS)]) == pytest.approx(calm)  # no dropout while measuring
    assert model.training
    assert all(not layer._forward_hooks for layer in layers_of(model))
    assert all(weight.grad is None for weight in model.parameters())


def test_influence_of_no_tokens_is_refused():
    with pytest.raises((RequestError, ValueError), match=r"token|row|batch"):
        block_influence(tiny_model("llama"), [])


# ------------------------------------------------------------------------------------------------------------- choice


@pytest.mark.parametrize(
    ("influence", "count", "kept"),
    [
        ([0.1, 0.4, 0.2, 0.3], 2, [1, 3]),
        ([0.1, 0.4, 0.2, 0.3], 3, [1, 2, 3]),
        ([0.1, 0.4, 0.2, 0.3], 4, [0, 1, 2, 3]),
        ([0.5, 0.5, 0.5], 2, [0, 1]),  # of equal layers the earlier stays
        ([0.1, 0.5, 0.1, 0.5, 0.1], 3, [0, 1, 3]),
        ([1.4], 1, [0]),
    ],
)
def test_most_influential(influence, count, kept):
    assert most_influential(influence, count) == kept


@pytest.mark.parametrize(
    ("total", "count", "kept"),
    [
        (12, 1, [0]),
        (12, 2, [0, 11]),
        (4, 3, [0, 2, 3]),
        (5, 3, [0, 2, 4]),
        (7, 4, [0, 2, 4, 6]),
        (30, 4, [0, 10, 19, 29]),
        (6, 6, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_evenly_spaced(total, count, kept):
    assert evenly_spaced(total, count) == kept


@pytest.mark.slow
@given(st.data())
def test_evenly_spaced_layers_differ_and_lie_evenly(data):
    total = data.draw(st.integers(2, 200))
    count = data.draw(st.integers(2, total))
    kept = evenly_spaced(total, count)
    gaps = {after - before for before, after in pairwise(kept)}
    assert len(kept) == count
    assert (kept[0], kept[-1]) == (0, total - 1)
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("count", [0, -1, 4])
def test_too_few_or_too_many_layers_are_refused(count):
    for choose in (lambda: evenly_spaced(3, count), lambda: most_influential([0.1, 0.2, 0.3], count)):
        with pytest.raises(RequestError, match=rf"between 1 and 3 layers.* Got {count}\."):
            choose()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], r"at least one layer to keep, of 0 … 2"),
        ([0, 3], r"layers 0 … 2\. Got 3"),
        ([-1, 0], r"layers 0 … 2\. Got -1"),
        ([0, 0, 1], r"once each, in ascending order\. Got \[0, 0, 1\]"),
        ([2, 1], r"once each, in ascending order\. Got \[2, 1\]"),
    ],
)
def test_wrong_indices_are_refused(layers, message):
    with pytest.raises(RequestError, match=message):
        prune_layers(tiny_model("gpt2"), layers)


# ------------------------------------------------------------------------------------------------------- other models


@every_architecture
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_the_list_of_layers_is_found(architecture, layers):
    model = tiny_model(architecture, layers=layers)
    name, stack = decoder_layers(model)
    assert stack is layers_of(model)
    assert model.get_submodule(name) is stack


def test_a_model_without_one_list_of_layers_is_refused():
    model = tiny_model("llama")
    model.model.second = nn.ModuleList(nn.Linear(1, 1) for _ in range(3))
    with pytest.raises(RequestError, match=r"one list of 3 decoder layers in LlamaForCausalLM\. Found 2"):
        decoder_layers(model)
    model.model.layers = nn.Sequential()
    del model.model.second
    with pytest.raises(RequestError, match="Found 0"):
        prune_layers(model, [0])


def test_a_lora_model_loaded_from_its_folder_is_refused_or_cut(tmp_path):
    folder = save_model(tmp_path / "base", tiny_model("llama"))
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, base_model_name_or_path=str(folder))
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora).save_pretrained(tmp_path / "lora")
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "lora")
    try:
        student = prune_layers(teacher, [0, 2])
    except RequestError:
        return
    assert student.config.num_hidden_layers == 2


# ------------------------------------------------------------------------------------------------ wrapped text models


def gemma3_wrapper(layers=4):
    text = {
        "vocab_size": 97,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = CONFIG_MAPPING["gemma3"](text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.slow
def test_the_text_part_of_a_multimodal_wrapper_is_pruned(tmp_path):
    """Also where the vision tower has as many layers."""
    model = gemma3_wrapper()
    student = prune_layers(model, [1, 2])
    config = student.config.get_text_config()
    assert config.num_hidden_layers == 2
    assert config.layer_types == ["full_attention", "sliding_attention"]
    assert student.config.vision_config.num_hidden_layers == 4
    assert model.config.get_text_config().num_hidden_layers == 4
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(student))
