"""What a soft prompt is made of: nearest tokens against a loop, and KL by position against a float64 one."""

import math

import numpy as np
import pytest
import torch

from helpers.tiny import TOKENS, VOCABULARY, tiny_model, tiny_tokenizer
from helpers.trainers import rows
from minimal_loop import kl, response_log_probs
from promptkd.evaluation import Scoring
from promptkd.evaluation.prompt_explanation import (
    Start,
    explained_vectors,
    kl_by_position,
    nearest_tokens,
    position_curve,
    random_cosine,
    token_text,
)
from promptkd.models import SoftPrompt
from promptkd.models.soft_prompt import start_tokens


def literal_cosines(vector, embeddings):
    return [
        sum(a * b for a, b in zip(vector, row, strict=True)) / (math.hypot(*vector) * math.hypot(*row))
        for row in embeddings
    ]


@pytest.mark.parametrize("architecture", ["llama", "gemma"])  # the latter scales its embeddings
def test_nearest_tokens_are_those_of_a_loop(architecture):
    model = tiny_model(architecture, hidden=16)
    vectors = torch.randn(3, 16, generator=torch.Generator().manual_seed(4))
    cosines, ids = nearest_tokens(vectors, model, VOCABULARY - 2, 5)
    embeddings = model.get_input_embeddings().weight.detach().double().tolist()[: VOCABULARY - 2]
    for at, vector in enumerate(vectors.double().tolist()):
        own = literal_cosines(vector, embeddings)
        best = sorted(range(len(own)), key=lambda index: -own[index])[:5]
        assert ids[at].tolist() == best
        assert cosines[at].tolist() == pytest.approx([own[index] for index in best], abs=1e-6)


def test_tokens_that_the_model_has_no_embedding_of_are_left_out():
    model = tiny_model("llama", hidden=16)
    vectors = torch.randn(2, 16, generator=torch.Generator().manual_seed(4))
    for more, fewer in zip(*(nearest_tokens(vectors, model, VOCABULARY + extra, 5) for extra in (3, 0)), strict=True):
        assert torch.equal(more, fewer)
    assert random_cosine(model, 16, VOCABULARY + 3) == random_cosine(model, 16, VOCABULARY)


def test_a_planted_vector_is_found_with_cosine_one():
    model, tokenizer = tiny_model("gemma", hidden=16), tiny_tokenizer()
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        planted = 3 * embedding(torch.tensor([40]))  # as the first layer reads it, and longer
        start = Start(embedding(torch.tensor([7])), [7])
    explained = explained_vectors(planted, model, tokenizer, VOCABULARY, folder="prompt", start=start)
    (vector,) = explained.vectors
    assert (vector.nearest[0].id, vector.nearest[0].token) == (40, TOKENS[40])
    assert vector.nearest[0].cosine == pytest.approx(1, abs=1e-6)
    assert vector.start == TOKENS[7]
    assert vector.norm == explained.norm == pytest.approx(float(planted.norm()))
    assert vector.distance == explained.distance == pytest.approx(float((planted - start.vectors).norm()))
    assert vector.cosine_with_start == pytest.approx(float(torch.cosine_similarity(planted, start.vectors)))


def test_an_unknown_start_leaves_its_numbers_out():
    explained = explained_vectors(torch.ones(2, 16), tiny_model(), tiny_tokenizer(), VOCABULARY, folder="prompt")
    assert explained.distance is None
    assert [(each.start, each.distance, each.cosine_with_start) for each in explained.vectors] == [(None,) * 3] * 2


def test_an_embedding_of_zeros_is_near_nothing():
    model = tiny_model(hidden=16)
    with torch.no_grad():
        model.get_input_embeddings().weight[:] = 0
    assert nearest_tokens(torch.ones(1, 16), model, VOCABULARY, 1)[0].item() == 0


def test_random_directions_are_a_baseline_of_width_and_vocabulary():
    wide, narrow = (random_cosine(tiny_model(hidden=width), width, VOCABULARY) for width in (256, 16))
    assert 0.1 < wide < 0.35 < 0.5 < narrow < 0.9
    assert random_cosine(tiny_model(hidden=16), 16, 10) < narrow  # fewer tokens, none as near


@pytest.mark.parametrize(("start", "ids"), [("text", 7), ("padding", 7), ("random", 0)])
def test_start_tokens_are_those_that_the_prompt_is_made_of(start, ids):
    model, tokenizer = tiny_model(hidden=16), tiny_tokenizer()
    found = start_tokens(tokenizer, length=7, start=start, text="the an")
    assert len(found) == ids
    made = SoftPrompt.create(model, tokenizer, length=7, start=start, text="the an")
    if ids:
        assert torch.equal(made.start, model.get_input_embeddings().weight.detach()[found])


class Pieces:
    """A tokenizer of three tokens: with SentencePiece's space, in a byte alone, and plain."""

    names = ("▁the", "<0xE2>", "an")

    def convert_ids_to_tokens(self, index):
        return self.names[index]

    def decode(self, ids):
        return ("the", "\ufffd", "an")[ids[0]]


def test_a_token_is_shown_with_its_space_and_a_part_of_a_letter_by_its_name():
    assert [token_text(Pieces(), index) for index in range(3)] == [" the", "<0xE2>", "an"]


def test_positions_are_means_over_the_rows_that_reach_them():
    lengths = [1, 3, 40, 70]
    values = [np.arange(1, length + 1, dtype=np.float64) * (row + 1) for row, length in enumerate(lengths)]
    curve = position_curve(values)
    assert [(each.first, each.last) for each in curve.positions] == [
        *((t, t) for t in range(1, 33)),
        (33, 64),
        (65, 70),
    ]
    for mean in [*curve.positions, curve.whole]:
        held = [value for each in values for value in each[mean.first - 1 : mean.last]]
        assert mean.value == pytest.approx(sum(held) / len(held))
        assert mean.rows == sum(len(each) >= mean.first for each in values)
    assert (curve.whole.first, curve.whole.last) == (1, 70)
    assert curve.positions[0].low is not None
    assert curve.positions[-1].low is None  # of one row


@pytest.mark.parametrize("with_contexts", [False, True])
def test_kl_by_position_equals_a_loop_in_float64(float64_inside, with_contexts):
    student = tiny_model("llama", layers=2, hidden=16, seed=1, dtype=torch.float64)
    teacher = tiny_model("llama", layers=3, hidden=24, seed=2, dtype=torch.float64)
    examples = rows(5).examples
    soft_prompt = torch.randn(3, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    prompts, samples = [row.prompt_ids for row in examples], [row.response_ids for row in examples]
    contexts = [[9, 8, 7, *prompt] if with_contexts and at != 2 else None for at, prompt in enumerate(prompts)]
    scoring = Scoring(soft_prompt, VOCABULARY, contexts=contexts if with_contexts else None)
    found = kl_by_position(student, teacher, prompts, samples, scoring)
    sums: dict[tuple[str, int], list[float]] = {}
    with torch.no_grad():
        for prompt, context, sample in zip(prompts, contexts, samples, strict=True):
            prompted = response_log_probs(teacher, context or prompt, sample, soft_prompt)
            plain = response_log_probs(teacher, context or prompt, sample)
            own = response_log_probs(student, prompt, sample)
            pairs = {
                "prompted_to_plain": (prompted, plain),
                "prompted_to_student": (prompted, own),
                "plain_to_student": (plain, own),
            }
            for name, (p, q) in pairs.items():
                for position in range(len(sample)):
                    sums.setdefault((name, position + 1), []).append(float(kl(p[position], q[position])))
    assert {name: len(curve.positions) for name, curve in found.items()} == dict.fromkeys(pairs, max(map(len, samples)))
    for (name, position), values in sums.items():
        mean = found[name].positions[position - 1]
        assert mean.value == pytest.approx(sum(values) / len(values), rel=1e-9)
        assert mean.rows == len(values)
