"""Rows read on our own key-value store: the hidden states of a plain forward over each row alone."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from promptkd.evaluation import generate
from promptkd.models.lean_decoder import LeanDecoder
from promptkd.models.prepacked import PackedLinear, prepacked_linears
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


# --------------------------------------------------------------------------------------------------- the lean decoder

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
def test_the_lean_decoder_reads_rows_as_each_alone(architecture, length):
    model = tiny_model(architecture.split(",")[0], **LLAMAS[architecture])
    assert LeanDecoder.suits(model)
    lean = LeanDecoder(model, 3)
    assert reads_rows(model, lean)
    embedded = model.get_input_embeddings()(torch.arange(40, 40 + length)).detach() if length else None
    with torch.no_grad(), rows_of(model, len(FURTHER), lean) as rows:
        rows.read(PROMPTS, embedded)
        got = [rows.step(torch.tensor(tokens)) for tokens in FURTHER[:2]]
        rows.keep([2, 1])  # the first row ends
        got.append(rows.step(torch.tensor([FURTHER[2][2], FURTHER[2][1]])))
    for step, hidden in enumerate(got):
        for place, row in enumerate([0, 1, 2] if step < 2 else [2, 1]):
            whole = [*PROMPTS[row], *(tokens[row] for tokens in FURTHER[: step + 1])]
            torch.testing.assert_close(hidden[place], alone(model, whole, embedded), rtol=1e-4, atol=1e-4)


def test_generate_decodes_with_it_and_finished_rows_leave(monkeypatch):
    model, rows, step = tiny_model("llama", tied=False), [], LeanDecoder.__call__

    def noted(self, tokens, *further):
        rows.append(len(tokens))
        return step(self, tokens, *further)

    monkeypatch.setattr(LeanDecoder, "__call__", noted)
    asked = {"max_new_tokens": [4, 1, 3], "stop_ids": [], "temperature": 0}
    written = generate(model, PROMPTS, **asked)
    assert rows[-3:] == [2, 2, 1]  # before them, the trial
    monkeypatch.setenv("PROMPTKD_OFF", "lean_decoder")
    assert generate(model, PROMPTS, **asked) == written
    assert len(rows) == 4


def test_other_models_are_decoded_by_their_own_modules():
    hooked, in_float64 = tiny_model("llama"), tiny_model("llama", dtype=torch.float64)
    hooked.model.layers[1].mlp.register_forward_hook(lambda module, args, output: None)
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", r=2)).get_base_model()
    uneven = tiny_model("llama")
    uneven.model.layers[0].self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(16))
    for model in (hooked, in_float64, adapted, uneven, *map(tiny_model, ("gpt2", "opt", "gemma2", "cohere"))):
        assert not LeanDecoder.suits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not LeanDecoder.suits(tiny_model("llama"))


def test_a_model_that_only_looks_like_llamas_family_is_found_out():
    model = tiny_model("llama")
    model.model.layers[0].mlp.forward = lambda hidden: 2 * hidden
    lean = LeanDecoder(model, 2)
    assert not reads_rows(model, lean)
    assert reads_rows(model)


# ------------------------------------------------------------------------------------------------- prepacked weights


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "opt"])  # without and with biases
def test_prepacked_layers_give_the_same_logits(architecture, monkeypatch):
    model, ids, called = tiny_model(architecture), torch.tensor([[4, 9, 2], [7, 7, 1]]), []
    product = PackedLinear.__call__
    monkeypatch.setattr(PackedLinear, "__call__", lambda self, *args: called.append(self) or product(self, *args))
    with torch.no_grad():
        expected = model(ids).logits
        with prepacked_linears(model, 6):
            got = model(ids).logits
            assert "forward" in vars(model.lm_head)
    assert "forward" not in vars(model.lm_head)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
    assert len(called) == sum(type(each) is torch.nn.Linear for each in model.modules())


def test_more_rows_than_a_step_has_are_left_to_torch():
    """oneDNN keeps a program for every number of rows, and prompts have any number of tokens."""
    model, ids = tiny_model("llama"), torch.tensor([[4, 9, 2], [7, 7, 1]])
    with torch.no_grad(), prepacked_linears(model, 5):
        got = model(ids).logits
    with torch.no_grad():
        assert torch.equal(got, model(ids).logits)


def test_prepacked_layers_see_weights_as_they_are_at_entry():
    model, ids = tiny_model("llama"), torch.tensor([[4, 9, 2]])
    with torch.no_grad(), prepacked_linears(model, 3):
        before = model(ids).logits
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
        expected = model(ids).logits
        with prepacked_linears(model, 3):
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
