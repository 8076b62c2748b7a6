"""`promptkd exposure-bias` on tiny models: the record, prompted teachers, checkpoints, and wrong requests."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from helpers.commands import LIMITS, TEMPLATE, TRAINING, World, done, held, make_world, run
from helpers.tiny import END_ID, VOCABULARY, save_model, tiny_model, tiny_tokenizer
from promptkd.cli.commands.exposure_bias import exposure_table
from promptkd.data import encode_examples, read_examples
from promptkd.errors import PromptKDError
from promptkd.evaluation import Decoding, ExposureBias, Scoring, exposure_bias, sample_continuations
from promptkd.models import SoftPrompt, load_model, load_tokenizer, model_record
from promptkd.results import CurvePoint, Metric, Results


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def request(world, out, *arguments, students=None):
    students = students or [world.student]
    return (
        "exposure-bias", "--student", *students, "--teacher", world.teacher, "--data", world.test, "--out", out,
        *LIMITS, *arguments,
    )  # fmt: skip


def in_python(world, name, *, prompt=None, samples_per_row=3, ended="leave"):
    """The same by the library."""
    tokenizer, student, teacher = load_tokenizer(world.teacher), load_model(name), load_model(world.teacher)
    rows = encode_examples(
        read_examples(world.test), tokenizer, TEMPLATE, max_prompt_length=40, need_response=False
    ).examples
    prompts = [row.prompt_ids for row in rows]
    decoding = Decoding(max_new_tokens=8, stop_ids=[END_ID], vocabulary=VOCABULARY)
    mine = sample_continuations(student, prompts, decoding, samples_per_row=samples_per_row)
    theirs = sample_continuations(teacher, prompts, decoding, samples_per_row=samples_per_row, prompt=prompt)
    return exposure_bias(student, teacher, prompts, mine, theirs, Scoring(prompt, VOCABULARY), ended=ended)


@pytest.mark.slow
def test_two_students_on_one_record(world, tmp_path, capsys):
    """A padded head among them; the curves are the library's, and one file is all that is written."""
    padded = save_model(tmp_path / "models" / "padded", tiny_model("gpt2", vocabulary=VOCABULARY + 31, seed=4))
    out = tmp_path / "out" / "exposure.json"
    ran = done(capsys, *request(world, out, students=[world.student, str(padded)]))
    assert held(tmp_path / "out") == {"exposure.json"}
    results = Results.read(out)
    assert results.kind == "exposure-bias"
    assert set(results.models) == {"teacher teacher", "student", "padded"}
    assert results.data["test"].rows == 5
    assert set(results.timings) == {
        "sampling the teacher", "sampling student", "scoring student", "sampling padded", "scoring padded",
    }  # fmt: skip
    for curve, path in zip(results.curves, (world.student, padded), strict=True):
        expected = in_python(world, path)
        assert (curve.name, curve.model, curve.data) == ("exposure_bias", Path(path).name, "test")
        assert curve.points == [CurvePoint.model_validate(point.model_dump()) for point in expected.points]
        assert curve.settings == {
            "teacher": world.teacher,
            "prompt": None,
            "ended": "leave",
            "temperature": 1.0,
            "max_new_tokens": 8,
            "seeds": [10, 11, 12],
        }
        own = results.metrics[f"{curve.model}: KL(teacher || student) on its own continuations, nats/token"]
        given = results.metrics[f"{curve.model}: KL(teacher || student) on the teacher's, nats/token"]
        assert (own, given) == (expected.on_student, expected.on_teacher)
    head, units, first, *_ = ran.out.splitlines()
    assert " ".join(head.split()) == "KL on own on teacher's ExAccErr(1) ExAccErr(2) ExAccErr(4) ExAccErr(8)"
    assert " ".join(units.split()) == "nats/token nats/token % % % %"
    assert first.split()[0] == "student"
    assert f"The record is in {out}." in ran.err


@pytest.mark.slow
def test_the_prompted_teacher_of_a_run(world, tmp_path, capsys):
    """Sampled and compared with its prompt; by the run's folder or the prompt's own; other settings taken as given."""
    prompt = SoftPrompt.create(load_model(world.teacher), tiny_tokenizer(), length=5, start="random", seed=1)
    prompt.save(tmp_path / "run" / "prompt", load_model(world.teacher))
    expected = in_python(world, world.student, prompt=prompt().detach(), samples_per_row=2, ended="zero")
    assert expected.points != in_python(world, world.student, samples_per_row=2, ended="zero").points
    for number, folder in enumerate((tmp_path / "run", tmp_path / "run" / "prompt")):
        out = tmp_path / f"{number}.json"
        done(capsys, *request(world, out, "--prompt", folder, "--samples-per-row", 2, "--ended", "zero"))
        (curve,) = Results.read(out).curves
        assert curve.points == expected.points
        assert curve.settings["prompt"] == str(folder)
        assert curve.settings["ended"] == "zero"
        assert curve.settings["seeds"] == [10, 11]


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_every_checkpoint_of_a_run(world, tmp_path, capsys, monkeypatch, lora):
    """In the order of their steps, the student last; whole checkpoints and LoRA ones alike; same weights once."""
    calls = []
    counted = lambda *args, **settings: (calls.append(1), exposure_bias(*args, **settings))[1]  # noqa: E731
    monkeypatch.setattr("promptkd.cli.commands.exposure_bias.exposure_bias", counted)
    run_folder, out = tmp_path / "run", tmp_path / "exposure.json"
    pair = ("--student", world.student, "--teacher", world.teacher, "--data", world.train, "--out", run_folder)
    settings = (*TRAINING, "--save_steps", 1, "--keep", 9, *(("--student-lora-rank", 2) if lora else ()))
    done(capsys, "distill", "--method", "kd", *pair, *settings)
    shutil.copytree(run_folder / "checkpoints" / "checkpoint-2", run_folder / "checkpoints" / "checkpoint-10")
    done(capsys, *request(world, out, "--every-checkpoint", "--samples-per-row", 1, students=[run_folder]))
    results = Results.read(out)
    curves = {curve.model: curve.points for curve in results.curves}
    assert list(curves) == [*(f"run step {step}" for step in (1, 2, 3, 10)), "run"]
    assert set(results.models) == {"teacher teacher", *curves}
    assert curves["run step 10"] == curves["run step 2"] != curves["run step 1"]
    assert curves["run"] == curves["run step 3"]
    assert len(calls) == 3
    assert results.models["run"].sha256 == results.models["run step 3"].sha256 != results.models["run step 2"].sha256
    assert results.models["run"].bytes_on_disk == results.models["run step 3"].bytes_on_disk  # no optimizer's state
    first = in_python(world, run_folder / "checkpoints" / "checkpoint-1", samples_per_row=1)
    assert curves["run step 1"] == first.points
    assert results.models["run step 1"].path == str(run_folder / "checkpoints" / "checkpoint-1")


@pytest.mark.slow
@pytest.mark.parametrize("has_files", [True, False])
def test_a_stopped_command_measures_what_is_missing(world, tmp_path, capsys, monkeypatch, has_files):
    """Two students on two data sets, stopped before the last curve; the record is that of one go."""
    calls = []
    if not has_files:  # as of a name of the hub
        unhashed = lambda *of, **given: model_record(*of, **given).model_copy(update={"sha256": ""})  # noqa: E731
        monkeypatch.setattr("promptkd.cli.commands.exposure_bias.model_record", unhashed)

    def counted(*arguments, **settings):
        calls.append(1)
        if len(calls) == 4:
            raise PromptKDError("stopped")
        return exposure_bias(*arguments, **settings)

    monkeypatch.setattr("promptkd.cli.commands.exposure_bias.exposure_bias", counted)
    students, data = [world.student, world.teacher], ("--data", world.test, world.valid)
    whole, out = tmp_path / "whole.json", tmp_path / "out" / "e.json"
    given = [each for each in request(world, out, students=students) if each != world.test]
    given[given.index("--data") : given.index("--data") + 1] = data
    assert "stopped" in run(capsys, *given).err
    assert held(tmp_path / "out") == {"e.unfinished.jsonl"}
    assert "was begun with other settings: samples_per_row was 3" in run(capsys, *given, "--samples-per-row", 1).err
    assert "3 curves are measured already" in done(capsys, *given).err
    assert len(calls) == 5
    assert held(tmp_path / "out") == {"e.json"}
    done(capsys, *(whole if each is out else each for each in given))
    assert Results.read(out).curves == Results.read(whole).curves
    assert Results.read(out).metrics == Results.read(whole).metrics
    assert [(each.model, each.data) for each in Results.read(out).curves] == [
        (model, rows) for model in ("student", "teacher") for rows in ("test", "valid")
    ]


def test_the_table():
    """Zero has no sign, what is not defined is a dash, control characters stay text, and short curves leave gaps."""
    long = [CurvePoint(x=length, value=length - 4.04, low=length - 4.2, high=float(length)) for length in range(1, 10)]
    long[3] = CurvePoint(x=4, value=-0.04, low=-0.5, high=0.04)
    long[7] = CurvePoint(x=8, value=None)
    kl = Metric(value=0.1234, low=0.1, high=0.2)
    short = ExposureBias([CurvePoint(x=1, value=0.0)], kl, Metric(value=2.0))
    lines = exposure_table({"kd": ExposureBias(long, kl, kl), "\x1b[2J": short}).splitlines()
    assert lines[2].split() == ["kd", "0.123", "0.123", "-3.0", "-2.0", "0.0", "-"]
    assert re.split("  +", lines[3])[3:] == ["[-3.2, 1.0]", "[-2.2, 2.0]", "[-0.5, 0.0]"]
    assert lines[4].split() == ["␛[2J", "0.123", "2.000", "0.0", "-", "-", "-"]
    assert lines[5].split() == ["[0.100,", "0.200]"]
    assert len({len(line) for line in lines[:3]}) == 1


# ---- wrong requests ----

WRONG = {
    "no checkpoints": (("--every-checkpoint",), "W/student has none"),
    "no such prompt": (("--prompt", "W/none"), "Expected a PEFT adapter"),
    "a model as prompt": (("--prompt", "W/student"), "Expected a PEFT adapter"),
    "no samples": (("--samples-per-row", 0), "--samples-per-row must be at least 1. Got 0."),
    "a negative seed": (("--seed=-1",), "--seed must be 0 or more. Got -1."),
    "no length": (("--max_completion_length", 0), "must lie in [1, 1000000]. Got 0"),
    "unknown treatment": (("--ended", "lave"), "Did you mean leave?"),
}
OTHER_STUDENTS = {
    "another vocabulary": (["W/other"], "share 97 tokens but split text differently"),
    "no such student": (["W/student", "W/none"], "No such model: W/none does not exist"),
    "a student twice": (["W/student", "W/student"], "Each student must be given once. Got W/student W/student"),
}


def refused(world, tmp_path, capsys, message, *arguments, students=("W/student",), limits=LIMITS):
    def placed(text):
        return str(text).replace("W/", f"{world.folder}/")

    students = [placed(each) for each in students]
    pair = ("--student", *students, "--teacher", world.teacher, "--data", world.test, "--out", tmp_path / "e.json")
    ran = run(capsys, "exposure-bias", *pair, *limits, *map(placed, arguments))
    assert ran.status == 2, ran.err
    *_, line = ran.err.splitlines()  # a line on the rows may come first
    assert line.startswith("promptkd exposure-bias: ")
    assert placed(message) in line
    assert not (tmp_path / "e.json").exists()


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_settings(world, tmp_path, capsys, arguments, message):
    given = {"--max_prompt_length": 40, "--max_completion_length": 8, "--template": TEMPLATE}
    limits = [part for name, value in given.items() if name not in arguments for part in (name, value)]
    refused(world, tmp_path, capsys, message, *arguments, limits=limits)


@pytest.mark.parametrize(("students", "message"), OTHER_STUDENTS.values(), ids=OTHER_STUDENTS)
def test_wrong_students(world, tmp_path, capsys, students, message):
    refused(world, tmp_path, capsys, message, students=students)


def test_a_prompt_of_another_teacher(world, tmp_path, capsys):
    student = load_model(world.student)
    SoftPrompt(torch.zeros(3, 16)).save(tmp_path / "prompt", student)
    refused(
        world,
        tmp_path,
        capsys,
        "has vectors of 16 numbers, the teacher's embeddings have 24",
        "--prompt",
        tmp_path / "prompt",
    )


def test_students_that_render_requests_differently(world, tmp_path, capsys):
    """Their curves would compare answers to different prompts, against a teacher that reads only one of them."""
    chat = save_model(tmp_path / "chat", tiny_model("llama", seed=5), tiny_tokenizer(chat=True))
    limits = ("--max_prompt_length", 200, "--max_completion_length", 8)
    students = ["W/student", str(chat)]
    refused(world, tmp_path, capsys, "render them differently. Give a --template", students=students, limits=limits)


def test_results_are_not_replaced_unasked(world, tmp_path, capsys):
    (tmp_path / "e.json").write_text(json.dumps({"mine": 1}))
    ran = run(capsys, *request(world, tmp_path / "e.json"))
    assert ran.status == 2
    assert "exists. Replace it by --overwrite" in ran.err
    assert json.loads((tmp_path / "e.json").read_text()) == {"mine": 1}
