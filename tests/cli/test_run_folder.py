"""The folder of a run: what --overwrite replaces, and when."""

import shutil
from pathlib import Path

import pytest

from helpers.commands import World, distill, done, held, make_world, run, sft
from promptkd.cli import outputs
from promptkd.cli.outputs import RunFolder
from promptkd.cli.parsing.config_file import read_config

OLD, NEW = ({"out": "r", "data": "d", "keep": 2, "max_steps": steps} for steps in (3, 4))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def finished(folder: Path) -> RunFolder:
    """A finished run in `folder`, and how another one opens it to replace it."""
    with RunFolder(folder, OLD, resume=False, overwrite=False).opened():
        pass
    (folder / "student").mkdir()
    (folder / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    for name in ("results.json", "metrics.jsonl", "student/model.safetensors", "checkpoints/checkpoint-3/state.json"):
        (folder / name).write_text(f"the old {name}")
    return RunFolder(folder, NEW, resume=False, overwrite=True)


@pytest.mark.slow
@pytest.mark.parametrize("command", [distill, sft])
def test_a_refused_request_leaves_the_run_that_it_was_to_replace(world, tmp_path, capsys, command):
    out = tmp_path / "run"
    done(capsys, *command(world, out))
    before, files = contents(out), held(out)
    again = command(world, out, "--eval-data", world.valid, "--overwrite")
    too_long = [100_000 if each == 8 else each for each in again]
    ran = run(capsys, *too_long)
    assert ran.status == 2
    assert "has 512 positions" in ran.err
    assert contents(out) == before
    done(capsys, *command(world, out, "--overwrite"))
    assert held(out) == files


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_whatever_ends_the_body_leaves_the_old_run(tmp_path, error):
    folder = finished(tmp_path / "r")
    before = contents(tmp_path / "r")
    amid = {}
    with pytest.raises(error), folder.opened():  # noqa: PT012
        amid = contents(tmp_path / "r")  # which a kill now would leave
        raise error
    assert amid == before
    assert contents(tmp_path / "r") == before
    with folder.opened():
        pass
    assert [path.name for path in (tmp_path / "r").iterdir() if path.is_file()] == ["config.yaml"]
    assert read_config(tmp_path / "r" / "config.yaml") == NEW
    assert not any((tmp_path / "r" / "checkpoints").iterdir())


@pytest.mark.parametrize("removed", range(1, 4))
def test_a_run_that_was_killed_while_it_cleared_its_folder_neither_looks_finished_nor_is_refused(
    tmp_path, monkeypatch, removed
):
    folder, gone = finished(tmp_path / "r"), []

    def remove_some(place: Path) -> None:
        if len(gone) == removed:
            raise KeyboardInterrupt
        gone.append(place)
        remove(place)

    remove = outputs.remove
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "remove", remove_some)
        with pytest.raises(KeyboardInterrupt), folder.opened():
            pass
    assert not (tmp_path / "r" / "results.json").exists()
    assert read_config(tmp_path / "r" / "config.yaml") == OLD
    with folder.opened():
        pass
    assert read_config(tmp_path / "r" / "config.yaml") == NEW


def test_a_resumed_run_whose_start_fails_keeps_its_settings(tmp_path):
    finished(tmp_path / "r")
    folder = RunFolder(tmp_path / "r", OLD | {"keep": 5}, resume=True, overwrite=False)
    with pytest.raises(ValueError, match="no room"), folder.opened():
        raise ValueError("no room")
    assert read_config(tmp_path / "r" / "config.yaml") == OLD
    with folder.opened():
        pass
    assert read_config(tmp_path / "r" / "config.yaml")["keep"] == 5
    assert (tmp_path / "r" / "results.json").exists()


@pytest.mark.slow
def test_a_run_that_an_earlier_version_began_with_what_nothing_reads_is_resumed(world, tmp_path, capsys, caplog):
    """Of a method that samples nothing, the settings of sampling did nothing and were taken; they are refused now."""
    out = tmp_path / "run"
    done(capsys, *distill(world, out, "--method", "kd", "--save_steps", 1))
    expected = contents(out / "student")
    settings = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(f"{settings}temperature: 0.8\ngeneration_kwargs: {{num_beams: 2}}\n")
    for step in (2, 3):
        shutil.rmtree(out / "checkpoints" / f"checkpoint-{step}")
    shutil.rmtree(out / "student")
    done(capsys, "distill", "--out", out, "--resume")
    assert "kd samples no responses, and reads no --temperature, --generation_kwargs." in caplog.text
    assert contents(out / "student") == expected
