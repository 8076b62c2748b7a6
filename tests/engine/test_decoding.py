"""Sessions that decode: the logits of a plain forward over each row alone, whatever decodes them."""

from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model

from helpers.tiny import ARCHITECTURES, VOCABULARY, tiny_model
from promptkd.engine import decoding, first_verified, head_logits
from promptkd.engine.cpu import ENGINE
from promptkd.engine.cpu import decoding as onednn
from promptkd.engine.cpu.decoding import OneDNNLinear, onednn_linears, onednn_multiplies
from promptkd.engine.packed import supports_packing
from promptkd.engine.static_cache import FusedDecoder, supports_fused_decoder
from promptkd.generation import SamplingParams, generate

PROMPTS = ([5, 9, 11, 2, 40, 7, 7, 30, 12, 1], [3], [5, 9, 4, 60])
ROWS = len(PROMPTS)
FURTHER = ([10, 20, 30], [31, 21, 11], [12, 22, 32], [13, 23, 33])  # a step each, a token per row
STEPS = len(FURTHER)
fused_way, rows_way, cache_way, *_ = ENGINE.decoders

pytestmark = pytest.mark.usefixtures("own_engine")
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
no_units = pytest.mark.skipif(not onednn_multiplies(torch.bfloat16), reason="oneDNN multiplies no bfloat16 on this CPU")
with_and_without_units = pytest.mark.parametrize("units", [False, pytest.param(True, marks=no_units)])
plain_ways = pytest.mark.parametrize("way", [rows_way, cache_way], ids=lambda way: way.name)


@contextmanager
def session_of(way, model, *, max_new_tokens=STEPS, rows=ROWS, vocabulary=None):
    with torch.no_grad(), way.open(model, rows, vocabulary) as sessions, sessions(max_new_tokens) as session:
        yield session


def alone(model, ids, prompt=None):
    """The logits behind `ids`, by transformers itself."""
    embedded = model.get_input_embeddings()(torch.tensor([ids], device=model.device))
    if prompt is not None:
        embedded = torch.cat([prompt[None], embedded], 1)
    positions = torch.arange(embedded.shape[1], device=model.device)[None]
    with torch.no_grad():
        hidden = model.base_model(inputs_embeds=embedded, position_ids=positions, use_cache=False).last_hidden_state
        return head_logits(model, hidden[0, -1])


def soft_prompt(model, length):
    """The embeddings of some tokens, or None."""
    ids = torch.arange(40, 40 + length, device=model.device)
    return model.get_input_embeddings()(ids).detach() if length else None


def all_steps(session, model, embedded=None):
    """The logits behind the prompts and every further token, copied: a session may reuse what it returned."""
    logits = [session.prefill(PROMPTS, embedded).clone()]
    for tokens in FURTHER:
        logits.append(session.decode(torch.tensor(tokens, device=model.device)).clone())
    return logits


def assert_each_alone(got, model, embedded, tolerance):
    for step, logits in enumerate(got):
        for row, ids in enumerate(PROMPTS):
            whole = [*ids, *(tokens[row] for tokens in FURTHER[:step])]
            torch.testing.assert_close(logits[row], alone(model, whole, embedded), rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@plain_ways
@every_architecture
@pytest.mark.parametrize("length", [0, 3])
def test_rows_are_decoded_as_each_alone(architecture, length, way, float64_inside):
    model = tiny_model(architecture, dtype=torch.float64)
    assert first_verified(ENGINE.decoders, model) is rows_way
    embedded = soft_prompt(model, length)
    with session_of(way, model) as session:
        got = all_steps(session, model, embedded)
    assert_each_alone(got, model, embedded, 1e-10)


@every_architecture
@pytest.mark.parametrize("length", [0, 3])
def test_the_devices_own_way_decodes_rows_as_each_alone(architecture, length, device):
    model = tiny_model(architecture).to(device)
    embedded = soft_prompt(model, length)
    with torch.no_grad(), decoding(model, ROWS) as sessions, sessions(STEPS) as session:
        got = all_steps(session, model, embedded)
    assert_each_alone(got, model, embedded, 1e-4)


@every_architecture
def test_the_devices_own_way_moves_rows_up(architecture, device):
    model = tiny_model(architecture).to(device)
    with torch.no_grad(), decoding(model, ROWS) as sessions, sessions(STEPS) as session:
        rows_move_up(session, model, tolerance=1e-4)


@every_architecture
@pytest.mark.parametrize("kind", ["under autocast", "in bfloat16"])
def test_the_devices_own_way_decodes_in_bfloat16(architecture, kind, device):
    """Logits are float32, and no further from those of float32 weights than the model's own pass is, or nearly."""
    autocast = kind == "under autocast"
    model = tiny_model(architecture, dtype=torch.float32 if autocast else torch.bfloat16).to(device)
    wide = tiny_model(architecture).to(device)
    wide.load_state_dict(model.state_dict())
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast), torch.no_grad():
        with decoding(model, ROWS) as sessions, sessions(STEPS) as session:
            got = all_steps(session, model, soft_prompt(model, 3))
        theirs = [alone(model, ids, soft_prompt(model, 3)) for ids in PROMPTS]
    assert {each.dtype for each in got} == {torch.float32}
    assert not torch.equal(got[0], got[0].bfloat16().float())  # nothing was rounded behind the head
    exact = [alone(wide, ids, soft_prompt(wide, 3)) for ids in PROMPTS]
    error = max(float((each - other).abs().max()) for each, other in zip(theirs, exact, strict=True))
    assert_each_alone(got, wide, soft_prompt(wide, 3), max(0.05, 3 * error))


def rows_move_up(session, model, tolerance):
    session.prefill(PROMPTS)
    session.decode(torch.tensor([1, 2, 3], device=model.device))
    session.select([2, 1])  # the first row ends, the last one takes its place
    both = session.decode(torch.tensor([4, 5], device=model.device)).clone()
    session.select([1])
    last = session.decode(torch.tensor([6], device=model.device))
    for got, ids in zip(
        [*both, last[0]], [[*PROMPTS[2], 3, 4], [*PROMPTS[1], 2, 5], [*PROMPTS[1], 2, 5, 6]], strict=True
    ):
        torch.testing.assert_close(got, alone(model, ids), rtol=tolerance, atol=tolerance)


@plain_ways
def test_rows_that_move_up_take_their_past_along(way):
    model = tiny_model("llama", dtype=torch.float64)
    with session_of(way, model, max_new_tokens=3) as session:
        rows_move_up(session, model, tolerance=1e-10)


@plain_ways
@pytest.mark.parametrize("window", [3, 8])
def test_a_sliding_window_is_kept(window, way):
    """Windows shorter than a prompt, and reached while decoding."""
    model = tiny_model("gemma2", dtype=torch.float64, sliding_window=window)
    with session_of(way, model) as session:
        last = all_steps(session, model)[-1][0]
    wide = tiny_model("gemma2", dtype=torch.float64, sliding_window=64)
    whole = [*PROMPTS[0], *(tokens[0] for tokens in FURTHER)]
    torch.testing.assert_close(last, alone(model, whole), rtol=0, atol=1e-5)
    assert (last - alone(wide, whole)).abs().max() > 1e-3  # the window matters here


@pytest.mark.parametrize("way", ENGINE.decoders, ids=lambda way: way.name)
@pytest.mark.parametrize("bias", [False, True])
def test_only_the_first_tokens_of_a_padded_head_are_projected(way, bias):
    model = tiny_model("llama", vocabulary=VOCABULARY + 7, tied=False)
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, VOCABULARY + 7))
    with session_of(way, model, vocabulary=VOCABULARY) as session:
        got = all_steps(session, model)
    assert {each.shape for each in got} == {(len(PROMPTS), VOCABULARY)}
    for row, ids in enumerate(PROMPTS):
        torch.testing.assert_close(got[0][row], alone(model, ids)[:VOCABULARY], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", [fused_way, rows_way], ids=lambda way: way.name)
def test_the_models_attention_comes_back(way):
    model = tiny_model("llama")
    before = model.config._attn_implementation
    ids, mask = torch.tensor([[0, 5, 6], [7, 8, 9]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    own = model(ids, attention_mask=mask).logits
    with session_of(way, model) as session:
        session.prefill(PROMPTS)
        assert model.config._attn_implementation == before
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, own, rtol=1e-4, atol=1e-4)
    with session_of(way, model) as session, pytest.raises(IndexError):
        session.prefill([[3], [200]])  # no such token
    assert model.config._attn_implementation == before


def test_kinds_of_attention_that_are_not_known_are_left_to_transformers():
    model = tiny_model("llama")
    model.config.layer_types, model.config.attention_chunk_size = ["chunked_attention"] * 3, 64
    assert not supports_packing(model)
    assert first_verified(ENGINE.decoders, model) is cache_way


def test_a_recurrent_model_is_left_to_transformers():
    assert first_verified(ENGINE.decoders, tiny_model("mamba")) is cache_way


# -------------------------------------------------------------------------------------------------- the fused decoder

LLAMAS = {
    "llama": {},
    "mistral": {"sliding_window": 4, "head_dim": 8},
    "qwen2": {},  # biases
    "qwen3": {"head_dim": 8},  # norms of heads
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, scaled rotation": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
}


@pytest.mark.parametrize("architecture", LLAMAS)
@pytest.mark.parametrize("length", [0, 3])
def test_the_fused_decoder_decodes_rows_as_each_alone(architecture, length):
    model = tiny_model(architecture.split(",")[0], **LLAMAS[architecture])
    assert first_verified(ENGINE.decoders, model) is fused_way
    embedded = soft_prompt(model, length)
    with session_of(fused_way, model) as session:
        assert_each_alone(all_steps(session, model, embedded), model, embedded, 1e-4)
    with session_of(fused_way, model) as session:
        rows_move_up(session, model, tolerance=1e-4)


@pytest.mark.parametrize("architecture", LLAMAS)
@pytest.mark.parametrize("kind", ["under autocast", "in bfloat16"])
@with_and_without_units
def test_the_fused_decoder_in_bfloat16(architecture, kind, units, monkeypatch):
    """With oneDNN's products and with torch's own, whichever this processor would take."""
    autocast = kind == "under autocast"
    monkeypatch.setattr(onednn, "onednn_multiplies", lambda dtype: units)
    model = tiny_model(
        architecture.split(",")[0], dtype=torch.float32 if autocast else torch.bfloat16, **LLAMAS[architecture]
    )
    wide = tiny_model(architecture.split(",")[0], **LLAMAS[architecture])
    wide.load_state_dict(model.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), session_of(fused_way, model) as session:
        got = all_steps(session, model)
        theirs = [alone(model, ids) for ids in PROMPTS]
    exact = [alone(wide, ids) for ids in PROMPTS]
    error = max(float((each - other).abs().max()) for each, other in zip(theirs, exact, strict=True))
    assert_each_alone(got, wide, None, max(0.05, 3 * error))


def test_generate_decodes_with_it_and_finished_rows_leave(monkeypatch):
    model, rows, step = tiny_model("llama", tied=False), [], FusedDecoder.__call__

    def noted(self, tokens, *further):
        rows.append(len(tokens))
        return step(self, tokens, *further)

    monkeypatch.setattr(FusedDecoder, "__call__", noted)
    params = SamplingParams(max_new_tokens=[4, 1, 3], temperature=0)
    written = generate(model, PROMPTS, params)
    assert rows == [3, 3, 2, 1, 2, 2, 1]  # first the trial
    monkeypatch.setenv("PROMPTKD_ENGINE", "reference")
    assert generate(model, PROMPTS, params) == written
    assert len(rows) == 7


@pytest.mark.slow
def test_other_models_are_decoded_by_their_own_modules():
    hooked, in_float64 = tiny_model("llama"), tiny_model("llama", dtype=torch.float64)
    hooked.model.layers[1].mlp.register_forward_hook(lambda module, args, output: None)
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", r=2)).get_base_model()
    uneven = tiny_model("llama")
    uneven.model.layers[0].self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(16))
    for model in (hooked, in_float64, adapted, uneven, *map(tiny_model, ("gpt2", "opt", "gemma2", "cohere"))):
        assert not supports_fused_decoder(model)
        assert first_verified(ENGINE.decoders, model) is rows_way


def test_a_model_that_only_looks_like_llamas_family_is_found_out(monkeypatch):
    step = FusedDecoder.__call__
    monkeypatch.setattr(FusedDecoder, "__call__", lambda *args: 2 * step(*args))
    assert first_verified(ENGINE.decoders, tiny_model("llama")) is rows_way


# -------------------------------------------------------------------------------------------------- weights for oneDNN


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "opt"])  # without and with biases
def test_prepacked_layers_give_the_same_logits(architecture, monkeypatch):
    model, ids, called = tiny_model(architecture), torch.tensor([[4, 9, 2], [7, 7, 1]]), []
    product = OneDNNLinear.__call__
    monkeypatch.setattr(OneDNNLinear, "__call__", lambda self, *args: called.append(self) or product(self, *args))
    with torch.no_grad():
        expected = model(ids).logits
        with onednn_linears(model, 6):
            got = model(ids).logits
            assert "forward" in vars(model.lm_head)
    assert "forward" not in vars(model.lm_head)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
    assert len(called) == sum(type(each) is torch.nn.Linear for each in model.modules())


def test_more_rows_than_a_step_has_are_left_to_torch():
    """oneDNN keeps a program for every number of rows, and prompts have any number of tokens."""
    model, ids = tiny_model("llama"), torch.tensor([[4, 9, 2], [7, 7, 1]])
    with torch.no_grad(), onednn_linears(model, 5):
        got = model(ids).logits
    with torch.no_grad():
        assert torch.equal(got, model(ids).logits)


def test_prepacked_layers_see_weights_as_they_are_at_entry():
    model, ids = tiny_model("llama"), torch.tensor([[4, 9, 2]])
    with torch.no_grad(), onednn_linears(model, 3):
        before = model(ids).logits
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
        expected = model(ids).logits
        with onednn_linears(model, 3):
            got = model(ids).logits
    assert (got - before).abs().max() > 1e-2
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("way", [fused_way, rows_way], ids=lambda way: way.name)
def test_sessions_see_weights_as_they_are_when_they_are_opened(way):
    """All that is laid out anew, the head too, is laid out again after a step of an optimizer."""
    model = tiny_model("llama", tied=False)
    with session_of(way, model) as session:
        all_steps(session, model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    with session_of(way, model) as session:
        assert_each_alone(all_steps(session, model), model, None, 1e-4)


def test_other_precisions_are_left_as_they_are():
    model = tiny_model("llama", dtype=torch.float64)
    with onednn_linears(model, 2):
        assert "forward" not in vars(model.lm_head)


@with_and_without_units
@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_under_autocast_layers_are_laid_out_in_bfloat16_where_onednn_multiplies_it(architecture, units, monkeypatch):
    """Autocast casts the inputs of `nn.Linear`, and a prepacked layer its own."""
    model, ids = tiny_model(architecture), torch.tensor([[4, 9, 2]])
    monkeypatch.setattr(onednn, "onednn_multiplies", lambda dtype: dtype == torch.float32 or units)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        expected = model(ids).logits
        with onednn_linears(model, 3):
            assert ("forward" in vars(model.lm_head)) == units
            got = model(ids).logits
        assert (first_verified(ENGINE.decoders, model) is fused_way) == (architecture == "llama")
        written = generate(model, PROMPTS, SamplingParams(max_new_tokens=6, temperature=0))
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=0.2)
    assert [len(each) for each in written] == [6, 6, 6]


def test_layers_come_back_after_an_error():
    model = tiny_model("llama")
    with pytest.raises(ZeroDivisionError), onednn_linears(model, 2):
        raise ZeroDivisionError
    assert all("forward" not in vars(module) for module in model.modules())
