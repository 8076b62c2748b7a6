"""`kill -9` in the middle of each part of a job; `benchmarks/reliability/kill.py` does it at random moments."""

import os

import pytest
from benchmarks.reliability.kill import PARTS, Job, Marks

from helpers.commands import make_world
from helpers.gguf_file import write_gguf
from helpers.tiny import tiny_model

pytestmark = pytest.mark.slow


def test_a_killed_job_that_goes_on_ends_in_the_same_bits(tmp_path):
    world = make_world(tmp_path / "world")
    teacher = write_gguf(tmp_path / "teacher.gguf", tiny_model("llama", layers=4, hidden=24, seed=2))
    marks = Marks()
    whole = Job(tmp_path / "job", world, teacher, seed=1)
    usual = {}
    for command in whole.commands:
        assert whole.attempt(command, marks, "", 0, 0.0) == 0, (whole.folder / "log.txt").read_text()
        usual |= {name: marks.seconds(name) / marks.count(name) for name in PARTS if PARTS[name][2] == command}
    expected = whole.outcome()
    whole.folder.rename(tmp_path / "whole")
    killed = Job(tmp_path / "job", world, teacher, seed=1)  # the same place: records hold paths
    points = {"prune": ("conversion",), "distill": ("checkpoint", "record and page")}
    for command in killed.commands:
        for target in points.get(command, ()):
            status = killed.attempt(command, marks, target, 2 if target == "checkpoint" else 1, usual[target] / 2)
            assert os.WIFSIGNALED(status), (target, (killed.folder / "log.txt").read_text())
        assert killed.attempt(command, marks, "", 0, 0.0) == 0, (killed.folder / "log.txt").read_text()
    found = killed.outcome()
    assert [name for name in expected | found if expected.get(name) != found.get(name)] == []
