"""ExAccErr: a literal double loop, every continuation enumerated, samplers that agree, and errors that compound."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from helpers.tiny import VOCABULARY, tiny_model, tiny_tokenizer
from helpers.trainers import pair
from promptkd.engine import head_logits
from promptkd.errors import PromptKDError, RequestError
from promptkd.evaluation import Bootstrap, ExposureBias, Scoring, exposure_bias, sample_continuations
from promptkd.evaluation.accumulated_error import excess_accumulated_error
from promptkd.evaluation.exposure_bias import token_errors
from promptkd.generation import Decoding, SamplingParams, generate, row_seeds
from promptkd.models import SoftPrompt

STOP = 3


def errors(*rows):
    return [[np.array(draw, dtype=float) for draw in row] for row in rows]


def values(points):
    return [point.value for point in points]


# -------------------------------------------------------------------------------------------------- given continuations


def some_requests() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in (3, 1, 8, 5)]


def some_samples(seed: int, draws: int) -> list[list[list[int]]]:
    """Of 1 to 6 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def one() -> list[int]:
        length = int(torch.randint(1, 7, (), generator=generator))
        return torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()

    return [[one() for _ in range(draws)] for _ in some_requests()]


def literal_log_probs(model, ids, prompt, vocabulary):
    """Log-probabilities behind `ids`, a row of its own without padding, as a list of floats."""
    with torch.no_grad():
        embedded = model.get_input_embeddings()(torch.tensor([ids]))
        if prompt is not None:
            embedded = torch.cat([prompt[None].to(embedded.dtype), embedded], dim=1)
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0, -1, :vocabulary].tolist()
    highest = max(logits)
    total = highest + math.log(math.fsum(math.exp(each - highest) for each in logits))
    return [each - total for each in logits]


def literal_error(student, teacher, ids, prompt=None, vocabulary=None):
    q, p = literal_log_probs(student, ids, None, vocabulary), literal_log_probs(teacher, ids, prompt, vocabulary)
    return math.fsum(math.exp(log_p) * (log_p - log_q) for log_p, log_q in zip(p, q, strict=True))


def literal_curve(student_errors, teacher_errors, ended):
    """The definition as two loops; errors[row][draw][token]."""
    curve, accumulated_student, accumulated_teacher = [], 0.0, 0.0
    longest = max(len(draw) for side in (student_errors, teacher_errors) for row in side for draw in row)
    for place in range(longest):
        means = []
        for side in (student_errors, teacher_errors):
            if ended == "leave":
                here = [draw[place] for row in side for draw in row if len(draw) > place]
            else:
                here = []
                for row in side:
                    going = [draw[place] for draw in row if len(draw) > place]
                    here.append(math.fsum(going) / len(going) if going else 0.0)
            means.append(math.fsum(here) / len(here) if here else math.nan)
        accumulated_student += means[0]
        accumulated_teacher += means[1]
        value = 100 * (accumulated_student - accumulated_teacher) / accumulated_teacher
        curve.append(None if math.isnan(value) else value)
    return curve


@pytest.mark.slow
@pytest.mark.parametrize("ended", ["leave", "zero"])
@pytest.mark.parametrize("prompted", [False, True])
def test_it_equals_a_literal_double_loop(ended, prompted):
    """Padded heads, continuations of many lengths, more of them the student's than the teacher's."""
    vocabulary, requests = 90, some_requests()
    student, teacher = pair(torch.float64)
    prompt = SoftPrompt.create(teacher, tiny_tokenizer(), length=4, start="random")().detach() if prompted else None
    mine, theirs = some_samples(1, 3), some_samples(2, 2)

    def literal(samples):
        return [
            [
                [
                    literal_error(student, teacher, request + draw[:place], prompt, vocabulary)
                    for place in range(len(draw))
                ]
                for draw in row
            ]
            for request, row in zip(requests, samples, strict=True)
        ]

    on_student, on_teacher = literal(mine), literal(theirs)
    got = exposure_bias(
        student, teacher, requests, mine, theirs, Scoring(prompt, vocabulary, batch_size=5), ended=ended
    )
    assert [point.x for point in got.points] == list(range(1, 7))
    assert values(got.points) == pytest.approx(literal_curve(on_student, on_teacher, ended), rel=1e-9, abs=1e-9)
    for metric, side in ((got.on_student, on_student), (got.on_teacher, on_teacher)):
        every = [each for row in side for draw in row for each in draw]
        assert metric.value == pytest.approx(math.fsum(every) / len(every), rel=1e-9)


def test_numbers_worked_out_by_hand():
    """r = 1, 3 (one of two rows left), 5 and e = 1, 1, 2: R = 1, 4, 9 against 1, 2, 4."""
    on_student, on_teacher = errors([[1, 3, 5]], [[1]]), errors([[2, 1, 2]], [[0, 1]])
    assert values(excess_accumulated_error(on_student, on_teacher)) == pytest.approx([0, 100, 125])
    # with zeros r = 1, 1.5, 2.5 and e = 1, 1, 1: R = 1, 2.5, 5 against 1, 2, 3
    zero = excess_accumulated_error(on_student, on_teacher, ended="zero")
    assert values(zero) == pytest.approx([0, 25, 200 / 3])


def test_a_row_with_more_continuations_left_weighs_more():
    """Each continuation counts alike: (1 + 1 + 4) / 3, not the mean of 1 and 4."""
    on_student, on_teacher = errors([[0, 1], [0, 1]], [[0, 4], [0]]), errors([[1, 1]], [[1, 1]])
    assert values(excess_accumulated_error(on_student, on_teacher)) == pytest.approx([-100, 0])


def test_the_first_token_counts_and_gives_zero():
    """Behind the request alone, both contexts are the same."""
    student, teacher = pair()
    got = exposure_bias(student, teacher, some_requests(), some_samples(1, 1), some_samples(2, 1))
    assert got.points[0].value == pytest.approx(0, abs=1e-3)
    assert got.points[0].rows == 4
    first = token_errors(student, teacher, [[5]], [[[7]]])
    assert first[0][0].tolist() == pytest.approx([literal_error(student, teacher, [5])], rel=1e-5)


def test_it_is_not_defined_where_nothing_reaches_or_nothing_errs():
    on_student, on_teacher = errors([[1, 1]], [[1]]), errors([[1, 1, 1]], [[1, 1]])
    points = excess_accumulated_error(on_student, on_teacher)
    assert values(points) == [0, 0, None]
    assert [point.rows for point in points] == [2, 1, 0]
    assert values(excess_accumulated_error(on_teacher, on_student)) == [0, 0, None]
    assert values(excess_accumulated_error(on_student, on_teacher, ended="zero")) == pytest.approx([0, -25, -40])
    assert values(excess_accumulated_error(errors([[1, 2]]), errors([[0, 1]]))) == [None, 200]
    model, samples = tiny_model(), some_samples(1, 1)
    same = exposure_bias(model, model, some_requests(), samples, some_samples(2, 1))
    assert set(values(same.points)) == {None}
    assert same.on_student.value == same.on_teacher.value == 0


def test_logits_are_held_for_few_tokens_at_a_time(monkeypatch):
    student, teacher = pair()
    seen = []

    def noted(model, hidden, **settings):
        seen.append(len(hidden))
        return head_logits(model, hidden, **settings)

    monkeypatch.setattr("promptkd.evaluation.measure.head_logits", noted)
    samples = [[[each % 90 for each in range(100)]] * 2 for _ in range(4)]
    exposure_bias(student, teacher, some_requests(), samples, samples, Scoring(batch_size=8))
    assert sum(seen) == 2 * 2 * 800
    assert max(seen) == 256


# ------------------------------------------------------------------------------------------------------------ intervals


def test_intervals_draw_both_sides_of_a_row_together():
    """Rows differ a thousandfold, but the student errs twice as much as the teacher in each."""
    scale = 10.0 ** np.linspace(-1, 2, 20)
    on_teacher = errors(*([[each, each]] for each in scale))
    points = excess_accumulated_error(errors(*([[2 * each, 2 * each]] for each in scale)), on_teacher)
    for point in points:
        assert (point.value, point.low, point.high) == pytest.approx((100, 100, 100))
        assert point.rows == 20


def test_there_is_no_interval_of_one_row_or_where_resamples_miss_the_few_rows_that_reach():
    one = excess_accumulated_error(errors([[1, 2], [2, 2]]), errors([[1, 1]]))
    assert all(point.value is not None and point.low is None and point.high is None for point in one)
    few = errors([[1, 1]], *([[1 + each / 50]] for each in range(30)))
    points = excess_accumulated_error(few, errors(*([[1, 1]] for _ in range(31))))
    assert points[0].low < points[0].value < points[0].high
    assert points[1].value is not None
    assert points[1].low is points[1].high is None
    assert points[1].rows == 1


def test_equal_seeds_give_equal_intervals_and_resamples_in_blocks_too(monkeypatch):
    generator = np.random.default_rng(0)
    made = [errors(*([generator.gamma(2, size=4)] for _ in range(12))) for _ in range(2)]
    whole = excess_accumulated_error(*made, bootstrap=Bootstrap(500, seed=3))
    assert excess_accumulated_error(*made, bootstrap=Bootstrap(500, seed=4)) != whole
    monkeypatch.setattr("promptkd.evaluation.statistics._BLOCK", 100)
    assert excess_accumulated_error(*made, bootstrap=Bootstrap(500, seed=3)) == whole


@pytest.mark.slow
def test_intervals_hold_zero_as_often_as_they_say():
    """Simulated rows with effects of their own, both sides drawn alike, several draws that end at random."""
    generator = np.random.default_rng(1)
    trials, inside = 300, 0
    for _ in range(trials):
        effect = generator.gamma(4, 0.25, size=60)

        def side(effect=effect):
            return [
                [generator.gamma(1, each, size=min(8, generator.geometric(0.1))) for _ in range(2)] for each in effect
            ]

        point = excess_accumulated_error(side(), side(), bootstrap=Bootstrap(200))[5]
        inside += point.low <= 0 <= point.high
    assert 0.91 <= inside / trials <= 0.985


# ---------------------------------------------------------------------------------------- every continuation enumerated


NO_ROLES = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
"""For models of fewer tokens than the tests' tokenizer has."""


def four_words(seed: int) -> nn.Module:
    """Of four tokens, the last of which ends a continuation; every context has a distribution of its own."""
    return tiny_model("llama", layers=2, vocabulary=4, tied=False, seed=seed, **NO_ROLES)


REQUESTS = [[0, 1], [2]]
LENGTH = 4


def exact_means(sampler, student, teacher, draws):
    """Mean error at tokens 1 … LENGTH over every continuation of the requests, with its probability under `sampler`.

    `draws` None: over the continuations still going. Else with 0 for a row where all of so many draws have ended.
    """
    contexts = [[(tuple(request), 1.0)] for request in REQUESTS]
    means = []
    for _ in range(LENGTH):
        sums, shares = [], []
        for row, each in enumerate(contexts):
            sums.append(math.fsum(share * literal_error(student, teacher, list(ids)) for ids, share in each))
            shares.append(math.fsum(share for _, share in each))
            contexts[row] = [
                ((*ids, token), share * math.exp(log_p))
                for ids, share in each
                for token, log_p in enumerate(literal_log_probs(sampler, list(ids), None, None))
                if token != STOP
            ]
        if draws is None:
            means.append(math.fsum(sums) / math.fsum(shares))
        else:
            any_left = [1 - (1 - share) ** draws for share in shares]
            given_left = [total / share for total, share in zip(sums, shares, strict=True)]
            means.append(math.fsum(a * b for a, b in zip(any_left, given_left, strict=True)) / len(REQUESTS))
    return means


def drawn(model, rows: int, *, seed: int, draws: int = 60):
    prompts = [request for _ in range(rows // 2) for request in REQUESTS]
    decoding = Decoding(max_new_tokens=LENGTH, stop_ids=[STOP], batch_size=600, seed=seed)
    return prompts, sample_continuations(model, prompts, decoding, samples_per_row=draws)


@pytest.fixture(scope="module")
def enumerated():
    """Student and teacher, and the errors on continuations of each, the teacher's twice."""
    student, teacher = four_words(2), four_words(3)
    scored = []
    for sampler, seed in ((student, 100), (teacher, 300), (teacher, 500)):
        prompts, samples = drawn(sampler, 40, seed=seed)
        scored.append(token_errors(student, teacher, prompts, samples, Scoring(batch_size=400)))
    return student, teacher, *scored


@pytest.mark.slow
@pytest.mark.parametrize("draws", [None, 1, 2])
def test_it_converges_to_the_expectation_over_every_continuation(enumerated, draws):
    """Over what is still going, however many draws a row has; with zeros for ended rows of one draw and of two."""
    student, teacher, *scored, _ = enumerated
    r, e = (exact_means(sampler, student, teacher, draws) for sampler in (student, teacher))
    exact = [100 * (math.fsum(r[:place]) / math.fsum(e[:place]) - 1) for place in range(1, LENGTH + 1)]
    size = draws or len(scored[0][0])
    mine, theirs = ([row[at : at + size] for row in each for at in range(0, len(row), size)] for each in scored)
    points = excess_accumulated_error(mine, theirs, ended="zero" if draws else "leave")
    assert exact[0] == pytest.approx(0)
    assert abs(exact[-1]) > 20
    assert len(points) == LENGTH
    for point, value in zip(points[1:], exact[1:], strict=True):
        width = point.high - point.low
        assert point.low - width / 2 < value < point.high + width / 2
        assert width < 0.5 * abs(exact[-1])


@pytest.mark.slow
def test_zero_lies_in_the_interval_when_the_sampler_is_the_teachers(enumerated):
    """The student's distribution errs as before, on contexts that come from where the teacher's come from."""
    _, _, mine, theirs, again = enumerated
    assert all(point.low <= 0 <= point.high for point in excess_accumulated_error(again, theirs)[1:])
    assert not any(point.low <= 0 <= point.high for point in excess_accumulated_error(mine, theirs)[1:])


# ------------------------------------------------------------------------------------------------------ teacher forcing


def markov(table: torch.Tensor) -> nn.Module:
    """A model whose next token depends on the last one alone, by the rows of `table`."""
    size = len(table)
    model = tiny_model("llama", layers=1, hidden=size, vocabulary=size, tied=False, **NO_ROLES)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight.copy_(table.log().T / size**0.5)  # the norm makes the one of a row √size
    return model


WORDS, RING = 60, 6


def ring() -> torch.Tensor:
    """Tokens 0 … 5 follow each other in a ring; from the others, which it never writes, the teacher turns back."""
    table = torch.full((WORDS, WORDS), 1e-7)
    for token in range(WORDS):
        if token < RING:
            table[token, :RING] = 0.02
        table[token, (token + 1) % RING] = 1
    return table / table.sum(-1, keepdim=True)


def accumulated(table: torch.Tensor, error: torch.Tensor, length: int) -> torch.Tensor:
    """Expected error over the first 1 … `length` tokens of a chain that starts anywhere in the ring."""
    share = torch.zeros(WORDS)
    share[:RING] = 1 / RING
    means = []
    for _ in range(length):
        means.append(share @ error)
        share = share @ table
    return torch.stack(means).cumsum(0)


@pytest.mark.slow
def test_it_grows_with_the_length_for_a_student_trained_on_the_teachers_continuations():
    """Teacher forcing never shows what is beside the ring: the student slips off it and does not find back."""
    length, prompts = 24, [[row % RING] for row in range(48)]
    settings = {"max_new_tokens": length, "stop_ids": []}
    teacher, student = markov(ring()), markov(torch.full((WORDS, WORDS), 1 / WORDS))
    shown = generate(teacher, prompts, SamplingParams(**settings), seeds=row_seeds(1, 48))
    rows = torch.tensor([[*prompt, *response] for prompt, response in zip(prompts, shown, strict=True)])
    optimizer = torch.optim.Adam([student.lm_head.weight], lr=0.02)
    for _ in range(20):
        logits = student(rows).logits[:, :-1]
        nn.functional.cross_entropy(logits.reshape(-1, WORDS), rows[:, 1:].reshape(-1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    decoding = Decoding(batch_size=144, **settings)
    mine, theirs = (sample_continuations(each, prompts, decoding, samples_per_row=3) for each in (student, teacher))
    points = exposure_bias(student, teacher, prompts, mine, theirs, Scoring(batch_size=48)).points

    with torch.no_grad():
        p, q = (model(torch.arange(WORDS)[:, None]).logits[:, 0].softmax(-1) for model in (teacher, student))
    torch.testing.assert_close(p, ring())
    error = (p * (p.log() - q.log())).sum(-1)
    exact = (100 * (accumulated(q, error, length) / accumulated(p, error, length) - 1)).tolist()
    curve = [points[place - 1] for place in (1, 3, 6, 12, 24)]
    assert [point.value for point in curve] == pytest.approx([exact[int(point.x) - 1] for point in curve], rel=0.2)
    assert all(longer.low > shorter.value + 50 for shorter, longer in pairwise(curve))


# --------------------------------------------------------------------------------------------- sampling and wrong input


def test_a_draw_has_the_seed_that_its_row_has_in_evaluate():
    model, requests = tiny_model("llama", tied=False), some_requests()
    settings = {"max_new_tokens": 5, "stop_ids": [1, 2, 3]}
    samples = sample_continuations(model, requests, Decoding(**settings, seed=4), samples_per_row=3, rows=[0, 2, 3, 7])
    for draw in range(3):
        seeds = [row_seeds(4 + draw, 8)[row] for row in (0, 2, 3, 7)]
        assert [row[draw] for row in samples] == generate(model, requests, SamplingParams(**settings), seeds=seeds)
    assert len({tuple(draw) for row in samples for draw in row}) > 6


def test_progress_counts_the_continuations_of_both():
    student, teacher = pair()
    seen = []
    got = exposure_bias(
        student,
        teacher,
        some_requests(),
        some_samples(1, 2),
        some_samples(2, 1),
        Scoring(batch_size=5, on_batch=seen.append),
    )
    assert isinstance(got, ExposureBias)
    assert seen == [5, 10, 12]


def test_a_kl_that_is_not_finite_fails_the_run():
    student, teacher = pair()
    with torch.no_grad():
        student.lm_head.weight.fill_(math.nan)
    with pytest.raises(PromptKDError, match="not finite in row"):
        exposure_bias(student, teacher, some_requests(), some_samples(1, 1), some_samples(2, 1))


def test_wrong_arguments_are_refused():
    student, teacher = pair()
    with pytest.raises(RequestError, match="Got 4 requests, 3 and 4"):
        exposure_bias(student, teacher, some_requests(), some_samples(1, 1)[:3], some_samples(2, 1))
    with pytest.raises(RequestError, match="Got 0 rows of the student and 1 of the teacher"):
        excess_accumulated_error([], errors([[1]]))
    with pytest.raises(RequestError, match="none of the teacher in row 1"):
        excess_accumulated_error(errors([[1]], [[1]]), errors([[1]], []))
    with pytest.raises(RequestError, match="one of leave, zero"):
        excess_accumulated_error(errors([[1]]), errors([[1]]), ended="drop")
