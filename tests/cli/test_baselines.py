"""`distill` beside its teacher and its own start, measured on the same rows."""

from pathlib import Path

import pytest

from helpers.commands import (
    LIMITS,
    RUN_FILES,
    World,
    below,
    distill,
    done,
    held,
    json_lines,
    make_world,
    run,
    weights,
    write_rows,
)
from helpers.commands import rows as made_rows
from promptkd.cli.headline import compare_within
from promptkd.results import BEFORE, Results
from promptkd.training.callbacks import ProgressBar

pytestmark = pytest.mark.slow

MEASURED = ("--measure", "all", "--select", "loss")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = make_world(tmp_path_factory.mktemp("world"))
    return made._replace(valid=str(write_rows(made.folder / "valid.jsonl", made_rows(22, first=20))))


@pytest.fixture(scope="module")
def measured(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was measured beside its baselines."""
    from promptkd.cli import main

    out = tmp_path_factory.mktemp("measured") / "run"
    request = distill(world, out, "--method", "promptkd-lora", "--eval-data", world.valid, *MEASURED)
    assert main([str(each) for each in request]) == 0
    return out


@pytest.fixture
def no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds take longer than the tiny runs that they are of."""
    monkeypatch.setattr("promptkd.cli.training_run.measure_speed", lambda *arguments: None)


def test_both_are_measured_as_evaluate_measures_them(world, measured, tmp_path, capsys):
    record = Results.read(measured / "results.json")
    assert [each.model for each in record.evaluations] == ["student", BEFORE, "teacher"]  # a study takes the first
    for at, model, teacher in ((1, world.student, ("--teacher", world.teacher)), (2, world.teacher, ())):
        out = tmp_path / f"{at}.json"
        request = ("--data", world.valid, "--seeds", 10, "--no-greedy", "--measure", "student", *LIMITS)
        done(capsys, "evaluate", "--model", model, "--out", out, *teacher, *request)
        (alone,) = Results.read(out).evaluations
        assert record.evaluations[at].metrics == alone.metrics
        assert record.evaluations[at].samples == alone.samples


def test_the_record_holds_differences_speeds_and_sizes(world, measured):
    record = Results.read(measured / "results.json")
    pairs = {(each.model, each.baseline) for each in record.differences}
    assert pairs == {("student", BEFORE), ("student", "teacher")}
    assert {each.metric for each in record.differences} == {"loss", "kl_to_teacher", "rouge_l", "eos_share"}
    assert all(each.difference.rows == 22 and each.p_adjusted is not None for each in record.differences)
    assert set(record.models) == {"student", BEFORE, "teacher"}
    assert record.models[BEFORE].path == world.student
    assert record.models["student"].about == "the student after 3 steps of promptkd-lora"
    assert record.models["student"].bytes_on_disk == (measured / "student" / "model.safetensors").stat().st_size
    assert set(record.inference) == {"student", "teacher"}
    assert record.inference["student"].weight_bytes == 4 * record.models["student"].parameters
    assert {"baselines", "evaluate", "speed"} <= record.timings.keys()


def test_measuring_changes_nothing_of_the_training(world, measured, tmp_path, capsys):
    out = tmp_path / "run"
    ran = done(
        capsys, *distill(world, out, "--method", "promptkd-lora", "--eval-data", world.valid, "--select", "loss")
    )
    assert weights(out / "student") == weights(measured / "student")
    assert held(measured) - held(out) == {"baselines.json"}
    record = Results.read(out / "results.json")
    assert [each.model for each in record.evaluations] == ["student"]
    assert not record.inference
    assert "The teacher was not measured here" in ran.out


def test_a_resumed_run_measures_neither_again(world, tmp_path, capsys, monkeypatch, no_speed):
    out = tmp_path / "run"
    request = distill(world, out, "--eval-data", world.valid, "--save_steps", 1, "--eval_steps", 1, *MEASURED)

    def interrupted(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ProgressBar, "on_step_begin", interrupted)
        ran = run(capsys, *request)
    assert ran.status == 130
    assert f"Measuring the {BEFORE} and the teacher on 22 rows; --measure student leaves this out." in ran.err
    kept = Results.read(out / "baselines.json")
    before = (out / "baselines.json").read_bytes()
    ran = done(capsys, *request, "--resume")
    assert "Measuring the student before" not in ran.err
    assert (out / "baselines.json").read_bytes() == before
    record = Results.read(out / "results.json")
    assert record.evaluations[1:] == kept.evaluations
    assert len([line for line in json_lines(out / "metrics.jsonl") if "loss" in line]) == 3
    assert held(out) >= RUN_FILES | below("student", {"model.safetensors"})


def test_a_run_resumed_without_them_measures_the_teacher_alone(world, tmp_path, capsys, no_speed):
    out = tmp_path / "run"
    request = distill(world, out, "--eval-data", world.valid, "--select", "loss")
    done(capsys, *request)
    again = [each if each != "student" or request[at - 1] != "--measure" else "all" for at, each in enumerate(request)]
    ran = done(capsys, *again, "--resume")
    assert "Measuring the teacher on 22 rows" in ran.err
    assert [each.model for each in Results.read(out / "results.json").evaluations] == ["student", "teacher"]


def test_the_p_of_a_checkpoint_that_its_rows_chose_holds_for_all_of_them(world, tmp_path, capsys, no_speed):
    out = tmp_path / "run"
    done(capsys, *distill(world, out, "--eval-data", world.valid, "--eval_steps", 1, *MEASURED))
    record = Results.read(out / "results.json")
    assert [each.chosen_from for each in record.training.values()] == [3]
    assert "student is measured on the rows that chose it out of 3 validations." in " ".join(record.notes)
    once = record.model_copy(deep=True)
    compare_within(once, [BEFORE, "teacher", "student"])
    found, of_one = ([each.p_adjusted for each in made.differences] for made in (record, once))
    assert found == [min(1, 3 * p) for p in of_one]
    assert min(found) < 1
    assert [each.difference for each in record.differences] == [each.difference for each in once.differences]


def test_evaluate_with_a_teacher_tells_what_is_kept(world, tmp_path, capsys, monkeypatch):
    out = tmp_path / "scores.json"
    request = ("evaluate", "--model", world.student, "--teacher", world.teacher, "--data", world.valid, *LIMITS)
    ran = done(capsys, *request, "--seeds", 1, 2, "--out", out)
    parts = ("seed1", "seed2", "greedy", "references")
    files = {f"scores-valid-{part}.jsonl" for part in (*parts, *(f"teacher-{part}" for part in parts))}
    assert held(tmp_path) == files | {"scores.json", "scores-settings.json"}
    record = Results.read(out)
    names = [(each.model, each.decoding["temperature"]) for each in record.evaluations]
    assert names == [("student", 1.0), ("student", 0.0), ("teacher teacher", 1.0), ("teacher teacher", 0.0)]
    assert {each.data for each in record.differences} == {"valid, sampled", "valid, greedy"}
    assert set(record.inference) == {"student", "teacher teacher"}
    assert "27 % of its size" in " ".join(ran.out.split())

    alone = tmp_path / "alone.json"
    done(capsys, "evaluate", "--model", world.teacher, "--data", world.valid, *LIMITS, "--seeds", 1, 2, "--out", alone)
    for ours, theirs in zip(record.evaluations[2:], Results.read(alone).evaluations, strict=True):
        assert ours.metrics == theirs.metrics
    before = {path.name: path.read_bytes() for path in tmp_path.glob("scores-*.jsonl")}
    monkeypatch.setattr("promptkd.cli.commands.evaluate.measure_speed", lambda *arguments: None)
    done(capsys, *request, "--seeds", 1, 2, "--out", out)  # nothing is decoded again
    assert {path.name: path.read_bytes() for path in tmp_path.glob("scores-*.jsonl")} == before


def test_compare_takes_a_runs_own_student(measured, tmp_path, capsys):
    out = tmp_path / "both.json"
    done(capsys, "compare", measured, f"again={measured}", "--out", out, "--metrics", "loss")
    assert [(each.model, each.baseline) for each in Results.read(out).differences] == [("again", "run")]
