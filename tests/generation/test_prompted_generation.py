"""Responses of a teacher with a soft prompt: the prompt stands directly before the request, whatever the padding."""

import pytest
import torch
from peft import PeftModel

from helpers.models import response_logits
from helpers.tiny import ARCHITECTURES, VOCABULARY, tiny_model, tiny_tokenizer
from promptkd.data.batch import right_pad
from promptkd.generation import SamplingParams, generate, row_seeds
from promptkd.models import SoftPrompt

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
LENGTH = 12  # past Gemma 2's window of 8
BEFORE = [21, 4, 33, 60, 7]


def requests() -> list[list[int]]:
    """Of 1 to 15 tokens, in no order of length."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in (4, 11, 1, 15, 7)]


def greedy(model, prompts, *, prompt=None, batch_size=8, stop_ids=()):
    params = SamplingParams(max_new_tokens=LENGTH, stop_ids=stop_ids, temperature=0)
    return generate(model, prompts, params, prompt=prompt, batch_size=batch_size)


def vectors(model, length=5):
    return SoftPrompt.create(model, tiny_tokenizer(), length=length, start="random", seed=3)


@pytest.mark.slow
@every_architecture
def test_the_prompt_made_of_a_texts_embeddings_acts_as_that_text(architecture):
    """Scaling, positions, order and padding at once."""
    model = tiny_model(architecture, tied=False)
    prompt = model.get_input_embeddings()(torch.tensor(BEFORE)).detach()
    expected = greedy(model, [BEFORE + each for each in requests()])
    assert expected != greedy(model, requests())
    for batch_size in (1, 3, 8):
        assert greedy(model, requests(), prompt=prompt, batch_size=batch_size) == expected


@every_architecture
def test_each_token_is_the_most_probable_one_of_the_scored_logits(architecture):
    """What is sampled from is what is scored, row by row without padding."""
    model = tiny_model(architecture, tied=False)
    prompt = vectors(model)().detach()
    responses = greedy(model, requests(), prompt=prompt)
    assert len({tuple(response) for response in responses}) == len(responses)
    for request, response in zip(requests(), responses, strict=True):
        with torch.no_grad():
            logits = response_logits(model, right_pad([request], [response]), prompt)
        assert logits.argmax(-1).tolist() == response


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_it_writes_what_peft_writes_row_by_row(architecture, tmp_path):
    model = tiny_model(architecture, tied=False)
    prompt = vectors(model)
    prompt.save(tmp_path, model)
    responses = greedy(model, requests(), prompt=prompt().detach())
    wrapped = PeftModel.from_pretrained(tiny_model(architecture, tied=False), str(tmp_path)).eval()
    for request, response in zip(requests(), responses, strict=True):
        ids = list(request)
        for token in response:
            with torch.no_grad():
                row = torch.tensor([ids])
                logits = wrapped(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
            assert ids[-1] == token


@pytest.mark.slow
def test_samples_do_not_depend_on_the_batch_and_rows_that_end_change_no_other():
    model = tiny_model("llama", tied=False)
    prompt = model.get_input_embeddings()(torch.tensor(BEFORE)).detach()
    params, seeds = SamplingParams(max_new_tokens=LENGTH, stop_ids=list(range(0, VOCABULARY, 9))), row_seeds(4, 5)
    expected = generate(model, [BEFORE + each for each in requests()], params, seeds=seeds)
    assert len({len(response) for response in expected}) > 2
    for batch_size in (1, 2, 5):
        assert generate(model, requests(), params, seeds=seeds, prompt=prompt, batch_size=batch_size) == expected


def test_a_prompt_of_no_vectors_changes_nothing():
    model = tiny_model("llama", tied=False)
    assert greedy(model, requests(), prompt=torch.empty(0, 16)) == greedy(model, requests())


def test_a_mixture_of_two_models_takes_no_prompt():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="stands before one model"):
        generate(
            model,
            [[1]],
            SamplingParams(max_new_tokens=1, temperature=0),
            prompt=vectors(model)(),
            mixed_with=(model, 0.5),
        )
