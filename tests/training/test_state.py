"""What a checkpoint adds, from parts to a file and back to other parts."""

import math
from types import SimpleNamespace

import pytest
import torch

from helpers.parts import parts, window
from helpers.trainers import rows
from promptkd.errors import RequestError
from promptkd.methods.distillm2 import Contrast
from promptkd.objectives import Moving, Taid, Veto
from promptkd.responses import AdaptiveReplay, Responses
from promptkd.training.own_teacher import MovingAverage
from promptkd.training.state import ExtraState, PartialLog
from promptkd.training.teacher_tuner import TeacherTuners


def running(part, **sums):
    """What a partial log reads of a trainer."""
    defaults = {"_tr_loss": torch.tensor(0.0), "_globalstep_last_logged": 0, "_total_train_tokens": 0}
    return SimpleNamespace(accelerator=part.accelerator, _metrics={"train": {}}, **{**defaults, **sums})


def make(folder, **sums):
    part = parts(folder, on_nan="skip")
    trainer, tuner, responses = running(part, **sums), part.tuner(), AdaptiveReplay(start=0.5)
    tuner.start(4)
    log = PartialLog(trainer)
    return part, trainer, tuner, responses, log, ExtraState(log, part.guard, responses=responses, tuner=tuner)


def test_all_parts_resume_from_a_file(tmp_path):
    sums = {"_tr_loss": torch.tensor(1.25), "_globalstep_last_logged": 6, "_total_train_tokens": 80}
    part, trainer, tuner, responses, _, extra = make(tmp_path, **sums)
    trainer._metrics["train"] = {"kl": [0.5, 0.25]}
    with part.phases("prompt"):
        tuner.step(window(rows(4).examples), part.student, part.student_loss().hidden_for_tuner, step=0, logs=True)
    part.guard.skipped, part.guard.since_log = 3, {"taken": 2, "skipped": 1}
    responses.share, responses.best = 0.75, 1.5
    responses.buffer.append((rows(1).examples[0], [5, 6]))
    extra.save(tmp_path, writes=True)

    part, trainer, other, replay, log, resumed = make(tmp_path)
    resumed.load(tmp_path, process=0)
    assert torch.equal(other.adapter.state_dict()["embeddings"], tuner.adapter.state_dict()["embeddings"])
    for mine, theirs in zip(other.optimizer.state.values(), tuner.optimizer.state.values(), strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    assert other.scheduler.state_dict() == tuner.scheduler.state_dict()
    assert (part.guard.skipped, part.guard.since_log) == (3, {"taken": 2, "skipped": 1})
    assert (replay.share, replay.best, list(replay.buffer)) == (0.75, 1.5, [(rows(1).examples[0], [5, 6])])
    assert float(trainer._tr_loss) == 0.0  # transformers sets it to 0 behind the loading
    log.begin()
    assert (float(trainer._tr_loss), trainer._globalstep_last_logged, trainer._total_train_tokens) == (1.25, 6, 80)
    assert trainer._metrics["train"] == {"kl": [0.5, 0.25]}
    trainer._tr_loss = torch.tensor(0.0)
    log.begin()
    assert float(trainer._tr_loss) == 0.0  # a later training begins afresh


def test_the_adapter_alone_is_taken_from_the_best_checkpoint(tmp_path):
    _, _, tuner, _, _, extra = make(tmp_path)
    with torch.no_grad():
        tuner.adapter.module.embeddings.add_(1.0)
    extra.save(tmp_path, writes=True)
    part, _, other, _, _, resumed = make(tmp_path)
    part.guard.skipped = 2
    resumed.load_adapter(tmp_path)
    assert torch.equal(other.adapter.module.embeddings, tuner.adapter.module.embeddings)
    assert part.guard.skipped == 2


def of_kind(folder, *, average=False, adapter=False, moving=None):
    part = parts(folder)
    tuner = part.tuner() if adapter else None
    if tuner is not None:
        tuner.start(4)
    mean = MovingAverage(part.student, 0.5, part.accelerator, part.guard) if average else None
    return ExtraState(PartialLog(running(part)), part.guard, tuner=tuner, average=mean, moving=moving)


PLAIN: dict = {}
AVERAGE, ADAPTER = {"average": True}, {"adapter": True}


@pytest.mark.parametrize(
    ("written", "read", "told"),
    [
        (PLAIN, AVERAGE, "holds no moving average of the student .*and this run has a moving average"),
        (AVERAGE, PLAIN, "holds a moving average of the student .*and this run has none"),
        (PLAIN, ADAPTER, "holds no trained part of the teacher"),
        (ADAPTER, PLAIN, "holds a trained part of the teacher, and this run has none"),
        (PLAIN, {"moving": Taid()}, "holds no coefficients of a moving objective"),
        ({"moving": Taid()}, {"moving": Veto()}, "holds coefficients of a moving objective .*and this run has none"),
        ({"moving": Taid()}, {"moving": Contrast(rises=True)}, "has kept t, trend, loss, and .*needs 'steps'"),
    ],
)
def test_a_checkpoint_of_another_kind_of_run_is_refused(tmp_path, written, read, told):
    of_kind(tmp_path, **written).save(tmp_path, writes=True)
    resumed = of_kind(tmp_path, **read)
    with pytest.raises(RequestError, match=told) as caught:
        resumed.load(tmp_path, process=0)
    assert "Resume with the method and the teacher of the run that wrote it" in str(caught.value)
    if read in (AVERAGE, ADAPTER):
        with pytest.raises(RequestError, match=told):
            resumed.load_adapter(tmp_path)


def test_a_checkpoint_of_several_teachers_is_not_one_of_a_single(tmp_path):
    several = of_kind(tmp_path, **ADAPTER)
    several._tuner = TeacherTuners([several._tuner])
    several.save(tmp_path, writes=True)
    with pytest.raises(RequestError, match=r"holds the teachers .*this run has one without a name"):
        of_kind(tmp_path, **ADAPTER).load(tmp_path, process=0)


@pytest.mark.parametrize("moving", [None, Moving(), Veto()])
def test_a_state_without_parts_serves_runs_that_need_none(tmp_path, moving):
    of_kind(tmp_path).save(tmp_path, writes=True)
    of_kind(tmp_path, moving=moving).load(tmp_path, process=0)
    assert "moving" not in of_kind(tmp_path, moving=moving).state_dict()


def test_fewer_processes_share_what_more_have_kept(tmp_path):
    class Numbered(Responses):
        number = 0

        def state_dict(self):
            return {"number": self.number}

        def load_state_dict(self, state):
            self.number = state["number"]

    part, responses = parts(tmp_path), Numbered()
    trainer = running(part, _tr_loss=torch.tensor(math.pi))
    log = PartialLog(trainer)
    extra = ExtraState(log, part.guard, responses=responses)
    state = extra.state_dict()
    state["responses"] = [{"number": number} for number in range(3)]
    state["log"]["loss"] = [1.0, 2.0, 6.0]
    extra.load_state_dict(state, process=1)
    assert responses.number == 1
    extra.load_state_dict(state, process=4)
    assert responses.number == 1
    log.begin()
    assert float(trainer._tr_loss) == 3.0  # the mean, where the processes are others


def test_only_the_process_that_writes_does(tmp_path):
    extra = make(tmp_path)[-1]
    extra.save(tmp_path, writes=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(RequestError, match=r"Expected the method's state at .*method\.json"):
        extra.load(tmp_path, process=0)
