"""Responses: greedy ones token by token as transformers writes them, sampled ones with the exact probabilities."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GenerationConfig

from helpers.tiny import ARCHITECTURES, END_ID, VOCABULARY, tiny_model
from promptkd.engine import engine_for, evaluating, first_verified
from promptkd.engine.reference import DynamicCacheDecoder
from promptkd.errors import RequestError
from promptkd.generation import Decoding, SamplingParams, generate, row_seeds

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
LENGTH = 14  # past Gemma 2's window of 8


def is_tried(model) -> bool:
    """Have a model's decoders tried before its forwards are counted; whether one other than the reference runs it."""
    decoders = engine_for(model.device).decoders
    return not isinstance(first_verified(decoders, model), DynamicCacheDecoder)


def some_prompts(count: int = 8) -> list[list[int]]:
    """Of 1 to 19 tokens, in no order of length, two of one length."""
    generator = torch.Generator().manual_seed(3)
    lengths = [4, 11, 1, 19, 7, 11, 2, 15][:count]
    return [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def greedy(model, prompts, *, stop_ids=(), batch_size=8, length=LENGTH):
    params = SamplingParams(max_new_tokens=length, stop_ids=stop_ids, temperature=0)
    return generate(model, prompts, params, batch_size=batch_size)


def transformers_greedy(model, prompt, *, stop_ids=(), **settings):
    """One row without padding, with none of the settings that the model brings along."""
    config = GenerationConfig(
        do_sample=False, max_new_tokens=LENGTH, eos_token_id=list(stop_ids) or None, pad_token_id=END_ID, **settings
    )
    model.generation_config = GenerationConfig()
    ids = torch.tensor([prompt], device=model.device)
    written = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return written[0, len(prompt) :].tolist()


def until_stop(response, stop_ids):
    for place, token in enumerate(response):
        if token in stop_ids:
            return response[: place + 1]
    return response


# -------------------------------------------------------------------------------------------------------------- greedy


@pytest.mark.slow
@every_architecture
def test_greedy_is_transformers_generate_token_by_token(architecture, device):
    model, prompts = tiny_model(architecture, tied=False).to(device), some_prompts()
    expected = [transformers_greedy(model, prompt) for prompt in prompts]
    assert len({tuple(response) for response in expected}) == len(prompts)
    assert max(len(set(response)) for response in expected) > 4  # not one token over and over
    for batch_size in (1, 3, 8):
        assert greedy(model, prompts, batch_size=batch_size) == expected


@pytest.mark.slow
@every_architecture
def test_rows_that_end_early_change_no_other_row(architecture, device):
    model, prompts = tiny_model(architecture, tied=False).to(device), some_prompts()
    unlimited = greedy(model, prompts)
    stops = [unlimited[0][0], unlimited[1][3], unlimited[5][9]]  # at once, early, late
    expected = [until_stop(response, stops) for response in unlimited]
    assert expected[0] == [stops[0]]
    assert len({len(response) for response in expected}) >= 3
    for batch_size in (3, 8):
        assert greedy(model, prompts, stop_ids=stops, batch_size=batch_size) == expected
    for row in (0, 1, 5):  # that those of transformers end likewise; unlimited ones are compared above
        assert transformers_greedy(model, prompts[row], stop_ids=stops) == expected[row]


@pytest.mark.slow
def test_a_stop_id_is_kept_and_nothing_follows_it():
    model, prompts = tiny_model("gpt2", tied=False), some_prompts()
    unlimited = greedy(model, prompts)
    for stop in {token for response in unlimited for token in response}:
        for response, whole in zip(greedy(model, prompts, stop_ids=[stop]), unlimited, strict=True):
            assert response == until_stop(whole, [stop])
            assert stop not in response[:-1]
            assert response[-1] == stop or len(response) == LENGTH


def test_without_stop_ids_every_response_has_the_full_length():
    model = always(END_ID)
    assert greedy(model, some_prompts(3)) == [[END_ID] * LENGTH] * 3


@pytest.mark.slow
def test_a_stop_id_in_the_prompt_does_not_stop():
    """pad == EOS == a prompt's token: only what is generated counts."""
    model = tiny_model("gpt2", tied=False)
    prompts = [[END_ID, 5, END_ID], [END_ID], [3, END_ID]]
    expected = [until_stop(transformers_greedy(model, prompt), [END_ID]) for prompt in prompts]
    assert min(len(response) for response in expected) > 1
    assert greedy(model, prompts, stop_ids=[END_ID]) == expected


@pytest.mark.slow
def test_the_limit_is_exact():
    model, prompts = tiny_model("llama", tied=False), some_prompts()
    whole = greedy(model, prompts)
    for length in (1, 2, 7):
        assert greedy(model, prompts, length=length) == [response[:length] for response in whole]


def always(token: int) -> nn.Module:
    """A model that writes one token, whatever came before."""
    model = tiny_model("gpt2", tied=False)
    model.lm_head.bias = nn.Parameter(torch.zeros(VOCABULARY))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias[token] = 1.0
    return model


@pytest.mark.usefixtures("own_engine")
def test_eos_as_first_token_of_every_row():
    calls = []
    model = always(END_ID)
    assert is_tried(model)
    model.transformer.register_forward_hook(lambda *_: calls.append(1))
    assert greedy(model, some_prompts(), stop_ids=[END_ID]) == [[END_ID]] * 8
    assert len(calls) == 1  # nothing is decoded behind the last row's end


@pytest.mark.slow
@pytest.mark.usefixtures("own_engine")
def test_finished_rows_leave_the_batch():
    model, prompts = tiny_model("llama", tied=False), some_prompts()
    unlimited = greedy(model, prompts)
    stops = [unlimited[0][0], unlimited[1][3]]
    lengths = [len(until_stop(response, stops)) for response in unlimited]
    rows = []
    model.model.register_forward_hook(lambda module, args, output: rows.append(len(output.last_hidden_state)))
    assert is_tried(model)
    rows.clear()
    greedy(model, prompts, stop_ids=stops)
    # the prompts are read side by side as one row, then a token a row
    assert rows == [1] + [sum(length > step for length in lengths) for step in range(1, max(lengths))]


@pytest.mark.slow
def test_a_peft_model_writes_with_its_adapter():
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)
    model, prompts = get_peft_model(tiny_model("llama", tied=False), lora).eval(), some_prompts()
    responses = greedy(model, prompts)
    assert responses == greedy(model.merge_and_unload(), prompts)


@pytest.mark.slow
def test_settings_of_the_models_folder_are_not_applied():
    model, prompts = tiny_model("gpt2", tied=False), some_prompts()
    plain = [transformers_greedy(model, prompt) for prompt in prompts]
    assert [transformers_greedy(model, prompt, repetition_penalty=1.3) for prompt in prompts] != plain

    model.generation_config = GenerationConfig(
        repetition_penalty=1.3, no_repeat_ngram_size=2, suppress_tokens=plain[0][:3], do_sample=True, max_new_tokens=2,
        eos_token_id=plain[0][1],
    )  # fmt: skip
    assert greedy(model, prompts) == plain
    seeds = row_seeds(1, len(prompts))

    def sampled():
        return generate(model, prompts, SamplingParams(max_new_tokens=9), seeds=seeds)

    before = sampled()
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.3, top_p=0.2, top_k=2)
    assert sampled() == before


@pytest.mark.slow
def test_a_recurrent_model_is_refused_or_right():
    model, prompts = tiny_model("mamba"), some_prompts()
    expected = [transformers_greedy(model, prompt) for prompt in prompts]
    try:
        written = greedy(model, prompts)
    except RequestError:
        return
    assert written == expected


@pytest.mark.usefixtures("own_engine")
def test_rows_of_like_length_share_a_batch():
    model, prompts = tiny_model("gpt2"), some_prompts()
    assert is_tried(model)
    shapes = []
    model.transformer.wte.register_forward_hook(lambda module, args, output: shapes.append(tuple(args[0].shape)))
    greedy(model, prompts, length=1, batch_size=2)
    assert shapes == [(1, 19 + 15), (1, 11 + 11), (1, 7 + 4), (1, 2 + 1)]  # the longest first: memory runs out early


# ---------------------------------------------------------------------------------------- padded heads and two models


@pytest.mark.slow
def test_no_token_beyond_the_vocabulary_is_written():
    model, prompts = tiny_model("llama", vocabulary=VOCABULARY + 5, tied=False), some_prompts()
    exact = tiny_model("llama", vocabulary=VOCABULARY, tied=False)
    exact.load_state_dict(
        {
            name: weight[:VOCABULARY] if len(weight) > VOCABULARY else weight
            for name, weight in model.state_dict().items()
        }
    )
    model.lm_head.bias = nn.Parameter(torch.zeros(VOCABULARY + 5))
    with torch.no_grad():
        model.lm_head.bias[VOCABULARY:] = 20.0
    assert max(greedy(model, prompts)[0]) >= VOCABULARY
    seeds = row_seeds(1, len(prompts))
    for settings in ({"temperature": 0}, {}, {"top_p": 0.9, "top_k": 20}):
        params = SamplingParams(max_new_tokens=9, **settings)
        got = generate(model, prompts, replace(params, vocabulary=VOCABULARY), seeds=seeds)
        assert got == generate(exact, prompts, params, seeds=seeds)


def mixture(student, teacher, share, temperature, ids) -> torch.Tensor:
    with torch.no_grad():
        q, p = (model(input_ids=torch.tensor([ids])).logits[0, -1].double() for model in (student, teacher))
    return (1 - share) * (q / temperature).softmax(-1) + share * (p / temperature).softmax(-1)


@pytest.mark.slow
def test_a_mixture_of_two_models_has_the_exact_probabilities():
    student, teacher = tiny_model("llama", tied=False), tiny_model("llama", tied=False, layers=2, seed=1)
    counts = first_tokens(student, temperature=1.3, mixed_with=(teacher, 0.3))
    statistic, bound = chi_square(counts, mixture(student, teacher, 0.3, 1.3, PROMPT).tolist())
    assert statistic < bound
    for share, temperature in ((0.4, 1.3), (0.2, 1.3), (0.3, 1.0)):
        statistic, bound = chi_square(counts, mixture(student, teacher, share, temperature, PROMPT).tolist())
        assert statistic > bound


@pytest.mark.slow
def test_a_mixture_is_written_token_by_token_by_both_models():
    student = tiny_model("gpt2", tied=False, dropout=0.3).train()
    teacher, prompts = tiny_model("gemma2", tied=False, seed=1), some_prompts()

    def by_hand(prompt):
        ids = list(prompt)
        for _ in range(LENGTH):
            ids.append(int(mixture(student.eval(), teacher, 0.5, 1.0, ids).argmax()))
        return ids[len(prompt) :]

    unlimited = [by_hand(prompt) for prompt in prompts]
    student.train()
    stops = [unlimited[0][0], unlimited[1][3], unlimited[4][6]]
    params = SamplingParams(max_new_tokens=LENGTH, stop_ids=stops, temperature=0)
    for batch_size in (1, 3, 8):
        written = generate(student, prompts, params, batch_size=batch_size, mixed_with=(teacher, 0.5))
        assert written == [until_stop(response, stops) for response in unlimited]
    assert (student.training, teacher.training) == (True, False)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_mixture_of_one_model_alone_is_that_model(share):
    models, prompts = (tiny_model("gpt2", tied=False), tiny_model("gpt2", tied=False, seed=1)), some_prompts()
    params, seeds = SamplingParams(max_new_tokens=9, stop_ids=[END_ID]), row_seeds(2, 8)
    expected = generate(models[int(share)], prompts, params, seeds=seeds)
    assert generate(models[0], prompts, params, seeds=seeds, mixed_with=(models[1], share)) == expected
    assert generate(models[1 - int(share)], prompts, params, seeds=seeds) != expected


# ------------------------------------------------------------------------------------------------------------ sampling


@pytest.mark.slow
@every_architecture
def test_a_sampled_response_does_not_depend_on_batch_or_order(architecture, device):
    model, prompts = tiny_model(architecture, tied=False).to(device), some_prompts()
    prompts[5] = list(prompts[1])  # two rows of one prompt
    seeds = row_seeds(7, len(prompts))

    def sampled(rows, batch_size):
        got = generate(
            model,
            [prompts[row] for row in rows],
            SamplingParams(max_new_tokens=LENGTH, stop_ids=[END_ID, 3, 8, 40], temperature=1.3, top_p=0.95),
            seeds=[seeds[row] for row in rows],
            batch_size=batch_size,
        )
        return dict(zip(rows, got, strict=True))

    expected = sampled(range(8), 8)
    assert expected[1] != expected[5]  # one prompt, two seeds
    assert len({len(response) for response in expected.values()}) > 2
    assert sampled(range(8), 1) == expected
    assert sampled([6, 0, 7, 3, 1, 5, 2, 4], 3) == expected
    for row in (2, 3):
        assert sampled([row], 1)[row] == expected[row]


def test_seeds_decide():
    model, prompts = tiny_model("gpt2", tied=False), some_prompts()

    def sampled(seed):
        return generate(model, prompts, SamplingParams(max_new_tokens=9), seeds=row_seeds(seed, 8))

    first = sampled(10)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    assert sampled(10) == first
    assert torch.equal(torch.random.get_rng_state(), before)  # the trainer's random state is not ours to move
    assert all(ours != theirs for ours, theirs in zip(sampled(20), first, strict=True))


def test_row_seeds_are_distinct_and_do_not_depend_on_the_number_of_rows():
    drawn = [seed for named in (0, 1, 10, 20) for seed in row_seeds(named, 500)]
    assert len(set(drawn)) == 2000
    assert row_seeds(10, 500)[:3] == row_seeds(10, 3)
    assert all(0 <= seed < 2**63 for seed in drawn)


PROMPT = [5, 9, 17]
DRAWS = 6000


def exact_distribution(model, temperature: float, top_p: float, top_k: int) -> list[float]:
    """As transformers and vLLM define it: temperature, then top-k, then top-p of what top-k has left."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPT])).logits[0, -1].double() / temperature
    weights = [math.exp(value) for value in (logits - logits.max()).tolist()]
    ranked = sorted(range(len(weights)), key=lambda token: -weights[token])[: top_k or None]
    whole = sum(weights[token] for token in ranked)
    kept, mass = [], 0.0
    for token in ranked:
        if mass >= top_p * whole:
            break
        kept.append(token)
        mass += weights[token]
    return [weights[token] / mass if token in kept else 0.0 for token in range(len(weights))]


def first_tokens(model, **settings) -> Counter:
    mixed_with = settings.pop("mixed_with", None)
    params = SamplingParams(max_new_tokens=1, **settings)
    prompts, seeds = [PROMPT] * DRAWS, row_seeds(4, DRAWS)
    drawn = generate(model, prompts, params, seeds=seeds, batch_size=1500, mixed_with=mixed_with)
    return Counter(token for (token,) in drawn)


def chi_square(counts: Counter, probabilities: list[float]) -> tuple[float, float]:
    """The statistic, and the bound that it passes once in 30,000 (Wilson and Hilferty); rare tokens are one class."""
    statistic, classes, rare = 0.0, 0, [0.0, 0.0]
    for token, probability in enumerate(probabilities):
        expected = DRAWS * probability
        if expected < 8:
            rare = [rare[0] + expected, rare[1] + counts[token]]
            continue
        statistic, classes = statistic + (counts[token] - expected) ** 2 / expected, classes + 1
    if rare[0] >= 8:
        statistic, classes = statistic + (rare[1] - rare[0]) ** 2 / rare[0], classes + 1
    freedom = classes - 1
    return statistic, freedom * (1 - 2 / (9 * freedom) + 4 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [
        (1.0, 1.0, 0),
        (0.7, 1.0, 0),
        (1.8, 1.0, 0),
        (1.0, 0.6, 0),
        (1.0, 1.0, 12),
        (1.4, 0.6, 30),
    ],
)
def test_sampled_tokens_have_the_exact_probabilities(temperature, top_p, top_k):
    model = tiny_model("llama", tied=False)
    expected = exact_distribution(model, temperature, top_p, top_k)
    counts = first_tokens(model, temperature=temperature, top_p=top_p, top_k=top_k)
    allowed = {token for token, probability in enumerate(expected) if probability > 0}
    assert set(counts) <= allowed
    assert len(allowed) >= 5
    if top_k:
        assert len(allowed) <= top_k
    statistic, bound = chi_square(counts, expected)
    assert statistic < bound
    statistic, bound = chi_square(counts, exact_distribution(model, 1.25 * temperature, top_p, top_k))
    assert statistic > bound  # there are draws enough to tell another temperature


@pytest.mark.slow
def test_one_token_to_choose_from_is_greedy():
    model, prompts = tiny_model("qwen2", tied=False), some_prompts()
    expected, seeds = greedy(model, prompts), row_seeds(3, 8)
    for settings in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-3}):
        assert generate(model, prompts, SamplingParams(max_new_tokens=LENGTH, **settings), seeds=seeds) == expected


def test_successive_tokens_and_rows_are_drawn_apart():
    """Of uniform logits: every pair of neighbouring steps, and of neighbouring rows, is equally likely."""
    model = tiny_model("gpt2", layers=1, tied=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    drawn = generate(model, [PROMPT] * 1500, SamplingParams(max_new_tokens=5), seeds=row_seeds(0, 1500), batch_size=750)
    quarters = torch.tensor(drawn) * 4 // VOCABULARY  # 25, 24, 24, 24 tokens
    share = torch.tensor([25, 24, 24, 24]) / VOCABULARY
    expected = torch.outer(share, share)
    for first, second in ((quarters[:, :-1], quarters[:, 1:]), (quarters[:-1], quarters[1:])):
        pairs = torch.bincount((4 * first + second).reshape(-1), minlength=16).view(4, 4)
        scaled = expected * first.numel()
        assert ((pairs - scaled) ** 2 / scaled).sum() < 46  # 15 degrees of freedom: once in 20,000


# ---------------------------------------------------------------------------------------------- modes, progress, errors


@pytest.mark.slow
def test_dropout_is_off_and_training_mode_comes_back():
    model, prompts = tiny_model("gpt2", tied=False, dropout=0.5).train(), some_prompts()
    assert greedy(model, prompts) == greedy(tiny_model("gpt2", tied=False), prompts)
    assert all(module.training for module in model.modules())
    evaluated = tiny_model("gpt2", tied=False)
    greedy(evaluated, prompts)
    assert not any(module.training for module in evaluated.modules())


def test_the_mode_comes_back_after_an_error():
    model = tiny_model("gpt2").train()

    def stop(rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, [[1]], SamplingParams(max_new_tokens=1, temperature=0), on_batch=stop)
    assert model.training
    with evaluating(model):
        assert not model.training
    assert model.training


@pytest.mark.usefixtures("own_engine")
def test_no_graph_is_kept():
    model, kept = tiny_model("llama").requires_grad_(True), []
    model.model.register_forward_hook(lambda module, args, output: kept.append(output.last_hidden_state.requires_grad))
    assert is_tried(model)
    kept.clear()
    greedy(model, some_prompts(2), length=2)
    assert kept == [False, False]
    assert torch.is_grad_enabled()


def test_progress_counts_finished_rows():
    seen = []
    params = SamplingParams(max_new_tokens=1, temperature=0)
    generate(tiny_model("gpt2"), some_prompts(), params, batch_size=3, on_batch=seen.append)
    assert seen == [3, 6, 8]


def test_no_prompts_no_responses():
    assert generate(tiny_model("gpt2"), [], SamplingParams(max_new_tokens=3), seeds=[]) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[1], []]}, "at least one token"),
        ({"params": SamplingParams(max_new_tokens=[3])}, r"one per prompt \(2\), got 1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seeds": None}, r"one seed per prompt \(2\), got None"),
        ({"seeds": [1]}, r"one seed per prompt \(2\), got 1"),
        ({"batch_size": 0, "seeds": None}, "batch_size .*; sampling needs"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {"prompts": [[1], [2, 3]], "params": SamplingParams(max_new_tokens=1), "seeds": [1, 2]} | change
    with pytest.raises(RequestError, match=f"Cannot generate: .*{message}"):
        generate(tiny_model("gpt2"), **arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": [3, 0]}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, r"temperature must be 0 \(greedy\) or more, got -0.1"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, "got 1.1"),
        ({"top_k": -1}, r"top_k must be 0 \(off\) or more, got -1"),
        ({"seed": -1, "top_k": -1}, "top_k .*; seed must be 0 or more, got -1"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(RequestError, match=f"Cannot decode: .*{message}"):
        Decoding(**settings)


@pytest.mark.slow
def test_a_limit_a_prompt_cuts_each_response_by_itself():
    model, prompts = tiny_model("llama"), some_prompts()
    settings = {"seeds": row_seeds(0, len(prompts)), "batch_size": 3}
    whole = generate(model, prompts, SamplingParams(max_new_tokens=9), **settings)
    limits = [1 + 4 * row % 9 for row in range(len(prompts))]
    cut = generate(model, prompts, SamplingParams(max_new_tokens=limits), **settings)
    assert cut == [response[:limit] for response, limit in zip(whole, limits, strict=True)]
