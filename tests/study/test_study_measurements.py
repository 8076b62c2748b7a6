"""What a study measures of its students besides: exposure bias, from the commands to the page; and what it deletes."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

import promptkd.cli.options.evaluate
import promptkd.cli.options.exposure_bias
from helpers.bias_records import biased_runs, curve_of, record
from helpers.commands import LIMITS, World, done, make_world, run
from helpers.processes import ForkedCommand
from helpers.standins import StandIn
from promptkd.cli.parsing.parser import merged_config, parse_options
from promptkd.cli.study_disk import delete_models, models_needed_in
from promptkd.cli.study_runs import StudyRun, plan_text
from promptkd.results import Evaluation, Metric, ModelRecord, Results, Training
from promptkd.study.plan import Planned
from promptkd.study.processes import Job


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def study_file(world: World, out: Path, /, base=None, **changes) -> Path:
    limits = {str(flag).removeprefix("--"): value for flag, value in zip(LIMITS[::2], LIMITS[1::2], strict=True)}
    own = {
        **{"student": world.student, "teacher": world.teacher, "data": world.train, "use_cpu": True, "max_steps": 2},
        **{"per_device_train_batch_size": 4, "preflight": False, **limits},
    }
    settings = {"out": str(out), "base": own | (base or {}), "methods": ["kd"], "seeds": [1], "references": False}
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(settings | changes))
    return file


def test_exposure_bias_is_measured_after_each_training_against_the_runs_teacher(world, tmp_path, capsys):
    measured = {"exposure_bias": {"data": [world.test], "every-checkpoint": True}, "references": True}
    file = study_file(world, tmp_path / "out", {"keep": None}, seeds=[1, 2], **measured)
    said = done(capsys, "study", file, "--dry-run").out.replace("\nA: ", "")
    lines = [line for line in said.splitlines() if line.startswith("promptkd ")]
    assert [line.split()[1] for line in lines] == ["exposure-bias", *["distill", "exposure-bias"] * 2]
    untrained, _, first, *_ = lines
    out = tmp_path / "out"
    assert f"--student {out}/kd-seed-1 " in first
    assert f"--teacher {world.teacher} " in first
    assert "--max-completion-length 8 " in first
    assert first.endswith(f"--every-checkpoint true --out {out}/exposure-bias/kd-seed-1/results.json")
    assert "--every-checkpoint" not in untrained
    assert f"--student {world.student} " in untrained
    assert untrained.endswith(f"--out {out}/exposure-bias/untrained/results.json")


def test_what_is_said_of_the_teachers_pass_is_not_asked_of_the_teacher_itself(world, tmp_path, capsys):
    asked = {"data": [world.test], "seeds": [10, 20], "kl_seeds": 1, "teacher_dtype": "float32"}
    file = study_file(world, tmp_path / "out", evaluate=asked, references=True, metrics=["loss", "kl_to_teacher"])
    lines = done(capsys, "study", file, "--dry-run").out.replace("\nA: ", "").splitlines()
    teacher, untrained, trained = (line for line in lines if line.startswith("promptkd evaluate"))
    for line in (untrained, trained):
        assert "--kl-seeds 1" in line
        assert "--teacher-dtype float32" in line
    assert f"--model {world.teacher} " in teacher
    assert "--kl-seeds" not in teacher
    assert "--teacher" not in teacher
    done(capsys, *shlex.split(teacher)[1:])


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        ({}, {"exposure_bias": {"student": "s"}}, "exposure_bias sets student, but each run's student is measured"),
        ({}, {"exposure_bias": {"overwrite": True}}, "exposure_bias sets overwrite, but a study measures again"),
        ({}, {"exposure_bias": {"every_checkpoint": True}}, "Say in `base` how many: keep: none keeps all."),
        ({"teacher": "ema"}, {}, "exposure_bias cannot be measured after a run whose teacher was the moving average"),
        ({}, {"exposure_bias": {"samples_per_row": 0}}, "samples-per-row must be at least 1"),
        ({}, {"exposure_bias": {"seeds": [1]}}, "--seeds is unknown. Did you mean --seed?"),
        ({}, {"exposure_bias": {}, "metrics": ["exposure_bias"]}, "metrics asks for exposure_bias, which is not"),
    ],
)
def test_a_wrong_measurement(world, tmp_path, capsys, base, changes, message):
    measured = {"data": [world.test], **changes.get("exposure_bias", {})} if changes.get("exposure_bias", 1) else {}
    file = study_file(world, tmp_path / "out", base, **(changes | {"exposure_bias": measured}))
    ran = run(capsys, "study", file)
    assert ran.status == 2
    assert message in ran.err
    assert not (tmp_path / "out").exists()


def test_answers_that_another_setting_cannot_use_are_told_before_anything_runs(world, tmp_path, capsys):
    file = study_file(world, tmp_path / "out", evaluate={"data": [world.test], "seeds": [10]})
    said = done(capsys, "study", file, "--dry-run").out.split("\n\n")[0]
    command = next(line for line in said.split("promptkd ") if "--model" in line)
    config = merged_config(
        parse_options("evaluate", promptkd.cli.options.evaluate, shlex.split(command)[1:]).options, {}
    )
    Results(kind="evaluate", config=config).write(tmp_path / "out/evaluations/kd-seed-1/results.json")
    (tmp_path / "out/evaluations/kd-seed-1/results-settings.json").write_text("{}")
    file = study_file(world, tmp_path / "out", evaluate={"data": [world.test, world.valid], "seeds": [10, 20]})
    assert "1 of 1 runs to do" in done(capsys, "study", file, "--dry-run").out
    file = study_file(world, tmp_path / "out", evaluate={"data": [world.test], "limit": 2})
    assert (
        "the answers of before were made with other settings: limit was None and is now 2."
        in run(capsys, "study", file, "--dry-run").err
    )


# ---- what the teacher alone reads ----

MEASURED = ["loss", "kl_to_teacher"]


def measuring_commands(said):
    lines = said.replace("\nA: ", "").splitlines()
    return [shlex.split(line) for line in lines if line.startswith(("promptkd evaluate", "promptkd exposure-bias"))]


def test_a_context_that_all_runs_share_is_read_in_every_measurement(world, tmp_path, capsys):
    """But not by the teacher itself, which stands in the table as a model that reads the requests alone."""
    measured = {key: {"data": [world.test]} for key in ("evaluate", "exposure_bias")}
    base = {"teacher_prompt": "Be kind.", "max_teacher_prompt_length": 99}
    given = {"methods": ["gkd", "promptkd"], "references": True, "metrics": MEASURED, **measured}
    said = done(capsys, "study", study_file(world, tmp_path / "out", base, **given), "--dry-run").out
    teacher, *others = measuring_commands(said)
    assert "--teacher-prompt" not in teacher
    assert len(others) == 6  # of the untrained student and of two runs
    for command in others:
        assert command[command.index("--teacher-prompt") + 1] == "Be kind."
        assert command[command.index("--max-teacher-prompt-length") + 1] == "99"
    for key in measured:
        note = f"{key}: all runs share teacher_prompt; all are measured against the teacher that reads it."
        assert said.count(note) == 1
    plain = {key: {**own, "teacher_prompt": None} for key, own in measured.items()}
    said = done(capsys, "study", study_file(world, tmp_path / "out", base, **(given | plain)), "--dry-run").out
    for command in measuring_commands(said)[1:]:
        assert command[command.index("--teacher-prompt") + 1] == "none"
        assert "--max-teacher-prompt-length" not in command
    assert "all runs share" not in said


def test_where_runs_differ_in_their_context_all_are_measured_against_the_plain_teacher(world, tmp_path, capsys):
    measured = {key: {"data": [world.test]} for key in ("evaluate", "exposure_bias")}
    methods = ["gkd", {"name": "opcd", "teacher_prompt": "Be kind.", "max_teacher_prompt_length": 99}]
    given = {"methods": methods, "references": False, "metrics": MEASURED, **measured}
    said = done(capsys, "study", study_file(world, tmp_path / "out", **given), "--dry-run").out
    assert not any("--teacher-prompt" in command for command in measuring_commands(said))
    for key in measured:
        note = f"{key}: the runs differ in teacher_prompt; all are measured against the teacher without it."
        assert said.count(note) == 1
    own = {"data": [world.test], "teacher_prompt": "Be brief."}
    ran = run(capsys, "study", study_file(world, tmp_path / "out", **(given | {"evaluate": own})), "--dry-run")
    assert "The runs differ in max_teacher_prompt_length. Say in `evaluate` with which one" in ran.err
    own["max_teacher_prompt_length"] = 50
    said = done(capsys, "study", study_file(world, tmp_path / "out", **(given | {"evaluate": own})), "--dry-run").out
    for command in measuring_commands(said):
        assert ("Be brief." in command) == ("--teacher-prompt" in command) == (command[1] == "evaluate")
    assert "evaluate: the runs differ" not in said


def test_a_measurement_without_a_teacher_has_no_context(world, tmp_path, capsys):
    given = {"methods": ["gkd"], "evaluate": {"data": [world.test]}}
    said = done(
        capsys, "study", study_file(world, tmp_path / "out", {"teacher_prompt": "Be kind."}, **given), "--dry-run"
    )
    (command,) = measuring_commands(said.out)
    assert "--teacher-prompt" not in command
    assert "teacher_prompt;" not in said.out


def test_a_record_of_the_same_context_is_that_of_the_study_though_a_file_held_it(world, tmp_path, capsys):
    """What was measured with a file's text is measured; with another text in the file, or none, it is not."""
    file = tmp_path / "context.txt"
    file.write_text("Be kind.")
    out, base = tmp_path / "out", {"teacher_prompt": str(file), "template": "Q: {{ instruction }}"}
    given = {"methods": ["gkd"], "exposure_bias": {"data": [world.test]}}
    said = done(capsys, "study", study_file(world, out, base, **given), "--dry-run").out
    (command,) = measuring_commands(said)
    parsed = parse_options("exposure-bias", promptkd.cli.options.exposure_bias, command[2:]).options
    config = merged_config(parsed, {}) | {"teacher_prompt": "Be kind."}
    Results(kind="exposure-bias", config=config).write(out / "exposure-bias/gkd-seed-1/results.json")
    Results(kind="distill").write(out / "gkd-seed-1" / "results.json")
    (out / "gkd-seed-1" / "student").mkdir()
    asked = study_file(world, out, base, **given)
    assert not measuring_commands(done(capsys, "study", asked, "--dry-run").out)
    file.write_text("Be brief.")
    assert len(measuring_commands(done(capsys, "study", asked, "--dry-run").out)) == 1


def made_study(folder: Path) -> Path:
    """A study of exposure bias alone, two methods x three seeds, as it lies on the disk."""
    settings = {"out": "elsewhere", "base": {"student": "s", "teacher": "t", "data": "d"}, "methods": ["a", "b"]}
    folder.mkdir()
    settings |= {"seeds": [1, 2, 3], "exposure_bias": {"data": ["t"]}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    for group, seeds in biased_runs({"a": 0.1, "b": 0.5}).items():
        for seed, measured in seeds.items():
            name = f"{group}-seed-{seed}"
            measured.curves.insert(0, curve_of(f"{name} step 10", seed, 0.05))
            measured.write(folder / "exposure-bias" / name / "results.json")
            Results(kind="distill").write(folder / name / "results.json")
    start = record(curve_of("student", 9, 0))
    start.models["student"] = ModelRecord(path="s", parameters=1, sha256="")
    start.write(folder / "exposure-bias" / "untrained" / "results.json")
    return folder


def test_a_studys_exposure_bias_is_compared_and_reported(tmp_path, capsys):
    study = made_study(tmp_path / "s")
    said = done(capsys, "compare", study, "--baseline", "b", "--out", tmp_path / "c.json").out
    compared = Results.read(tmp_path / "c.json")
    (difference,) = compared.differences
    assert (difference.model, difference.baseline, difference.metric) == ("a", "b", "exposure_bias")
    assert difference.difference.value < 0
    assert "a is better on exposure bias than b." in said
    kinds = [(curve.name, curve.model) for curve in compared.curves]
    assert kinds == [
        *(("exposure_bias", group) for group in "ab"),
        *(("exposure_bias_by_step", group) for group in "ab"),
        ("exposure_bias", "untrained"),
        ("exposure_bias_difference", "a"),
    ]
    for name in ("page.html", "table.tex", "table.md", "data.csv"):
        done(capsys, "report", study, "--out", tmp_path / name)
    page, text = (tmp_path / "page.html").read_text(), (tmp_path / "table.tex").read_text()
    assert page.count('class="chart tall only-script" id="bias-') == 3
    assert "Bands are 95 % intervals over the seeds of training and the rows of the data" in page
    assert "Difference in ExAccErr$(l)$ in percentage points, $l$ in tokens." in text
    assert "$\\mathrm{step} = 10$" in text
    assert "exposure_bias,%," in (tmp_path / "data.csv").read_text()
    assert "ExAccErr(l) in %, by optimizer step." in (tmp_path / "table.md").read_text()


def test_exposure_bias_is_compared_by_its_name_where_nothing_else_is_measured(tmp_path, capsys):
    study = made_study(tmp_path / "s")
    assert "Expected metrics that rows" in run(capsys, "compare", study, "--metrics", "rouge_l").err
    done(capsys, "compare", study, "--metrics", "exposure_bias", "--out", tmp_path / "c.json")
    assert len(Results.read(tmp_path / "c.json").differences) == 1


def test_a_studys_page_says_which_teacher_was_measured_where_one_read_a_context(tmp_path, capsys):
    study = made_study(tmp_path / "s")
    teacher = ModelRecord(path="t", parameters=1, sha256="ab")

    def written(place, context):
        record = Results.read(study / place / "results.json")
        record.models["teacher"] = teacher.model_copy(update={"context": context})
        record.write(study / place / "results.json")

    def page():
        done(capsys, "report", study, "--out", tmp_path / "page.html", "--overwrite")
        return (tmp_path / "page.html").read_text()

    assert "The exposure bias is against" not in page()
    for seed in (1, 2, 3):
        written(f"a-seed-{seed}", "Be kind.")
    assert "The exposure bias is against the teacher without the context that it read in training (a)." in page()
    for name in ("a", "b"):
        for seed in (1, 2, 3):
            written(f"exposure-bias/{name}-seed-{seed}", "Be kind.")
    assert "The exposure bias is against the teacher with a context that the students do not read." in page()
    assert "The answers and the loss of the teacher itself are those without a context." not in page()
    own = Evaluation(model="t", data="t", decoding={}, metrics={"loss": Metric(value=1.0)})
    Results(kind="evaluate", evaluations=[own]).write(study / "evaluations" / "teacher" / "results.json")
    assert "The answers and the loss of the teacher itself are those without a context." in page()


def test_the_plan_ends_with_the_time_of_training_and_measuring(tmp_path):
    cost = Training(method="kd", steps=10, seconds=600.0, peak_memory_bytes=1)
    trained, runs = Results(kind="distill", training={"student": cost}), []
    for seed in (1, 2, 3):
        name = f"kd-seed-{seed}"
        files = [tmp_path / folder / name / "results.json" for folder in ("evaluations", "exposure-bias")]
        job = Job(
            name, tmp_path / name, () if seed == 1 else (("distill", "--seed", str(seed)),), tmp_path / "log", steps=10
        )
        runs.append(
            StudyRun(Planned("kd", seed, {"method": "kd"}), job, files[0], trained if seed == 1 else None, files[1])
        )
        if seed == 1:
            for file, seconds in zip(files, (40.0, 20.0), strict=True):
                Results(kind="evaluate", timings={"test": seconds}).write(file)
    *commands, last = plan_text(runs, [], 1, keep_models=True).splitlines()
    assert commands[0] == "promptkd distill --seed 2"
    assert last == (
        "2 of 3 runs to do, 20 steps. About 20:00 of training and 2:00 of measuring, by the finished runs; "
        "loading and validation come on top."
    )


# ---- what is deleted ----


def test_models_that_runs_need_are_not_deleted(tmp_path):
    runs = [Planned("a", 1, {"student": f"{tmp_path}/out/kd/student", "teacher": ["t", f"x={tmp_path}/out/t"]})]
    first, second = models_needed_in(tmp_path / "out", runs, [None])
    assert f"{tmp_path}/out/kd/student is one that runs need" in first
    assert "x=" in second
    assert not models_needed_in(tmp_path / "other", runs)


@pytest.mark.parametrize("measurement", ["evaluate", "exposure_bias"])
def test_the_teacher_of_a_measurement_is_not_deleted(world, tmp_path, capsys, measurement):
    teacher = tmp_path / "out" / "kd-seed-1"
    measured = {measurement: {"data": [world.test], "teacher": str(teacher)}}
    said = run(capsys, "study", study_file(world, tmp_path / "out", keep_models=False, **measured)).err
    assert f"{teacher} is one that runs need" in said


def test_deleting_keeps_all_but_weights_and_checkpoints(tmp_path):
    folder = tmp_path / "kd-seed-1"
    for name in ("student/model.safetensors", "checkpoints/checkpoint-1/a", "prompt/b", "results.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x" * 1000)
    told = delete_models(folder)
    assert told == "kd-seed-1: deleted checkpoints, student (0.00 GB), as keep_models is false; its records stay."
    assert {each.name for each in folder.iterdir()} == {"prompt", "results.json"}
    assert delete_models(folder) == ""


@pytest.mark.slow
def test_a_study_that_keeps_no_models(world, tmp_path, capsys, monkeypatch):
    """Every checkpoint is measured before it goes, the run stays done, and what would need its student is refused."""
    monkeypatch.setattr("promptkd.study.processes.subprocess", StandIn(subprocess, Popen=ForkedCommand))
    out, measured = tmp_path / "out", {"data": [world.test], "every_checkpoint": True, "samples_per_row": 1}
    base = {"keep": None, "save_steps": 1}
    file = study_file(world, out, base, exposure_bias=measured, keep_models=False)
    ran = done(capsys, "study", file)
    assert "kd-seed-1: deleted checkpoints, student (" in ran.err
    assert not (out / "kd-seed-1" / "checkpoints").exists()
    curves = Results.read(out / "exposure-bias" / "kd-seed-1" / "results.json").curves
    assert [curve.model for curve in curves] == ["kd-seed-1 step 1", "kd-seed-1 step 2", "kd-seed-1"]
    kept = {path.relative_to(out) for path in out.rglob("*")}
    assert "1 of 1 runs are done already" in done(capsys, "study", file).err
    assert {path.relative_to(out) for path in out.rglob("*")} == kept
    file = study_file(world, out, base, exposure_bias=measured | {"limit": 3}, keep_models=False)
    said = run(capsys, "study", file).err
    assert "kd-seed-1: its student was deleted once it was measured" in said
    assert "of exposure_bias limit was None and is now 3" in said


@pytest.mark.slow
def test_a_finished_run_is_done_in_another_study_too(world, tmp_path, capsys, monkeypatch):
    """Copied with what was measured of it, though its student is gone; not if that was measured of another student."""
    monkeypatch.setattr("promptkd.study.processes.subprocess", StandIn(subprocess, Popen=ForkedCommand))
    measured = {
        "evaluate": {"data": [world.test], "seeds": [10]},
        "exposure_bias": {"data": [world.test], "samples_per_row": 1},
    }
    one, other = tmp_path / "one", tmp_path / "other"
    done(capsys, "study", study_file(world, one, keep_models=False, **measured))
    for part in ("", "evaluations", "exposure-bias"):
        shutil.copytree(one / part / "kd-seed-1", other / part / "kd-seed-1")
    file = study_file(world, other, keep_models=False, **measured)
    assert "1 of 1 runs are done already" in done(capsys, "study", file).err
    assert (other / "report.html").is_file()

    record = Results.read(other / "kd-seed-1" / "results.json")
    record.models["student"].sha256 = "another"
    record.write(other / "kd-seed-1" / "results.json")
    said = run(capsys, "study", file).err
    assert f"of evaluate model was '{one}/kd-seed-1' and is now '{other}/RUN'" in said
