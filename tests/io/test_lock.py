"""One process at a time writes a folder or a file, and one that is killed is in nobody's way."""

import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.commands import DISTILL_FILES, PROMPT_FILES, TRAINED_FILES, below, done, held, make_world, run
from helpers.processes import forked_command, killed
from promptkd.errors import RequestError
from promptkd.io import lock
from promptkd.io.lock import locked

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
HOLD = """
import pathlib, subprocess, sys, time
from promptkd.io.lock import locked
with locked(pathlib.Path(sys.argv[1]), folder=True) as handle:
    child = subprocess.Popen(["sleep", "60"], pass_fds=[handle] if sys.argv[2:] else [])
    print(child.pid, flush=True)
    time.sleep(60)
"""
TAKE_TURNS = """
import os, pathlib, sys
from promptkd.io.lock import locked
folder = pathlib.Path(sys.argv[1])
for _ in range(60):
    with locked(folder / "file", waits=True):
        os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))  # fails where another is inside
        os.unlink(folder / "inside")
"""


class Holder:
    """A process of its own that holds a folder; `child`, which it started, may have inherited the lock."""

    def __init__(self, folder: Path, *inherited: str):
        command = [sys.executable, "-c", HOLD, str(folder), *inherited]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
        self.pid, self.child = self.process.pid, int(self.process.stdout.readline())

    def __enter__(self) -> "Holder":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        os.kill(self.child, signal.SIGKILL)
        self.process.stdout.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    folder = tmp_path / "run"
    with Holder(folder) as first:
        told = rf"{folder} can be .* process {first.pid} on {re.escape(platform.node())}, since 20\d\d-\d\d-\d\d \d\d:"
        began = time.monotonic()
        with pytest.raises(RequestError, match=told), locked(folder, folder=True):
            pass
        assert time.monotonic() - began < 2
        first.kill()
        began = time.monotonic()
        with locked(folder, folder=True):
            assert time.monotonic() - began < 2
            assert str(os.getpid()) in (folder / ".lock").read_text()
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_what_a_killed_process_left_running_holds_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_PATIENCE", 0.5)
    with Holder(tmp_path, "inherited") as first:
        first.kill()
        told = f"what process {first.pid} on .* left running when it was killed is at it"
        with pytest.raises(RequestError, match=told), locked(tmp_path, folder=True):
            pass
        monkeypatch.setattr(lock, "_PATIENCE", 30)
        subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {first.child}"])
        with locked(tmp_path, folder=True):
            pass


@pytest.mark.slow
def test_removed_lock_files_let_no_two_processes_in(tmp_path):
    command = [sys.executable, "-c", TAKE_TURNS, str(tmp_path)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) for _ in range(4)]
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_guards_no_name_any_more_is_not_taken(tmp_path, monkeypatch):
    """The file was removed between its opening and its locking."""
    path, names = tmp_path / ".results.json.lock", []
    try_lock = lock._try_lock

    def removed_meanwhile(handle, path):
        names.append(os.fstat(handle).st_ino)
        if len(names) == 1:
            path.unlink()
        return try_lock(handle, path)

    monkeypatch.setattr(lock, "_try_lock", removed_meanwhile)
    with locked(tmp_path / "results.json") as handle:
        assert os.path.samestat(os.fstat(handle), path.stat())
        assert len(names) == 2
    assert not path.exists()


def test_what_was_made_for_the_lock_goes_with_it(tmp_path):
    (tmp_path / "old").mkdir()
    with locked(tmp_path / "old" / "new" / "run", folder=True):
        pass
    assert held(tmp_path) == set()
    assert [each.name for each in tmp_path.iterdir()] == ["old"]
    with locked(tmp_path / "new" / "results.json"):
        (tmp_path / "new" / "results-settings.json").write_text("{}")
    assert held(tmp_path) == {"new/results-settings.json"}


def test_without_locks_of_the_file_system_the_run_goes_on(tmp_path, monkeypatch, caplog):
    def no_locks(handle: int, blocking: bool) -> bool:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock, "lock_descriptor", no_locks)
    with locked(tmp_path / "run", folder=True):
        pass
    assert "has no locks" in caplog.text


@pytest.mark.slow
def test_a_run_that_is_being_written_is_refused_and_resumed_right_after_a_kill(tmp_path, capsys):
    world, out = make_world(tmp_path / "world"), tmp_path / "run"
    models = ("--student", world.student, "--teacher", world.teacher, "--data", world.train)
    limits = ("--max_prompt_length", 40, "--max_completion_length", 4, "--template", "{{ instruction }}")
    steps = ("--max_steps", 8, "--save_steps", 2, "--per_device_train_batch_size", 2, "--use_cpu")
    request = [str(each) for each in ("distill", *models, *limits, *steps, "--out", out)]
    first = forked_command(request, tmp_path / "log")
    try:
        deadline = time.monotonic() + 120
        while not any(out.glob("checkpoints/checkpoint-*")):
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.01)
        os.kill(first, signal.SIGSTOP)  # it writes the run until it is killed
        for mode in ("--resume", "--overwrite"):
            ran = run(capsys, *request, mode)
            assert ran.status == 2
            assert f"process {first} on " in ran.err.splitlines()[-1]
    finally:
        killed(first)
    done(capsys, *request, "--resume")
    assert held(out) == DISTILL_FILES | below("student", TRAINED_FILES) | below("prompt", PROMPT_FILES) | below(
        "checkpoints", {"checkpoint-6", "checkpoint-8"}
    )
