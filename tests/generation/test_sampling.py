"""Which token is drawn: against the plain cumulative sum in float64, and, for every loop, the exact distribution.

The loops: promptkd's by every decoder of the CPU engine and by the reference, the trainer's rollout by that loop, and
the trainer's rollout by transformers' `generate` through TRL. vLLM runs on GPUs alone and is not here.
"""

import math

import pytest
import torch
from transformers import GenerationConfig

from helpers.tiny import END_ID, VOCABULARY, tiny_model, tiny_tokenizer
from helpers.trainers import rows, trainer
from promptkd.engine import Vocabulary
from promptkd.evaluation.exposure_bias import sample_continuations
from promptkd.evaluation.measure import Decoding, decode_rows
from promptkd.generation import SamplingParams, generate, row_seeds
from promptkd.generation.sampling import next_tokens

ROWS = 200
SIZES = (1, 2, 255, 256, 257, 511, 512, 700)  # of words: less than a block, a block, and a last one that is not whole


def logits(words: int, seed: int = 0) -> torch.Tensor:
    """(ROWS, words), two thirds of the words without any probability."""
    generator = torch.Generator().manual_seed(seed)
    drawn = 3 * torch.randn(ROWS, words, generator=generator)
    absent = torch.rand(ROWS, words, generator=generator) < 2 / 3
    absent[torch.arange(ROWS), torch.arange(ROWS) % words] = False
    return drawn.masked_fill(absent, -math.inf)


def uniforms_of(seed: int, device: torch.device) -> torch.Tensor:
    return torch.rand(ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(device)


def by_the_plain_sum(probabilities: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    cumulative = probabilities.double().cumsum(-1)
    return torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True)[:, 0]


@pytest.mark.parametrize("words", SIZES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_word_at_which_the_cumulative_distribution_passes_u(words, temperature, device):
    given = logits(words).to(device)
    uniforms = uniforms_of(1, device)
    drawn = next_tokens([(given, 1.0)], SamplingParams(temperature), uniforms)
    assert torch.equal(drawn, by_the_plain_sum((given / temperature).softmax(-1), uniforms))
    assert words == 1 or len(set(drawn.tolist())) > 1


@pytest.mark.parametrize("words", SIZES)
@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_give_a_word_that_there_is(words, u, device):
    given = logits(words).to(device)
    drawn = next_tokens([(given, 1.0)], SamplingParams(), torch.full((ROWS,), u, dtype=torch.float64, device=device))
    probabilities = given.softmax(-1)
    assert (probabilities.gather(-1, drawn[:, None]) > 0).all()
    present = probabilities > 0
    place = present.int().argmax(-1) if u == 0 else words - 1 - present.flip(-1).int().argmax(-1)
    assert torch.equal(drawn, place)


def test_the_border_between_two_blocks_never_gives_a_word_without_probability(device):
    """u at the very sum of the first block, and next to it: rounding must not fall on a word of probability 0."""
    given = torch.full((ROWS, 600), -math.inf)
    generator = torch.Generator().manual_seed(2)
    given[:, 40:200] = torch.randn(ROWS, 160, generator=generator)
    given[:, 300:500] = torch.randn(ROWS, 200, generator=generator)
    given = given.to(device)
    probabilities = given.softmax(-1)
    border = probabilities[:, :256].double().sum(-1) / probabilities.double().sum(-1)
    for step in (-1, 0, 1):
        uniforms = border + step * 2.0**-53
        drawn = next_tokens([(given, 1.0)], SamplingParams(), uniforms)
        assert (probabilities.gather(-1, drawn[:, None]) > 0).all()
        assert ((drawn == 199) | (drawn == 198) | (drawn >= 300)).all()


@pytest.mark.parametrize(("top_p", "top_k"), [(0.6, 0), (1.0, 5), (0.8, 9)])
def test_truncation_over_several_blocks(top_p, top_k, device):
    given = logits(700).to(device)
    uniforms = uniforms_of(3, device)
    drawn = next_tokens([(given, 1.0)], SamplingParams(1.0, top_p, top_k), uniforms)
    for row in range(ROWS):
        ranked = given[row].softmax(-1).sort(descending=True)
        kept = ranked.indices[: top_k or None]
        mass = ranked.values[: len(kept)]
        kept = kept[mass.cumsum(-1) - mass < top_p * mass.sum()]
        assert int(drawn[row]) in kept.tolist()


# ------------------------------------------------------------------------------- loops, against exact distributions

DRAWS = 4000
PROMPT = [5, 9, 17]
UNLIKELY = 1e-4
"""A test fails below this p-value. With the fixed seeds below the outcome is the same at every run; anew drawn, one
run of this file in a thousand would fail by chance. Another temperature must fall far below it (`TELLS_APART`)."""
TELLS_APART = 1e-9
STEEP = 6
"""First tokens behind which the second one is tested apart; the others are one class a first token."""


def pairs(model, temperature=1.0):
    """(V, V) exact probabilities of the first two tokens behind the prompt, from float64 logits."""
    with torch.no_grad():
        words = model.config.vocab_size
        ids = torch.cat([torch.tensor([PROMPT]).expand(words, -1), torch.arange(words)[:, None]], dim=1)
        logits = model(input_ids=ids).logits.double() / temperature
    first, second = logits[0, len(PROMPT) - 1].softmax(-1), logits[:, len(PROMPT)].softmax(-1)
    return first[:, None] * second


def p_value(drawn, probabilities):
    """Of Pearson's chi-square over (first, second) tokens; classes that expect fewer than 8 draws are one."""
    counts = torch.zeros_like(probabilities)
    counts.index_put_(tuple(torch.tensor(drawn).T), torch.ones(len(drawn), dtype=torch.float64), accumulate=True)
    steep = probabilities.sum(-1).topk(STEEP).indices
    rest = torch.ones(len(probabilities), dtype=torch.bool)
    rest[steep] = False
    observed, expected = (
        torch.cat([each[steep].flatten(), each[rest].sum(-1)]) for each in (counts, len(drawn) * probabilities)
    )
    rare = expected < 8
    observed, expected = (torch.cat([each[~rare], each[rare].sum()[None]]) for each in (observed, expected))
    assert len(expected) > 20
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2, dtype=torch.float64), statistic / 2))


def our_loop(model, folder):
    return generate(
        model,
        [PROMPT] * DRAWS,
        SamplingParams(max_new_tokens=2),
        seeds=row_seeds(3, DRAWS),
        batch_size=1000,
    )


def our_modules(model, folder):
    """The same with the model's own layers: a hook is what fused ones would pass over."""
    model.model.norm.register_forward_hook(lambda module, inputs, output: None)
    return our_loop(model, folder)


def rollout(model, folder, **settings):
    """As the trainer samples the student's responses."""
    torch.manual_seed(5)
    teacher = tiny_model("llama", layers=1, seed=2, vocabulary=model.config.vocab_size)
    run = trainer(folder, models=(model, teacher), max_completion_length=2, generation_batch_size=1000, **settings)
    run.rollout.stop_ids = ()
    run.teacher.vocabulary = Vocabulary(model.config.vocab_size)  # the tokenizer has fewer tokens than the larger one
    run.rollout._generation.eos_token_id = run.rollout._generation.suppress_tokens = None
    torch.manual_seed(5)
    return run.rollout._sample([PROMPT] * DRAWS, run.model, None)


def transformers_rollout(model, folder):
    """The same by transformers' `generate`."""
    return rollout(model, folder, generation_kwargs={"renormalize_logits": True})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "warmer"),  # one block of the inverse CDF, and three; over more words the same draws tell less
    [(VOCABULARY, 1.2), (3 * 256 - 5, 1.5)],
)
@pytest.mark.parametrize(
    ("loop", "engine"),
    [(our_loop, ""), (our_modules, ""), (our_loop, "reference"), (rollout, ""), (transformers_rollout, "")],
)
def test_two_tokens_have_their_exact_probabilities(loop, engine, words, warmer, tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTKD_ENGINE", engine)
    model = tiny_model("llama", layers=2, vocabulary=words, seed=1, tied=False)
    exact, other = pairs(model), pairs(model, warmer)
    model.generation_config = GenerationConfig()
    drawn = loop(model, tmp_path)
    assert {len(each) for each in drawn} == {2}
    assert p_value(drawn, exact) > UNLIKELY
    assert p_value(drawn, other) < TELLS_APART


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_two_tokens_have_their_exact_probabilities_on_the_device(tmp_path):
    model = tiny_model("llama", layers=2, seed=1, tied=False)
    exact, other = pairs(model), pairs(model, 1.2)
    drawn = our_loop(model.to("cuda"), tmp_path)
    assert p_value(drawn, exact) > UNLIKELY
    assert p_value(drawn, other) < TELLS_APART


@pytest.mark.slow
def test_the_engines_of_the_commands_are_one():
    """What `evaluate`, `generate` and `exposure-bias` sample is, seed by seed, what the tested loop samples."""
    model, tokenizer = tiny_model("llama", tied=False), tiny_tokenizer()
    data = rows(6).examples
    prompts, settings = [row.prompt_ids for row in data], {"max_new_tokens": 7, "stop_ids": [END_ID]}
    seeds = [row_seeds(10 + draw, len(data)) for draw in range(2)]
    params = SamplingParams(vocabulary=VOCABULARY, **settings)
    direct = [generate(model, prompts, params, seeds=each) for each in seeds]
    measured = decode_rows(model, tokenizer, data, Decoding(**settings, seed=10))
    assert measured == direct[0]
    continued = sample_continuations(
        model, prompts, Decoding(vocabulary=VOCABULARY, **settings, seed=10), samples_per_row=2
    )
    assert continued == [list(each) for each in zip(*direct, strict=True)]
    assert direct[0] != direct[1]
