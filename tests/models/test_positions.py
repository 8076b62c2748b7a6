"""A model's positions are counted before anything runs, soft prompt and responses included."""

from dataclasses import replace

import pytest
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from helpers.tiny import VOCABULARY, tiny_model
from promptkd.data import EncodedExample
from promptkd.errors import RequestError
from promptkd.models import check_positions, check_rows_fit, position_limit
from promptkd.models.vocabulary import check_row_ids, check_stop_ids


def row(prompt: int, response: int) -> EncodedExample:
    return EncodedExample([1] * prompt, [2] * response, ("",), "", 0)


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "llama", "gemma2"])
def test_every_configurations_name_of_them_is_known(architecture):
    assert position_limit(tiny_model(architecture)) == 512


@pytest.mark.parametrize(
    ("kind", "settings", "limit"),
    [
        ("mpt", {"n_heads": 2, "d_model": 16, "n_layers": 1, "max_seq_len": 64}, 64),
        ("ctrl", {"n_embd": 16, "n_head": 2, "n_layer": 1, "dff": 16, "n_positions": 48}, 48),
        ("mamba", {"hidden_size": 16, "num_hidden_layers": 1}, None),
        ("bloom", {"hidden_size": 16, "n_head": 2, "n_layer": 1}, None),
        ("falcon", {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "alibi": True}, None),
    ],
)
def test_tables_end_and_biases_and_states_do_not(kind, settings, limit):
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](vocab_size=97, **settings))
    assert position_limit(model) == limit


def test_what_fits_to_the_last_position_is_taken():
    model = tiny_model("gpt2")
    check_positions("model", model, 500, 12)
    check_positions("model", model, 495, 10, soft_prompt=7)
    check_rows_fit("model", model, [row(500, 12), row(12, 500), row(1, 1)], 12)


@pytest.mark.parametrize(
    ("prompt", "response", "vectors", "said"),
    [
        (500, 13, 0, "513 are needed: for a prompt of 500 tokens and a response of up to 13. Lower --max_completion_l"),
        (500, 13, 0, "--max_completion_length to 12, or leave long rows out"),
        (
            500,
            10,
            7,
            "517 are needed: for a prompt of 500 tokens and a response of up to 10 behind a soft prompt of 7.",
        ),
        (600, 10, 0, "Lower --max_completion_length, and leave long rows out by a lower --max_prompt_length"),
    ],
)
def test_one_position_too_few_is_refused_with_the_sum_and_what_would_fit(prompt, response, vectors, said):
    with pytest.raises(RequestError, match="The teacher has 512 positions, and") as error:
        check_positions("teacher", tiny_model("gpt2"), prompt, response, soft_prompt=vectors)
    assert said in str(error.value)


def test_the_longest_row_decides_by_its_reference_or_by_what_may_be_written():
    model = tiny_model("opt")
    with pytest.raises(RequestError, match="of 12 tokens and a response of up to 501"):
        check_rows_fit("model", model, [row(500, 1), row(12, 501)], 12)
    with pytest.raises(RequestError, match="of 500 tokens and a response of up to 13"):
        check_rows_fit("model", model, [row(500, 1), row(12, 400)], 13)


def test_tokens_that_a_tokenizer_alone_was_given_are_refused_where_a_row_uses_them():
    model = tiny_model("llama")
    unused, used = row(3, 3), EncodedExample([1], [VOCABULARY], ("",), "", 7)
    check_rows_fit("model", model, [unused], 0)
    with pytest.raises(RequestError, match=r"response of row 7 has the token id 97.*resize_token_embeddings"):
        check_rows_fit("model", model, [unused, used], 0)
    with pytest.raises(RequestError, match=r"prompt of row 7 has the token id 97"):
        check_rows_fit("model", model, [replace(used, prompt_ids=[VOCABULARY], response_ids=[1])], 0)
    check_row_ids("model", model, [used], responses=False)
    check_stop_ids("model", model, [VOCABULARY, 5])
    with pytest.raises(RequestError, match="Answers end with the token id 97, and the model has 97 tokens"):
        check_stop_ids("model", model, [VOCABULARY])
