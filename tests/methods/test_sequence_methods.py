"""MiniLLM and DPKD, whose losses put a response's tokens together, with the logits of a few tokens at a time."""

import pytest
import torch

from helpers.tiny import VOCABULARY
from helpers.trainers import pair, rows
from promptkd.data.batch import right_pad
from promptkd.engine import engine_for, head_logits, response_hidden
from promptkd.methods import MethodSettings, named_method
from promptkd.methods.method import Step
from promptkd.models.pair import Pair, log_probs, with_entropy
from promptkd.objectives.divergences import reverse_kl
from promptkd.objectives.sequence import ResponseLogProbs, dpkd, minillm

CHOICES = [
    ("minillm", {}),
    ("minillm", {"teacher_mix": 0.0}),
    ("minillm", {"importance": "product", "clip_ratio": None}),
    ("minillm", {"importance": "none", "length_normalization": False, "clip_ratio": 0.0}),
    ("dpkd", {}),
    ("dpkd", {"dpkd_beta": 0.0}),
    ("dpkd", {"dpkd_level": "token", "length_normalization": False, "dpkd_beta": 0.7}),
]


def step_of(models, chunk: int | None) -> Step:
    student, teacher = models
    examples, sampled = rows(4).examples, rows(4, seed=1).examples
    batch = right_pad([row.prompt_ids for row in examples], [row.response_ids for row in sampled])

    @torch.no_grad()
    def taught(other):
        return response_hidden(teacher, other)

    def hidden(other):
        return response_hidden(student, other)

    return Step(Pair(student, teacher, VOCABULARY, chunk), examples, batch, hidden(batch), taught, hidden, 0.0)


def all_at_once(name, settings, step):
    """The loss as its formula reads, from all logits of both models, with the gradient left to autograd."""

    def logits(batch, hidden):
        return head_logits(step.pair.student, hidden), head_logits(step.pair.teacher, step.teacher_hidden(batch))

    def found(batch, hidden):
        student, teacher = logits(batch, hidden)
        log_q, log_p = log_probs(student, batch.targets), log_probs(teacher, batch.targets).detach()
        return batch.by_row(log_q), batch.by_row(log_p), batch.by_row(torch.ones_like(log_p)) > 0

    student, teacher = logits(step.batch, step.student_hidden)
    log_q, log_p, mask = found(step.batch, step.student_hidden)
    if name == "minillm":
        mix = settings.pop("teacher_mix", 0.2)
        behavior = None if mix == 0 else ((1 - mix) * log_q.detach().exp() + mix * log_p.exp()).log()
        kl = step.batch.by_row(reverse_kl(student, teacher))
        values = minillm(log_q, log_p, kl, mask, log_behavior=behavior, **settings)
        return with_entropy(values.sum(), student, teacher)
    chosen = right_pad([row.prompt_ids for row in step.rows], [row.response_ids for row in step.rows])
    better = ResponseLogProbs(*found(chosen, step.hidden_of_student(chosen)))
    values = dpkd(
        better, ResponseLogProbs(log_q, log_p, mask), **{n.removeprefix("dpkd_"): v for n, v in settings.items()}
    )
    return with_entropy(values.sum(), student)


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize(("name", "settings"), CHOICES, ids=str)
def test_chunks_change_neither_loss_nor_gradients(float64_inside, name, settings, chunk):
    models = pair(torch.float64)
    outcomes = []
    method = named_method(name, MethodSettings(**settings))
    for compute in (method.student_loss, lambda step: all_at_once(name, dict(settings), step)):
        loss = compute(step_of(models, chunk))
        gradients = torch.autograd.grad(loss.total, list(models[0].parameters()))
        outcomes.append((loss, gradients))
    (ours, mine), (plain, theirs) = outcomes
    torch.testing.assert_close(ours.total, plain.total, rtol=1e-10, atol=1e-10)
    assert ours.metrics.keys() == plain.metrics.keys()
    for each, value in plain.metrics.items():
        assert float(ours.metrics[each]) == pytest.approx(float(value), rel=1e-9)
    for each, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["minillm", "dpkd"])
def test_no_more_tokens_are_projected_at_a_time_than_chunk_tokens_says(monkeypatch, name):
    most, backend = [], engine_for(torch.device("cpu")).head
    logits = backend.projection.logits

    def counted(self, hidden):
        most.append(len(hidden))
        return logits(self, hidden)

    monkeypatch.setattr(backend.projection, "logits", counted)
    monkeypatch.setattr("promptkd.models.pair.head_logits", None)
    step = step_of(pair(), 3)
    named_method(name, MethodSettings()).student_loss(step).total.backward()
    assert max(most) == 3 < len(step.batch.targets)
