"""Rows read on our own key-value store: the hidden states of a plain forward over each row alone."""

import pytest
import torch

from promptkd.evaluation import generate
from promptkd.models.prepacked import prepacked_linears
from promptkd.models.row_cache import reads_rows, rows_of
from tiny import ARCHITECTURES, tiny_model

PROMPTS = ([5, 9, 11, 2, 40, 7, 7, 30, 12, 1], [3], [5, 9, 4, 60])
FURTHER = ([10, 20, 30], [31, 21, 11], [12, 22, 32], [13, 23, 33])  # a step each, a token a row


@pytest.fixture(autouse=True)
def devices(monkeypatch):
    """On, also where the suite runs with them off."""
    monkeypatch.delenv("PROMPTKD_OFF", raising=False)


every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def alone(model, ids, prompt=None):
    """The last hidden state behind `ids`, by transformers itself."""
    embedded = model.get_input_embeddings()(torch.tensor([ids]))
    if prompt is not None:
        embedded = torch.cat([prompt[None], embedded], 1)
    positions = torch.arange(embedded.shape[1])[None]
    with torch.no_grad():
        return model.base_model(inputs_embeds=embedded, position_ids=positions, use_cache=False).last_hidden_state[
            0, -1
        ]


@every_architecture
@pytest.mark.parametrize("length", [0, 3])
def test_rows_are_read_as_each_alone(architecture, length):
    model = tiny_model(architecture, dtype=torch.float64)
    assert reads_rows(model)
    embedded = model.get_input_embeddings()(torch.arange(40, 40 + length)) if length else None
    with torch.no_grad(), rows_of(model, room=len(FURTHER)) as rows:
        got = [rows.read(PROMPTS, embedded), *(rows.step(torch.tensor(tokens)) for tokens in FURTHER)]
    for step, hidden in enumerate(got):
        for row, ids in enumerate(PROMPTS):
            whole = [*ids, *(tokens[row] for tokens in FURTHER[:step])]
            # with a soft cap, transformers takes the softmax in float32 whatever the model is
            tolerance = 1e-5 if architecture == "gemma2" else 1e-10
            torch.testing.assert_close(hidden[row], alone(model, whole, embedded), rtol=0, atol=tolerance)


def test_rows_that_move_up_take_their_past_along():
    model = tiny_model("llama", dtype=torch.float64)
    with torch.no_grad(), rows_of(model, room=3) as rows:
        rows.read(PROMPTS)
        rows.step(torch.tensor([1, 2, 3]))
        rows.keep([2, 1])  # the first row ends, the last one takes its place
        rows.step(torch.tensor([4, 5]))
        rows.keep([1])
        last = rows.step(torch.tensor([6]))
    torch.testing.assert_close(last[0], alone(model, [*PROMPTS[1], 2, 5, 6]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("window", [3, 8])
def test_a_sliding_window_is_kept(window):
    """Windows shorter than a prompt, and reached while decoding."""
    model = tiny_model("gemma2", dtype=torch.float64, sliding_window=window)
    with torch.no_grad(), rows_of(model, room=len(FURTHER)) as rows:
        got = [rows.read(PROMPTS), *(rows.step(torch.tensor(tokens)) for tokens in FURTHER)]
    wide = tiny_model("gemma2", dtype=torch.float64, sliding_window=64)
    whole = [*PROMPTS[0], *(tokens[0] for tokens in FURTHER)]
    torch.testing.assert_close(got[-1][0], alone(model, whole), rtol=0, atol=1e-5)
    assert (got[-1][0] - alone(wide, whole)).abs().max() > 1e-3  # the window matters here


def test_the_models_attention_comes_back():
    model = tiny_model("llama")
    before = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), rows_of(model, room=1):
        raise ZeroDivisionError
    assert model.config._attn_implementation == before


def test_a_forward_of_ones_own_inside_is_refused():
    model = tiny_model("llama")
    with rows_of(model, room=1), pytest.raises(RuntimeError, match="outside of a forward of promptkd"):
        model(input_ids=torch.tensor([[1, 2]]))


def test_kinds_of_attention_that_are_not_known_are_left_to_transformers():
    model = tiny_model("llama")
    model.config.layer_types = ["chunked_attention"] * 3
    assert not reads_rows(model)


def test_a_recurrent_model_is_left_to_transformers():
    assert not reads_rows(tiny_model("mamba"))


# ------------------------------------------------------------------------------------------------- prepacked weights


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "opt"])  # without and with biases
def test_prepacked_layers_give_the_same_logits(architecture):
    model, ids = tiny_model(architecture), torch.tensor([[4, 9, 2], [7, 7, 1]])
    with torch.no_grad():
        expected = model(ids).logits
        with prepacked_linears(model, 2):
            got = model(ids).logits
            assert "forward" in vars(model.lm_head)
    assert "forward" not in vars(model.lm_head)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


def test_prepacked_layers_see_weights_as_they_are_at_entry():
    model, ids = tiny_model("llama"), torch.tensor([[4, 9, 2]])
    with torch.no_grad(), prepacked_linears(model, 1):
        before = model(ids).logits
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
        expected = model(ids).logits
        with prepacked_linears(model, 1):
            got = model(ids).logits
    assert (got - before).abs().max() > 1e-2
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


def test_other_precisions_are_left_as_they_are():
    model = tiny_model("llama", dtype=torch.float64)
    with prepacked_linears(model, 2):
        assert "forward" not in vars(model.lm_head)


def test_autocast_decodes_without_prepacked_layers():
    """Autocast casts the inputs of `nn.Linear`, and not those of a prepacked layer."""
    model = tiny_model("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        written = generate(model, PROMPTS, max_new_tokens=6, stop_ids=[], temperature=0)
        with prepacked_linears(model, 2):
            assert "forward" not in vars(model.lm_head)
    assert [len(each) for each in written] == [6, 6, 6]


def test_layers_come_back_after_an_error():
    model = tiny_model("llama")
    with pytest.raises(ZeroDivisionError), prepacked_linears(model, 2):
        raise ZeroDivisionError
    assert all("forward" not in vars(module) for module in model.modules())
