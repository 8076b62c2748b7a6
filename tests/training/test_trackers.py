"""Live curves beside a run, and trackers that are refused before anything is loaded."""

import importlib.util
import io

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerState

from helpers.commands import distill, done, make_world, run, sft
from promptkd.errors import RequestError
from promptkd.training import DistillConfig, trackers
from promptkd.training.callbacks import ProgressBar


def curves(folder):
    logs = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {name: [event.step for event in logs.Scalars(name)] for name in logs.Tags()["scalars"]}


@pytest.mark.slow
@pytest.mark.parametrize("command", [distill, sft])
def test_the_curves_lie_beside_the_run_and_hold_each_step_once(tmp_path, capsys, monkeypatch, command):
    world, out = make_world(tmp_path), tmp_path / "run"
    request = command(world, out, "--save_steps", 1, "--eval-data", world.valid, "--eval_steps", 2, "--select", "last")

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 2:
            (out / "checkpoints/checkpoint-2/trainer_state.json").unlink()  # the second step is logged and lost
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ProgressBar, "on_step_begin", interrupt)
        ran = run(capsys, *request, "--report_to", "tensorboard")
    assert ran.status == 130
    assert f"Live curves: tensorboard --logdir {out / 'tensorboard'}" in ran.err
    assert curves(out)["train/loss"] == [1, 2]
    done(capsys, command.__name__, "--out", out, "--resume")
    found = curves(out)
    assert found["train/loss"] == [1, 2, 3]
    assert found["eval/loss"] == [2, 3]
    assert not (out / "checkpoints" / "runs").exists()
    done(capsys, *request, "--overwrite")
    assert not (out / "tensorboard").exists()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("wandb", "report_to wandb needs a package that is not installed: pip install wandb"),
        ("comet_ml", "pip install comet-ml"),
        ("tensorboard", "pip install tensorboard"),
        ("tensorbord", "report_to must be one of azure_ml, clearml,"),
    ],
)
def test_a_tracker_that_cannot_be_used_is_refused_before_anything_is_loaded(tmp_path, capsys, monkeypatch, name, told):
    monkeypatch.setattr(trackers, "get_available_reporting_integrations", list)  # as where none is installed
    monkeypatch.setattr("promptkd.cli.training_run.load_tokenizer", None)
    models = ("--student", tmp_path / "none", "--teacher", tmp_path / "none", "--data", tmp_path / "none")
    ran = run(capsys, "distill", *models, "--out", tmp_path / "run", "--use_cpu", "--report_to", name)
    assert ran.status == 2
    assert told in ran.err
    assert not (tmp_path / "run").exists()
    with pytest.raises(RequestError, match="report_to"):
        DistillConfig(output_dir=str(tmp_path), report_to=[name], use_cpu=True)


def test_what_is_installed_is_taken(tmp_path):
    assert importlib.util.find_spec("tensorboard")
    for names in ("none", "tensorboard", ["tensorboard"], "all"):
        DistillConfig(output_dir=str(tmp_path), report_to=names, use_cpu=True)


@pytest.mark.parametrize(("steps", "told"), [(1, "Distilling: 1 step\n"), (3, "Distilling: 3 steps\n")])
def test_where_there_is_no_terminal_the_number_of_steps_is_said(steps, told):
    console = Console(file=io.StringIO())
    state = TrainerState(max_steps=steps, is_world_process_zero=True)
    ProgressBar("Distilling", console).on_train_begin(None, state, None)
    assert console.file.getvalue() == told
