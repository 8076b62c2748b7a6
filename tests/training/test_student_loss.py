"""The student's loss by itself."""

import json
from dataclasses import replace

import pytest
import torch

from helpers.parts import parts, window
from helpers.tiny import tiny_model
from helpers.trainers import FIXED_PROMPTKD, FixedResponses, pair, rows, trainer
from minimal_loop import kl, response_log_probs
from promptkd.engine import engine_for
from promptkd.methods import Method, MethodSettings, named_method
from promptkd.objectives import reverse_kl


def gradients(model):
    found = [each.grad.clone() for each in model.parameters()]
    model.zero_grad()
    return found


def test_the_losses_of_micro_batches_add_up_to_the_mean_over_the_windows_tokens(tmp_path, float64_inside):
    student, teacher = pair(torch.float64)
    part = parts(tmp_path, models=(student, teacher))
    student_loss, examples = part.student_loss(), rows(6).examples
    made = window(examples[:2], examples[2:3], examples[3:])
    total = sum(student_loss(student, made, each) for each in made.micro_batches)
    total.backward()
    found = gradients(student)
    (prompt,) = part.teacher.adapter.parameters()
    expected = torch.tensor(0.0)
    for row in examples:
        with torch.no_grad():
            target = response_log_probs(teacher, row.prompt_ids, row.response_ids, prompt)
        expected = expected + kl(response_log_probs(student, row.prompt_ids, row.response_ids), target)
    tokens = sum(len(row.response_ids) for row in examples)
    (expected / tokens).backward()
    assert float(total) == pytest.approx(float(expected) / tokens, rel=1e-10)
    for mine, theirs in zip(found, gradients(student), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    logged = part.metrics.means(made, part.accelerator, {})
    assert logged["student_loss"] == pytest.approx(float(expected) / tokens, rel=1e-10)
    assert logged["entropy"] > 0
    assert prompt.grad is None


def test_the_tuner_and_the_student_share_the_first_pass_bit_for_bit(tmp_path, own_engine):
    part = parts(tmp_path)
    student, student_loss, examples = part.student, part.student_loss(), rows(4).examples
    made = window(examples[:2], examples[2:])
    first, second = made.micro_batches
    assert engine_for(part.accelerator.device).shares_passes

    def plain():
        loss = student_loss(student, made, first)
        loss.backward()
        return loss.detach(), gradients(student)

    hidden, (loss, own) = student_loss.hidden_for_tuner(student, first), plain()  # with the pass that the tuner asked
    assert first.student_hidden is None  # taken, and free for the memory
    again, other = plain()  # with a pass of its own
    assert torch.equal(loss, again)
    assert all(torch.equal(*each) for each in zip(own, other, strict=True))
    assert not hidden.requires_grad
    assert not student_loss.hidden_for_tuner(student, second).requires_grad
    assert second.student_hidden is None  # only the first one's graph is held


def test_with_dropout_the_tuner_sees_the_student_without_it(tmp_path):
    models = tiny_model("gpt2", layers=2, hidden=16, seed=1, dropout=0.5), pair()[1]
    part = parts(tmp_path, models=models, disable_dropout=False)
    student, student_loss, made = part.student.train(), part.student_loss(), window(rows(4).examples)
    (micro_batch,) = made.micro_batches
    hidden = student_loss.hidden_for_tuner(student, micro_batch)
    assert torch.equal(hidden, student_loss.hidden_for_tuner(student, micro_batch))
    assert micro_batch.student_hidden is None
    assert student.training
    losses = [float(student_loss(student, made, micro_batch)) for _ in range(2)]
    assert losses[0] != losses[1]  # its own pass drops out


def test_a_stale_target_is_used_once_and_said(tmp_path):
    part = parts(tmp_path, prompt_refresh="stale")
    student_loss, made = part.student_loss(), window(rows(4).examples)
    (micro_batch,) = made.micro_batches
    with torch.no_grad():
        fresh = float(student_loss(part.student, made, micro_batch))
        micro_batch.teacher_hidden = 2 * part.teacher.adapted_hidden(micro_batch.batch)
        stale = float(student_loss(part.student, made, micro_batch))
        assert part.metrics.means(made, part.accelerator, {})["prompt_lag"] == 1
        assert float(student_loss(part.student, made, micro_batch)) == fresh
        assert part.metrics.means(made, part.accelerator, {})["prompt_lag"] == 0
    assert abs(stale - fresh) > 1e-3


def test_a_loss_by_row_is_a_mean_over_rows_and_logged_per_token(tmp_path):
    method = replace(named_method("dpkd", MethodSettings()), responses=FixedResponses())
    part = parts(tmp_path, method=method, prompt_learning_rate=1e-3)
    student_loss, made = part.student_loss(), window(rows(4).examples)
    made.items = torch.tensor(4)
    (micro_batch,) = made.micro_batches
    loss = float(student_loss(part.student, made, micro_batch))
    made.items = torch.tensor(8)
    assert float(student_loss(part.student, made, micro_batch)) == pytest.approx(loss / 2, rel=1e-6)
    part.metrics.clear()
    made.items = torch.tensor(4)
    student_loss(part.student, made, micro_batch)
    assert part.metrics.means(made, part.accelerator, {})["student_loss"] == pytest.approx(loss, rel=1e-6)


def test_a_loss_is_told_how_much_of_the_training_is_done(tmp_path):
    told = []

    def loss(step):
        told.append(step.progress)
        return step.pair.student_loss(reverse_kl, step.student_hidden, step.teacher_hidden(step.batch))

    method = Method(FixedResponses(), loss=loss)
    trainer(tmp_path, method=method, max_steps=4, per_device_train_batch_size=1, gradient_accumulation_steps=2).train()
    assert told == [0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]


def test_plain_text_adds_its_cross_entropy(tmp_path, float64_inside):
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "abc"}))
    part = parts(
        tmp_path, models=pair(torch.float64), language_data=str(text), language_weight=0.5, method=FIXED_PROMPTKD
    )
    student_loss, made = part.student_loss(), window(rows(2).examples)
    (micro_batch,) = made.micro_batches
    with torch.no_grad():
        without = float(student_loss(part.student, made, micro_batch))
        micro_batch.texts = [[5, 6, 7], [8, 9]]
        made.text_tokens = torch.tensor(3)
        loss = float(student_loss(part.student, made, micro_batch))
        nats = 0.0
        for first, *others in micro_batch.texts:
            nats -= float(
                response_log_probs(part.student, [first], others).gather(1, torch.tensor(others)[:, None]).sum()
            )
    assert loss == pytest.approx(without + 0.5 * nats / 3, rel=1e-9)
    assert part.metrics.means(made, part.accelerator, {})["language_loss"] == pytest.approx(nats / 3, rel=1e-9)
