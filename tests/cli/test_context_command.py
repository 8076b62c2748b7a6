"""`distill` with a teacher that reads a context, from the command line to the record and the page."""

from pathlib import Path

import pytest

from helpers.commands import World, distill, done, json_lines, make_world, run, weights, write_rows
from helpers.commands import rows as made_rows
from helpers.trainers import TIMINGS
from promptkd.cli.parsing.config_file import read_config
from promptkd.results import Results

pytestmark = pytest.mark.slow

TWO_PARTS = ("--gradient_accumulation_steps", 2)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds take longer than the tiny runs that they are of."""
    monkeypatch.setattr("promptkd.cli.training_run.measure_speed", lambda *arguments: None)


def same_run(one: Path, other: Path) -> None:
    """The same weights and the same log, but for the clock."""
    assert weights(one / "student") == weights(other / "student")
    logs = [
        [
            {key: value for key, value in line.items() if key not in TIMINGS}
            for line in json_lines(run / "metrics.jsonl")
        ]
        for run in (one, other)
    ]
    assert logs[0] == logs[1]


def test_a_run_from_its_first_line_to_its_page(world, tmp_path, capsys, no_speed):
    file, out = tmp_path / "context.txt", tmp_path / "run"
    file.write_text("Say {{ reference }} now.", encoding="utf-8")
    measured = ("--eval-data", world.valid, "--measure", "all", "--select", "loss", "--preflight")
    ran = done(capsys, *distill(world, out, "--method", "promptkd", "--teacher_prompt", file, *TWO_PARTS, *measured))
    first, *_ = (line for line in ran.err.splitlines() if "context" in line)
    assert f"context that the student does not see: the text of {file} (24 characters)." in first
    record, page = Results.read(out / "results.json"), (out / "report.html").read_text(encoding="utf-8")
    told = "\n".join(record.notes)
    for sentence in (
        "12 rows have a context that only the teacher reads; in 12 of them it holds the row's reference",
        "--teacher_prompt names reference: in training the teacher sees each row's answer, and the student does not.",
        "The KL to the teacher is to the teacher with its context. Its own answers have it, too",
        "Warning: in 4 of 4 validation rows the teacher's context holds the row's reference.",
    ):
        assert sentence in told
        assert sentence in ran.err
    assert "the teacher reads its context in 4 of 4 rows" in ran.err  # the preflight
    assert record.preflight.contexts == 4
    assert record.models["teacher"].context == "Say {{ reference }} now."
    assert "the teacher with its context" in page
    assert "The teacher reads a context that the student does not see" in " ".join(ran.out.split())
    assert "which reads a context that the student does not see" in page
    assert (
        read_config(out / "config.yaml")["teacher_prompt"] == "Say {{ reference }} now."
    )  # not the file, which may change
    assert [each.model for each in record.evaluations] == ["student", "student before training", "teacher"]
    assert all("Say" not in sample.prompt for each in record.evaluations for sample in each.samples)
    plain = tmp_path / "plain"
    done(capsys, *distill(world, plain, "--method", "promptkd", *TWO_PARTS, *measured))
    without = Results.read(plain / "results.json")
    losses = [each.evaluations[2].metrics["loss"].value for each in (record, without)]
    assert losses[0] != losses[1]  # the teacher was measured with its context
    kls = [each.evaluations[1].metrics["kl_to_teacher"].value for each in (record, without)]
    assert kls[0] != kls[1]
    assert record.evaluations[1].metrics["loss"] == without.evaluations[1].metrics["loss"]  # the student's own was not
    assert "context" not in "\n".join(without.notes)


def test_with_a_column_a_resumed_run_ends_as_an_undisturbed_one(world, tmp_path, capsys):
    lines = made_rows(12)
    data = write_rows(tmp_path / "rows.jsonl", [{**row, "hint": "an" * (index % 4)} for index, row in enumerate(lines)])
    asked = ("--method", "promptkd", "--columns", "hint=teacher_prompt", "--save_steps", 1, *TWO_PARTS)

    def request(name):
        return distill(world._replace(train=data), tmp_path / name, *asked)

    ran = done(capsys, *request("whole"))
    assert "9 rows have a context that only the teacher reads." in ran.err
    assert "not used" not in ran.err
    done(capsys, *request("cut"))
    last = tmp_path / "cut" / "checkpoints" / "checkpoint-3" / "optimizer.safetensors"
    last.write_bytes(b"torn")
    done(capsys, *request("cut"), "--resume")
    same_run(tmp_path / "whole", tmp_path / "cut")


def test_without_a_context_opcd_is_gkd_bit_for_bit(world, tmp_path, capsys):
    done(capsys, *distill(world, tmp_path / "gkd", "--method", "gkd", *TWO_PARTS))
    for name, context in (("none", ()), ("blank", ("--teacher_prompt", " "))):
        ran = done(capsys, *distill(world, tmp_path / name, "--method", "opcd", *TWO_PARTS, *context))
        assert "No row has a context for the teacher: without one, opcd is gkd with reverse KL." in ran.err
        same_run(tmp_path / "gkd", tmp_path / name)
    done(capsys, *distill(world, tmp_path / "kind", "--method", "opcd", *TWO_PARTS, "--teacher_prompt", "Be kind."))
    assert weights(tmp_path / "kind" / "student") != weights(tmp_path / "gkd" / "student")


def test_requests_that_are_refused(world, tmp_path, capsys):
    for method, told, *more in (
        ("seqkd", "seqkd reads no teacher, and teacher_prompt is what a teacher reads. Leave it out."),
        ("gkd", "line 1: --teacher_prompt cannot be rendered: 'hint' is undefined", "{{ hint }}"),
        ("gkd", "--teacher_prompt does not compile as a Jinja template", "{{ hint"),
        ("gkd", "the shortest of the teacher's prompts has", "Be kind.", "--max_teacher_prompt_length", 5),
    ):
        text, *flags = more or ("Be kind.",)
        ran = run(capsys, *distill(world, tmp_path / "run", "--method", method, "--teacher_prompt", text, *flags))
        assert ran.status == 2
        assert told in ran.err
    assert not (tmp_path / "run").exists()


def test_validation_rows_without_a_context_are_told(world, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", [{**row, "teacher_prompt": "Be"} for row in made_rows(12)])
    ran = done(capsys, *distill(world._replace(train=data), tmp_path / "run", "--eval-data", world.valid))
    assert "The validation rows have no context: there the KL to the teacher is to the teacher without one." in ran.err
