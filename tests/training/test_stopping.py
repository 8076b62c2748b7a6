"""SIGINT and SIGTERM: where a run stops, what it leaves, what it says, and that going on loses nothing."""

import os
import shlex
import signal
import time
from types import SimpleNamespace

import pytest

from helpers.commands import (
    World,
    distill,
    done,
    hear_interrupts,
    held,
    json_lines,
    make_world,
    run,
    sft,
    steps,
    weights,
)
from helpers.processes import exit_code, forked_command, group
from promptkd.cli import resume_command
from promptkd.evaluation import dataset_evaluation
from promptkd.training import signals
from promptkd.training.callbacks import ProgressBar
from promptkd.training.checkpoint import checkpoints_in

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def _hear_interrupts():
    before = signal.getsignal(signal.SIGINT)
    hear_interrupts()
    yield
    signal.signal(signal.SIGINT, before)


def signalled(monkeypatch: pytest.MonkeyPatch, number: int, step: int, event: str = "on_step_begin") -> None:
    """The process is signalled when so many steps are done."""
    original = getattr(ProgressBar, event, lambda *args, **kwargs: None)

    def told(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == step:
            signal.raise_signal(number)

    monkeypatch.setattr(ProgressBar, event, told)


def longer(request: list[object], *arguments: object) -> list[object]:
    return [7 if each == 3 else each for each in request] + list(arguments)


@pytest.mark.parametrize(
    ("command", "number", "status", "words", "every"),
    [
        (distill, signal.SIGTERM, 143, "Stopped by SIGTERM", 3),  # in the middle of a logged line, too
        (distill, signal.SIGINT, 130, "Interrupted", 1),
        (sft, signal.SIGINT, 130, "Interrupted", 3),
    ],
)
def test_a_signal_ends_the_step_with_a_checkpoint(
    world, tmp_path, capfd, monkeypatch, command, number, status, words, every
):
    settings = ("--logging_steps", every, "--gradient_accumulation_steps", 2)  # two micro-batches of two rows
    requests = {}
    for name in ("whole", "cut"):
        requests[name] = [2 if each == 4 else each for each in longer(command(world, tmp_path / name))]
    done(capfd, *requests["whole"], *settings)
    with monkeypatch.context() as patch:
        signalled(patch, number, 3, "on_substep_end")  # within the fourth step
        ran = run(capfd, *requests["cut"], *settings)
    assert ran.status == status
    assert "Stopping after this optimizer step, with a checkpoint. A second signal ends at once." in ran.err
    message = f"promptkd {command.__name__}: {words} after step 4 of 7, with a checkpoint. To resume: "
    said, resume = ran.err.split(message)
    assert "Traceback" not in said
    assert held(tmp_path / "cut") == {"config.yaml", "metrics.jsonl", "checkpoints/checkpoint-4"}

    words = shlex.split(resume)
    assert words == ["promptkd", command.__name__, "--out", str(tmp_path / "cut"), "--resume"]
    done(capfd, *words[1:])
    assert held(tmp_path / "cut") >= held(tmp_path / "whole")
    assert steps(tmp_path / "cut") == steps(tmp_path / "whole")
    name = "student" if command is distill else "model"
    assert weights(tmp_path / "cut" / name) == weights(tmp_path / "whole" / name)


def test_an_epochs_validation_comes_before_the_checkpoint_it_belongs_to(world, tmp_path, capfd, monkeypatch):
    """Three steps are an epoch. A signal in its last step, or in its validation, loses neither of the two."""
    settings = ("--eval-data", world.valid, "--select", "last", "--save_strategy", "steps", "--save_steps", 3)
    done(capfd, *longer(distill(world, tmp_path / "whole")), *settings)
    for event in ("on_step_begin", "on_evaluate", "on_log"):
        cut = tmp_path / event
        with monkeypatch.context() as patch:
            signalled(patch, signal.SIGTERM, 2 if event == "on_step_begin" else 3, event)
            assert run(capfd, *longer(distill(world, cut)), *settings).status == 143
        assert checkpoints_in(cut / "checkpoints").keys() == {3}
        assert "eval_loss" in json_lines(cut / "metrics.jsonl")[-1]
        done(capfd, *longer(distill(world, cut)), *settings, "--resume")
        assert steps(cut) == steps(tmp_path / "whole")


def test_a_signal_in_the_last_step_leaves_the_finish_to_the_resumed_run(world, tmp_path, capfd, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGTERM, 6)
        assert run(capfd, *longer(distill(world, out))).status == 143
    assert held(out) == {
        "config.yaml",
        "metrics.jsonl",
        "checkpoints/checkpoint-7",
    }  # in the middle of an epoch
    done(capfd, *longer(distill(world, out)), "--resume")
    done(capfd, *longer(distill(world, tmp_path / "whole")))
    assert held(out) == held(tmp_path / "whole")
    assert steps(out) == steps(tmp_path / "whole")
    assert weights(out / "student") == weights(tmp_path / "whole" / "student")


def test_a_second_signal_ends_at_once(world, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(signals, "_ECHO", -1.0)
    signalled(monkeypatch, signal.SIGTERM, 1)
    signalled(monkeypatch, signal.SIGTERM, 1)
    ran = run(capfd, *distill(world, tmp_path / "run"))
    assert ran.status == 143
    assert "Stopped by SIGTERM before a checkpoint was written. To resume: promptkd distill" in ran.err
    assert held(tmp_path / "run") == {"config.yaml", "metrics.jsonl"}


def test_a_signal_that_a_launcher_repeats_counts_once_and_the_handlers_are_those_of_before(
    world, tmp_path, capfd, monkeypatch
):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    signalled(monkeypatch, signal.SIGTERM, 1)
    signalled(monkeypatch, signal.SIGTERM, 1)
    assert run(capfd, *distill(world, tmp_path / "run")).status == 143
    assert checkpoints_in(tmp_path / "run" / "checkpoints").keys() == {2}
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_an_ignored_signal_stays_ignored(world, tmp_path, capfd, monkeypatch):
    """As under nohup, or in a script's background job."""
    monkeypatch.setattr(signal, "default_int_handler", None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signalled(monkeypatch, signal.SIGINT, 1)
    done(capfd, *distill(world, tmp_path / "run"))


def test_other_commands_leave_nothing_that_looks_whole(world, tmp_path, capfd, monkeypatch):
    """The signal comes in the middle of what takes the time."""

    def told(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)

    model = ("--model", world.student, "--data", world.test, "--template", "{{ instruction }}")
    pair = ("--student", world.student, "--teacher", world.teacher, "--data", world.test)
    done(capfd, *distill(world, tmp_path / "run"))
    cases = {
        "promptkd.cli.commands.generate.generate": ("generate", *model, "--out", tmp_path / "g.jsonl"),
        "promptkd.cli.commands.exposure_bias.sample_continuations": (
            "exposure-bias",
            *pair,
            "--out",
            tmp_path / "x.json",
        ),
        "promptkd.cli.commands.prune.prune_layers": (
            "prune",
            "--model",
            world.teacher,
            "--keep",
            0,
            "--out",
            tmp_path / "p",
        ),
        "promptkd.cli.commands.export.export_safetensors": (
            *("export", "--model", world.student, "--to", "safetensors", "--out", tmp_path / "e"),
        ),
        "promptkd.cli.commands.report.render_report": ("report", tmp_path / "run", "--out", tmp_path / "r.html"),
    }
    before = {each.name for each in tmp_path.iterdir()}
    for place, arguments in cases.items():
        with monkeypatch.context() as patch:
            patch.setattr(place, told)
            ran = run(capfd, *arguments)
        assert ran.status == 143, arguments
        resume = f" To resume: {shlex.join(map(str, ('promptkd', *arguments)))}" if arguments[0] == "generate" else ""
        assert ran.err.splitlines()[-1] == f"promptkd {arguments[0]}: Stopped by SIGTERM.{resume}"
        assert {each.name for each in tmp_path.iterdir()} == before, arguments


def test_evaluate_says_how_it_resume_and_does(world, tmp_path, capfd, monkeypatch):
    out, data = tmp_path / "results.json", ("--data", world.test, "--template", "Q {{ instruction }}")
    request = ["evaluate", "--model", world.student, *data, "--max_completion_length", 4, "--out", out, "--seeds", 1, 2]
    answered = 0
    decode_rows = dataset_evaluation.decode_rows

    def told(*args, **kwargs):
        nonlocal answered
        answered += 1
        if answered == 2:
            signal.raise_signal(signal.SIGTERM)
        return decode_rows(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(dataset_evaluation, "decode_rows", told)
        ran = run(capfd, *request, "--overwrite")
    assert ran.status == 143
    assert not out.exists()
    resume = ran.err.split("promptkd evaluate: Stopped by SIGTERM. To resume: ")[1]
    assert shlex.split(resume) == ["promptkd", *map(str, request)]  # --overwrite would begin anew
    ran = done(capfd, *shlex.split(resume)[1:])
    assert "Resuming from" in ran.err


@pytest.mark.parametrize(
    ("given", "overwrite", "flags", "expected"),
    [
        (["--out", "a b", "--resume"], False, ("--resume",), "--out 'a b' --resume"),
        (["--overwrite", "--out", "r"], True, ("--resume",), "--out r --resume"),
        (["--overwrite", "true", "--out", "r"], True, (), "--out r"),
        (["--overwrite=true", "--no-resume", "--out", "r"], True, ("--resume",), "--out r --resume"),
        (["--config", "c.yaml"], True, ("--resume",), "--config c.yaml --resume --no-overwrite"),
        (["--out", "r"], False, ("--overwrite",), "--out r --overwrite"),
    ],
)
def test_the_command_that_resumes_a_run_without_settings(monkeypatch, tmp_path, given, overwrite, flags, expected):
    options = SimpleNamespace(overwrite=overwrite, out=tmp_path)
    assert resume_command("distill", given, options, flags) == f"promptkd distill {expected}"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert resume_command("distill", given, options, flags).startswith("accelerate launch -m promptkd distill ")


def test_the_command_that_resumes_a_run_with_its_own_settings(tmp_path):
    (tmp_path / "config.yaml").touch()
    options = SimpleNamespace(overwrite=False, out=tmp_path)
    long = ["--student", "S", "--out", str(tmp_path)]
    assert resume_command("distill", long, options, ("--resume",)) == f"promptkd distill --out {tmp_path} --resume"
    with_token = resume_command("distill", [*long, "--hub_token", "hf_planted"], options, ("--resume",))
    assert "--student S" in with_token  # the file holds no token, so that it must be given again
    assert "hf_planted" not in with_token
    options.overwrite = True  # the file may be that of the run that was to be replaced
    assert "--student S" in resume_command("distill", [*long, "--overwrite"], options, ("--resume",))


# ---- from outside ----


def test_a_process_told_by_one_signal_stops_all_at_the_same_step(world, tmp_path, capfd):
    """Two processes; the second hears of it alone. One process goes on with the run."""
    out, logs = tmp_path / "run", [tmp_path / "first", tmp_path / "second"]
    request = [30 if each == 3 else 2 if each == 4 else each for each in distill(world, out)]
    children = [forked_command(request, log, **own) for log, own in zip(logs, group(2), strict=True)]
    deadline = time.monotonic() + 100
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < 5:
        if time.monotonic() > deadline:
            for child in children:
                os.kill(child, signal.SIGKILL)
            pytest.fail(logs[0].read_text())
        time.sleep(0.02)
    os.kill(children[1], signal.SIGTERM)
    statuses = [exit_code(child) for child in children]
    first, second = (log.read_text() for log in logs)
    assert statuses == [143, 143], first + second
    assert "Traceback" not in first + second
    (step,) = checkpoints_in(out / "checkpoints")
    assert 5 <= step < 30
    message = f"promptkd distill: Stopped by SIGTERM after step {step} of 30, with a checkpoint. To resume: accelerate"
    assert message in first
    assert "To resume" not in second
    assert len(json_lines(out / "metrics.jsonl")) == step
    ran = done(capfd, *request, "--resume")
    assert f"Resuming from {out / 'checkpoints' / f'checkpoint-{step}'}." in ran.err
    assert [line["step"] for line in json_lines(out / "metrics.jsonl")] == list(range(1, 31))
