"""The guard by itself: what it lets pass, what it refuses, and what it remembers. test_numbers.py has it in a run."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from helpers.tiny import tiny_model
from promptkd.errors import PromptKDError, RequestError
from promptkd.training.guard import MOST_SKIPPED, Guard
from promptkd.training.residence import bring, send_away


@pytest.fixture
def student():
    return nn.Linear(2, 1)


@pytest.fixture
def make(tmp_path, student):
    def guard(on_nan="stop", rollback=lambda: None):
        args = SimpleNamespace(on_nan=on_nan, output_dir=str(tmp_path), save_only_model=False)
        return Guard(args, Accelerator(cpu=True), lambda: {"student": student}, rollback)

    return guard


def take(guard, student, *, losses=(1.0, 1.0), norm=0.5, step=1, running=0.0, metrics=None, logged=None):
    """A step of two micro-batches with rows 0, 1 and 2, 3, `logged` into `metrics`; the running loss behind it."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    student(torch.ones(2)).backward()
    running_loss, metrics = torch.tensor(running), {} if metrics is None else metrics
    for index, loss in enumerate(losses):
        assert guard.begin_micro_batch(lambda index=index: [2 * index, 2 * index + 1], running_loss, metrics) == index
        guard.note("loss", torch.tensor(loss), index)
        running_loss += loss
    for name, value in (logged or {}).items():
        metrics.setdefault(name, []).append(value)
    guard.end_step(norm, step, optimizer, running_loss=running_loss, metrics=metrics)
    return float(running_loss)


def test_a_finite_step_is_left_alone(make, student):
    rolled_back = []
    guard, metrics = make(rollback=lambda: rolled_back.append(1)), {"kl": [1.0]}
    assert take(guard, student, running=5.0, metrics=metrics) == 7.0
    assert student.weight.grad is not None
    assert metrics == {"kl": [1.0]}
    assert not rolled_back
    assert guard.since_log == {"taken": 1, "skipped": 0}


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ({"losses": (1.0, math.nan)}, "loss is NaN or infinite on rows 2, 3 of the data"),
        ({"losses": (math.inf, 1.0)}, "loss is NaN or infinite on rows 0, 1 of the data"),
        ({"norm": math.nan}, "gradient is NaN or infinite on rows 0, 1, 2, 3 of the data"),
        ({"losses": (math.nan, 1.0), "norm": math.inf}, "gradient and loss are NaN or infinite on rows 0, 1 of the"),
    ],
)
def test_a_broken_step_stops_the_run_and_names_its_rows(make, student, broken, told):
    rolled_back = []
    guard = make(rollback=lambda: rolled_back.append(1))
    with pytest.raises(PromptKDError) as caught:
        take(guard, student, step=3, **broken)
    assert str(caught.value).startswith(f"Step 3 was not taken: {told}")
    assert "The weights" not in str(caught.value)
    assert "No checkpoint was written yet." in str(caught.value)
    assert rolled_back == [1]
    assert student.weight.grad is None  # so that no optimizer would move it


def test_weights_that_are_not_finite_are_named(make, student):
    with torch.no_grad():
        student.bias.fill_(math.inf)
    with pytest.raises(PromptKDError, match="The weights of the student hold NaN or infinite numbers themselves"):
        take(make(), student, norm=math.nan)


def test_weights_that_wait_off_the_device_are_looked_at(make, student, tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTKD_CACHE", str(tmp_path))
    teachers = {f"teacher {name}": tiny_model(seed=seed) for seed, name in enumerate("abc")}
    with torch.no_grad():
        next(teachers["teacher b"].parameters()).fill_(math.nan)
    for each in teachers.values():
        send_away(each, torch.device("cpu"))
    bring(teachers["teacher a"])
    guard = make()
    guard._models = lambda: {"student": student, **teachers}
    with pytest.raises(PromptKDError, match="The weights of the teacher b hold NaN"):
        take(guard, student, norm=math.nan)


def test_a_step_without_a_norm_is_judged_by_its_losses(make, student):
    guard = make()
    take(guard, student, norm=None)
    with pytest.raises(PromptKDError, match="loss is NaN"):
        take(guard, student, norm=None, losses=(math.nan,))


def test_a_skipped_step_is_taken_out_of_what_will_be_logged(make, student):
    rolled_back = []
    guard = make("skip", lambda: rolled_back.append(1))
    metrics = {"kl": [1.0], "rate": [0.1]}
    logged = {"kl": math.nan, "loss": math.nan, "rate": 0.1}
    assert take(guard, student, running=5.0, losses=(1.0, math.nan), metrics=metrics, logged=logged) == 5.0
    assert metrics == {"kl": [1.0], "rate": [0.1]}
    assert student.weight.grad is None
    assert rolled_back == [1]
    assert (guard.skipped, guard.skipped_in_a_row) == (1, 1)
    take(guard, student)
    assert (guard.skipped, guard.skipped_in_a_row) == (1, 0)
    assert guard.since_log == {"taken": 1, "skipped": 1}


def test_a_logged_loss_is_the_mean_over_the_steps_taken(make, student):
    guard = make("skip")
    for losses in ((1.0, 1.0), (math.nan,), (2.0, 2.0), (math.nan,)):
        take(guard, student, losses=losses)
    validation = {"eval_loss": 1.0}
    guard.adjust(validation)
    assert validation == {"eval_loss": 1.0}
    logs = {"loss": 6.0 / 4, "learning_rate": 0.1, "grad_norm": math.nan}  # transformers divides by all four
    guard.adjust(logs)
    assert logs == {"loss": 3.0, "learning_rate": 0.1, "skipped_steps": 2}
    guard.adjust(logs := {"loss": 1.5, "learning_rate": 0.1})
    assert logs["loss"] == 1.5  # the next line begins with no steps


def test_a_line_of_skipped_steps_alone_has_no_loss(make, student):
    guard = make("skip")
    take(guard, student, losses=(math.nan,))
    guard.adjust(logs := {"loss": 0.0, "learning_rate": 0.1})
    assert logs == {"learning_rate": 0.1, "skipped_steps": 1}


def test_many_skipped_steps_in_a_row_stop_the_run(make, student):
    guard = make("skip")
    for step in range(1, MOST_SKIPPED):
        take(guard, student, step=step, losses=(math.nan,))
    take(guard, student)  # and the count begins again
    for step in range(1, MOST_SKIPPED):
        take(guard, student, step=step, losses=(math.nan,))
    with pytest.raises(PromptKDError, match=f"{MOST_SKIPPED} steps in a row could not be taken, the last of them step"):
        take(guard, student, step=MOST_SKIPPED, losses=(math.nan,))


def test_a_resumed_guard_counts_on(make, student):
    guard, resumed = make("skip"), make("skip")
    for losses in ((1.0,), (math.nan,), (math.nan,)):
        take(guard, student, losses=losses)
    resumed.load_state_dict(guard.state_dict())
    assert resumed.state_dict() == {"total": 2, "in_a_row": 2, "since_log": {"taken": 1, "skipped": 2}}
    take(guard, student)
    assert resumed.since_log["taken"] == 1  # a copy


def test_a_step_that_was_interrupted_is_forgotten(make, student):
    guard = make()
    guard.begin_micro_batch(lambda: [7], torch.tensor(0.0), {})
    guard.note("loss", torch.tensor(math.nan), 0)
    guard.restart()
    take(guard, student)


def test_deepspeed_skips_nothing(tmp_path):
    args = SimpleNamespace(on_nan="skip", output_dir=str(tmp_path), save_only_model=False)
    with pytest.raises(RequestError, match="no step can be skipped"):
        Guard(args, SimpleNamespace(distributed_type="DEEPSPEED"), dict)
