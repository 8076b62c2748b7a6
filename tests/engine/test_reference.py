"""The reference engine on architectures whose rows cannot simply be padded: recurrent states, other caches, none."""

import pytest
import torch

from helpers.tiny import tiny_model
from promptkd.data.batch import right_pad
from promptkd.engine import check_scoring, decoding, first_verified, head_logits, response_hidden
from promptkd.engine.reference import DECODERS, SCORERS
from promptkd.errors import RequestError
from promptkd.generation import SamplingParams, generate

HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "head_dim": 8}
LINEAR = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 1,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
KINDS = {
    "qwen3_5_text": {**HYBRID, **LINEAR},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "full_attn_idxs": [1]},
    "mamba": {},
    "rwkv": {"attention_hidden_size": 16, "intermediate_size": 32},
}
DECODED_BY = dict.fromkeys(KINDS, "transformers' cache") | {"rwkv": "single rows on transformers' cache"}
every_kind = pytest.mark.parametrize("kind", KINDS)
PROMPTS, LIMITS = [[5, 9, 17, 30, 2, 44, 61], [7], [50, 4, 6], [8, 1, 3]], [6, 4, 2, 5]


def model_of(kind):
    return tiny_model(kind, **KINDS[kind])


def own_logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


@pytest.mark.slow
@every_kind
def test_rows_that_end_before_others_leave_the_batch_and_change_nothing(kind):
    model = model_of(kind)
    written = generate(model, PROMPTS, SamplingParams(temperature=0, max_new_tokens=LIMITS))
    assert [len(each) for each in written] == LIMITS
    for prompt, answer in zip(PROMPTS, written, strict=True):
        assert own_logits(model, prompt + answer)[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
    assert first_verified(DECODERS, model).name == DECODED_BY[kind]


@every_kind
@pytest.mark.parametrize("way", DECODERS[1:], ids=lambda way: way.name)
def test_every_slower_way_gives_the_models_own_logits(kind, way):
    if kind == "rwkv" and way is DECODERS[1]:
        pytest.skip("transformers mixes the states of RWKV's rows up, so that single rows are decoded")
    model, answers = model_of(kind), [[11, 12, 13], [14, 15, 16], [17, 18, 19], [20, 21, 22]]
    expected = [own_logits(model, [*ids, *more])[len(ids) - 1 :] for ids, more in zip(PROMPTS, answers, strict=True)]
    with torch.no_grad(), way.open(model, 4, None) as sessions, sessions(3) as session:
        rows, logits = [0, 1, 2, 3], session.prefill(PROMPTS)
        for step in range(4):
            torch.testing.assert_close(logits, torch.stack([expected[row][step] for row in rows]), rtol=1e-3, atol=1e-3)
            if step == 3:
                break
            if step in (1, 2):  # what the decode loop does: rows from the end take the places of those that ended
                slots = [3, 1, 2] if step == 1 else [0, 2]
                session.select(slots)
                rows = [rows[slot] for slot in slots]
            logits = session.decode(torch.tensor([answers[row][step] for row in rows]))


@every_kind
@pytest.mark.parametrize("vectors", [0, 3])
def test_ragged_rows_are_scored_as_each_row_alone(kind, vectors):
    model, responses = model_of(kind), [[21, 22], [23, 24, 25, 26], [27], []]
    prompt = model.get_input_embeddings()(torch.arange(60, 60 + vectors)).detach() if vectors else None
    with torch.no_grad():
        got = head_logits(model, response_hidden(model, right_pad(PROMPTS, responses), prompt))
        rows = [SCORERS[-1].hidden(model, right_pad([p], [r]), prompt) for p, r in zip(PROMPTS, responses, strict=True)]
        torch.testing.assert_close(got, head_logits(model, torch.cat(rows)), rtol=1e-3, atol=1e-3)
    if not vectors:
        own = [own_logits(model, p + r)[len(p) - 1 : len(p + r) - 1] for p, r in zip(PROMPTS, responses, strict=True)]
        torch.testing.assert_close(got, torch.cat(own), rtol=1e-3, atol=1e-3)


def test_a_model_without_a_cache_is_decoded_by_whole_rows():
    model = tiny_model("openai-gpt", n_positions=64, n_embd=16, n_layer=2, n_head=2)
    assert first_verified(DECODERS, model).name == "no cache"
    with torch.no_grad(), decoding(model, 1) as sessions, sessions(2) as session:
        first, second = session.prefill([[3, 4]])[0], session.decode(torch.tensor([5]))[0]
    torch.testing.assert_close(torch.stack([first, second]), own_logits(model, [3, 4, 5])[1:], rtol=1e-4, atol=1e-4)


def test_what_reads_tokens_ahead_is_refused_in_a_sentence():
    encoder = tiny_model("bert", is_decoder=False)
    with pytest.raises(RequestError, match="is no causal model as it is configured"):
        check_scoring(encoder)


def test_an_encoder_decoder_is_refused_in_a_sentence():
    model = tiny_model("bart", decoder_layers=2, d_model=16, decoder_attention_heads=2, decoder_ffn_dim=32)
    check_scoring(model)
    model.config.is_encoder_decoder = True
    with pytest.raises(RequestError, match=r"is an encoder-decoder model\. Expected a decoder-only model"):
        check_scoring(model)


def test_what_fails_within_the_model_is_told_in_a_sentence(monkeypatch):
    model = tiny_model("llama")

    def fails(*args, **kwargs):
        raise ZeroDivisionError("by\nnothing")

    monkeypatch.setattr(model.model, "forward", fails)
    with pytest.raises(RequestError, match="LlamaForCausalLM cannot be run here: by nothing"):
        check_scoring(model)
