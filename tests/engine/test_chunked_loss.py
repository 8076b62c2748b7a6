"""The chunked losses against the plain objectives: values, gradients and metrics."""

import math
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from promptkd.engine import (
    Head,
    Vocabulary,
    chunked_cross_entropy,
    chunked_log_probs,
    chunked_objective,
    chunked_on_policy_gradient,
    chunked_prompt_loss,
    chunked_skew_kl,
    chunked_weighted,
    engine_for,
)
from promptkd.objectives import (
    Taid,
    Veto,
    adaptive_kl,
    alpha_beta,
    concrete_score,
    entropy_aware_kl,
    forward_kl,
    jensen_shannon,
    prompt_loss,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    todi,
    total_variation,
)
from promptkd.objectives.sequence import on_policy_gradient

TOKENS, STUDENT, TEACHER, WORDS = 13, 5, 7, 29
OBJECTIVES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": partial(jensen_shannon, beta=0.3),
    "skew_forward_kl": partial(skew_forward_kl, alpha=0.1),
    "skew_reverse_kl": partial(skew_reverse_kl, alpha=0.1),
    "total_variation": total_variation,
    "adaptive_kl": adaptive_kl,
    "taid": Taid(start=0.6),
    "veto": Veto(beta=0.7),
    "veto reverse": Veto(beta=0.7, direction="reverse"),
    "alpha_beta": partial(alpha_beta, alpha=0.2, beta=0.7),
    "entropy_aware_kl": partial(entropy_aware_kl, threshold=2.5),
    "todi": todi,
    "concrete_score": concrete_score,
}
WITH_CONSTANTS = ("adaptive_kl", "taid", "veto", "veto reverse", "todi", "concrete_score")  # for the gradient
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 2.5, "scale": 1.7, "bias": True},
}


def random(*shape, seed, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(device)


def logits(head, hidden):
    """softcap · tanh(scale · (W h + b) / softcap), in the precision that all of it has, by autograd."""
    products = hidden @ head.weight[: head.vocabulary_size].T
    if head.bias is not None:
        products = products + head.bias[: head.vocabulary_size]
    scaled = head.scale * products
    return scaled if head.softcap is None else head.softcap * torch.tanh(scaled / head.softcap)


def head(width, seed, *, words=WORDS, bias=False, scale=1.0, softcap=None, trained=False, device="cpu"):
    weight = random(words, width, seed=seed, device=device)
    offset = random(words, seed=seed + 1, device=device) if bias else None
    for each in (weight, offset):
        if each is not None and trained:
            each.requires_grad_()
    return Head(weight, offset, scale, softcap)


def gradients(total, *tensors):
    return torch.autograd.grad(total, [each for each in tensors if each is not None])


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradients_equal_the_plain_objective(name, kind, device):
    objective = OBJECTIVES[name]
    hidden = random(TOKENS, STUDENT, seed=0, device=device).requires_grad_()
    teacher_hidden = random(TOKENS, TEACHER, seed=1, device=device)
    student_head = head(STUDENT, 2, trained=True, **HEADS[kind], device=device)
    teacher_head = head(TEACHER, 4, **HEADS[kind], device=device)
    plain = objective(logits(student_head, hidden), logits(teacher_head, teacher_hidden)).sum()
    chunked = chunked_objective(objective, (hidden, student_head), (teacher_hidden, teacher_head), chunk=4)
    torch.testing.assert_close(chunked.total, plain, rtol=1e-12, atol=0)
    scaled = [total * 0.37 for total in (chunked.total, plain)]  # as the division by the tokens does
    ours = gradients(scaled[0], hidden, student_head.weight, student_head.bias)
    theirs = gradients(scaled[1], hidden, student_head.weight, student_head.bias)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(("student_direction", "plain_direction"), [("reverse", "reverse"), ("forward", "reverse")])
@pytest.mark.parametrize("weight", [0.0, 0.6])
def test_the_prompt_loss_equals_the_plain_one(weight, student_direction, plain_direction, kind, device):
    prompted = random(TOKENS, TEACHER, seed=0, device=device).requires_grad_()
    plain_hidden, student_hidden = (
        random(TOKENS, TEACHER, seed=1, device=device),
        random(TOKENS, STUDENT, seed=2, device=device),
    )
    teacher_head, student_head = head(TEACHER, 3, **HEADS[kind], device=device), head(STUDENT, 5, device=device)
    directions = {"student_direction": student_direction, "plain_direction": plain_direction}
    plain = prompt_loss(
        logits(teacher_head, prompted),
        logits(student_head, student_hidden),
        logits(teacher_head, plain_hidden),
        weight=weight,
        **directions,
    ).sum()
    chunked = chunked_prompt_loss(
        (prompted, teacher_head),
        (student_hidden, student_head),
        (plain_hidden, teacher_head) if weight else None,
        weight=weight,
        chunk=4,
        **directions,
    )
    torch.testing.assert_close(chunked.total, plain, rtol=1e-12, atol=0)
    terms = chunked.metrics["to_student"] + weight * chunked.metrics.get("to_plain", 0.0)
    torch.testing.assert_close(terms, plain.detach(), rtol=1e-12, atol=0)
    (ours,), (theirs,) = gradients(chunked.total, prompted), gradients(plain, prompted)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_equal_models_give_exactly_zero(device):
    hidden = random(TOKENS, STUDENT, seed=0, device=device).requires_grad_()
    same = head(STUDENT, 1, trained=True, device=device)
    for objective in (forward_kl, reverse_kl):
        loss = chunked_objective(objective, (hidden, same), (hidden.detach(), same), chunk=4)
        assert float(loss.total.detach()) == 0
        (gradient,) = gradients(loss.total, hidden)
        assert float(gradient.abs().max()) < 1e-12


def test_padded_heads_are_sliced_and_their_columns_get_no_gradient(device):
    hidden = random(TOKENS, STUDENT, seed=0, device=device).requires_grad_()
    teacher_hidden = random(TOKENS, TEACHER, seed=1, device=device)
    wide = head(STUDENT, 2, words=WORDS + 6, bias=True, trained=True, device=device)
    narrow = Head(wide.weight[:WORDS].detach(), wide.bias[:WORDS].detach())
    teacher_head = head(TEACHER, 4, device=device)
    ours = chunked_objective(reverse_kl, (hidden, wide.limited_to(WORDS)), (teacher_hidden, teacher_head), chunk=4)
    theirs = chunked_objective(reverse_kl, (hidden, narrow), (teacher_hidden, teacher_head), chunk=4)
    assert torch.equal(ours.total, theirs.total)
    (gradient,) = gradients(ours.total, wide.weight)
    assert gradient.shape == (WORDS + 6, STUDENT)
    assert float(gradient[WORDS:].abs().max()) == 0
    assert float(gradient[:WORDS].abs().max()) > 0


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_masked_tokens_are_as_if_their_columns_were_not_there(name, kind, device):
    masked = [0, 3, WORDS - 1]
    kept = [index for index in range(WORDS) if index not in masked]
    hidden = random(TOKENS, STUDENT, seed=0, device=device).requires_grad_()
    teacher_hidden = random(TOKENS, TEACHER, seed=1, device=device)
    student_head = head(STUDENT, 2, words=WORDS + 6, trained=True, **HEADS[kind], device=device)
    teacher_head = head(TEACHER, 4, **HEADS[kind], device=device)

    def narrow(whole):
        bias = None if whole.bias is None else whole.bias[kept]
        return Head(whole.weight[kept], bias, whole.scale, whole.softcap)

    vocabulary, totals = Vocabulary(WORDS, (*masked, WORDS + 2)), []
    limited = student_head.limited_to(vocabulary), teacher_head.limited_to(vocabulary)
    for mine, other in (limited, (narrow(student_head), narrow(teacher_head))):
        found = chunked_objective(OBJECTIVES[name], (hidden, mine), (teacher_hidden, other), chunk=4)
        totals.append((found.total, found.metrics["entropy"]))
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-12, atol=0)
    leaves = hidden, student_head.weight, student_head.bias
    ours, theirs = (gradients(total, *leaves) for total, _ in totals)
    assert float(ours[1][[*masked, WORDS + 2]].abs().max()) == 0
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_entropy_is_the_students(device):
    hidden, teacher_hidden = (
        random(TOKENS, STUDENT, seed=0, device=device),
        random(TOKENS, TEACHER, seed=1, device=device),
    )
    student_head, teacher_head = head(STUDENT, 2, device=device), head(TEACHER, 4, device=device)
    q = logits(student_head, hidden).softmax(-1)
    expected = -(q * q.log()).sum()
    for objective in OBJECTIVES.values():
        loss = chunked_objective(objective, (hidden, student_head), (teacher_hidden, teacher_head), chunk=5)
        torch.testing.assert_close(loss.metrics["entropy"], expected, rtol=1e-12, atol=0)


def test_no_tokens_give_zero_and_a_graph(device):
    hidden = torch.empty(0, STUDENT, dtype=torch.float64, device=device, requires_grad=True)
    student_head = head(STUDENT, 2, trained=True, device=device)
    loss = chunked_objective(
        reverse_kl,
        (hidden, student_head),
        (torch.empty(0, TEACHER, dtype=torch.float64, device=device), head(TEACHER, 4, device=device)),
    )
    assert float(loss.total.detach()) == 0
    loss.total.backward()
    assert float(student_head.weight.grad.abs().max()) == 0


class Shape(NamedTuple):
    """Sizes, and what the two heads are like."""

    tokens: int
    chunk: int
    words: int
    padding: int
    """Columns of the learner's head behind the shared words, sliced off."""
    widths: tuple[int, int]
    heads: tuple[dict, dict]
    absent: tuple[frozenset[int], frozenset[int]]
    """Columns whose bias is -inf; at least one column is left."""


@st.composite
def shapes(draw) -> Shape:
    words = draw(st.integers(1, 9))
    kept = draw(st.integers(0, words - 1))
    columns = st.frozensets(st.sampled_from([each for each in range(words) if each != kept] or [0]), max_size=3)
    absent = tuple(frozenset() if words == 1 else draw(st.just(frozenset()) | columns) for _ in range(2))
    kinds = st.fixed_dictionaries(
        {
            "bias": st.booleans(),
            "scale": st.sampled_from([1.0, 0.3, 1.7]),
            "softcap": st.sampled_from([None, None, 2.5, 30.0]),
        }
    )
    return Shape(
        tokens=draw(st.integers(0, 9)),
        chunk=draw(st.integers(1, 11)),
        words=words,
        padding=draw(st.integers(0, 3)),
        widths=(draw(st.integers(1, 4)), draw(st.integers(1, 4))),
        heads=(draw(kinds), draw(kinds)),
        absent=absent,
    )


def heads_of(shape: Shape, seed: int, device: torch.device) -> tuple[Head, Head]:
    """A learner's head as wide as its padding asks, trained, and the target's."""
    made = []
    for index, (width, kind, absent) in enumerate(zip(shape.widths, shape.heads, shape.absent, strict=True)):
        words = shape.words + (shape.padding if index == 0 else 0)
        each = head(width, seed + 10 * index, words=words, device=device, **kind)
        bias = (
            each.bias if each.bias is not None or not absent else torch.zeros(words, dtype=torch.float64, device=device)
        )
        if bias is not None:
            bias[sorted(absent)] = -math.inf
        if index == 0:
            each.weight.requires_grad_()
            bias = bias if bias is None else bias.requires_grad_()
        made.append(Head(each.weight, bias, each.scale, each.softcap))
    return made[0], made[1]


COEFFICIENT = st.sampled_from([0.0, 1.0]) | st.floats(1e-6, 1 - 1e-6)
ANY_OBJECTIVE = st.sampled_from([forward_kl, reverse_kl, total_variation]) | st.one_of(
    *(
        st.builds(partial, st.just(f), **{name: COEFFICIENT})
        for f, name in ((jensen_shannon, "beta"), (skew_forward_kl, "alpha"), (skew_reverse_kl, "alpha"))
    ),
    st.builds(partial, st.just(adaptive_kl), mu=COEFFICIENT),
)


@pytest.mark.slow
@settings(deadline=None)
@given(objective=ANY_OBJECTIVE, shape=shapes(), seed=st.integers(0, 999))
def test_any_objective_at_any_shape_equals_the_plain_one(objective, shape, seed, device):
    hidden = random(shape.tokens, shape.widths[0], seed=seed, device=device).requires_grad_()
    target_hidden = random(shape.tokens, shape.widths[1], seed=seed + 1, device=device)
    wide, target = heads_of(shape, seed + 2, device)
    learner = wide.limited_to(shape.words)
    student, teacher = logits(learner, hidden), logits(target, target_hidden)
    plain = objective(student, teacher).sum()
    chunked = chunked_objective(objective, (hidden, learner), (target_hidden, target), chunk=shape.chunk)
    torch.testing.assert_close(chunked.total, plain, rtol=1e-10, atol=1e-12)
    same_gradients(0.37 * chunked.total, 0.37 * plain, hidden, wide.weight, wide.bias)
    if shape.tokens:
        both = (student + teacher).detach() > -math.inf
        overlap = (student.argmax(-1) == teacher.argmax(-1)).sum()
        assert chunked.metrics["top_overlap"] == overlap
        log_q = student.detach().masked_fill(~both, -math.inf).log_softmax(-1)
        entropy = -torch.where(both, log_q.exp() * log_q, 0.0).sum()
        torch.testing.assert_close(chunked.metrics["entropy"], entropy, rtol=1e-10, atol=1e-12)


def label_log_probs(logits, labels):
    return logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def both_models(shape, seed, device):
    """What a chunked loss takes, its leaves, and the plain logits over the columns that both have."""
    hidden = random(shape.tokens, shape.widths[0], seed=seed, device=device).requires_grad_()
    target_hidden = random(shape.tokens, shape.widths[1], seed=seed + 1, device=device)
    wide, target = heads_of(shape, seed + 2, device)
    learner = wide.limited_to(shape.words)
    student, teacher = logits(learner, hidden), logits(target, target_hidden)
    missing = (student.detach() == -math.inf) | (teacher == -math.inf)
    plain = [each.masked_fill(missing, -math.inf) for each in (student, teacher)]
    return ((hidden, learner), (target_hidden, target)), (hidden, wide.weight, wide.bias), plain


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(shape=shapes(), seed=st.integers(0, 999))
def test_the_on_policy_gradient_at_any_shape_equals_the_plain_one(shape, seed, device):
    models, leaves, (student, teacher) = both_models(shape, seed, device)
    there = [each for each in range(shape.words) if each not in shape.absent[0] | shape.absent[1]]
    labels = torch.tensor([there[each % len(there)] for each in range(shape.tokens)], dtype=torch.long, device=device)
    log_q, log_p = label_log_probs(student, labels), label_log_probs(teacher, labels)
    found = chunked_log_probs(*models, labels, chunk=shape.chunk)
    for mine, other in zip(found, (log_q.detach(), log_p), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)
    chunked = chunked_on_policy_gradient(*models, labels, chunk=shape.chunk)
    plain = on_policy_gradient(log_q, log_p).sum()
    torch.testing.assert_close(chunked.total, plain, rtol=1e-10, atol=1e-12)
    same_gradients(0.37 * chunked.total, 0.37 * plain, *leaves)
    if shape.tokens:
        expected = chunked_objective(reverse_kl, *models, chunk=shape.chunk).metrics
        expected["sampled_kl"] = (log_q - log_p).detach().sum()
        assert chunked.metrics.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(chunked.metrics[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(shape=shapes(), seed=st.integers(0, 999))
def test_weighted_log_probabilities_and_kls_at_any_shape_equal_the_plain_ones(shape, seed, device):
    models, leaves, (student, teacher) = both_models(shape, seed, device)
    there = [each for each in range(shape.words) if each not in shape.absent[0] | shape.absent[1]]
    labels = torch.tensor([there[each % len(there)] for each in range(shape.tokens)], dtype=torch.long, device=device)
    weight, kl_weight = (random(shape.tokens, seed=seed + each, device=device) for each in (5, 6))
    chunked = chunked_weighted(models[0], labels, weight, models[1], kl_weight, chunk=shape.chunk)
    plain = (weight * label_log_probs(student, labels) + kl_weight * reverse_kl(student, teacher)).sum()
    torch.testing.assert_close(chunked.total, plain, rtol=1e-10, atol=1e-12)
    same_gradients(0.37 * chunked.total, 0.37 * plain, *leaves)
    alone = chunked_weighted(models[0], labels, weight, chunk=shape.chunk)
    plain = (weight * label_log_probs(logits(models[0][1], leaves[0]), labels)).sum()
    torch.testing.assert_close(alone.total, plain, rtol=1e-10, atol=1e-12)
    same_gradients(0.37 * alone.total, 0.37 * plain, *leaves)
    if shape.tokens:
        expected = chunked_objective(reverse_kl, *models, chunk=shape.chunk).metrics
        assert chunked.metrics.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(chunked.metrics[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(shape=shapes(), seed=st.integers(0, 999), skew=st.sampled_from(["forward", "reverse"]))
def test_skew_kls_with_coefficients_of_each_token_at_any_shape_equal_the_plain_ones(shape, seed, skew, device):
    models, leaves, both = both_models(shape, seed, device)
    alpha, weight = (random(shape.tokens, seed=seed + n, device=device).sigmoid() for n in (7, 8))
    chunked = chunked_skew_kl(skew, *models, alpha=alpha, weight=weight, chunk=shape.chunk)
    if skew == "forward":
        values = skew_forward_kl(*both, alpha=alpha)
    else:
        values = skew_reverse_kl(*both, alpha=alpha, constant_mixture=True)
    plain = (weight * values).sum()
    torch.testing.assert_close(chunked.total, plain, rtol=1e-10, atol=1e-12)
    same_gradients(0.37 * chunked.total, 0.37 * plain, *leaves)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    shape=shapes(),
    seed=st.integers(0, 999),
    weight=st.sampled_from([0.0, 1.0]) | st.floats(0, 3),
    directions=st.tuples(*[st.sampled_from(["reverse", "forward"])] * 2),
)
def test_the_prompt_loss_at_any_shape_equals_the_plain_one(shape, seed, weight, directions, device):
    """The prompted and the plain teacher share a head, whose padding and absent columns are the learner's."""
    prompted = random(shape.tokens, shape.widths[0], seed=seed, device=device).requires_grad_()
    plain_hidden = random(shape.tokens, shape.widths[0], seed=seed + 1, device=device)
    student_hidden = random(shape.tokens, shape.widths[1], seed=seed + 2, device=device)
    wide, student_head = heads_of(shape, seed + 3, device)
    teacher_head = wide.limited_to(shape.words)
    named = dict(zip(("student_direction", "plain_direction"), directions, strict=True))
    plain = prompt_loss(
        logits(teacher_head, prompted),
        logits(student_head, student_hidden),
        logits(teacher_head, plain_hidden),
        weight=weight,
        **named,
    ).sum()
    models = (prompted, teacher_head), (student_hidden, student_head), (plain_hidden, teacher_head) if weight else None
    chunked = chunked_prompt_loss(*models, weight=weight, chunk=shape.chunk, **named)
    torch.testing.assert_close(chunked.total, plain, rtol=1e-10, atol=1e-12)
    same_gradients(0.37 * chunked.total, 0.37 * plain, prompted)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(shape=shapes(), seed=st.integers(0, 999))
def test_the_cross_entropy_at_any_shape_equals_the_plain_one(shape, seed, device):
    hidden = random(shape.tokens, shape.widths[0], seed=seed, device=device).requires_grad_()
    wide, _ = heads_of(shape, seed + 1, device)
    learner = wide.limited_to(shape.words)
    there = [each for each in range(shape.words) if each not in shape.absent[0]]
    labels = torch.tensor([there[each % len(there)] for each in range(shape.tokens)], dtype=torch.long, device=device)
    student = logits(learner, hidden)
    plain = torch.nn.functional.cross_entropy(student, labels, reduction="sum")
    chunked = chunked_cross_entropy((hidden, learner), labels, chunk=shape.chunk)
    torch.testing.assert_close(chunked.total, plain, rtol=1e-10, atol=1e-12)
    same_gradients(0.37 * chunked.total, 0.37 * plain, hidden, wide.weight, wide.bias)
    if shape.tokens:
        log_q = student.detach().log_softmax(-1)
        entropy = -torch.where(log_q == -math.inf, 0.0, log_q.exp() * log_q).sum()
        torch.testing.assert_close(chunked.metrics["entropy"], entropy, rtol=1e-10, atol=1e-12)


def same_gradients(ours, theirs, *tensors):
    for mine, other in zip(gradients(ours, *tensors), gradients(theirs, *tensors), strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("kind", ["plain", "softcap"])
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in WITH_CONSTANTS])
def test_gradients_equal_finite_differences(name, kind, device):
    """Not of the adaptive KL, whose weights are constants for its gradient alone: it is held to the plain one above."""
    hidden, target_hidden = random(3, 2, seed=0, device=device).requires_grad_(), random(3, 4, seed=1, device=device)
    learner = head(2, 2, words=5, trained=True, **HEADS[kind], device=device)
    target = head(4, 4, words=5, **HEADS[kind], device=device)
    rest = [each for each in (learner.weight, learner.bias) if each is not None]

    def total(hidden, weight, bias=None):
        made = Head(weight, bias, learner.scale, learner.softcap)
        return chunked_objective(OBJECTIVES[name], (hidden, made), (target_hidden, target), chunk=2).total

    assert torch.autograd.gradcheck(total, (hidden, *rest), fast_mode=True)


@pytest.mark.parametrize("student_direction", ["reverse", "forward"])
@pytest.mark.parametrize("plain_direction", ["reverse", "forward"])
def test_the_prompts_gradient_equals_finite_differences(student_direction, plain_direction, device):
    teacher_head, student_head = (
        head(4, 3, words=5, **HEADS["softcap"], device=device),
        head(2, 5, words=5, device=device),
    )
    plain_hidden, student_hidden = random(3, 4, seed=1, device=device), random(3, 2, seed=2, device=device)

    def total(prompted):
        return chunked_prompt_loss(
            (prompted, teacher_head),
            (student_hidden, student_head),
            (plain_hidden, teacher_head),
            weight=0.6,
            student_direction=student_direction,
            plain_direction=plain_direction,
            chunk=2,
        ).total

    assert torch.autograd.gradcheck(total, (random(3, 4, seed=0, device=device).requires_grad_(),), fast_mode=True)


def extreme(dtype, device):
    """Logits of ±80 as the states of heads that pass them on; the teacher's last column is padding."""
    like = {"dtype": dtype, "device": device}
    student = torch.tensor([[80.0, -80, 0, 1], [-80, 80, 0, 1], [80, 80, -80, -80], [0, 0, 0, 0]], **like)
    teacher = torch.tensor([[-80.0, 80, 0, 1], [-80, 80, 0, 1], [-80, 80, 80, -80], [80, -80, -80, 80]], **like)
    weight = torch.eye(4, **like)
    padded = torch.tensor([0.0, 0.0, 0.0, -math.inf], **like)
    return student, Head(weight.clone(), torch.zeros(4, **like)), teacher, Head(weight.clone(), padded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [1, 3, 8])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_extreme_logits_and_a_padded_teacher_stay_finite_and_right(name, chunk, dtype, device):
    student, student_head, teacher, teacher_head = extreme(dtype, device)
    student.requires_grad_()
    trained = (student, student_head.weight.requires_grad_(), student_head.bias.requires_grad_())
    loss = chunked_objective(OBJECTIVES[name], (student, student_head), (teacher, teacher_head), chunk=chunk)
    exact = OBJECTIVES[name](student.detach().double()[:, :3], teacher.double()[:, :3]).sum()  # the padding sliced off
    assert float(loss.total.detach()) == pytest.approx(float(exact), rel=1e-5)
    found = gradients(loss.total, *trained)
    assert all(each.isfinite().all() for each in found)
    assert float(found[0][:, 3].abs().max()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("student_direction", ["reverse", "forward"])
@pytest.mark.parametrize("plain_direction", ["reverse", "forward"])
def test_the_prompt_loss_of_extreme_logits_stays_finite_and_right(student_direction, plain_direction, dtype, device):
    student, student_head, prompted, teacher_head = extreme(dtype, device)
    prompted.requires_grad_()
    plain_hidden = prompted.detach().flip(0)
    directions = {"student_direction": student_direction, "plain_direction": plain_direction}
    loss = chunked_prompt_loss(
        (prompted, teacher_head),
        (student, student_head),
        (plain_hidden, teacher_head),
        weight=0.6,
        chunk=3,
        **directions,
    )
    sliced = [each.detach().double()[:, :3] for each in (prompted, student, plain_hidden)]
    assert float(loss.total.detach()) == pytest.approx(float(prompt_loss(*sliced, weight=0.6, **directions).sum()))
    (gradient,) = gradients(loss.total, prompted)
    assert gradient.isfinite().all()
    assert float(gradient[:, 3].abs().max()) == 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_float32_is_within_1e_5_of_float64(name, device):
    """A token's loss, and the gradient, from the same float32 states and weights."""
    tokens, width, words = 48, 24, 400
    hidden, teacher_hidden = (
        random(tokens, width, seed=0, device=device).float(),
        random(tokens, width, seed=1, device=device).float(),
    )
    weights = [random(words, width, seed=seed, device=device).float() / 3 for seed in (2, 3)]

    def outcome(dtype):
        state, weight = (each.detach().to(dtype).requires_grad_() for each in (hidden, weights[0]))
        target = Head(weights[1].to(dtype))
        loss = chunked_objective(OBJECTIVES[name], (state, Head(weight)), (teacher_hidden.to(dtype), target), chunk=20)
        return [each.detach().double() for each in (loss.total / tokens, *gradients(loss.total, state, weight))]

    for single, double in zip(outcome(torch.float32), outcome(torch.float64), strict=True):
        torch.testing.assert_close(single, double, rtol=1e-5, atol=1e-5)


def test_states_that_do_not_belong_together_are_refused():
    hidden, few = random(4, STUDENT, seed=0), random(3, TEACHER, seed=1)
    student_head, teacher_head = head(STUDENT, 2), head(TEACHER, 4)
    with pytest.raises(ValueError, match=r"one state per token.*4, 3"):
        chunked_objective(reverse_kl, (hidden, student_head), (few, teacher_head), chunk=3)
    with pytest.raises(ValueError, match=r"`plain`.*0\.5"):
        chunked_prompt_loss((few, teacher_head), (few, teacher_head), None, weight=0.5)


@pytest.mark.parametrize("kind", ["plain", "softcap"])
def test_blocks_of_a_chunk_change_nothing(kind, monkeypatch):
    def losses():
        hidden = random(TOKENS, STUDENT, seed=0).requires_grad_()
        student_head, teacher_head = head(STUDENT, 2, trained=True, **HEADS[kind]), head(TEACHER, 4)
        for objective in (reverse_kl, forward_kl, partial(jensen_shannon, beta=0.3)):
            loss = chunked_objective(objective, (hidden, student_head), (random(TOKENS, TEACHER, seed=1), teacher_head))
            yield from (loss.total.detach(), loss.metrics["entropy"])
            yield from gradients(loss.total, hidden, student_head.weight, student_head.bias)

    whole = list(losses())
    cpu = engine_for(torch.device("cpu"))
    blocks = replace(cpu, head=replace(cpu.head, block=3 * WORDS))  # of 3, 3, 3, 3 and 1 rows
    monkeypatch.setattr("promptkd.engine.chunked_loss.engine_for", lambda device: blocks)
    for got, expected in zip(losses(), whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_a_bias_of_minus_infinity_takes_a_word_away(device):
    hidden, teacher_hidden = (
        random(TOKENS, STUDENT, seed=0, device=device).requires_grad_(),
        random(TOKENS, TEACHER, seed=1, device=device),
    )
    student_head, teacher_head = (
        head(width, 2, trained=True, bias=True, device=device) for width in (STUDENT, TEACHER)
    )
    with torch.no_grad():
        student_head.bias[3] = teacher_head.bias[7] = -torch.inf
    for objective in (reverse_kl, forward_kl):
        plain = objective(logits(student_head, hidden), logits(teacher_head, teacher_hidden)).sum()
        chunked = chunked_objective(objective, (hidden, student_head), (teacher_hidden, teacher_head), chunk=4)
        torch.testing.assert_close(chunked.total, plain, rtol=1e-12, atol=0)
        (ours,), (theirs,) = gradients(chunked.total, hidden), gradients(plain, hidden)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    prompted = random(TOKENS, TEACHER, seed=2, device=device).requires_grad_()
    models = (prompted, teacher_head), (hidden.detach(), student_head), (teacher_hidden, teacher_head)
    plain = prompt_loss(*(logits(each, state) for state, each in models), weight=0.6).sum()
    chunked = chunked_prompt_loss(*models, weight=0.6, chunk=4)
    torch.testing.assert_close(chunked.total, plain, rtol=1e-12, atol=0)
    (ours,), (theirs,) = gradients(chunked.total, prompted), gradients(plain, prompted)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def bfloat16_values(*shape, seed, device):
    """Random float32 numbers that bfloat16 holds exactly, so that a product may round its factors to it."""
    return random(*shape, seed=seed, device=device).bfloat16().float()


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "total_variation"])
@pytest.mark.parametrize("loads", ["under autocast", "in bfloat16"])
def test_logits_of_bfloat16_states_are_float32(name, loads, device):
    """Logits near 16, which bfloat16 would round by 0.06; the same states and weights in float64 are the reference."""
    hidden, teacher_hidden = (bfloat16_values(40, 16, seed=seed, device=device).bfloat16() for seed in (0, 1))
    weights = [4 * bfloat16_values(300, 16, seed=seed, device=device) for seed in (2, 3)]
    autocast = loads == "under autocast"
    weight, teacher_weight = weights if autocast else (each.bfloat16() for each in weights)
    hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
        teacher = Head(teacher_weight)
        loss = chunked_objective(OBJECTIVES[name], (hidden, Head(weight)), (teacher_hidden, teacher), chunk=7)
    exact = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    student_logits, teacher_logits = exact[0] @ exact[1].T, teacher_hidden.double() @ teacher_weight.double().T
    assert float(student_logits.detach().abs().max()) > 16
    expected = OBJECTIVES[name](student_logits, teacher_logits).sum()
    assert loss.total.dtype == torch.float32
    assert float(loss.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for mine, other in zip(gradients(loss.total, hidden, weight), gradients(expected, *exact), strict=True):
        assert float((mine.double() - other).norm() / other.norm()) < 1e-2


def test_the_prompt_loss_of_bfloat16_states_is_float32(device):
    states = [bfloat16_values(40, 16, seed=seed, device=device).bfloat16() for seed in range(3)]
    heads = [4 * bfloat16_values(300, 16, seed=seed, device=device) for seed in (3, 4)]
    heads.append(heads[0])  # prompted, student, plain
    with torch.autocast(device.type, dtype=torch.bfloat16):
        models = [(state, Head(weight)) for state, weight in zip(states, heads, strict=True)]
        loss = chunked_prompt_loss(*models, weight=0.6, chunk=7)
    exact = [state.double() @ head.double().T for state, head in zip(states, heads, strict=True)]
    assert loss.total.dtype == torch.float32
    assert float(loss.total) == pytest.approx(float(prompt_loss(*exact, weight=0.6).sum()), rel=1e-5)


def test_a_chunk_of_every_size_gives_the_same_under_autocast(device):
    """The gradient takes the place of the logits, and both reuse a buffer from chunk to chunk."""
    hidden, teacher_hidden = (bfloat16_values(13, 5, seed=seed, device=device).bfloat16() for seed in (0, 1))
    weight, teacher = (bfloat16_values(29, 5, seed=seed, device=device) for seed in (2, 3))
    hidden.requires_grad_(), weight.requires_grad_()
    found = []
    for chunk in (1, 4, 13, None):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = chunked_objective(reverse_kl, (hidden, Head(weight)), (teacher_hidden, Head(teacher)), chunk=chunk)
        found.append([loss.total.detach(), *gradients(loss.total, hidden, weight)])
    for others in found[1:]:
        torch.testing.assert_close(others[0], found[0][0], rtol=1e-5, atol=0)
        for mine, other in zip(others[1:], found[0][1:], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-3)


def test_second_derivatives_are_refused():
    hidden = random(TOKENS, STUDENT, seed=0).requires_grad_()
    loss = chunked_objective(
        reverse_kl, (hidden, head(STUDENT, 2)), (random(TOKENS, TEACHER, seed=1), head(TEACHER, 4))
    )
    (gradient,) = torch.autograd.grad(loss.total.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
