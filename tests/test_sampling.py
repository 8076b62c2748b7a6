"""Which token is drawn, over vocabularies of several blocks: the plain cumulative sum in float64 is the reference."""

import math

import pytest
import torch

from promptkd.evaluation.sampling import Sampler

ROWS = 200
SIZES = (1, 2, 255, 256, 257, 511, 512, 700)  # of words: less than a block, a block, and a last one that is not whole


def logits(words: int, seed: int = 0) -> torch.Tensor:
    """(ROWS, words), two thirds of the words without any probability."""
    generator = torch.Generator().manual_seed(seed)
    drawn = 3 * torch.randn(ROWS, words, generator=generator)
    absent = torch.rand(ROWS, words, generator=generator) < 2 / 3
    absent[torch.arange(ROWS), torch.arange(ROWS) % words] = False
    return drawn.masked_fill(absent, -math.inf)


def by_the_plain_sum(probabilities: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    cumulative = probabilities.double().cumsum(-1)
    return torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True)[:, 0]


@pytest.mark.parametrize("words", SIZES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_word_at_which_the_cumulative_distribution_passes_u(words, temperature):
    given = logits(words)
    uniforms = torch.rand(ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    drawn = Sampler(temperature, 1.0, 0)([(given, 1.0)], uniforms)
    assert torch.equal(drawn, by_the_plain_sum((given / temperature).softmax(-1), uniforms))
    assert words == 1 or len(set(drawn.tolist())) > 1


@pytest.mark.parametrize("words", SIZES)
@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_give_a_word_that_there_is(words, u):
    given = logits(words)
    drawn = Sampler(1.0, 1.0, 0)([(given, 1.0)], torch.full((ROWS,), u, dtype=torch.float64))
    probabilities = given.softmax(-1)
    assert (probabilities.gather(-1, drawn[:, None]) > 0).all()
    present = probabilities > 0
    place = present.int().argmax(-1) if u == 0 else words - 1 - present.flip(-1).int().argmax(-1)
    assert torch.equal(drawn, place)


def test_the_border_between_two_blocks_never_gives_a_word_without_probability():
    """u at the very sum of the first block, and next to it: rounding must not fall on a word of probability 0."""
    given = torch.full((ROWS, 600), -math.inf)
    generator = torch.Generator().manual_seed(2)
    given[:, 40:200] = torch.randn(ROWS, 160, generator=generator)
    given[:, 300:500] = torch.randn(ROWS, 200, generator=generator)
    probabilities = given.softmax(-1)
    border = probabilities[:, :256].double().sum(-1) / probabilities.double().sum(-1)
    for step in (-1, 0, 1):
        uniforms = border + step * 2.0**-53
        drawn = Sampler(1.0, 1.0, 0)([(given, 1.0)], uniforms)
        assert (probabilities.gather(-1, drawn[:, None]) > 0).all()
        assert ((drawn == 199) | (drawn == 198) | (drawn >= 300)).all()


@pytest.mark.parametrize(("top_p", "top_k"), [(0.6, 0), (1.0, 5), (0.8, 9)])
def test_truncation_over_several_blocks(top_p, top_k):
    given = logits(700)
    uniforms = torch.rand(ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    drawn = Sampler(1.0, top_p, top_k)([(given, 1.0)], uniforms)
    for row in range(ROWS):
        ranked = given[row].softmax(-1).sort(descending=True)
        kept = ranked.indices[: top_k or None]
        mass = ranked.values[: len(kept)]
        kept = kept[mass.cumsum(-1) - mass < top_p * mass.sum()]
        assert int(drawn[row]) in kept.tolist()
