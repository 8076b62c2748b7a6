"""Checkpoints: what their manifest notices, which one a run goes on from, and what a full or refusing disk leaves."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import promptkd.training.validation
from helpers.commands import World, distill, done, held, json_lines, make_world, run, steps, weights
from helpers.trainers import log, rows, trainer
from promptkd.errors import PromptKDError
from promptkd.methods import named_method
from promptkd.results import Metric
from promptkd.training.checkpoint import MANIFEST, damage, resumable_checkpoint, set_aside, whole_folder, write_manifest


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def checkpoint(root: Path, step: int, best: int | None = None) -> Path:
    """A folder with the look of a checkpoint."""
    folder = root / f"checkpoint-{step}"
    (folder / "shards").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes([step]) * 1000)
    (folder / "shards" / "0.pt").write_bytes(b"optimizer")
    (folder / "trainer_state.json").write_text(json.dumps({"best_global_step": best}))
    write_manifest(folder)
    return folder


def tear(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def alter(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


# ---- the manifest ----


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda folder: None, None),
        (lambda folder: tear(folder / "model.safetensors"), "model.safetensors has 999 bytes in place of 1,000"),
        (lambda folder: alter(folder / "model.safetensors"), "model.safetensors holds other bytes than were written"),
        (lambda folder: (folder / "shards" / "0.pt").unlink(), "shards/0.pt is missing"),
        (lambda folder: alter(folder / "trainer_state.json"), "trainer_state.json holds other bytes than were written"),
        (lambda folder: (folder / MANIFEST).unlink(), "manifest.json is missing"),
        (lambda folder: tear(folder / MANIFEST), None),  # its last byte is a line break
        (lambda folder: (folder / MANIFEST).write_text('{"files": '), "manifest.json cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), "manifest.json cannot be read"),
    ],
)
def test_the_manifest_tells_what_is_wrong(tmp_path, harm, told):
    folder = checkpoint(tmp_path, 3)
    harm(folder)
    assert damage(folder) == told


# ---- which checkpoint a run goes on from ----


def test_the_newest_whole_checkpoint_is_gone_on_from_and_newer_ones_are_set_aside(tmp_path):
    folders = {step: checkpoint(tmp_path, step) for step in (5, 10, 100)}
    assert resumable_checkpoint(tmp_path) == (folders[100], {})
    tear(folders[100] / "model.safetensors")
    found, passed_over = resumable_checkpoint(tmp_path)
    assert found == folders[10]
    assert passed_over == {folders[100]: "model.safetensors has 999 bytes in place of 1,000"}
    set_aside(passed_over)
    left = {each.name for each in tmp_path.iterdir()}
    assert left == {"checkpoint-5", "checkpoint-10", "passed-over-checkpoint-100"}
    assert resumable_checkpoint(tmp_path) == (folders[10], {})


def test_a_checkpoint_whose_best_is_damaged_is_none_to_go_on_from(tmp_path):
    folders = {step: checkpoint(tmp_path, step, best) for step, best in ((1, 1), (2, 2), (3, 2))}
    alter(folders[2] / "model.safetensors")
    found, passed_over = resumable_checkpoint(tmp_path)
    assert found == folders[1]
    assert list(passed_over) == [folders[3], folders[2]]
    assert passed_over[folders[3]].startswith("of the best checkpoint until then, checkpoint-2, model.safetensors")


def test_without_any_whole_checkpoint_nothing_is_touched(tmp_path):
    assert resumable_checkpoint(tmp_path) == (None, {})
    tear(checkpoint(tmp_path, 1) / "model.safetensors")
    (checkpoint(tmp_path, 2) / "trainer_state.json").unlink()
    before = held(tmp_path)
    with pytest.raises(
        PromptKDError, match=r"checkpoint-2: trainer_state.json is missing; checkpoint-1: model.* Nothing"
    ):
        resumable_checkpoint(tmp_path)
    assert held(tmp_path) == before


def test_a_checkpoint_that_was_whole_but_had_no_name_yet_gets_it(tmp_path):
    """Killed between the renames that replace a checkpoint of the same step."""
    (tmp_path / ".partial").mkdir()
    staged = checkpoint(tmp_path / ".partial", 4)
    assert resumable_checkpoint(tmp_path) == (tmp_path / "checkpoint-4", {})
    assert not staged.exists()
    torn = checkpoint(tmp_path / ".partial", 5)
    tear(torn / "model.safetensors")
    assert resumable_checkpoint(tmp_path) == (tmp_path / "checkpoint-4", {})


@pytest.mark.slow
def test_a_torn_checkpoint_is_passed_over_and_the_run_ends_as_if_undisturbed(world, tmp_path, capsys):
    every = ("--save_steps", 1)
    done(capsys, *distill(world, tmp_path / "whole", *every))
    done(capsys, *distill(world, tmp_path / "cut", *every))
    checkpoints = tmp_path / "cut" / "checkpoints"
    alter(checkpoints / "checkpoint-3" / "optimizer.safetensors")
    ran = done(capsys, *distill(world, tmp_path / "cut", *every, "--resume"))
    assert (
        "checkpoint-3 is passed over and stays as passed-over-checkpoint-3: optimizer.safetensors holds other"
        in ran.err
    )
    assert f"Resuming from {checkpoints / 'checkpoint-2'}." in ran.err
    assert steps(tmp_path / "cut") == steps(tmp_path / "whole")
    assert weights(tmp_path / "cut" / "student") == weights(tmp_path / "whole" / "student")
    assert sorted(each.name for each in checkpoints.iterdir()) == [
        *("checkpoint-2", "checkpoint-3", "passed-over-checkpoint-3")
    ]

    for step in (2, 3):
        (checkpoints / f"checkpoint-{step}" / "method.json").unlink()
    before = held(tmp_path / "cut")
    ran = run(capsys, *distill(world, tmp_path / "cut", *every, "--resume"))
    assert ran.status == 1
    assert "checkpoint-3: method.json is missing; checkpoint-2: method.json is missing. Nothing was deleted." in ran.err
    assert held(tmp_path / "cut") == before


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "left"), [(("--keep", 1), {3}), ((), {2, 3}), (("--keep", "none"), {1, 2, 3})])
def test_so_many_checkpoints_stay(world, tmp_path, capsys, keep, left):
    done(capsys, *distill(world, tmp_path / "run", "--save_steps", 1, *keep))
    found = {int(each.name.removeprefix("checkpoint-")) for each in (tmp_path / "run" / "checkpoints").iterdir()}
    assert found == left


@pytest.mark.slow
def test_the_best_checkpoint_stays_among_few(tmp_path, monkeypatch):
    ours = trainer(
        tmp_path,
        eval_data=rows(4, seed=5),
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
    )
    evaluate = ours.evaluate
    ours.evaluate = lambda **kwargs: {**evaluate(**kwargs), "eval_loss": float(ours.state.global_step)}
    ours.train()
    assert {each.name for each in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-4"}


def test_wrong_numbers_of_checkpoints_are_refused(world, tmp_path, capsys):
    assert "--keep must be at least 1" in run(capsys, *distill(world, tmp_path / "run", "--keep", 0)).err
    ran = run(capsys, *distill(world, tmp_path / "run", "--save_total_limit", 3))
    assert ran.status == 2
    assert "--save_total_limit is set by --keep here" in ran.err
    ran = run(capsys, *distill(world, tmp_path / "run", "--save_only_model", "--resume"))
    assert ran.status == 2
    assert not (tmp_path / "run").exists()


# ---- a run resumes from any step ----


@pytest.mark.slow
@pytest.mark.parametrize("by_epoch", [False, True])
def test_a_checkpoint_at_any_step_holds_the_line_and_the_validation_to_come(tmp_path, by_epoch):
    settings = {
        "max_steps": 7,
        "method": named_method("promptkd"),
        "eval_data": rows(3, seed=5),
        "logging_steps": 3,
        "save_strategy": "steps",
        "save_steps": 1,
        **({"eval_strategy": "epoch"} if by_epoch else {"eval_strategy": "steps", "eval_steps": 2}),
    }
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    assert [line["step"] for line in log(whole) if "eval_loss" in line] == ([4, 7] if by_epoch else [2, 4, 6, 7])
    assert [line["step"] for line in log(whole) if "loss" in line] == [3, 6]
    for stop in (2, 4, 5):  # within a logged line, at the end of an epoch, within the next line
        resumed = trainer(tmp_path / f"resumed-{stop}", **settings | {"save_strategy": "no"})
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
        assert log(resumed) == log(whole)
        for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.slow
def test_a_run_that_was_moved_keeps_its_best(world, tmp_path, capsys, monkeypatch):
    summarize, told = promptkd.training.validation.summarize, iter((1.0, 2.0, 3.0))
    monkeypatch.setattr(
        promptkd.training.validation, "summarize", lambda rows: summarize(rows) | {"loss": Metric(value=next(told))}
    )
    chosen = ("--eval-data", world.valid, "--select", "loss", "--eval_steps", 1)
    done(capsys, *distill(world, tmp_path / "run", *chosen))
    best = weights(tmp_path / "run" / "student")
    assert best == weights(tmp_path / "run" / "checkpoints" / "checkpoint-1")
    (tmp_path / "run").rename(tmp_path / "moved")
    done(capsys, *distill(world, tmp_path / "moved", *chosen, "--resume"))
    assert weights(tmp_path / "moved" / "student") == best


# ---- a disk that refuses ----


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of its own on `folder`."""
    folder.mkdir()
    made = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, check=False
    )
    if not made or made.returncode:
        pytest.skip("a small file system can be mounted by root alone")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_leaves_the_earlier_checkpoints(world, tmp_path, capsys):
    """Room for one checkpoint and a half; once there is more, the run goes on from the first."""
    done(capsys, *distill(world, tmp_path / "whole", "--save_steps", 1))
    with small_disk(tmp_path / "disk", "16m"):
        out = tmp_path / "disk" / "run"
        size = sum(file.stat().st_size for file in (tmp_path / "whole/checkpoints/checkpoint-2").rglob("*"))
        ballast = tmp_path / "disk" / "ballast"
        ballast.write_bytes(bytes(2**24 - 3 * size // 2 - 2**15))
        ran = run(capsys, *distill(world, out, "--save_steps", 1))
        assert ran.status == 1
        assert "Traceback" not in ran.err
        message = ran.err.splitlines()[-1]
        assert message.startswith(f"promptkd distill: Could not write {out}/checkpoints/checkpoint-2 (")
        assert message.endswith("Intact, for --resume: checkpoint-1.")
        assert {each.name for each in (out / "checkpoints").iterdir()} == {"checkpoint-1"}
        assert damage(out / "checkpoints" / "checkpoint-1") is None
        ballast.unlink()
        done(capsys, *distill(world, out, "--save_steps", 1, "--resume"))
        assert steps(out) == steps(tmp_path / "whole")
        assert weights(out / "student") == weights(tmp_path / "whole" / "student")


def test_a_folder_that_cannot_be_written_to_is_refused_before_any_work(world, tmp_path, capsys):
    with small_disk(tmp_path / "disk", "1m"):
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "disk"], check=True)
        ran = run(capsys, *distill(world, tmp_path / "disk" / "run"))
        assert ran.status == 2
        assert f"Cannot write {tmp_path}/disk/run" in ran.err


@pytest.mark.slow
def test_what_was_deleted_meanwhile_is_named(tmp_path, capsys):
    ours = make_world(tmp_path / "world")
    done(capsys, *distill(ours, tmp_path / "run"))
    before = held(tmp_path / "run")
    for gone in (Path(ours.student), Path(ours.train)):
        elsewhere = gone.rename(gone.with_name("elsewhere"))
        ran = run(capsys, *distill(ours, tmp_path / "run", "--resume"))
        assert ran.status == 2
        assert str(gone) in ran.err
        assert held(tmp_path / "run") == before
        elsewhere.rename(gone)


@pytest.mark.slow
def test_a_best_checkpoint_that_goes_while_training_does_is_missed(tmp_path):
    ours = trainer(
        tmp_path,
        eval_data=rows(4, seed=5),
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    rate = ours._save_rng_state

    def spoil(folder):
        rate(folder)
        if ours.state.global_step == 2:
            alter(tmp_path / "checkpoint-1" / "model.safetensors")

    ours._save_rng_state = spoil
    ours._determine_best_metric = lambda metrics, trial: _first_is_best(ours)
    with pytest.raises(PromptKDError, match=r"best checkpoint, .*checkpoint-1, was damaged .* model.safetensors holds"):
        ours.train()


def _first_is_best(ours) -> bool:
    ours.state.best_global_step, ours.state.best_metric = 1, 0.0
    return ours.state.global_step == 1


def test_a_model_is_written_whole_or_the_earlier_one_stays(tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "config.json").write_text("earlier")

    def fail() -> None:
        with whole_folder(tmp_path / "student", writes=True) as partial:
            partial.mkdir()
            (partial / "config.json").write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(PromptKDError, match=r"student .*No space left"):
        fail()
    assert [each.name for each in tmp_path.iterdir()] == ["student"]
    assert (tmp_path / "student" / "config.json").read_text() == "earlier"


@pytest.mark.slow
def test_the_log_is_written_anew_from_the_checkpoint(world, tmp_path, capsys):
    """Steps behind the checkpoint, a torn line and its leftover go; no step comes twice."""
    out = tmp_path / "run"
    done(capsys, *distill(world, out, "--save_steps", 2, "--keep", 1))
    whole = steps(out)
    (out / "checkpoints" / "checkpoint-3").rename(out / "checkpoints" / "checkpoint-3.lost")
    done(capsys, *distill(world, out, "--save_steps", 2, "--keep", 2, "--overwrite"))
    checkpoints = out / "checkpoints"
    (checkpoints / "checkpoint-3").rename(checkpoints / "checkpoint-3.lost")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"loss": 1.0, "st')
    (out / "metrics.jsonl.partial").write_text("torn")
    done(capsys, *distill(world, out, "--save_steps", 2, "--resume"))
    assert steps(out) == whole
    assert [line["step"] for line in json_lines(out / "metrics.jsonl")] == [1, 2, 3]
    assert not (out / "metrics.jsonl.partial").exists()
