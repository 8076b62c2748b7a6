"""Objectives whose coefficient moves, in a run: what they are told, what is kept of them, and their ends."""

import math

import pytest
import torch

from helpers.trainers import FIXED_PROMPTKD, FixedResponses, log, trainer
from promptkd.engine import ChunkedLoss
from promptkd.methods import Method, MethodSettings, named_method
from promptkd.objectives import Moving, Taid, forward_kl
from promptkd.training.dry_run import take_trial_steps

pytestmark = pytest.mark.slow


def trained(folder, name, *, run=None, **settings):
    made = trainer(folder, method=named_method(name, MethodSettings(**settings)), **(run or {}))
    made.train()
    return made


def weights(made):
    adapter = [] if made.adapter is None else made.adapter.parameters()
    return torch.cat([each.detach().flatten() for each in (*made.model.parameters(), *adapter)])


@pytest.mark.parametrize(
    ("free", "settings", "plain", "plain_settings"),
    [
        ("taid", {"taid_start": 1.0}, "kd", {}),
        ("veto", {"veto_beta": 0.0, "student_share": 0.0}, "kd", {}),
        ("abkd", {"ab_alpha": 1.0, "ab_beta": 0.0}, "kd", {}),
        ("eopd", {"entropy_threshold": 99.0, "student_share": 0.0}, "gkd", {"student_share": 0.0}),
        ("promptkd", {"objective": "veto", "veto_beta": 0.0, "veto_direction": "reverse"}, "promptkd", {}),
    ],
)
def test_at_an_end_of_its_coefficient_a_method_is_a_plain_one_step_for_step(
    tmp_path, free, settings, plain, plain_settings
):
    run = {"max_steps": 2}
    mine = trained(tmp_path / "a", free, run=run, **settings)
    theirs = trained(tmp_path / "b", plain, run=run, **plain_settings)
    close = {"rtol": 0, "atol": 1e-6} if free == "eopd" else {"rtol": 0, "atol": 0}  # it has no written kernel
    torch.testing.assert_close(weights(mine), weights(theirs), **close)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_t_moves_by_the_mean_loss_of_the_whole_step(tmp_path, accumulation):
    settings = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    made = trained(tmp_path, "taid", run={"max_steps": 5, **settings}, taid_alpha=1.0, taid_momentum=0.5)
    entries = log(made)
    again = Taid(alpha=1.0, momentum=0.5)
    for step, entry in enumerate(entries):
        again.before_step(step / 5)
        assert entry["taid_t"] == again.t
        again.after_step(entry["student_loss"])
    assert len({entry["taid_t"] for entry in entries}) == 5
    assert entries[-1]["taid_t"] > 0.4 + 0.6 * 4 / 5  # ahead of the linear rise


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("taid", {"taid_alpha": 0.3}),
        ("veto", {"student_share": 0.5, "cross_entropy_share": 0.3, "distillation_temperature": 2.0}),
        ("promptkd", {"objective": "taid", "taid_alpha": 0.3}),
    ],
)
def test_a_run_resumes_bit_for_bit(tmp_path, name, settings):
    run = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trained(tmp_path / "whole", name, run=run, **settings)
    resumed = trainer(tmp_path / "resumed", method=named_method(name, MethodSettings(**settings)), **run)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert log(resumed) == log(whole)
    assert torch.equal(weights(resumed), weights(whole))
    assert resumed.method.moving.state_dict() == whole.method.moving.state_dict()


class Told(Moving):
    def __init__(self):
        self.told = []

    def before_step(self, progress):
        self.told.append(progress)

    def after_step(self, loss):
        self.told.append(loss)


def test_a_loss_of_ones_own_can_be_told_as_well(tmp_path):
    told = Told()

    def loss(step) -> ChunkedLoss:
        return step.pair.student_loss(forward_kl, step.student_hidden, step.teacher_hidden(step.batch))

    made = trainer(tmp_path, method=Method(FixedResponses(), loss=loss, moving=told), gradient_accumulation_steps=2)
    made.train()
    losses = [entry["student_loss"] for entry in log(made)]
    assert told.told == [0, losses[0], 1 / 3, losses[1], 2 / 3, losses[2]]
    assert FIXED_PROMPTKD.moving.state_dict() == {}


def test_a_skipped_step_is_not_told(tmp_path):
    told, calls = Told(), []

    def broken_once(student, teacher):
        calls.append(1)
        return forward_kl(student, teacher) * (math.nan if len(calls) == 2 else 1.0)

    method = Method(FixedResponses(), broken_once, moving=told)
    made = trainer(tmp_path, method=method, on_nan="skip", chunk_tokens=0)
    made.train()
    assert [value for value in told.told if value in (0, 1 / 3, 2 / 3)] == [0, 1 / 3, 2 / 3]
    assert len(told.told) == 5  # the second step has no loss


def test_trial_steps_and_an_earlier_training_leave_a_later_one_at_the_start(tmp_path):
    method = Method(FixedResponses(), Taid(alpha=0.5))
    take_trial_steps(trainer(tmp_path / "trial", method=method, max_steps=4))
    assert method.moving.state_dict()["loss"] is not None
    logs = []
    for name in ("first", "second"):
        made = trainer(tmp_path / name, method=method)
        made.train()
        logs.append(log(made))
    assert logs[0] == logs[1]
    assert logs[0][0]["taid_t"] == 0.4


def test_at_a_temperature_and_beside_a_cross_entropy_it_moves_as_well(tmp_path):
    settings = {"distillation_temperature": 2.0, "cross_entropy_share": 0.5, "student_share": 0.0}
    made = trained(tmp_path, "veto", **settings)
    assert [entry["veto_beta"] for entry in log(made)] == pytest.approx([0.8, 0.8 * 2 / 3, 0.8 / 3])
