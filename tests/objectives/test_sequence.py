"""MiniLLM's and on-policy distillation's surrogates and DPKD's preference against sums over every response of a toy
language; DistiLLM-2's coefficients."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.paper_loops import distillm2_beta, distillm2_skew
from promptkd.data.batch import right_pad
from promptkd.objectives import reverse_kl
from promptkd.objectives.sequence import (
    ResponseLogProbs,
    contrast_weight,
    dpkd,
    minillm,
    on_policy_gradient,
    return_to_go,
    skew_coefficients,
)

WORDS, END, LONGEST = 3, 0, 3


class Toy:
    """A language model whose logits are a table: one row for every prefix without END."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        prefixes = [prefix for n in range(LONGEST) for prefix in itertools.product(range(1, WORDS), repeat=n)]
        self.logits = {
            prefix: (1.5 * torch.randn(WORDS, dtype=torch.float64, generator=generator)).requires_grad_()
            for prefix in prefixes
        }

    def table(self, response):
        """(T, V) logits along a response."""
        return torch.stack([self.logits[response[:t]] for t in range(len(response))])

    def log_probs(self, response):
        return self.table(response).log_softmax(-1)[range(len(response)), list(response)]


def responses():
    """Every response: it ends with END, or at the longest length."""
    for n in range(1, LONGEST + 1):
        for body in itertools.product(range(1, WORDS), repeat=n - 1):
            yield (*body, END)
    yield from itertools.product(range(1, WORDS), repeat=LONGEST)


def exact_gradient(student, teacher):
    total = sum(
        student.log_probs(y).sum().exp() * (student.log_probs(y).sum() - teacher.log_probs(y).sum())
        for y in responses()
    )
    return torch.autograd.grad(total, list(student.logits.values()))


def expected_gradient(student, teacher, share, **settings):
    """The surrogate's gradient, averaged over all responses by the probability with which they are sampled."""
    total = torch.zeros((), dtype=torch.float64)
    mass = 0.0
    for y in responses():
        log_q, log_p = student.log_probs(y)[None], teacher.log_probs(y)[None].detach()
        behavior = torch.log((1 - share) * log_q.detach().exp() + share * log_p.exp())
        single = reverse_kl(student.table(y), teacher.table(y).detach())[None]
        mask = torch.ones(1, len(y), dtype=torch.bool)
        values = minillm(log_q, log_p, single, mask, log_behavior=behavior if share else None, **settings)
        probability = behavior.sum().exp().detach()
        mass += float(probability)
        total = total + probability * values.sum()
    assert mass == pytest.approx(1.0)
    return torch.autograd.grad(total, list(student.logits.values()))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.7])
def test_the_surrogates_expected_gradient_is_that_of_the_sequence_level_reverse_kl(share):
    student, teacher = Toy(0), Toy(1)
    ours = expected_gradient(student, teacher, share, importance="product", length_normalization=False, clip_ratio=None)
    for mine, exact in zip(ours, exact_gradient(student, teacher), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-12)


def test_on_policy_the_token_weights_are_exact_too():
    student, teacher = Toy(0), Toy(1)
    ours = expected_gradient(student, teacher, 0.0, importance="token", length_normalization=False, clip_ratio=0.2)
    for mine, exact in zip(ours, exact_gradient(student, teacher), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-12)


def test_off_policy_the_token_weights_are_biased():
    """Or the test above could not tell the two apart."""
    student, teacher = Toy(0), Toy(1)
    ours = expected_gradient(student, teacher, 0.7, importance="token", length_normalization=False, clip_ratio=None)
    exact = exact_gradient(student, teacher)
    assert max(float((mine - other).abs().max()) for mine, other in zip(ours, exact, strict=True)) > 1e-3


def test_a_student_equal_to_its_teacher_has_no_gradient():
    student, teacher = Toy(0), Toy(0)
    for choices in ({"importance": "product"}, {"importance": "token"}, {"length_normalization": True}):
        for mine in expected_gradient(student, teacher, 0.0, **choices):
            assert float(mine.abs().max()) < 1e-12


def test_return_to_go_by_hand():
    cost = torch.tensor([[1.0, 2.0, 4.0, 8.0], [3.0, 5.0, 7.0, 9.0]])
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    assert return_to_go(cost, mask, normalize=False).tolist() == [[14.0, 12.0, 8.0, 0.0], [5.0, 0.0, 0.0, 0.0]]
    normalized = return_to_go(cost, mask, normalize=True)
    torch.testing.assert_close(normalized, torch.tensor([[14 / 3, 6.0, 8.0, 0.0], [5.0, 0.0, 0.0, 0.0]]))


def test_minillm_by_hand():
    """Two tokens; the second costs log(q/p) = log 2, and the first was twice as likely under the sampler."""
    log_q = torch.tensor([[math.log(0.2), math.log(0.5)]], requires_grad=True)
    log_p = torch.tensor([[math.log(0.2), math.log(0.25)]])
    behavior = torch.tensor([[math.log(0.4), math.log(0.5)]])
    single, mask = torch.tensor([[0.3, 0.4]]), torch.ones(1, 2, dtype=torch.bool)
    settings = {"log_behavior": behavior, "length_normalization": False}
    free = minillm(log_q, log_p, single, mask, importance="token", clip_ratio=None, **settings)
    torch.testing.assert_close(free, torch.tensor([[0.5 * 0.3 + 0.5 * math.log(2), 0.4]]))
    (gradient,) = torch.autograd.grad(free.sum(), log_q)
    torch.testing.assert_close(gradient, torch.tensor([[0.5 * math.log(2), 0.0]]))
    clipped = minillm(log_q, log_p, single, mask, importance="token", clip_ratio=0.2, **settings)
    torch.testing.assert_close(clipped, torch.tensor([[0.5 * 0.3 + 0.8 * math.log(2), 0.4]]))
    (gradient,) = torch.autograd.grad(clipped.sum(), log_q)
    torch.testing.assert_close(gradient, torch.zeros(1, 2))  # outside the clip, nothing more to learn


def test_padding_changes_nothing():
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    log_q, log_p, single = -random(2, 4).abs(), -random(2, 4).abs(), random(2, 4).abs()
    mask = torch.tensor([[True] * 4, [True] * 2 + [False] * 2])

    def wide(values, filler):
        return torch.cat([values, torch.full((2, 3), filler, dtype=values.dtype)], dim=1)

    for importance in ("token", "product", "none"):
        narrow = minillm(log_q, log_p, single, mask, log_behavior=log_p, importance=importance)
        padded = minillm(
            wide(log_q, -9.0),
            wide(log_p, -1.0),
            wide(single, 7.0),
            wide(mask, False),
            log_behavior=wide(log_p, -30.0),
            importance=importance,
        )
        torch.testing.assert_close(padded[:, :4], narrow)
        assert float(padded[:, 4:].abs().max()) == 0
        assert float(narrow[1, 2:].abs().max()) == 0


# The literal reference: one row, one token at a time, in Python floats. ----------------------------------------------


def loop_minillm(row, *, importance, length_normalization, clip_ratio):
    """Values of a row, and their sum's gradients by log q and by the single-step part."""
    n, values, by_log_q, by_single = len(row), [], [], []
    cost = [q - p for q, p, _, _ in row]
    weights = [1.0 if importance == "none" else math.exp(q - b) for q, _, _, b in row]
    for t in range(n):
        single, before = row[t][2], math.prod(weights[:t])
        if importance == "product":
            following = sum(cost[s] * math.prod(weights[: s + 1]) for s in range(t + 1, n))
            following /= (n - t - 1 or 1) if length_normalization else 1
            values.append(before * single)
            by_single.append(before)
            by_log_q.append(following)
            continue
        following = sum(cost[t + 1 :]) / ((n - t - 1 or 1) if length_normalization else 1)
        ratio = clipped = weights[t]
        if clip_ratio is not None:
            clipped = min(max(ratio, 1 - clip_ratio), 1 + clip_ratio)
        gain = max(ratio * following, clipped * following)
        values.append(weights[t] * single + gain)
        by_single.append(weights[t])
        by_log_q.append(ratio * following if gain == ratio * following and following != 0 else 0.0)
    return values, by_log_q, by_single


def loop_dpkd(chosen, rejected, *, beta, level, length_normalization):
    """The loss of a row from the differences log q - log p of its two responses."""
    if level == "token":
        losses = [math.log1p(math.exp(-beta * (c - r))) for c, r in zip(chosen, rejected, strict=False)]
        return sum(losses) / (len(losses) or 1) if length_normalization else sum(losses)
    scale = (len(chosen) or 1, len(rejected) or 1) if length_normalization else (1, 1)
    return math.log1p(math.exp(-beta * (sum(chosen) / scale[0] - sum(rejected) / scale[1])))


def ragged(lengths, seed, columns):
    """`columns` tensors (B, T) of values up to 2 below 0 and the mask; what lies under the padding is far off."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths, default=0)
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    made = [-2 * torch.rand(len(lengths), width, dtype=torch.float64, generator=generator) for _ in range(columns)]
    return [torch.where(mask, each, 50.0) for each in made], mask


LENGTHS = st.lists(st.integers(0, 4), min_size=1, max_size=3)


@pytest.mark.slow
@settings(deadline=None)
@given(
    lengths=LENGTHS,
    seed=st.integers(0, 999),
    importance=st.sampled_from(["token", "product", "none"]),
    length_normalization=st.booleans(),
    clip_ratio=st.none() | st.floats(0, 0.9),
)
def test_minillm_equals_the_double_loop_at_any_mask_and_coefficient(lengths, seed, **choices):
    (log_q, log_p, single, behavior), mask = ragged(lengths, seed, 4)
    log_q.requires_grad_()
    single = single.neg().requires_grad_()
    values = minillm(log_q, log_p, single, mask, log_behavior=behavior, **choices)
    assert float(values[~mask].abs().sum().detach()) == 0
    found = torch.autograd.grad(values.sum(), (log_q, single), materialize_grads=True)
    tables = [each.detach() for each in (log_q, log_p, single, behavior)]
    for row, length in enumerate(lengths):
        tokens = [tuple(float(each[row, t]) for each in tables) for t in range(length)]
        expected = loop_minillm(tokens, **choices)
        for mine, other in zip((values.detach(), *found), expected, strict=True):
            assert mine[row, :length].tolist() == pytest.approx(other, rel=1e-9, abs=1e-12)
            assert float(mine[row, length:].abs().sum()) == 0


@pytest.mark.slow
@settings(deadline=None)
@given(
    lengths=LENGTHS.flatmap(
        lambda own: st.tuples(st.just(own), st.lists(st.integers(0, 4), min_size=len(own), max_size=len(own)))
    ),
    seed=st.integers(0, 999),
    beta=st.just(0.0) | st.floats(1e-3, 5),
    level=st.sampled_from(["sequence", "token"]),
    length_normalization=st.booleans(),
)
def test_dpkd_equals_the_double_loop_at_any_mask_and_coefficient(lengths, seed, **choices):
    sides = [ragged(each, seed + index, 2) for index, each in enumerate(lengths)]
    values = dpkd(*(ResponseLogProbs(*tables, mask) for tables, mask in sides), **choices)
    for row, (own, other) in enumerate(zip(*lengths, strict=True)):
        differences = [(q - p)[row, :length].tolist() for ((q, p), _), length in zip(sides, (own, other), strict=True)]
        assert float(values[row]) == pytest.approx(loop_dpkd(*differences, **choices), rel=1e-9)


@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("length_normalization", [True, False])
def test_dpkds_gradients_equal_finite_differences(level, length_normalization):
    ((chosen_q, chosen_p), chosen_mask), ((rejected_q, rejected_p), rejected_mask) = (
        ragged([3, 1], 0, 2),
        ragged([2, 4], 1, 2),
    )
    for each in (chosen_q, rejected_q):
        each.requires_grad_()

    def loss(chosen, rejected):
        return dpkd(
            ResponseLogProbs(chosen, chosen_p, chosen_mask),
            ResponseLogProbs(rejected, rejected_p, rejected_mask),
            beta=0.7,
            level=level,
            length_normalization=length_normalization,
        )

    assert torch.autograd.gradcheck(loss, (chosen_q, rejected_q))


def test_float32_is_within_1e_5_of_float64():
    (log_q, log_p, single, behavior), mask = ragged([4, 2, 3], 0, 4)
    tables = [torch.where(mask, each.float(), 0.0) for each in (log_q, log_p, -single, behavior)]
    for importance in ("token", "product", "none"):
        ours, exact = (
            minillm(*made[:3], mask, log_behavior=made[3], importance=importance)
            for made in (tables, [each.double() for each in tables])
        )
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    for level in ("sequence", "token"):
        ours, exact = (
            dpkd(ResponseLogProbs(*made[:2], mask), ResponseLogProbs(*made[2:], mask), level=level)
            for made in (tables, [each.double() for each in tables])
        )
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


def test_extreme_log_probabilities_stay_finite():
    """Tokens that the student or the teacher holds for impossible, as far as float32 tells: logits of ±80."""
    log_q = torch.tensor([[-160.0, -1e-30, -80.0], [-1e-30, -160.0, -2.0]], requires_grad=True)
    log_p, behavior = torch.tensor([[-1e-30, -160.0, -3.0]] * 2), torch.tensor([[-1.6, -0.2, -1.0]] * 2)
    single, mask = torch.full((2, 3), 160.0), torch.tensor([[True] * 3, [True, True, False]])
    for importance in ("token", "product", "none"):
        total = minillm(log_q, log_p, single, mask, log_behavior=behavior, importance=importance).sum()
        assert torch.autograd.grad(total, log_q)[0].isfinite().all()
        assert total.isfinite()
    for level in ("sequence", "token"):
        chosen, rejected = ResponseLogProbs(log_q, log_p, mask), ResponseLogProbs(log_p, log_q.detach(), mask)
        total = dpkd(chosen, rejected, beta=1.0, level=level).sum()
        assert torch.autograd.grad(total, log_q)[0].isfinite().all()
        assert total.isfinite()


def test_dpkd_by_hand():
    chosen_q, chosen_p = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])  # differences 0.5, -1
    rejected_q, rejected_p = torch.tensor([[-3.0, -1.0, -1.0]]), torch.tensor([[-1.0, -1.0, -4.0]])  # -2, 0, 3
    arguments = (
        ResponseLogProbs(chosen_q, chosen_p, torch.ones(1, 2, dtype=torch.bool)),
        ResponseLogProbs(rejected_q, rejected_p, torch.ones(1, 3, dtype=torch.bool)),
    )

    def loss(x):
        return math.log1p(math.exp(-x))

    summed = dpkd(*arguments, beta=2.0, length_normalization=False)
    assert float(summed) == pytest.approx(loss(2 * (-0.5 - 1.0)))
    mean = dpkd(*arguments, beta=2.0)
    assert float(mean) == pytest.approx(loss(2 * (-0.25 - 1 / 3)))
    tokens = dpkd(*arguments, beta=2.0, level="token", length_normalization=False)
    assert float(tokens) == pytest.approx(loss(2 * 2.5) + loss(2 * -1.0))
    assert float(dpkd(*arguments, beta=0.0)) == pytest.approx(math.log(2))


def test_dpkd_raises_the_chosen_and_lowers_the_rejected():
    chosen = torch.zeros(1, 2, requires_grad=True)
    rejected = torch.zeros(1, 2, requires_grad=True)
    mask, reference = torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2)
    for level in ("sequence", "token"):
        sides = (ResponseLogProbs(each, reference, mask) for each in (chosen, rejected))
        loss = dpkd(*sides, level=level).sum()
        up, down = torch.autograd.grad(loss, (chosen, rejected))
        assert float(up.max()) < 0 < float(down.min())


def test_values_by_row():
    batch = right_pad([[1], [1, 2], [3]], [[4, 5, 6], [], [7]])
    table = batch.by_row(torch.tensor([10.0, 20.0, 30.0, 40.0]))
    assert table.tolist() == [[10.0, 20.0, 30.0], [0.0, 0.0, 0.0], [40.0, 0.0, 0.0]]


def test_unknown_choices_are_refused():
    zeros, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="Got 'tokens'"):
        minillm(zeros, zeros, zeros, mask, importance="tokens")
    with pytest.raises(ValueError, match="`level`"):
        dpkd(*[ResponseLogProbs(zeros, zeros, mask)] * 2, level="word")


# On-policy distillation ----------------------------------------------------------------------------------------------


def test_on_policy_the_expected_gradient_is_that_of_each_tokens_reverse_kl():
    """Over all responses by their probabilities: the exact gradient, less what a token does to those that follow."""
    student, teacher = Toy(0), Toy(1)
    sampled, exact = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for y in responses():
        probability = student.log_probs(y).sum().exp().detach()
        values = on_policy_gradient(student.log_probs(y), teacher.log_probs(y).detach())
        sampled = sampled + probability * values.sum()
        exact = exact + probability * reverse_kl(student.table(y), teacher.table(y).detach()).sum()
    tables = list(student.logits.values())
    ours, one_step = torch.autograd.grad(sampled, tables), torch.autograd.grad(exact, tables)
    for mine, other in zip(ours, one_step, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)
    whole = exact_gradient(student, teacher)
    assert max(float((mine - other).abs().max()) for mine, other in zip(ours, whole, strict=True)) > 1e-3


def test_on_policy_gradient_by_hand():
    """A token twice as likely under the student: A = -log 2, so that its log-probability falls."""
    log_q = torch.tensor([0.5, 0.25], dtype=torch.float64).log().requires_grad_()
    log_p = torch.tensor([0.25, 0.25], dtype=torch.float64).log().requires_grad_()
    values = on_policy_gradient(log_q, log_p)
    torch.testing.assert_close(values.detach(), torch.tensor([-(math.log(2) ** 2), 0.0], dtype=torch.float64))
    mine, teachers = torch.autograd.grad(values.sum(), (log_q, log_p), allow_unused=True)
    torch.testing.assert_close(mine, torch.tensor([math.log(2), 0.0], dtype=torch.float64))
    assert teachers is None


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-1e4, 0), st.floats(-1e4, 0)), max_size=6))
def test_on_policy_gradient_equals_a_loop(tokens):
    log_q = torch.tensor([q for q, _ in tokens], dtype=torch.float64, requires_grad=True)
    values = on_policy_gradient(log_q, torch.tensor([p for _, p in tokens], dtype=torch.float64))
    assert values.tolist() == pytest.approx([-(p - q) * q for q, p in tokens])
    (gradient,) = torch.autograd.grad(values.sum(), log_q)
    assert gradient.tolist() == pytest.approx([q - p for q, p in tokens])


# DistiLLM-2's coefficients -------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    sides=st.lists(st.tuples(st.floats(-8, 0), st.floats(-8, 0)), min_size=1, max_size=5),
    base=st.floats(0.02, 1),
    mean=st.floats(-0.5, 0.5),
)
def test_skew_coefficients_equal_the_loop(sides, base, mean):
    gap = torch.tensor([math.exp(p) - math.exp(q) for p, q in sides], dtype=torch.float64)
    expected = [distillm2_skew([p], [q], base=base, mean=mean) for p, q in sides]
    assert skew_coefficients(gap, mean, alpha=base).tolist() == pytest.approx(expected, rel=1e-9)


def test_skew_coefficients_by_hand():
    """The mean is 0.2: as far apart as that or further keeps α0, nearer falls at once to the least."""
    gap = torch.tensor([0.5, 0.2, 0.19, 0.1, 0.0, -0.1], dtype=torch.float64)
    found = skew_coefficients(gap, 0.2, alpha=0.1).tolist()
    assert found == pytest.approx([0.1, 0.1, 1 - 0.9 * 0.2 / 0.19001, 0.01, 0.01, 0.1], rel=1e-3)
    assert skew_coefficients(gap, 0.0, alpha=0.1).tolist() == [0.1] * 6  # no mean yet, or equal models
    assert skew_coefficients(gap, 0.2, alpha=0.001).tolist() == [0.001] * 6  # below the least, α0 alone


def test_the_weight_of_the_students_side_rises_in_the_first_half():
    steps = 8
    weights = [contrast_weight(step / steps) for step in range(steps)]
    assert weights == [1.0, 1.125, 1.25, 1.375, 1.5, 1.5, 1.5, 1.5]
    assert weights == [distillm2_beta(step, steps) for step in range(steps)]
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError, match="progress"):
            contrast_weight(wrong)
