"""The chunked losses against the plain objectives: values, gradients and figures."""

from functools import partial

import pytest
import torch

from promptkd.objectives import (
    adaptive_kl,
    forward_kl,
    jensen_shannon,
    prompt_loss,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)
from promptkd.objectives.linear import Head, chunked_objective, chunked_prompt_loss

TOKENS, STUDENT, TEACHER, WORDS = 13, 5, 7, 29
OBJECTIVES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": partial(jensen_shannon, beta=0.3),
    "skew_forward_kl": partial(skew_forward_kl, alpha=0.1),
    "skew_reverse_kl": partial(skew_reverse_kl, alpha=0.1),
    "total_variation": total_variation,
    "adaptive_kl": adaptive_kl,
}
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 2.5, "scale": 1.7, "bias": True},
}


def random(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def head(width, seed, *, words=WORDS, bias=False, scale=1.0, softcap=None, trained=False):
    weight = random(words, width, seed=seed)
    offset = random(words, seed=seed + 1) if bias else None
    for each in (weight, offset):
        if each is not None and trained:
            each.requires_grad_()
    return Head(weight, offset, scale, softcap)


def gradients(total, *tensors):
    return torch.autograd.grad(total, [each for each in tensors if each is not None])


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradients_equal_the_plain_objective(name, chunk, kind):
    objective = OBJECTIVES[name]
    hidden = random(TOKENS, STUDENT, seed=0).requires_grad_()
    teacher_hidden = random(TOKENS, TEACHER, seed=1)
    student_head = head(STUDENT, 2, trained=True, **HEADS[kind])
    teacher_head = head(TEACHER, 4, **HEADS[kind])
    plain = objective(student_head.logits(hidden), teacher_head.logits(teacher_hidden)).sum()
    chunked = chunked_objective(objective, hidden, student_head, teacher_hidden, teacher_head, chunk=chunk)
    torch.testing.assert_close(chunked.total, plain, rtol=1e-12, atol=0)
    scaled = [total * 0.37 for total in (chunked.total, plain)]  # as the division by the tokens does
    ours = gradients(scaled[0], hidden, student_head.weight, student_head.bias)
    theirs = gradients(scaled[1], hidden, student_head.weight, student_head.bias)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(("student_direction", "plain_direction"), [("reverse", "reverse"), ("forward", "reverse")])
@pytest.mark.parametrize("weight", [0.0, 0.6])
def test_the_prompt_loss_equals_the_plain_one(weight, student_direction, plain_direction, kind):
    prompted = random(TOKENS, TEACHER, seed=0).requires_grad_()
    plain_hidden, student_hidden = random(TOKENS, TEACHER, seed=1), random(TOKENS, STUDENT, seed=2)
    teacher_head, student_head = head(TEACHER, 3, **HEADS[kind]), head(STUDENT, 5)
    directions = {"student_direction": student_direction, "plain_direction": plain_direction}
    plain = prompt_loss(
        teacher_head.logits(prompted),
        student_head.logits(student_hidden),
        teacher_head.logits(plain_hidden),
        weight=weight,
        **directions,
    ).sum()
    chunked = chunked_prompt_loss(
        prompted,
        teacher_head,
        student_hidden,
        student_head,
        plain_hidden if weight else None,
        teacher_head,
        weight=weight,
        chunk=4,
        **directions,
    )
    torch.testing.assert_close(chunked.total, plain, rtol=1e-12, atol=0)
    terms = chunked.figures["to_student"] + weight * chunked.figures.get("to_plain", 0.0)
    torch.testing.assert_close(terms, plain.detach(), rtol=1e-12, atol=0)
    (ours,), (theirs,) = gradients(chunked.total, prompted), gradients(plain, prompted)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_equal_models_give_exactly_zero():
    hidden = random(TOKENS, STUDENT, seed=0).requires_grad_()
    same = head(STUDENT, 1, trained=True)
    for objective in (forward_kl, reverse_kl):
        loss = chunked_objective(objective, hidden, same, hidden.detach(), same, chunk=4)
        assert float(loss.total.detach()) == 0
        (gradient,) = gradients(loss.total, hidden)
        assert float(gradient.abs().max()) < 1e-12


def test_padded_heads_are_sliced_and_their_columns_get_no_gradient():
    hidden = random(TOKENS, STUDENT, seed=0).requires_grad_()
    teacher_hidden = random(TOKENS, TEACHER, seed=1)
    wide = head(STUDENT, 2, words=WORDS + 6, bias=True, trained=True)
    narrow = Head(wide.weight[:WORDS].detach(), wide.bias[:WORDS].detach())
    teacher_head = head(TEACHER, 4)
    ours = chunked_objective(reverse_kl, hidden, wide.sliced(WORDS), teacher_hidden, teacher_head, chunk=4)
    theirs = chunked_objective(reverse_kl, hidden, narrow, teacher_hidden, teacher_head, chunk=4)
    assert torch.equal(ours.total, theirs.total)
    (gradient,) = gradients(ours.total, wide.weight)
    assert gradient.shape == (WORDS + 6, STUDENT)
    assert float(gradient[WORDS:].abs().max()) == 0
    assert float(gradient[:WORDS].abs().max()) > 0


def test_entropy_is_the_students():
    hidden, teacher_hidden = random(TOKENS, STUDENT, seed=0), random(TOKENS, TEACHER, seed=1)
    student_head, teacher_head = head(STUDENT, 2), head(TEACHER, 4)
    q = student_head.logits(hidden).softmax(-1)
    expected = -(q * q.log()).sum()
    for objective in OBJECTIVES.values():
        loss = chunked_objective(objective, hidden, student_head, teacher_hidden, teacher_head, chunk=5)
        torch.testing.assert_close(loss.figures["entropy"], expected, rtol=1e-12, atol=0)


def test_no_tokens_give_zero_and_a_graph():
    hidden = torch.empty(0, STUDENT, dtype=torch.float64, requires_grad=True)
    student_head = head(STUDENT, 2, trained=True)
    loss = chunked_objective(reverse_kl, hidden, student_head, torch.empty(0, TEACHER).double(), head(TEACHER, 4))
    assert float(loss.total.detach()) == 0
    loss.total.backward()
    assert float(student_head.weight.grad.abs().max()) == 0


def test_single_precision_is_as_good_as_the_plain_objective():
    def single(tensor):
        return tensor.float().requires_grad_(tensor.requires_grad)

    hidden, teacher_hidden = random(64, STUDENT, seed=0), random(64, TEACHER, seed=1)
    heads = [head(STUDENT, 2), head(TEACHER, 4)]
    exact = reverse_kl(heads[0].logits(hidden), heads[1].logits(teacher_hidden)).sum()
    loss = chunked_objective(
        reverse_kl, single(hidden), Head(single(heads[0].weight)), single(teacher_hidden), Head(single(heads[1].weight))
    )
    assert float(loss.total) == pytest.approx(float(exact), rel=1e-6)


@pytest.mark.parametrize("kind", ["plain", "softcap"])
def test_blocks_of_a_chunk_change_nothing(kind, monkeypatch):
    def losses():
        hidden = random(TOKENS, STUDENT, seed=0).requires_grad_()
        student_head, teacher_head = head(STUDENT, 2, trained=True, **HEADS[kind]), head(TEACHER, 4)
        for objective in (reverse_kl, forward_kl, partial(jensen_shannon, beta=0.3)):
            loss = chunked_objective(objective, hidden, student_head, random(TOKENS, TEACHER, seed=1), teacher_head)
            yield from (loss.total.detach(), loss.figures["entropy"])
            yield from gradients(loss.total, hidden, student_head.weight, student_head.bias)

    whole = list(losses())
    monkeypatch.setattr("promptkd.objectives.linear._BLOCK", 3 * WORDS)  # rows in blocks of 3, 3, 3, 3 and 1
    for got, expected in zip(losses(), whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_a_bias_of_minus_infinity_takes_a_word_away():
    hidden, teacher_hidden = random(TOKENS, STUDENT, seed=0).requires_grad_(), random(TOKENS, TEACHER, seed=1)
    student_head, teacher_head = (head(width, 2, trained=True, bias=True) for width in (STUDENT, TEACHER))
    with torch.no_grad():
        student_head.bias[3] = teacher_head.bias[7] = -torch.inf
    for objective in (reverse_kl, forward_kl):
        plain = objective(student_head.logits(hidden), teacher_head.logits(teacher_hidden)).sum()
        chunked = chunked_objective(objective, hidden, student_head, teacher_hidden, teacher_head, chunk=4)
        torch.testing.assert_close(chunked.total, plain, rtol=1e-12, atol=0)
        (ours,), (theirs,) = gradients(chunked.total, hidden), gradients(plain, hidden)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    prompted = random(TOKENS, TEACHER, seed=2).requires_grad_()
    models = (prompted, teacher_head), (hidden.detach(), student_head), (teacher_hidden, teacher_head)
    plain = prompt_loss(*(each.logits(state) for state, each in models), weight=0.6).sum()
    chunked = chunked_prompt_loss(*(part for model in models for part in model), weight=0.6, chunk=4)
    torch.testing.assert_close(chunked.total, plain, rtol=1e-12, atol=0)
    (ours,), (theirs,) = gradients(chunked.total, prompted), gradients(plain, prompted)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_bfloat16_heads_are_compared_in_float32():
    hidden = random(TOKENS, STUDENT, seed=0).bfloat16().requires_grad_()
    teacher_hidden = random(TOKENS, TEACHER, seed=1).bfloat16()
    student_head = Head(head(STUDENT, 2).weight.bfloat16().requires_grad_())
    teacher_head = Head(head(TEACHER, 4).weight.bfloat16())
    plain = reverse_kl(student_head.logits(hidden), teacher_head.logits(teacher_hidden)).sum()
    chunked = chunked_objective(reverse_kl, hidden, student_head, teacher_hidden, teacher_head, chunk=4)
    assert chunked.total.dtype == torch.float32
    torch.testing.assert_close(chunked.total, plain, rtol=1e-5, atol=0)
    for mine, other in zip(
        gradients(chunked.total, hidden, student_head.weight),
        gradients(plain, hidden, student_head.weight),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=2e-2, atol=2e-2)
