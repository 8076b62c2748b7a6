"""`promptkd exposure-bias`: several students, checkpoints, the prompted teacher, and what is refused."""

from pathlib import Path

import pytest

from commands import LIMITS, TRAINING, World, done, held, make_world, run
from promptkd.evaluation import exposure_bias, sample_continuations
from promptkd.models import SoftPrompt, load_model
from promptkd.results import Results
from tiny import END_ID, VOCABULARY

DRAWS = 2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


DRAWN = ("--samples-per-row", DRAWS)


def measure(world: World, out, *arguments):
    return ["exposure-bias", "--teacher", world.teacher, "--data", world.test, "--out", out, *LIMITS, *arguments]


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory) -> str:
    """A run of three steps with its last two checkpoints, its student and its soft prompt."""
    from promptkd.cli import main

    run_folder = tmp_path_factory.mktemp("runs") / "promptkd"
    request = ["distill", "--student", world.student, "--teacher", world.teacher, "--data", world.train]
    request += ["--out", run_folder, *TRAINING, "--save_strategy", "steps", "--save_steps", 1]
    assert main([str(each) for each in request]) == 0
    return str(run_folder)


def test_students_stand_in_one_record_with_the_figures_of_the_library(world, trained, tmp_path, capsys):
    out = tmp_path / "exposure.json"
    ran = done(capsys, *measure(world, out, "--student", world.student, trained, *DRAWN))
    assert held(tmp_path) == {"exposure.json"}
    results = Results.read(out)
    assert results.kind == "exposure-bias"
    assert [curve.model for curve in results.curves] == ["student", "promptkd"]
    assert all(curve.points[0].value == 0 for curve in results.curves)  # both contexts are the request
    assert set(results.models) == {"teacher teacher", "student", "promptkd"}
    assert "ExAccErr(8)" in ran.out
    assert "promptkd" in ran.out

    prompts = world_prompts(world)
    teacher, student = load_model(world.teacher), load_model(world.student)
    settings = {"samples_per_row": DRAWS, "max_new_tokens": 8, "stop_ids": [END_ID], "vocabulary": VOCABULARY}
    theirs, own = (sample_continuations(each, prompts, **settings) for each in (teacher, student))
    expected = exposure_bias(student, teacher, prompts, own, theirs, vocabulary=VOCABULARY)
    assert [point.value for point in results.curves[0].points] == pytest.approx(
        [point.value for point in expected.points], rel=1e-4, abs=1e-6
    )


def world_prompts(world: World) -> list[list[int]]:
    from promptkd.data.dataset import load_rows
    from promptkd.models import load_tokenizer

    template = LIMITS[LIMITS.index("--template") + 1]
    limits = {"max_prompt_length": 40, "max_response_length": 8, "need_response": False}
    data = load_rows(world.test, load_tokenizer(world.student), template=template, **limits)
    return [row.prompt_ids for row in data.examples]


def test_every_checkpoint_of_a_run(world, trained, tmp_path, capsys):
    out = tmp_path / "exposure.json"
    done(capsys, *measure(world, out, "--student", trained, "--every-checkpoint", *DRAWN))
    labels = [curve.model for curve in Results.read(out).curves]
    assert labels == ["promptkd step 2", "promptkd step 3", "promptkd"]


def test_the_prompted_teacher_is_sampled_and_compared(world, trained, tmp_path, capsys):
    plain, prompted = tmp_path / "plain.json", tmp_path / "prompted.json"
    done(capsys, *measure(world, plain, "--student", world.student, *DRAWN))
    done(capsys, *measure(world, prompted, "--student", world.student, "--prompt", trained, *DRAWN))
    curve = Results.read(prompted).curves[0]
    assert curve.settings["prompt"] == trained

    prompts, vectors = world_prompts(world), SoftPrompt.load(Path(trained) / "prompt")().detach()
    teacher, student = load_model(world.teacher), load_model(world.student)
    settings = {"samples_per_row": DRAWS, "max_new_tokens": 8, "stop_ids": [END_ID], "vocabulary": VOCABULARY}
    theirs = sample_continuations(teacher, prompts, prompt=vectors, **settings)
    own = sample_continuations(student, prompts, **settings)
    expected = exposure_bias(student, teacher, prompts, own, theirs, prompt=vectors, vocabulary=VOCABULARY)
    values = [point.value for point in curve.points]
    assert values == pytest.approx([point.value for point in expected.points], rel=1e-4, abs=1e-6)
    assert values[1:] != [point.value for point in Results.read(plain).curves[0].points][1:]


def test_ended_rows_as_zero_is_another_figure(world, tmp_path, capsys):
    out = tmp_path / "exposure.json"
    done(capsys, *measure(world, out, "--student", world.student, "--ended", "zero"))
    assert Results.read(out).curves[0].settings["ended"] == "zero"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--student", "W/other"), "cut text differently"),
        (("--student", "W/student", "--samples-per-row", 0), "--samples-per-row must be at least 1"),
        (("--student", "W/student", "W/student"), "each student must be given once"),
        (("--student", "W/student", "--every-checkpoint"), "--every-checkpoint needs run folders"),
        (("--student", "W/student", "--prompt", "W/none"), "W/none"),
        (("--student", "W/student", "--ended", "never"), "--ended"),
    ],
)
def test_wrong_input(arguments, message, world, tmp_path, capsys):
    placed = [str(each).replace("W/", f"{world.folder}/") for each in arguments]
    ran = run(capsys, *measure(world, tmp_path / "exposure.json", *placed))
    assert ran.status == 2
    assert message.replace("W/", f"{world.folder}/") in ran.err
    assert ran.err.count("\n") == 1
    assert not held(tmp_path)
