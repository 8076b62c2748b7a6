"""A response token by token: the tokens of `generate`, and text in which no character is cut."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.tiny import ARCHITECTURES, END_ID, tiny_model, tiny_tokenizer
from promptkd.generation import SamplingParams, generate
from promptkd.generation.conversation import TextStream
from promptkd.generation.decode_loop import stream

PROMPT = [4, 11, 60, 7, 23]
SAMPLED = {"temperature": 1.3, "top_p": 0.9, "top_k": 40}


def whole(model, *, stop_ids=(), seed=None, **settings):
    seeds = None if seed is None else [seed]
    return generate(model, [PROMPT], SamplingParams(max_new_tokens=20, stop_ids=stop_ids, **settings), seeds=seeds)[0]


def streamed(model, *, stop_ids=(), seed=None, **settings):
    return stream(model, PROMPT, SamplingParams(max_new_tokens=20, stop_ids=stop_ids, **settings), seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"seed": 5}, {"seed": 6, **SAMPLED}])
def test_a_stream_is_what_generate_writes(architecture, settings):
    model = tiny_model(architecture, tied=False)
    expected = whole(model, **settings)
    assert list(streamed(model, **settings)) == expected
    stop = expected[7]
    cut = list(streamed(model, stop_ids=[stop], **settings))
    assert cut == whole(model, stop_ids=[stop], **settings) == expected[: expected.index(stop) + 1]


@pytest.mark.slow
def test_streams_read_in_turns_do_not_disturb_each_other():
    models = [tiny_model("llama", seed=seed, tied=False) for seed in (0, 1)]
    expected = [whole(model, seed=3) for model in models]
    in_turns = zip(*(streamed(model, seed=3) for model in models), strict=True)
    assert [list(tokens) for tokens in zip(*in_turns, strict=True)] == expected
    assert expected[0] != expected[1]


def test_gradients_and_training_mode_are_as_before():
    model = tiny_model("llama").train()
    tokens = streamed(model, temperature=0.0)
    next(tokens)
    assert torch.is_grad_enabled()  # between two tokens the caller is itself again
    assert not model.training
    tokens.close()
    assert model.training


def test_wrong_settings_are_told_before_the_first_token():
    with pytest.raises(ValueError, match="sampling needs one seed"):
        streamed(tiny_model("llama"), temperature=1.0)
    with pytest.raises(ValueError, match="every prompt needs at least one token"):
        stream(tiny_model("llama"), [], SamplingParams(max_new_tokens=3, temperature=0))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte."""
    alphabet = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


@pytest.mark.parametrize("text", ["plain", "naïve – 日本語 🙂👩‍💻", "🙂", " two  spaces\n\n"])
def test_no_character_is_cut(text):
    tokenizer = byte_tokenizer()
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    read = TextStream(tokenizer)
    pieces = [read.add(index) for index in ids]
    assert "".join(pieces) + read.end() == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert sum(map(bool, pieces)) == len(text)  # a character comes with its last byte


def test_bytes_that_are_no_character_come_at_the_end_or_when_something_follows():
    tokenizer = byte_tokenizer()
    smile = tokenizer("🙂")["input_ids"]
    broken, letter = smile[:3], tokenizer("a")["input_ids"]
    read = TextStream(tokenizer)
    assert [read.add(index) for index in broken] == ["", "", ""]
    assert read.end() == tokenizer.decode(broken)
    read = TextStream(tokenizer)
    ids = broken + letter + smile + letter
    assert "".join(read.add(index) for index in ids) + read.end() == tokenizer.decode(ids)


def test_random_tokens_of_a_word_tokenizer():
    tokenizer = tiny_tokenizer()
    ids = torch.randint(0, END_ID + 1, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    read = TextStream(tokenizer)
    text = "".join(read.add(index) for index in ids) + read.end()
    assert text == tokenizer.decode(ids, skip_special_tokens=True)
