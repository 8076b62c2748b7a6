"""Rows packed without padding against the padded rectangle: states, gradients, and what a pack leaves behind."""

import logging

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model
from transformers import AttentionInterface

from promptkd.data.packing import right_pad
from promptkd.errors import RequestError
from promptkd.engine import response_hidden
from promptkd.models import packed
from promptkd.models.lean_layers import is_lean, lean_states
from promptkd.models.packed import packed_hidden, packs
from promptkd.engine import padded_hidden
from promptkd.switches import switched_on
from tiny import tiny_model

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LEAN = ("llama", "qwen2", "qwen3", "mistral", "llama, biases", "llama, scaled rotation")
ARCHITECTURES = (*LEAN, "gpt2", "opt", "gemma", "gemma2", "cohere", "granite")
SETTINGS = {
    "mistral": {"sliding_window": 4, "head_dim": 8},
    "qwen3": {"head_dim": 8},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, scaled rotation": {"rope_parameters": YARN},
    "gemma2": {"attn_logit_softcapping": 1.5},  # a soft cap that the random scores reach
}

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@pytest.fixture(autouse=True)
def packing(monkeypatch):
    """On, also where the suite runs with it off."""
    monkeypatch.delenv("PROMPTKD_OFF", raising=False)


def model_of(architecture, **settings):
    return tiny_model(architecture.split(",")[0], **SETTINGS.get(architecture, {}), **settings)


def random_batch(seed, rows=6):
    """Prompts of 1 to 13 tokens, responses of 0 to 9."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(least, most):
        length = int(torch.randint(least, most + 1, (), generator=generator))
        return torch.randint(0, 97, (length,), generator=generator).tolist()

    return right_pad([tokens(1, 13) for _ in range(rows)], [tokens(0, 9) for _ in range(rows)])


def batch_of_common_beginnings(seed, rows=7):
    """Rows that begin alike in several ways, one of them the beginning of another, and two the same."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(0, 97, (30,), generator=generator).tolist()
    other = torch.randint(0, 97, (30,), generator=generator).tolist()
    prompts = [whole[:9], whole[:4], whole[:9] + other[:3], whole[:6] + other[:2], other[:5], whole[:9], other[:1]]
    responses = [other[:6], whole[4:8], other[9:12], [], whole[:7], other[:6], other[1:9]]
    return right_pad(prompts[:rows], responses[:rows])


def vectors(model, length):
    """A trainable soft prompt, or None."""
    width = model.get_input_embeddings().weight.shape[1]
    noise = torch.randn(length, width, generator=torch.Generator().manual_seed(length))
    return noise.to(model.dtype).requires_grad_() if length else None


def states_and_gradients(hidden_of, model, batch, prompt):
    """Hidden states, and gradients of a random function of them with respect to the weights and the prompt."""
    hidden = hidden_of(model, batch, prompt)
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    learned = [*model.base_model.parameters(), *([] if prompt is None else [prompt])]
    gradients = torch.autograd.grad((hidden * weights.to(hidden.dtype)).sum(), learned, allow_unused=True)
    return hidden.detach(), torch.cat([each.flatten() for each in gradients if each is not None])


def relative_gap(got, expected):
    return float((got - expected).detach().norm() / expected.detach().norm())


@every_architecture
@pytest.mark.parametrize("length", [0, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_packed_rows_equal_padded_ones_and_so_do_their_gradients(architecture, length, seed):
    model, batch = model_of(architecture), random_batch(seed)
    assert packs(model)
    prompt = vectors(model, length)
    (ours, our_gradient), (theirs, their_gradient) = (
        states_and_gradients(hidden_of, model, batch, prompt) for hidden_of in (packed_hidden, padded_hidden)
    )
    assert relative_gap(ours, theirs) < 1e-5
    assert relative_gap(our_gradient, their_gradient) < 1e-4


@every_architecture
@pytest.mark.parametrize("length", [0, 3])
def test_what_rows_have_in_common_is_read_once_and_changes_nothing(architecture, length, monkeypatch):
    model, batch = model_of(architecture), batch_of_common_beginnings(0)
    prompt = vectors(model, length)
    read = []

    def note(module, args, kwargs):
        read.append(kwargs["position_ids"].shape[1])

    model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    (ours, our_gradient), (theirs, their_gradient) = (
        states_and_gradients(hidden_of, model, batch, prompt) for hidden_of in (packed_hidden, padded_hidden)
    )
    assert read[0] == length + len({tuple(row[:end]) for row in real_tokens(batch) for end in range(1, len(row) + 1)})
    assert relative_gap(ours, theirs) < 1e-5
    assert relative_gap(our_gradient, their_gradient) < 1e-4
    monkeypatch.setenv("PROMPTKD_OFF", "shared_prefixes")
    packed_hidden(model, batch, prompt)
    assert read[-1] == sum(map(len, real_tokens(batch))) + length * len(batch.lengths)


def real_tokens(batch):
    """What a pass must read of every row: up to the token that predicts the last one."""
    rows, columns = batch.rows.tolist(), batch.columns.tolist()
    ends = [
        max((at for row, at in zip(rows, columns, strict=True) if row == each), default=0)
        for each in range(len(batch.lengths))
    ]
    return [row[: end + 1] for row, end in zip(batch.input_ids.tolist(), ends, strict=True)]


def test_rows_share_nothing_where_dropout_would_drop_the_same_in_all_of_them():
    model, batch = model_of("gpt2"), batch_of_common_beginnings(0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.train()
    read = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["position_ids"].shape[1]), with_kwargs=True
    )
    packed_hidden(model, batch, None)
    assert read == [sum(map(len, real_tokens(batch)))]


# ------------------------------------------------------------------------------------------- layers of Llama's family


@pytest.mark.parametrize("architecture", LEAN)
def test_lean_layers_equal_the_models_own(architecture, monkeypatch):
    model, batch = model_of(architecture), batch_of_common_beginnings(1)
    prompt, run = vectors(model, 3), []
    monkeypatch.setattr(packed, "lean_states", lambda *args: run.append(len(args)) or lean_states(*args))
    packed_hidden(model, batch, prompt)
    assert len(run) == 2  # the trial, and the pack
    ours, our_gradient = states_and_gradients(packed_hidden, model, batch, prompt)
    monkeypatch.setenv("PROMPTKD_OFF", "lean_layers")
    theirs, their_gradient = states_and_gradients(packed_hidden, model, batch, prompt)
    assert len(run) == 3
    assert relative_gap(ours, theirs) < 1e-6
    assert relative_gap(our_gradient, their_gradient) < 1e-5
    assert not torch.equal(ours, theirs)  # another way was taken


def test_layers_with_lora_are_lean_too():
    model, batch = model_of("llama"), random_batch(2)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)).eval()
    learned = [each for each in adapted.parameters() if each.requires_grad]
    assert is_lean(model)
    found = []
    for hidden_of in (packed_hidden, padded_hidden):
        hidden = hidden_of(model, batch, None)
        gradients = torch.autograd.grad(hidden.square().sum(), learned)
        found.append([hidden.detach(), torch.cat([each.flatten() for each in gradients])])
    assert relative_gap(found[0][0], found[1][0]) < 1e-5
    assert relative_gap(found[0][1], found[1][1]) < 1e-4


def test_a_model_whose_modules_must_be_called_is_not_lean():
    assert is_lean(model_of("llama"))
    hooked, behind, replaced = (model_of("llama") for _ in range(3))
    hooked.model.layers[0].register_forward_pre_hook(lambda module, args: None)
    behind.model.layers[0].mlp.register_full_backward_hook(lambda module, inward, outward: None)
    replaced.model.layers[0].mlp.forward = lambda hidden: hidden
    tuned = get_peft_model(model_of("llama"), LNTuningConfig(target_modules=["input_layernorm"])).get_base_model()
    others = (model_of("llama", dtype=torch.float64), model_of("gemma"), model_of("gpt2"))
    other_gates = model_of("llama", hidden_act="gelu")
    assert not any(map(is_lean, (hooked, behind, replaced, tuned, other_gates, *others)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_lean(model_of("llama"))


def test_a_model_that_only_looks_like_llamas_family_keeps_its_layers():
    class Doubled(type(model_of("llama").model.layers[0].mlp)):
        def forward(self, hidden):
            return 2 * super().forward(hidden)

    model, batch = model_of("llama"), random_batch(0)
    model.model.layers[1].mlp.__class__ = Doubled
    assert not is_lean(model)
    assert relative_gap(packed_hidden(model, batch, None), padded_hidden(model, batch, None)) < 1e-5


def test_a_trial_finds_out_what_classes_do_not_tell(monkeypatch):
    model, batch = model_of("llama"), random_batch(0)
    monkeypatch.setattr(packed, "lean_states", lambda *args: 2 * lean_states(*args))
    assert relative_gap(packed_hidden(model, batch, None), padded_hidden(model, batch, None)) < 1e-5


def test_second_derivatives_are_refused():
    model, batch = model_of("llama"), random_batch(0)
    weight = model.model.norm.weight
    (gradient,) = torch.autograd.grad(packed_hidden(model, batch, None).square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_dropout_in_attention_is_left_to_the_model(monkeypatch):
    model = model_of("llama", attention_dropout=0.5).train()
    monkeypatch.setattr(packed, "lean_states", None)
    assert packed_hidden(model, random_batch(0), None).isfinite().all()


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])  # the others compute their norms in float32 whatever comes
def test_packed_rows_equal_padded_ones_in_float64(architecture):
    model, batch = model_of(architecture, dtype=torch.float64), batch_of_common_beginnings(0)
    ours, theirs = (
        states_and_gradients(hidden_of, model, batch, vectors(model, 3)) for hidden_of in (packed_hidden, padded_hidden)
    )
    for mine, other in zip(ours, theirs, strict=True):
        assert relative_gap(mine, other) < 1e-12


def test_packs_are_cut_where_they_would_grow_too_long(monkeypatch):
    model, batch = model_of("llama"), random_batch(0)
    whole = packed_hidden(model, batch, None)
    monkeypatch.setattr("promptkd.models.packed._LONGEST", 1)  # every row a pack of its own
    assert relative_gap(packed_hidden(model, batch, None), whole) < 1e-5


@every_architecture
def test_a_pack_leaves_the_models_attention_as_it_was(architecture):
    """A model left with the packs' attention, which needs no mask, would decode left-padded rows unmasked."""
    model = model_of(architecture)
    before = model.config._attn_implementation
    ids, mask = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    settings = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    fresh = model.generate(ids, **settings)
    response_hidden(model, random_batch(0))
    assert model.config._attn_implementation == before
    assert torch.equal(model.generate(ids, **settings), fresh)
    with pytest.raises(IndexError):
        packed_hidden(model, right_pad([[96, 200]], [[1]]), None)  # no such token
    assert model.config._attn_implementation == before


def test_activations_that_are_computed_again_see_no_other_row():
    model, batch = model_of("llama").train(), random_batch(0)
    _, expected = states_and_gradients(padded_hidden, model, batch, None)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, got = states_and_gradients(response_hidden, model, batch, None)
    assert relative_gap(got, expected) < 1e-5


def test_a_model_that_mixes_the_rows_of_a_pack_is_scored_padded(monkeypatch, caplog):
    model, batch = model_of("llama"), random_batch(0)
    expected = padded_hidden(model, batch, None)

    def over_everything(module, query, key, value, mask, **settings):
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return output.transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "promptkd_rows", over_everything)
    with caplog.at_level(logging.INFO, logger="promptkd"):
        assert not packs(model)
    assert caplog.messages == ["LlamaForCausalLM scores rows padded."]
    assert torch.equal(response_hidden(model, batch), expected)


@pytest.mark.parametrize("off", ["packing", "fused_head, packing", "all"])
def test_packing_can_be_switched_off(off, monkeypatch):
    model, batch = model_of("llama"), random_batch(0)
    assert packs(model)
    monkeypatch.setenv("PROMPTKD_OFF", off)
    assert not packs(model)
    assert torch.equal(response_hidden(model, batch), padded_hidden(model, batch, None))


def test_a_device_that_there_is_not_is_refused(monkeypatch):
    monkeypatch.setenv("PROMPTKD_OFF", "packing,fused_heads")
    with pytest.raises(RequestError, match="Got fused_heads"):
        switched_on("packing")
