"""The tokens that end a response, and where other tools find them."""

import json

import pytest
import torch

from helpers.tiny import BOS_ID, END_ID, PAD_ID, save_model, tiny_model, tiny_tokenizer
from promptkd.models import load_model
from promptkd.models.end_tokens import keep_end_tokens, known_end_tokens
from promptkd.models.export import export_safetensors, plain_model

TURN = (  # ends an answer with another token than EOS
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<pad>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize(
    ("held", "ends", "expected"),
    [
        (END_ID, (END_ID,), END_ID),
        (None, (END_ID,), END_ID),
        (None, (), None),
        (END_ID, (PAD_ID, END_ID), [END_ID, PAD_ID]),
        ([BOS_ID, END_ID], (PAD_ID,), [BOS_ID, END_ID, PAD_ID]),  # several, as Llama 3 and Gemma have
        ([PAD_ID, END_ID], (END_ID, PAD_ID), [PAD_ID, END_ID]),
    ],
)
def test_a_models_generation_configuration_gains_the_ends_it_lacks(held, ends, expected):
    model = tiny_model("gpt2", layers=1)
    model.generation_config.eos_token_id = held
    keep_end_tokens(model, ends)
    assert model.generation_config.eos_token_id == expected


def test_a_model_without_a_generation_configuration_gets_one():
    model = tiny_model("gpt2", layers=1)
    model.generation_config = None
    keep_end_tokens(model, (END_ID,))
    assert model.generation_config.eos_token_id == END_ID


def chat_tokenizer(template=TURN):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_the_ends_of_a_model_whose_template_is_not_known():
    model = tiny_model("gpt2", layers=1)
    model.generation_config.eos_token_id = [BOS_ID]
    assert known_end_tokens(model, chat_tokenizer()) == tuple(sorted((BOS_ID, END_ID, PAD_ID)))
    assert known_end_tokens(model, tiny_tokenizer(eos=False)) == (BOS_ID,)
    broken = chat_tokenizer("{{ raise_exception('system first') }}")
    assert known_end_tokens(model, broken) == tuple(sorted((BOS_ID, END_ID)))


def stops_at(model, token):
    """Whether transformers, with the settings in the folder alone, ends at `token` when the model writes it at once."""
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(torch.zeros_like(head.weight))
    head.bias = torch.nn.Parameter(torch.zeros(len(head.weight)).index_fill(0, torch.tensor([token]), 9.0))
    return model.generate(torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=False, pad_token_id=0).shape[1] == 3


@pytest.mark.slow
def test_an_exported_folder_names_the_templates_end(tmp_path):
    source = save_model(tmp_path / "model", tiny_model(), chat_tokenizer())
    assert not stops_at(load_model(source), PAD_ID)
    export_safetensors(tmp_path / "out", *plain_model(str(source)), torch.float32)
    held = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert held["eos_token_id"] == [END_ID, PAD_ID]
    assert not held.get("_from_model_config")
    assert all(stops_at(load_model(tmp_path / "out"), token) for token in (END_ID, PAD_ID))
