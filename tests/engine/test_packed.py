"""Rows packed without padding against the padded rectangle: states, gradients, and what a pack leaves behind."""

import logging

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model
from transformers import AttentionInterface

from helpers.tiny import tiny_model
from promptkd.data.batch import right_pad
from promptkd.engine import engine_for, first_verified, packed, response_hidden
from promptkd.engine.cpu import ENGINE
from promptkd.engine.fused_layers import fused_forward, supports_fused_forward
from promptkd.engine.reference import PaddedScorer

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
FUSED = ("llama", "qwen2", "qwen3", "mistral", "llama, biases", "llama, scaled rotation")
ARCHITECTURES = (*FUSED, "gpt2", "opt", "gemma", "gemma2", "cohere", "granite")
SETTINGS = {
    "mistral": {"sliding_window": 4, "head_dim": 8},
    "qwen3": {"head_dim": 8},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, scaled rotation": {"rope_parameters": YARN},
    "gemma2": {"attn_logit_softcapping": 1.5},  # a soft cap that the random scores reach
}
fused_way, packed_way, padded_way, *_ = ENGINE.scorers

pytestmark = pytest.mark.usefixtures("own_engine")
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def model_of(architecture, **settings):
    return tiny_model(architecture.split(",")[0], **SETTINGS.get(architecture, {}), **settings)


def random_batch(seed, rows=6, device="cpu"):
    """Prompts of 1 to 13 tokens, responses of 0 to 9."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(least, most):
        length = int(torch.randint(least, most + 1, (), generator=generator))
        return torch.randint(0, 97, (length,), generator=generator).tolist()

    return right_pad([tokens(1, 13) for _ in range(rows)], [tokens(0, 9) for _ in range(rows)], device=device)


def batch_of_common_beginnings(seed, rows=7, device="cpu"):
    """Rows that begin alike in several ways, one of them the beginning of another, and two the same."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(0, 97, (30,), generator=generator).tolist()
    other = torch.randint(0, 97, (30,), generator=generator).tolist()
    prompts = [whole[:9], whole[:4], whole[:9] + other[:3], whole[:6] + other[:2], other[:5], whole[:9], other[:1]]
    responses = [other[:6], whole[4:8], other[9:12], [], whole[:7], other[:6], other[1:9]]
    return right_pad(prompts[:rows], responses[:rows], device=device)


def vectors(model, length):
    """A trainable soft prompt, or None."""
    weight = model.get_input_embeddings().weight
    noise = torch.randn(length, weight.shape[1], generator=torch.Generator().manual_seed(length))
    return noise.to(weight).requires_grad_() if length else None


def states_and_gradients(hidden_of, model, batch, prompt):
    """Hidden states, and gradients of a random function of them with respect to the weights and the prompt."""
    hidden = hidden_of(model, batch, prompt)
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    learned = [*model.base_model.parameters(), *([] if prompt is None else [prompt])]
    gradients = torch.autograd.grad((hidden * weights.to(hidden)).sum(), learned, allow_unused=True)
    return hidden.detach(), torch.cat([each.flatten() for each in gradients if each is not None])


def relative_gap(got, expected):
    return float((got - expected).detach().double().norm() / expected.detach().double().norm())


@pytest.mark.slow
@every_architecture
@pytest.mark.parametrize(("length", "seed"), [(0, 0), (3, 1)])
def test_packed_rows_equal_padded_ones_and_so_do_their_gradients(architecture, length, seed, device):
    model, batch = model_of(architecture).to(device), random_batch(seed, device=device)
    prompt = vectors(model, length)
    (ours, our_gradient), (theirs, their_gradient) = (
        states_and_gradients(hidden_of, model, batch, prompt) for hidden_of in (response_hidden, padded_way.hidden)
    )
    assert relative_gap(ours, theirs) < 1e-5
    assert relative_gap(our_gradient, their_gradient) < 1e-4


@every_architecture
def test_packed_rows_are_as_exact_as_padded_ones_in_bfloat16(architecture, device):
    """All states are rounded, so each way is held to the same weights in float32.

    How far rounding carries a gradient of these models is chance: by twice as much or half for another order of sums.
    """
    found = []
    for seed in range(2):
        model = model_of(architecture, dtype=torch.bfloat16, seed=seed).to(device)
        batch = random_batch(seed, device=device)
        wide = model_of(architecture).to(device)
        wide.load_state_dict(model.state_dict())
        prompt = vectors(model, 3)
        exact = states_and_gradients(padded_way.hidden, wide, batch, prompt.detach().float().requires_grad_())
        both = (states_and_gradients(way, model, batch, prompt) for way in (response_hidden, padded_way.hidden))
        found.append((*both, exact))
    for part in range(2):  # states, gradients
        ours, theirs, exact = (torch.cat([each[way][part].flatten() for each in found]) for way in range(3))
        assert ours.dtype == torch.bfloat16
        assert relative_gap(ours, exact) < 2.5 * relative_gap(theirs, exact)


@every_architecture
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_architecture_is_packed_on_cpu(architecture, dtype):
    model = model_of(architecture, dtype=dtype)
    expected = fused_way if architecture in FUSED else packed_way
    assert first_verified(ENGINE.scorers, model) is expected
    if dtype == torch.float32:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert first_verified(ENGINE.scorers, model) is expected


@every_architecture
@pytest.mark.parametrize("length", [0, 3])
def test_what_rows_have_in_common_is_read_once_and_changes_nothing(architecture, length):
    model, batch = model_of(architecture), batch_of_common_beginnings(0)
    prompt = vectors(model, length)
    read = []

    def note(module, args, kwargs):
        read.append(kwargs["position_ids"].shape[1])

    model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    (ours, our_gradient), (theirs, their_gradient) = (
        states_and_gradients(hidden_of, model, batch, prompt) for hidden_of in (packed_way.hidden, padded_way.hidden)
    )
    assert read[0] == length + len({tuple(row[:end]) for row in real_tokens(batch) for end in range(1, len(row) + 1)})
    assert relative_gap(ours, theirs) < 1e-5
    assert relative_gap(our_gradient, their_gradient) < 1e-4


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
    packed_way.hidden(model, batch, None)
    assert read == [sum(map(len, real_tokens(batch)))]


# ------------------------------------------------------------------------------------------- layers of Llama's family


@pytest.mark.parametrize("architecture", FUSED)
def test_fused_layers_equal_the_models_own(architecture, monkeypatch):
    model, batch = model_of(architecture), batch_of_common_beginnings(1)
    prompt, run = vectors(model, 3), []
    monkeypatch.setattr(packed, "fused_forward", lambda *args: run.append(args) or fused_forward(*args))
    response_hidden(model, batch, prompt)
    assert len(run) == 4  # the trial, without a soft prompt, with one and after a context, and the pack
    ours, our_gradient = states_and_gradients(fused_way.hidden, model, batch, prompt)
    theirs, their_gradient = states_and_gradients(packed_way.hidden, model, batch, prompt)
    assert len(run) == 5
    assert relative_gap(ours, theirs) < 1e-6
    assert relative_gap(our_gradient, their_gradient) < 1e-5


def test_layers_with_lora_are_fused_too():
    model, batch = model_of("llama"), random_batch(2)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)).eval()
    learned = [each for each in adapted.parameters() if each.requires_grad]
    assert first_verified(ENGINE.scorers, model) is fused_way
    found = []
    for way in (fused_way, padded_way):
        hidden = way.hidden(model, batch, None)
        gradients = torch.autograd.grad(hidden.square().sum(), learned)
        found.append([hidden.detach(), torch.cat([each.flatten() for each in gradients])])
    assert relative_gap(found[0][0], found[1][0]) < 1e-5
    assert relative_gap(found[0][1], found[1][1]) < 1e-4


@pytest.mark.slow
def test_a_model_whose_modules_must_be_called_is_not_fused():
    assert supports_fused_forward(model_of("llama"))
    hooked, behind, replaced = (model_of("llama") for _ in range(3))
    hooked.model.layers[0].register_forward_pre_hook(lambda module, args: None)
    behind.model.layers[0].mlp.register_full_backward_hook(lambda module, inward, outward: None)
    replaced.model.layers[0].mlp.forward = lambda hidden: hidden
    tuned = get_peft_model(model_of("llama"), LNTuningConfig(target_modules=["input_layernorm"])).get_base_model()
    others = (model_of("llama", dtype=torch.float64), model_of("gemma"), model_of("gpt2"))
    other_gates = model_of("llama", hidden_act="gelu")
    assert not any(map(supports_fused_forward, (hooked, behind, replaced, tuned, other_gates, *others)))


def test_a_model_that_only_looks_like_llamas_family_keeps_its_layers():
    class Doubled(type(model_of("llama").model.layers[0].mlp)):
        def forward(self, hidden):
            return 2 * super().forward(hidden)

    model, batch = model_of("llama"), random_batch(0)
    model.model.layers[1].mlp.__class__ = Doubled
    assert not supports_fused_forward(model)
    assert first_verified(ENGINE.scorers, model) is packed_way
    assert relative_gap(response_hidden(model, batch), padded_way.hidden(model, batch, None)) < 1e-5


def test_a_trial_finds_out_what_classes_do_not_tell(monkeypatch):
    model, batch = model_of("llama"), random_batch(0)
    monkeypatch.setattr(packed, "fused_forward", lambda *args: 2 * fused_forward(*args))
    assert relative_gap(response_hidden(model, batch), padded_way.hidden(model, batch, None)) < 1e-5


@pytest.mark.parametrize("way", [fused_way, packed_way], ids=lambda way: way.name)
def test_second_derivatives_are_refused(way):
    model, batch = model_of("llama"), random_batch(0)
    weight = model.model.layers[0].self_attn.q_proj.weight
    (gradient,) = torch.autograd.grad(way.hidden(model, batch, None).square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_dropout_in_attention_is_left_to_the_model(monkeypatch):
    model = model_of("llama", attention_dropout=0.5).train()
    assert first_verified(ENGINE.scorers, model) is packed_way
    first, second = (response_hidden(model, random_batch(0)) for _ in range(2))
    assert first.isfinite().all()
    assert not torch.equal(first, second)
    assert first_verified(ENGINE.scorers, model.eval()) is fused_way


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])  # the others compute their norms in float32 whatever comes
def test_packed_rows_equal_padded_ones_in_float64(architecture, device):
    model = model_of(architecture, dtype=torch.float64).to(device)
    batch = batch_of_common_beginnings(0, device=device)
    ours, theirs = (
        states_and_gradients(hidden_of, model, batch, vectors(model, 3))
        for hidden_of in (response_hidden, padded_way.hidden)
    )
    for mine, other in zip(ours, theirs, strict=True):
        assert relative_gap(mine, other) < 1e-12


@pytest.mark.parametrize("way", [fused_way, packed_way], ids=lambda way: way.name)
def test_packs_are_cut_where_they_would_grow_too_long(way, monkeypatch):
    model, batch, read = model_of("llama"), random_batch(0), []
    whole, states = way.hidden(model, batch, None), type(way).states_at
    monkeypatch.setattr(type(way), "states_at", lambda self, model, pack, *rest: (
        read.append(len(pack.row_indices)) or states(self, model, pack, *rest)
    ))  # fmt: skip
    monkeypatch.setattr(way, "max_tokens", 1)
    assert relative_gap(way.hidden(model, batch, None), whole) < 1e-5
    assert read == [1] * len(batch.lengths)  # every row a pack of its own


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
        packed_way.hidden(model, right_pad([[96, 200]], [[1]]), None)  # no such token
    assert model.config._attn_implementation == before


def test_the_attention_of_packs_is_refused_outside_of_a_pass():
    """It needs no mask, so a model that is left with it would see padding and all other rows."""
    model = model_of("llama")
    model.config._attn_implementation = "promptkd"
    with pytest.raises(RuntimeError, match="outside of a forward pass by promptkd"):
        model(input_ids=torch.tensor([[1, 2]]))


def test_activations_that_are_computed_again_see_no_other_row():
    model, batch = model_of("llama").train(), random_batch(0)
    _, expected = states_and_gradients(padded_way.hidden, model, batch, None)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, got = states_and_gradients(response_hidden, model, batch, None)
    assert relative_gap(got, expected) < 1e-5


def test_a_model_that_mixes_the_rows_of_a_pack_is_scored_padded(monkeypatch, caplog):
    model, batch = model_of("gpt2"), random_batch(0)
    expected = padded_way.hidden(model, batch, None)

    def over_everything(module, query, key, value, mask, **settings):
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return output.transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "promptkd", over_everything)
    with caplog.at_level(logging.INFO, logger="promptkd"):
        assert first_verified(ENGINE.scorers, model) is padded_way
    (message,) = caplog.messages
    assert message.startswith("GPT2LMHeadModel is not run by packed rows on cpu: it differs by ")
    assert torch.equal(response_hidden(model, batch), expected)


def test_the_reference_engine_packs_nothing(monkeypatch):
    model, batch = model_of("llama"), random_batch(0)
    monkeypatch.setenv("PROMPTKD_ENGINE", "reference")
    assert isinstance(first_verified(engine_for(torch.device("cpu")).scorers, model), PaddedScorer)
    assert torch.equal(response_hidden(model, batch), padded_way.hidden(model, batch, None))
