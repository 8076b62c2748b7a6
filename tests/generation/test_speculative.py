"""Responses that a student proposes and a teacher corrects, held to a loop that takes one token at a time."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from helpers.paper_loops import skd_distribution
from helpers.tiny import tiny_model
from promptkd.errors import RequestError
from promptkd.generation import Corrected, SamplingParams, generate, generate_corrected, row_seeds
from promptkd.generation.sampling import next_tokens, uniforms
from promptkd.responses import Speculation

PROMPTS = [[5, 9, 11, 2, 40, 7, 7, 30, 12, 1], [3], [5, 9, 4, 60], [8, 8], [30, 31, 32, 33, 34]]
SEEDS = row_seeds(5, len(PROMPTS))
STOPS = tuple(range(0, 97, 9))
PARAMS = SamplingParams(max_new_tokens=9, stop_ids=STOPS)


def pair(architecture="llama", **settings):
    student = tiny_model(architecture, layers=1, seed=1, **settings)
    return student, tiny_model(architecture, layers=2, seed=2, **settings)


def logits_behind(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[:, -1].float()


def one_by_one(student, teacher, prompt, judged, params, speculation, seed, absent=()):
    """The definition, without caches, blocks or batches."""
    (limit,) = params.limits(1)
    tokens, replaced = [], 0
    drawn, again = uniforms([seed], limit), uniforms([row_seeds(seed, 1)[0]], limit)
    of_teacher = SamplingParams(speculation.temperature, speculation.top_p)
    while len(tokens) < limit and not (tokens and tokens[-1] in params.stop_ids):
        step = len(tokens)
        mine, theirs = logits_behind(student, [*prompt, *tokens]), logits_behind(teacher, [*judged, *tokens])
        for each in (mine, theirs):
            each[:, [*absent, *params.masked_ids]] = -torch.inf
        token = int(next_tokens([(mine, 1.0)], params, None if params.is_greedy else drawn[:, step]))
        ranked = theirs[0].argsort(descending=True).tolist()
        if token not in ranked[: speculation.top_k]:
            token = int(next_tokens([(theirs, 1.0)], of_teacher, None if of_teacher.is_greedy else again[:, step]))
            replaced += 1
        tokens.append(token)
    return Corrected(tokens, replaced)


def all_one_by_one(student, teacher, params, speculation, judged=PROMPTS, **settings):
    rows = zip(PROMPTS, judged, SEEDS, strict=True)
    return [one_by_one(student, teacher, *row[:2], params, speculation, row[2], **settings) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("params", "speculation"),
    [
        (PARAMS, Speculation(top_k=30, block=4)),
        (PARAMS, Speculation(top_k=3, block=3, temperature=0.5, top_p=0.7)),
        (replace(PARAMS, temperature=1.5, top_p=0.8, top_k=20, masked_ids=(1, 2, 90)), Speculation(top_k=40, block=6)),
        (replace(PARAMS, temperature=0, stop_ids=(16,)), Speculation(top_k=15, block=8, temperature=0)),
    ],
)
def test_tokens_are_those_of_the_definition(params, speculation):
    student, teacher = pair()
    expected = all_one_by_one(student, teacher, params, speculation)
    found = generate_corrected(student, teacher, PROMPTS, params, speculation, seeds=SEEDS, batch_size=4)
    assert found == expected
    assert 0 < sum(each.replaced for each in found) < sum(len(each.token_ids) for each in found)


@pytest.mark.slow
def test_neither_the_block_nor_the_batch_matters(device):
    student, teacher = (each.to(device) for each in pair("gemma2"))
    found = []
    for block, batch in ((1, 5), (2, 1), (7, 3)):
        speculation = Speculation(top_k=20, block=block)
        found.append(generate_corrected(student, teacher, PROMPTS, PARAMS, speculation, seeds=SEEDS, batch_size=batch))
        order = [3, 0, 1, 4, 2]
        prompts, seeds = [PROMPTS[row] for row in order], [SEEDS[row] for row in order]
        others = generate_corrected(student, teacher, prompts, PARAMS, speculation, seeds=seeds, batch_size=batch)
        assert others == [found[-1][row] for row in order]
    assert found == found[:1] * 3
    assert len({len(each.token_ids) for each in found[0]}) > 1


@pytest.mark.parametrize("block", [1, 4])
def test_a_teacher_that_rejects_nothing_leaves_what_the_student_writes(block):
    student, teacher = pair()
    params = replace(PARAMS, temperature=0.8, top_p=0.9)
    found = generate_corrected(student, teacher, PROMPTS, params, Speculation(97, block), seeds=SEEDS)
    assert [each.token_ids for each in found] == generate(student, PROMPTS, params, seeds=SEEDS)
    assert {each.replaced for each in found} == {0}


@pytest.mark.slow
def test_a_sharp_teacher_that_takes_only_its_best_token_writes_alone():
    student, teacher = pair()
    with torch.no_grad():
        teacher.model.norm.weight.mul_(100)
    found = generate_corrected(student, teacher, PROMPTS, PARAMS, Speculation(1, 4), seeds=SEEDS)
    greedy = generate(teacher, PROMPTS, replace(PARAMS, temperature=0))
    assert [each.token_ids for each in found] == greedy
    assert sum(each.replaced for each in found) > 0.8 * sum(map(len, greedy))


@pytest.mark.slow
@pytest.mark.parametrize("block", [1, 3])
def test_the_teacher_may_read_other_prompts(block):
    student, teacher = pair()
    judged = [[*range(40, 40 + 3 * row), *prompt] for row, prompt in enumerate(PROMPTS)]
    speculation = Speculation(20, block)
    found = generate_corrected(student, teacher, PROMPTS, PARAMS, speculation, seeds=SEEDS, teacher_prompts=judged)
    assert found == all_one_by_one(student, teacher, PARAMS, speculation, judged)
    assert found != generate_corrected(student, teacher, PROMPTS, PARAMS, speculation, seeds=SEEDS)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_tokens_that_one_side_lacks_are_never_written(side):
    """By a bias of -inf in its head, as padding columns and tokens of one side have it."""
    student, teacher = pair(tied=False)
    absent = [0, 4, 11, 50, 96]
    head = (student if side == "student" else teacher).lm_head
    head.bias = torch.nn.Parameter(torch.zeros(97).index_fill(0, torch.tensor(absent), -torch.inf))
    speculation = Speculation(97 if side == "teacher" else 10, 4)
    found = generate_corrected(student, teacher, PROMPTS, PARAMS, speculation, seeds=SEEDS)
    assert found == all_one_by_one(student, teacher, PARAMS, speculation, absent=absent)
    assert not set(absent) & {token for each in found for token in each.token_ids}


def test_limits_are_those_of_each_row_and_padding_columns_are_not_written():
    student, teacher = pair(vocabulary=97 + 6)
    limits = [1, 2, 13, 4, 5]
    params = SamplingParams(max_new_tokens=limits, vocabulary=97)
    found = generate_corrected(student, teacher, PROMPTS, params, Speculation(25, 5), seeds=SEEDS, batch_size=4)
    assert [len(each.token_ids) for each in found] == limits
    assert max(token for each in found for token in each.token_ids) < 97


@pytest.mark.slow
def test_rows_may_fill_a_table_of_positions_to_its_end():
    """A block that goes beyond a row's limit needs positions, of which a model may have no more."""
    settings = {"layers": 1, "n_positions": 16}
    student, teacher = tiny_model("gpt2", seed=1, **settings), tiny_model("gpt2", seed=2, **settings)
    prompts, params = [[5] * 4, [9] * 2], SamplingParams(max_new_tokens=12)
    found = [
        generate_corrected(student, teacher, prompts, params, Speculation(60, block), seeds=[3, 4]) for block in (1, 8)
    ]
    assert found[0] == found[1]
    assert [len(each.token_ids) for each in found[0]] == [12, 12]


@pytest.mark.slow
def test_models_without_a_past_to_return_to_are_corrected_token_by_token(monkeypatch):
    teacher = tiny_model("llama", layers=2, seed=2)
    student = tiny_model("mamba", layers=1, seed=1)
    speculation = Speculation(40, 4)
    found = generate_corrected(student, teacher, PROMPTS, PARAMS, speculation, seeds=SEEDS)
    assert found == all_one_by_one(student, teacher, PARAMS, speculation)


@pytest.mark.slow
def test_the_reference_writes_the_same(monkeypatch):
    student, teacher = pair()
    found = generate_corrected(student, teacher, PROMPTS, PARAMS, Speculation(20, 4), seeds=SEEDS)
    monkeypatch.setenv("PROMPTKD_ENGINE", "reference")
    assert found == generate_corrected(student, teacher, PROMPTS, PARAMS, Speculation(20, 4), seeds=SEEDS)


WORDS, DRAWS, START = 5, 4000, [2, 0, 4]


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [1, 3])
def test_sequences_have_their_exact_probabilities(top_k):
    """Three tokens of five, 125 sequences: chi-square against the paper's definition, enumerated."""
    student, teacher = (
        tiny_model("llama", layers=layers, vocabulary=WORDS, seed=layers, tied=False, hidden=8, pad_token_id=0)
        for layers in (1, 2)
    )
    with torch.no_grad():
        for model in (student, teacher):
            model.lm_head.weight.mul_(1.5)
    expected, uncorrected = (chances(student, teacher, top=top) for top in (top_k, WORDS))
    params, seeds = SamplingParams(max_new_tokens=3), row_seeds(7, DRAWS)
    found = generate_corrected(
        student, teacher, [START] * DRAWS, params, Speculation(top_k, 3), seeds=seeds, batch_size=2000
    )
    counts = Counter(tuple(each.token_ids) for each in found)
    assert statistic(counts, expected) < 5
    assert statistic(counts, uncorrected) > 20  # there are draws enough to tell that something was corrected
    assert 0.05 < sum(each.replaced for each in found) / (3 * DRAWS) < 0.95


def chances(student, teacher, *, top):
    """The probability of every sequence of three tokens."""
    found = {(): 1.0}
    for _ in range(3):
        longer = {}
        for tokens, chance in found.items():
            both = (logits_behind(model, [*START, *tokens])[0].tolist() for model in (student, teacher))
            for token, share in enumerate(skd_distribution(*both, top=top)):
                longer[(*tokens, token)] = chance * share
        found = longer
    assert sum(found.values()) == pytest.approx(1)
    return found


def statistic(counts, expected):
    """Chi-square in deviations from its mean, of sequences that are expected eight times and more; the rest is one."""
    cells = [(DRAWS * chance, counts[tokens]) for tokens, chance in expected.items()]
    common = [cell for cell in cells if cell[0] >= 8]
    rest = [sum(values) for values in zip(*(cell for cell in cells if cell[0] < 8), strict=True)]
    if rest and rest[0] >= 8:
        common.append(tuple(rest))
    freedom = len(common) - 1
    assert freedom > 20
    value = sum((seen - due) ** 2 / due for due, seen in common)
    return (value - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": SEEDS[:2]}, r"one seed per prompt \(5\), got 2"),
        ({"teacher_prompts": PROMPTS[:3]}, r"teacher_prompts must hold one per prompt \(5\), got 3"),
        ({"teacher_prompts": [*PROMPTS[:4], []]}, "every teacher's prompt needs at least one token"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_wrong_requests(change, message):
    student, teacher = pair()
    with pytest.raises(RequestError, match=message):
        generate_corrected(student, teacher, PROMPTS, PARAMS, Speculation(), **{"seeds": SEEDS} | change)


def test_wrong_settings_are_told_together():
    with pytest.raises(RequestError, match=r"top_k .* got 0; block .* got 0; temperature .* got -1; top_p .* got 2"):
        Speculation(top_k=0, block=0, temperature=-1, top_p=2)


def test_no_prompts_no_responses():
    assert generate_corrected(*pair(), [], PARAMS, Speculation(), seeds=[]) == []
