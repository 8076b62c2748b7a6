"""`promptkd study`: what it plans and refuses, runs in processes of their own, and what it goes on with."""

import csv
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from rich.console import Console

import promptkd.cli.options.distill
from helpers.bias_records import biased_runs
from helpers.commands import (
    LIMITS,
    PROMPT_FILES,
    RUN_FILES,
    TEMPLATE,
    TRAINED_FILES,
    World,
    below,
    done,
    json_lines,
    make_world,
    run,
)
from helpers.processes import ForkedCommand, forked_command, killed
from helpers.standins import StandIn
from helpers.tiny import save_model, tiny_model
from promptkd.cli import study_runs
from promptkd.cli.commands.study import compare_and_report
from promptkd.cli.options.study import Options
from promptkd.cli.parsing.parser import merged_config, parse_options
from promptkd.cli.study_comparison import read_study, study_comparison, study_records
from promptkd.cli.study_runs import StudyRun
from promptkd.errors import RequestError
from promptkd.evaluation.pairing import Candidate
from promptkd.io.lock import locked
from promptkd.results import DataRecord, Evaluation, Metric, ModelRecord, Results, RowResult, Training, file_sha256
from promptkd.study.bias_pooling import pool_bias
from promptkd.study.loop import Table, carry_out, seconds_left
from promptkd.study.plan import Planned, arguments_of, plan_runs
from promptkd.study.pooling import both_ways, compare_groups, t_quantile, t_two_sided
from promptkd.study.processes import Job, LocalPool, Phase, shares, shell_line

RECIPE = Path(promptkd.__file__).parent / "recipes" / "study.yaml"
PAIR = {"student": "s", "teacher": "t", "data": "d"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def planned(methods, seeds=(1,), grid=None, base=PAIR, files=None):
    return plan_runs(base, methods, list(seeds), grid or {}, read_file=lambda path: (files or {})[str(path)])


def study_file(world: World, out: Path, /, steps: int = 2, **changes) -> Path:
    """A study of two steps a run, in a file beside its folder."""
    limits = {str(flag).removeprefix("--"): value for flag, value in zip(LIMITS[::2], LIMITS[1::2], strict=True)}
    base = {
        **{"student": world.student, "teacher": world.teacher, "data": world.train, "eval_data": world.valid},
        **{"max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "use_cpu": True, **limits},
    }
    settings = {"out": str(out), "base": base | changes.pop("base", {}), "methods": ["kd"], "seeds": [1]}
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(settings | changes))
    return file


# ---- the plan ----


def test_a_run_for_each_method_setting_and_seed():
    methods = ["kd", {"name": "gkd", "grid": {"beta": [0, 0.5, 1]}}]
    runs = planned(methods, [3, 1], {"learning_rate": [1e-4, 5e-5]})
    assert len(runs) == len({run.name for run in runs}) == 2 * 2 * (1 + 3)
    assert [run.seed for run in runs] == [3] * 8 + [1] * 8
    assert runs[0].name == "kd-learning_rate-0.0001-seed-3"
    assert runs[3].name == "gkd-learning_rate-0.0001-beta-0.5-seed-3"
    assert runs[3].settings == {**PAIR, "method": "gkd", "learning_rate": 1e-4, "beta": 0.5, "seed": 3}


def test_a_study_that_grows_keeps_the_names_it_has():
    small = planned(["kd"], [1], {"learning_rate": [1e-4]})
    large = planned(["gkd", "kd"], [2, 1], {"learning_rate": [5e-5, 1e-4]})
    assert small[0] in large


def test_the_nearer_setting_wins():
    files = {"base.yaml": {"alpha": 1, "beta": 1, "gamma": 1, "delta": 1, "seed": 9}, "m.yaml": {"beta": 2, "gamma": 2}}
    base = {"config": "base.yaml", "gamma": 3, "delta": 3, "eps": 3}
    method = {"name": "kd", "config": "m.yaml", "delta": 4}
    (found,) = planned([method], [5], {"zeta": [6]}, base, files)
    expected = {"alpha": 1, "beta": 1, "gamma": 3, "delta": 4, "eps": 3, "zeta": 6, "method": "kd", "seed": 5}
    assert found.settings == expected


def test_a_method_s_file_changes_nothing_that_the_base_shares_and_the_study_says_so():
    recipe = {"beta": 2, "gamma": 2, "delta": 2, "template": "a\n" * 30, "same": 5, "zeta": 7, "method": "promptkd"}
    files = {"base.yaml": {"beta": 1, "template": "", "same": 5}, "recipe": recipe}
    base = {"config": "base.yaml", "gamma": 3, "delta": 3}
    runs = planned(["kd", {"name": "own", "config": "recipe", "delta": 2}], [1, 2], {"zeta": [7, 8]}, base, files)
    shared = {"beta": 1, "gamma": 3, "template": "", "same": 5}
    assert all(run.settings.items() >= shared.items() for run in runs)
    assert {run.group.partition("-")[0]: run.settings["delta"] for run in runs} == {"kd": 3, "own": 2}
    told = "beta 1 (not 2), gamma 3 (not 2), template '' (not a a a a a a a a a a a a…)"
    told = f"own takes from the base and not from its own config: {told}. Set it in the method to change it."
    assert {run.note for run in runs} == {"", told}


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({"name": "fast", "method": "promptkd"}, "promptkd"),
        ({"name": "published", "config": "recipe"}, "promptkd"),
        ("kd", "kd"),
    ],
)
def test_the_name_is_the_method_unless_one_is_given(method, expected):
    (found,) = planned([method], files={"recipe": {"method": "promptkd"}})
    assert found.settings["method"] == expected


def test_values_that_no_folder_can_be_named_by_get_a_hash():
    names = [run.name for run in planned(["kd"], grid={"template": ["a b", "a/b", "a" * 300, "a" * 301, ""]})]
    assert len(set(names)) == 5
    assert all(len(name) < 60 and "/" not in name and " " not in name for name in names)


def test_arguments_give_the_settings_again():
    settings = {
        **{"student": "a b", "teacher": "-t", "data": "d", "out": "o", "merge": True, "student_lora_rank": 4},
        **{"eval_data": None, "template": "Q: {{ x }}\nA: ", "ab_alpha": -1e-05, "optim_args": ""},
        **{"model_init_kwargs": {"a": [1, None], "b": {"c": True}}, "report_to": ["wandb", "tensorboard"]},
    }
    merged = merged_config(*parse_options("distill", promptkd.cli.options.distill, arguments_of(settings)))
    assert {name: merged[name] for name in settings} == settings


@pytest.mark.parametrize("text", ["\U0001f600", "é\x7f\x85\u2028", "\\ud83d", 'a "b" \n'])
def test_arguments_give_every_character_again(text):
    settings = {**PAIR, "out": "o", "columns": {"instruction": text}, "chat_template_kwargs": {text: [text]}}
    merged = merged_config(*parse_options("distill", promptkd.cli.options.distill, arguments_of(settings)))
    assert {name: merged[name] for name in settings} == settings


def test_mappings_name_runs_as_they_did_before():
    named = [run.name for run in planned(["kd"], grid={"columns": [{"instruction": "é"}]})]
    assert named == ["kd-columns-instruction-u00e9-2d4099-seed-1"]


def test_a_method_may_begin_as_the_name_of_a_reference_does():
    assert [run.name for run in planned([{"name": name, "method": "kd"} for name in ("untrained-kd", "teachers")])] == [
        "untrained-kd-seed-1",
        "teachers-seed-1",
    ]


WRONG_PLANS = {
    "no method": ({"methods": []}, "at least one method"),
    "no seed": ({"seeds": []}, "at least one seed"),
    "a seed twice": ({"seeds": [1, 1]}, "Each seed must be given once. 1 is there twice"),
    "a negative seed": ({"seeds": [-1]}, "seeds must be 0 or more. Got -1"),
    "a method twice": ({"methods": ["kd", "KD"]}, "Two are called KD-seed-1, kd-seed-1"),
    "a value twice": ({"grid": {"alpha": [1, 1]}}, "Two are called kd-alpha-1-seed-1"),
    "a nameless method": ({"methods": [{"beta": 1}]}, "mappings with a name such as"),
    "a path for a name": ({"methods": ["../kd"]}, "a name becomes a folder's"),
    "a seed in base": ({"base": {"seed": 1}}, "base sets seed, but `seeds` lists the seeds"),
    "a folder in a method": ({"methods": [{"name": "kd", "out": "x"}]}, "kd sets out, but the study names"),
    "a secret": (
        {"base": {"hub_token": "hf_x"}},
        "base sets hub_token, but the study's file and commands are no place",
    ),
    "a method in base": ({"base": {"method": "kd"}}, "base sets method"),
    "a method in the grid": ({"grid": {"method": ["kd"]}}, "grid varies method; list several methods"),
    "base against grid": ({"base": {"beta": 1}, "grid": {"beta": [0]}}, "base sets beta, which grid varies"),
    "method against grid": (
        {"methods": [{"name": "kd", "beta": 1}], "grid": {"beta": [0]}},
        "kd sets beta, which the grid varies",
    ),
    "a grid without values": ({"grid": {"beta": []}}, "beta needs at least one value"),
    "no grid": ({"methods": [{"name": "kd", "grid": 3}]}, "kd: grid: expected a mapping"),
    "a key twice": ({"base": {"eval-data": "a", "eval_data": "b"}}, "duplicate key eval_data"),
    "a reference for a name": (
        {"methods": [{"name": "untrained", "method": "kd"}]},
        "untrained would be taken for a model that the study measures beside its methods. Give it another `name`",
    ),
    "one of several references for a name": (
        {"methods": [{"name": "teacher.b", "method": "kd"}]},
        "teacher.b would be",
    ),
    "no file": ({"base": {"config": 3}}, "config expects the path of a YAML file. Got 3"),
}


@pytest.mark.parametrize("case", WRONG_PLANS)
def test_a_wrong_plan(case):
    changes, message = WRONG_PLANS[case]
    with pytest.raises(RequestError) as caught:
        planned(**({"methods": ["kd"]} | changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)  # one problem, told once


def test_problems_of_a_plan_are_told_together():
    with pytest.raises(RequestError, match=r"(?s)^3 things are wrong.*seeds.*a/b.*Got 3"):
        planned(["a/b", 3], [])


# ---- what is refused before anything runs ----


def refused(capsys, file: Path, *arguments) -> str:
    before = sorted(file.parent.rglob("*"))
    ran = run(capsys, "study", file, *arguments)
    assert ran.status == 2, ran.err
    assert not ran.out
    assert sorted(file.parent.rglob("*")) == before
    return ran.err


def test_every_wrong_flag_of_every_run_is_told_at_once(world, tmp_path, capsys):
    methods = ["kd", "promtkd", {"name": "gkd", "beta": 7}, {"name": "b", "method": "kd", "beta": 0.5}]
    evaluate = {"data": [world.test, "none.jsonl"], "seeds": [1], "model": "m"}
    file = study_file(world, tmp_path / "out", methods=methods, seeds=[1, 2], evaluate=evaluate)
    said = refused(capsys, file, "--baseline", "sft")
    assert "6 things are wrong" in said
    assert "promtkd-seed-1 and 1 more: Expected a method of" in said
    assert "gkd-seed-1 and 1 more: --beta must lie in [0, 1]. Got 7." in said
    assert "b-seed-1 and 1 more: kd takes no beta" in said
    assert "all 8 runs: No such file or folder: none.jsonl" in said
    assert "evaluate sets model" in said
    assert "--baseline must be one of kd, promtkd, gkd, b. Got sft" in said


def test_each_data_set_is_read_once(world, tmp_path, capsys, monkeypatch):
    read = []
    read_examples = study_runs.read_examples
    monkeypatch.setattr(
        study_runs, "read_examples", lambda source, **limits: read.append(source) or read_examples(source, **limits)
    )
    evaluate = {"data": [world.test], "seeds": [1]}
    file = study_file(world, tmp_path / "out", methods=["kd", "promptkd"], seeds=[1, 2], evaluate=evaluate)
    assert "4 of 4 runs to do" in done(capsys, "study", file, "--dry-run").out
    assert sorted(read) == sorted([world.train, world.valid, world.test])

    read.clear()
    file = study_file(world, tmp_path / "out", seeds=[1, 2], base={"data": "none.jsonl"})
    assert "all 2 runs: No such file or folder: none.jsonl" in refused(capsys, file)
    assert read == ["none.jsonl"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": {"max_stpes": 3}}, "kd-seed-1: --max-stpes is unknown. Did you mean --max-steps?"),
        ({"sedes": [1]}, "the key sedes is unknown. Did you mean seeds?"),
        ({"base": {"data": "none.jsonl"}}, "No such file or folder: none.jsonl"),
        ({"evaluate": {"data": ["t"], "sedes": [1]}}, "--sedes is unknown. Did you mean --seeds?"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"cpus_per_run": 0}, "cpus_per_run must be at least 1"),
        ({"gpus_per_run": -1}, "gpus_per_run must be 0 or more"),
        ({"engine": "ray", "workers": 2}, "--workers is of this machine"),
        ({"ray_address": "x"}, "--ray-address goes with --engine ray"),
        ({"engine": "slurm"}, "engine expects one of local, ray"),
        ({"seeds": "x"}, "seeds expects one or more values, each a whole number"),
        (
            {"methods": ["kd", {"name": "long", "method": "kd", "max_completion_length": 9}], "evaluate": {"data": []}},
            "The runs differ in max_completion_length. Say in `evaluate`",
        ),
        (
            {"base": {"model_init_kwargs": '{"revision": '}, "evaluate": {"data": ["t"]}},
            "kd-seed-1: --model-init-kwargs expects a mapping",
        ),
        *(
            ({"base": {key: value}, "evaluate": {"data": ["t"]}}, f"kd-seed-1: {key} names a revision, and models")
            for key, value in {
                "teacher_model_revision": "v2",
                "teacher_model_init_kwargs": {"revision": "v2"},
                "model_init_kwargs": '{"revision": "v2"}',
            }.items()
        ),
    ],
)
def test_a_wrong_study(world, tmp_path, capsys, changes, message):
    assert message in refused(capsys, study_file(world, tmp_path / "out", **changes))


def test_what_nothing_would_measure_is_refused_before_its_models_are_deleted(world, tmp_path, capsys):
    methods = ["kd", {"name": "gkd", "eval_data": world.valid}]
    unmeasured = {"methods": methods, "seeds": [1, 2], "base": {"eval_data": None}, "keep_models": False}
    told = "keep_models: false would delete its student, which nothing measures. Give `eval_data` in `base`, or"
    said = refused(capsys, study_file(world, tmp_path / "out", **unmeasured))
    assert f"kd-seed-1 and 1 more: {told}" in said
    for more in ({"keep_models": True}, {"base": {}}, {"evaluate": {"data": [world.test]}}):
        file = study_file(world, tmp_path / "out", **(unmeasured | more))
        assert "4 of 4 runs to do" in done(capsys, "study", file, "--dry-run").out


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (
            {"eval_data": None},
            {"metrics": ["rouge_l"]},
            "asks for rouge_l, which is not measured of every run",
        ),
        (
            {"eval_data": None},
            {"metrics": ["loss"], "methods": ["kd", {"name": "gkd", "eval_data": "v"}]},
            "asks for loss, which is not measured of every run",
        ),
        (
            {"teacher": None, "kept_logits": "k"},
            {},
            "asks for kl_to_teacher, which is not measured of every run",
        ),
        ({"kept_logits": "k"}, {}, "asks for kl_to_teacher, which is not measured of every run"),
        ({"teacher": None, "kept_logits": "k"}, {"evaluate": {"data": ["t"]}}, "asks for kl_to_teacher, which is not"),
        ({"kept_logits": "k"}, {"evaluate": {"data": ["t"]}}, ""),
        ({"kept_logits": "k"}, {"evaluate": {"data": ["t"], "teacher": "t"}}, ""),
        ({}, {}, ""),
    ],
)
def test_metrics_are_those_that_validation_or_evaluate_measures(world, tmp_path, capsys, base, changes, message):
    file = study_file(world, tmp_path / "out", base=base, **({"metrics": ["kl_to_teacher"]} | changes))
    said = run(capsys, "study", file, "--dry-run").err
    assert message in said if message else "metrics asks for" not in said


@pytest.mark.parametrize("missing", [["student"], ["data"], ["student", "data"]])
def test_a_base_without_student_or_data(world, tmp_path, capsys, missing):
    changes = {"base": dict.fromkeys(missing), "seeds": [1, 2], "evaluate": {"data": [world.test]}}
    said = refused(capsys, study_file(world, tmp_path / "out", **changes))
    names = " and ".join(missing)
    assert f"all 2 runs: `base` names no {names.replace('and', 'and no')}. Give {names} there." in said
    assert "--resume" not in said


def test_a_problem_of_training_and_measuring_names_each_run_once(world, tmp_path, capsys):
    """The same message of both: the rows of training are measured, too, and there are none."""
    evaluate = {"data": ["none.jsonl"]}
    methods = ["kd", {"name": "wrong", "method": "kd", "data": "none.jsonl"}]
    said = refused(capsys, study_file(world, tmp_path / "out", methods=methods, seeds=[1], evaluate=evaluate))
    assert "all 2 runs: No such file or folder: none.jsonl" in said


def test_settings_of_loading_that_name_no_revision_are_measured(world, tmp_path, capsys):
    base = {
        "teacher_model_init_kwargs": {"attn_implementation": "sdpa"},
        "model_init_kwargs": '{"code_revision": "v2"}',
    }
    file = study_file(world, tmp_path / "out", base=base, evaluate={"data": [world.test]})
    assert "1 of 1 runs to do" in done(capsys, "study", file, "--dry-run").out


def test_a_file_is_missing(tmp_path, capsys):
    assert "CONFIG is missing: The study." in run(capsys, "study").err
    assert "expects a YAML file" in run(capsys, "study", tmp_path / "none.yaml").err
    assert "CONFIG expects a path" in run(capsys, "study", "a.yaml", "b.yaml").err


def test_ray_that_is_not_installed(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    file = study_file(world, tmp_path / "out")
    assert "pip install 'promptkd[ray]'" in refused(capsys, file, "--engine", "ray")


def test_a_dry_run_writes_nothing_and_its_commands_can_be_run(world, tmp_path, capsys):
    grid = {"learning_rate": [1e-3, 2e-3]}
    base = {"num_train_epochs": 3, "max_steps": -1, "gradient_accumulation_steps": 2}
    file = study_file(world, tmp_path / "out", methods=["kd", "promptkd"], seeds=[1, 2], base=base)
    settings = yaml.safe_load(file.read_text())
    del settings["base"]["learning_rate"]
    file.write_text(yaml.safe_dump(settings | {"grid": grid}))
    said = done(capsys, "study", file, "--dry-run").out
    assert list(tmp_path.iterdir()) == [file]
    assert "8 of 8 runs to do, 48 steps." in said  # 12 rows: 3 batches, 2 steps an epoch
    commands = [line for line in said.replace(TEMPLATE, "T").splitlines() if line.startswith("promptkd distill")]
    assert len(commands) == 8
    assert commands[0].endswith(f"--seed 1 --out {tmp_path}/out/kd-learning_rate-0.001-seed-1 --resume")


def test_a_recipe_in_a_study_keeps_to_the_lengths_of_the_base(world, tmp_path, capsys):
    lengths = tmp_path / "lengths.yaml"
    lengths.write_text("max_completion_length: 6\nlr_scheduler_type: constant\n")
    file = study_file(world, tmp_path / "out", methods=["kd", {"name": "own", "config": "promptkd-veto"}])
    settings = yaml.safe_load(file.read_text())
    settings["base"] = {
        k: v for k, v in settings["base"].items() if k not in ("max_completion_length", "learning_rate")
    }
    settings["base"]["config"] = str(lengths)
    file.write_text(yaml.safe_dump(settings))
    said = done(capsys, "study", file, "--dry-run").out
    commands = [line for line in said.replace(TEMPLATE, "T").splitlines() if line.startswith("promptkd distill")]
    assert ["--max-completion-length 6" in line for line in commands] == [True, True]
    assert ["--learning-rate 5e-05" in line for line in commands] == [False, True]
    told = "max_completion_length 6 (not 256)"
    assert told in said
    assert "lr_scheduler_type constant (not linear)" in said
    settings["base"]["max_steps"] = 1
    file.write_text(yaml.safe_dump(settings | {"methods": settings["methods"][1:]}))
    assert told in done(capsys, "study", file).err


def test_the_recipe_is_a_study(world, tmp_path, capsys):
    base = yaml.safe_load(RECIPE.read_text())["base"] | {
        **{"student": world.student, "teacher": world.teacher, "data": world.train, "eval_data": world.valid},
    }
    evaluate = {"data": [world.test], "seeds": [10, 20]}
    places = ("--out", tmp_path / "out", "--base", yaml.safe_dump(base, default_flow_style=True, width=10**6).strip())
    measured = ("--evaluate", yaml.safe_dump(evaluate, default_flow_style=True, width=10**6).strip())
    said = done(capsys, "study", RECIPE, *places, *measured, "--dry-run").out
    assert "36 of 36 runs to do, 18,000 steps." in said  # (4 + 2 of distillm) methods x 2 rates x 3 seeds
    assert said.count("promptkd evaluate") == 36 + 2  # the teacher and the untrained student, once each


# ---- running ----


@pytest.mark.slow
def test_a_page_that_the_disk_does_not_take_leaves_the_old_one(tmp_path, capsys):
    planned_run, out = Planned("kd", 1, {}), tmp_path / "out"
    folder = out / planned_run.name
    folder.mkdir(parents=True)
    Results(kind="distill", config={}).write(folder / "results.json")
    (out / "report.html").write_text("the old page")
    finished = StudyRun(planned_run, Job("kd-seed-1", folder, (), out / "log"), folder / "results.json", None)
    options = Options(config=out / "study.yaml", out=out, base={}, methods=["kd"], seeds=[1])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            compare_and_report(options, [finished])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (out / "report.html").read_text() == "the old page"
    compare_and_report(options, [finished])
    assert "<html" in (out / "report.html").read_text()


@pytest.mark.slow
def test_a_study_runs_goes_on_and_compares(world, tmp_path, capsys, monkeypatch):
    """Two methods x two seeds on two workers, one method failing until its student is there."""
    monkeypatch.setattr("promptkd.study.processes.subprocess", StandIn(subprocess, Popen=ForkedCommand))
    out, late = tmp_path / "out", tmp_path / "late"
    evaluate = {"data": [world.test], "seeds": [10]}
    methods = ["promptkd", {"name": "late", "method": "kd", "student": str(late)}]
    measured = {"evaluate": evaluate, "metrics": ["loss", "rouge_l"], "references": False}
    file = study_file(world, out, methods=methods, seeds=[1, 2], **measured)
    ran = run(capsys, "study", file, "--workers", 2)
    assert ran.status == 1
    assert "2 of 4 runs failed" in ran.err
    assert f"late-seed-2 (status 2), see {out}/logs/late-seed-2.log: promptkd distill: " in ran.err
    assert f"Try them again by: promptkd study {out}/config.yaml" in ran.err
    evaluated = {f"results{part}" for part in (".json", "-settings.json")}
    evaluated |= {f"results-test-{part}.jsonl" for part in ("greedy", "seed10", "references")}
    trained = RUN_FILES | below("student", TRAINED_FILES) | below("prompt", PROMPT_FILES)
    trained |= {"checkpoints/checkpoint-2"}
    finished = {"promptkd-seed-1", "promptkd-seed-2"}
    kept = {"config.yaml", "comparison.json", "report.html"}
    kept |= {f"logs/{name}-seed-{seed}.log" for name in ("promptkd", "late") for seed in (1, 2)}
    for name in finished:
        kept |= below(name, trained) | below(f"evaluations/{name}", evaluated)
    assert files(out) == kept
    first = {name: (out / name / "results.json").stat().st_mtime_ns for name in finished}

    save_model(late, tiny_model("llama", layers=2, hidden=16, seed=1))
    ran = done(capsys, "study", out / "config.yaml", "--workers", 2)
    assert "2 of 4 runs are done already" in ran.err
    assert "late-seed-1: started" in ran.err
    assert "promptkd-seed-1: started" not in ran.err
    assert {name: (out / name / "results.json").stat().st_mtime_ns for name in finished} == first
    results = Results.read(out / "comparison.json")
    assert results.kind == "study"
    page = (out / "report.html").read_text()
    assert "intervals over the seeds of training and the rows" in page
    assert "do not cover another training seed" not in page
    assert {(each.model, each.baseline) for each in results.differences} == {("late", "promptkd")}
    assert {each.metric for each in results.differences} == {"loss", "rouge_l"}
    losses = {each.model: each.metrics["loss"] for each in results.evaluations if "loss" in each.metrics}
    for group, figure in losses.items():
        each = [Results.read(out / f"evaluations/{group}-seed-{seed}/results.json") for seed in (1, 2)]
        own = [record.evaluations[0].metrics["loss"].value for record in each]
        assert figure.value == pytest.approx(np.mean(own))
        assert figure.deviation == pytest.approx(np.std(own, ddof=1))
    assert {name: cost.steps for name, cost in results.training.items()} == {"promptkd": 2, "late": 2}
    assert "late" in ran.out
    said = done(capsys, "study", file, "--dry-run").out
    assert "0 of 4 runs to do, 0 steps." in said

    settings = yaml.safe_load(file.read_text())
    settings["base"]["learning_rate"] = 5e-4
    file.write_text(yaml.safe_dump(settings))
    before = files(out)
    ran = run(capsys, "study", file)
    assert ran.status == 2
    assert "all 4 runs: --resume continues the run" in ran.err
    assert "learning_rate was 0.001 and is now 0.0005" in ran.err
    assert files(out) == before


def files(folder: Path) -> set[str]:
    """Every file of a study; of a checkpoint, its folder alone."""
    found = set()
    for path in (each.relative_to(folder) for each in folder.rglob("*") if each.is_file()):
        parts = path.parts[:3] if "checkpoints" in path.parts else path.parts
        found.add("/".join(parts))
    return found


@pytest.mark.slow
def test_a_study_that_is_killed_leaves_nothing_running_and_goes_on(world, tmp_path, capsys, monkeypatch):
    """The run that is killed with it is a process with an interpreter of its own, as it is for a user."""
    out = tmp_path / "out"
    file = study_file(world, out, steps=40, base={"save_steps": 10, "logging_steps": 10, "eval_strategy": "no"})
    study = forked_command(["study", file], tmp_path / "said", PYTHONPATH=os.pathsep.join(sys.path))
    checkpoints = out / "kd-seed-1" / "checkpoints"
    until(lambda: any(checkpoints.glob("checkpoint-*")), 120)
    with pytest.raises(RequestError, match=f"process {study} on "), locked(out, folder=True):
        pass
    (child,) = [each for each in psutil.Process(study).children() if "distill" in each.cmdline()]
    killed(study)
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 60)
    assert not (out / "kd-seed-1" / "results.json").exists()
    monkeypatch.setattr("promptkd.study.processes.subprocess", StandIn(subprocess, Popen=ForkedCommand))
    ran = done(capsys, "study", file)
    assert "kd-seed-1: done" in ran.err
    assert "Resuming from" in (out / "logs" / "kd-seed-1.log").read_text()
    logged = [line["step"] for line in json_lines(out / "kd-seed-1" / "metrics.jsonl")]
    assert logged == list(range(10, 41, 10))


def until(holds, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


# ---- processes, signals, the table ----


def job_of(folder: Path, name: str, *commands: tuple[str, ...]) -> Job:
    return Job(name, folder / name, commands, folder / f"{name}.log", steps=10)


@pytest.mark.slow
def test_a_job_that_fails_ends_its_own_commands_alone(tmp_path):
    version, wrong = ("--version",), ("no-such-command",)
    jobs = [
        job_of(tmp_path, "bad", wrong, version),
        job_of(tmp_path, "good", version, version),
        job_of(tmp_path, "more", version),
    ]
    console = Console(file=(tmp_path / "said").open("w"), width=60)
    assert carry_out(jobs, LocalPool([{}, {}]), console) is None
    assert {job.name: job.status for job in jobs} == {"bad": 2, "good": 0, "more": 0}
    assert (tmp_path / "good.log").read_text().count("$ promptkd --version\npromptkd ") == 2
    assert "There is no command 'no-such-command'" in (tmp_path / "bad.log").read_text()
    assert "--version" not in (tmp_path / "bad.log").read_text()
    console.file.close()
    said = (tmp_path / "said").read_text()
    assert "bad: failed (2) after" in said
    assert "2 done, 1 failed" in said.splitlines()[-1]


@pytest.mark.parametrize(("at_once", "statuses"), [(False, {-signal.SIGTERM, 143}), (True, {-signal.SIGKILL})])
def test_a_pool_stops_its_processes(tmp_path, at_once, statuses):
    os.mkfifo(tmp_path / "never")  # reading it waits for a writer
    job = job_of(tmp_path, "a", ("study", str(tmp_path / "never")), ("--version",))
    pool = LocalPool([{}])
    pool.start(job)
    assert not pool.has_room()
    assert pool.finished() == {}
    pool.stop(at_once=at_once)
    ended: dict[str, int] = {}
    until(lambda: ended.update(pool.finished()) or ended, 20)
    assert ended["a"] in statuses
    assert pool.has_room()
    assert "--version" not in job.log.read_text()


class Endless:
    """An engine whose jobs end when they are told to."""

    def __init__(self, deaf: bool = False):
        self.deaf, self.active, self.calls, self.ended = deaf, [], [], {}

    def has_room(self):
        return len(self.active) < 2

    def start(self, job):
        self.active.append(job.name)
        if len(self.active) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def has_begun(self, job):
        return True

    def finished(self):
        ended, self.ended = self.ended, {}
        return ended

    def stop(self, *, at_once):
        self.calls.append("kill" if at_once else "stop")
        if at_once:
            self.ended = dict.fromkeys(self.active, -9)
        elif self.deaf:
            os.kill(os.getpid(), signal.SIGTERM)  # SIGINT is not heard where the suite runs in the background
        else:
            self.ended = dict.fromkeys(self.active, 143)

    def close(self):
        self.calls.append("close")


@pytest.mark.slow
@pytest.mark.parametrize(("deaf", "calls"), [(False, ["stop", "close"]), (True, ["stop", "kill", "close"])])
def test_a_signal_stops_the_runs_and_a_second_one_ends_them(tmp_path, deaf, calls):
    jobs = [job_of(tmp_path, name) for name in "abc"]
    engine, handlers = Endless(deaf), [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    console = Console(file=(tmp_path / "said").open("w"))
    assert carry_out(jobs, engine, console) == signal.SIGTERM
    assert [job.phase for job in jobs] == [Phase.STOPPED, Phase.STOPPED, Phase.WAITING]
    assert engine.calls == calls
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    console.file.close()
    assert "2 stopped, 1 waiting" in (tmp_path / "said").read_text()


def test_workers_share_cores_and_gpus():
    assert shares(2, 8, [], {}) == [{"OMP_NUM_THREADS": "4"}] * 2
    assert shares(3, 2, [], {}) == [{"OMP_NUM_THREADS": "1"}] * 3
    assert shares(3, 8, ["4", "7"], {"OMP_NUM_THREADS": "2"}) == [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in "474"]


def test_the_last_words_of_a_log_cannot_reach_the_terminal_as_codes(tmp_path):
    (tmp_path / "a.log").write_text("first\n\x1b[31mred \n\n")
    assert job_of(tmp_path, "a").last_words() == "␛[31mred"
    assert job_of(tmp_path, "none").last_words() == ""


def test_a_command_is_shown_without_secrets():
    assert (
        shell_line(["distill", "--hub-token", "hf_x", "--data", "a b"])
        == "promptkd distill --hub-token '***' --data 'a b'"
    )


def test_the_time_that_is_left_goes_by_the_groups_steps_and_by_how_many_run_at_once(tmp_path):
    jobs = [job_of(tmp_path, f"kd-seed-{seed}") for seed in range(6)]
    assert [job.steps for job in jobs] == [10] * 6
    assert seconds_left(jobs, 2, 500.0) is None
    jobs[0].phase = Phase.DONE  # before this process
    assert seconds_left(jobs, 2, 500.0) is None
    jobs[1].phase, jobs[1].began, jobs[1].seconds = Phase.DONE, 100.0, 60.0
    jobs[2].phase, jobs[2].began = Phase.FAILED, 100.0
    jobs[3].phase, jobs[3].began = Phase.RUNNING, 480.0
    jobs[5].steps = 30
    measured = [job_of(tmp_path, name) for name in ("teacher", "trained before")]
    measured[0].steps, measured[1].steps_before = 0, 10
    for job in measured:
        job.phase, job.began, job.seconds = Phase.DONE, 100.0, 1000.0
    jobs += measured
    assert seconds_left(jobs, 2, 500.0) == 180  # that of the longest run
    assert seconds_left(jobs, 1, 500.0) == 40 + 60 + 180
    assert seconds_left(jobs, 1, 900.0) == 0 + 60 + 180
    assert seconds_left(jobs[:4], 2, 500.0) == 40
    assert seconds_left(jobs[:3], 2, 500.0) is None
    jobs[5].steps_before = 25  # it is resumed
    assert seconds_left(jobs, 2, 500.0) == (40 + 60 + 30) / 2
    slow = job_of(tmp_path, "skd-seed-1")
    slow.group, slow.phase, slow.began, slow.seconds = "skd", Phase.DONE, 100.0, 200.0
    jobs[4].group = "skd"
    assert seconds_left([*jobs, slow], 1, 500.0) == 40 + 200 + 30
    jobs[4].group = "of which none is done"
    assert seconds_left([*jobs, slow], 1, 500.0) == 40 + 260 / 2 + 30


def test_the_live_table(tmp_path):
    jobs = [job_of(tmp_path, f"kd-seed-{seed}") for seed in range(40)]
    (tmp_path / "kd-seed-7").mkdir()
    (tmp_path / "kd-seed-7" / "metrics.jsonl").write_text(
        '{"step": 3, "loss": 1.25}\n{"step": 4, "eval_loss": 2}\n{"ste'
    )
    file = (tmp_path / "screen").open("w+")
    table = Table(jobs, Console(file=file, force_terminal=True, width=70, height=12))
    with table.live:
        for seed, status in ((3, 0), (5, 1)):
            table.begun(jobs[seed])
            table.ended(jobs[seed], status, stopped=False)
        table.begun(jobs[7])
        file.truncate(0)
        table.refresh()
    file.seek(0)
    shown = file.read()
    (line,) = {line.split("\x1b")[0].rstrip() for line in shown.splitlines() if "kd-seed-7" in line}
    assert line.split()[-5:-1] == ["kd-seed-7", "running", "4/10", "1.250"]
    assert "failed (1)" in shown
    assert "1 done, 1 failed, 1 running, 37 waiting;" in shown
    assert "about 0:00 to go; 32 more runs" in shown


# ---- what the methods are compared by ----


@pytest.mark.parametrize(
    ("df", "t"), [(1, 12.7062), (2, 4.3027), (3.0, 3.1824), (10, 2.2281), (30, 2.0423), (1000, 1.9623)]
)
def test_students_t(df, t):
    assert t_quantile(df) == pytest.approx(t, rel=1e-4)
    assert t_two_sided(t, df) == pytest.approx(0.05, rel=1e-3)
    assert t_two_sided(-t, df) == t_two_sided(t, df)
    assert t_two_sided(0, df) == pytest.approx(1)


def test_both_ways_by_hand():
    by_seed, by_row = np.array([1.0, 3.0]), np.array([0.5, -0.5, 0.0])
    metric, p = both_ways(by_seed, by_row)
    seeds, rows = 2 / 2, 3 / 2 * 0.5  # Var(v) / S; R / (R - 1) Σ t²
    degrees = (seeds + rows) ** 2 / (seeds**2 / 1 + rows**2 / 2)
    reach = max(t_quantile(degrees) * (seeds + rows) ** 0.5, t_quantile(1) * seeds**0.5)
    assert (metric.value, metric.deviation) == (2, pytest.approx(2**0.5))
    assert (metric.low, metric.high) == (pytest.approx(2 - reach), pytest.approx(2 + reach))
    assert p == pytest.approx(max(t_two_sided(2 / (seeds + rows) ** 0.5, degrees), t_two_sided(2 / seeds**0.5, 1)))
    alike = np.array([2.0, 2.0])  # rows alone differ
    assert both_ways(alike, by_row)[1] == pytest.approx(t_two_sided(2 / rows**0.5, 2))
    assert both_ways(np.array([1.0]), by_row)[0].low is None
    assert both_ways(np.zeros(3), np.zeros(4)) == (Metric(value=0, rows=4), 1)  # without an interval of no width


def candidate(group: str, seed: int, scores, *, teacher: str = "t") -> Candidate:
    """A run whose row i has the score `scores[i]` under every decoding seed, and a loss over i + 1 tokens."""
    samples = [
        RowResult(
            row=row, seed=10, prompt=str(row), references=[], response="",
            scores={"rouge_l": score, "loss": score, "kl_to_teacher": score, "response_length": 1.0},
            tokens={"loss": row + 1},
        )
        for row, score in enumerate(scores)
    ]  # fmt: skip
    decoding = {"temperature": 1.0, "max_new_tokens": 8, "seeds": [10]}
    made = Evaluation(model="m", data="test", decoding=decoding, metrics={}, samples=samples)
    record = Results(kind="evaluate", evaluations=[made], data={"test": DataRecord(path="t", rows=3, sha256="ab")})
    record.models["teacher"] = ModelRecord(path=teacher, parameters=1, sha256="")
    return Candidate(f"{group}-{seed}", record, "m")


BETTER = {"rouge_l": "higher", "loss": "lower", "kl_to_teacher": "lower", "response_length": None}.get


def test_groups_are_compared_over_the_seeds_that_both_have():
    scores = {("a", 1): [1, 2, 3], ("a", 2): [2, 2, 5], ("b", 1): [3, 2, 4], ("b", 2): [4, 5, 6], ("b", 3): [9, 9, 9]}
    groups: dict[str, dict[int, Candidate]] = {"a": {}, "b": {}}
    for (group, seed), rows in scores.items():
        groups[group][seed] = candidate(group, seed, rows)
    made = compare_groups(groups, BETTER, baseline="a")
    found = {each.metric: each for each in made.differences}
    assert found.keys() == {"rouge_l", "loss", "kl_to_teacher"}
    assert found["rouge_l"].difference.value == pytest.approx(np.mean([9 - 6, 15 - 9]) / 3)
    weighted = {key: np.dot(rows, [1, 2, 3]) / 6 for key, rows in scores.items()}
    by_seed = [weighted["b", seed] - weighted["a", seed] for seed in (1, 2)]
    assert found["loss"].difference.value == pytest.approx(np.mean(by_seed))
    assert found["loss"].difference.deviation == pytest.approx(np.std(by_seed, ddof=1))
    parts = np.zeros(3)
    for seed in (1, 2):
        for sign, group in ((1, "b"), (-1, "a")):
            own = np.array(scores[group, seed]) - weighted[group, seed]
            parts += sign * own * np.array([1, 2, 3]) / 6 / 2
    assert found["loss"].p_value == pytest.approx(both_ways(np.array(by_seed), parts)[1])
    assert all(each.p_value <= each.p_adjusted for each in made.differences)
    (a, b) = made.evaluations
    assert (a.model, b.model) == ("a", "b")
    assert b.metrics["rouge_l"].value == pytest.approx(np.mean([3, 5, 9]))
    assert "a has no finished run of seed 3." in made.notes
    assert [each.metric for each in compare_groups(groups, BETTER, baseline="b", metrics=["loss"]).differences] == [
        "loss"
    ]


def test_the_loss_of_a_group_that_lacks_the_first_decoding_is_compared_in_the_other():
    groups = {group: {seed: candidate(group, seed, [1, 2, 3 + shift]) for seed in (1, 2)} for shift, group in
              enumerate("abc")}  # fmt: skip
    for group, seeds in groups.items():
        for each in seeds.values():
            (sampled,) = each.record.evaluations
            greedy = sampled.model_copy(update={"decoding": {"temperature": 0.0}})
            each.record.evaluations = [greedy] if group == "c" else [sampled, greedy]
    made = compare_groups(groups, BETTER, baseline="a", metrics=["loss"])
    assert [(each.data, each.model) for each in made.differences] == [("test, sampled", "b"), ("test, greedy", "c")]


def test_a_baseline_that_has_nothing_but_exposure_bias():
    groups = {"b": {seed: candidate("b", seed, [1, 2, 3]) for seed in (1, 2)}}
    beside = pool_bias(biased_runs({"a": 0.1, "b": 0.5}), {}, baseline="a")
    made = compare_groups(groups, BETTER, baseline="a", beside=beside)
    assert [(each.metric, each.model, each.baseline) for each in made.differences] == [("exposure_bias", "b", "a")]
    assert "a, the baseline, has nothing but exposure bias: nothing else is compared with it." in made.notes


def test_a_kl_to_different_teachers_is_not_compared():
    groups = {group: {seed: candidate(group, seed, [1, 2, 3], teacher=group) for seed in (1, 2)} for group in "ab"}
    made = compare_groups(groups, BETTER, baseline="a")
    assert {each.metric for each in made.differences} == {"rouge_l", "loss"}
    told = "kl_to_teacher of b was not compared: its record names another teacher, or context, than that of a."
    assert told in made.notes
    assert told not in compare_groups(groups, BETTER, baseline="a", metrics=["loss"]).notes
    with pytest.raises(RequestError, match=f"Nothing to compare: kl_to_teacher. {told}"):
        compare_groups(groups, BETTER, baseline="a", metrics=["kl_to_teacher"])


@pytest.mark.parametrize(("seed_spread", "row_spread"), [(1.0, 0.1), (0.1, 1.0), (1.0, 1.0)])
def test_no_more_than_five_percent_of_equal_methods_are_told_apart(seed_spread, row_spread):
    """Differences of 3 seeds on 40 rows, drawn with mean 0; rows alone would claim far more where seeds spread."""
    draw = np.random.default_rng(0)
    claimed = 0
    for _ in range(1000):
        table = (
            seed_spread * draw.normal(size=(3, 1)) + row_spread * 6 * draw.normal(size=40) + draw.normal(size=(3, 40))
        )
        by_row = table.mean(0) / 40
        claimed += both_ways(table.mean(1), by_row - by_row.mean())[1] <= 0.05
    assert claimed <= 65  # 50 expected at most; 3 standard deviations are 20


# ---- a study's folder ----


def made_study(folder: Path, seeds=(1, 2), shift: float = 0.0) -> Path:
    """A finished study of two methods, with what it measured beside them, made up."""
    settings = {"out": "elsewhere", "base": PAIR | {"config": "gone.yaml"}, "methods": ["a", "b"], "seeds": list(seeds)}
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | {"evaluate": {"data": ["t"]}}))
    for group, base in (("a", 1.0), ("b", 3.0 + shift)):
        for seed in seeds:
            record = candidate(group, seed, [base + seed, base, base + 0.5]).record
            record.write(folder / "evaluations" / f"{group}-seed-{seed}" / "results.json")
            cost = Training(method=group, steps=2, seconds=1.0, peak_memory_bytes=1)
            trained = Results(kind="distill", training={f"{group}-seed-{seed}": cost}, evaluations=record.evaluations)
            trained.write(folder / f"{group}-seed-{seed}" / "results.json")
    for label, value in (("teacher", 9.0), ("untrained", 0.5)):
        candidate(label, 0, [value, value, value + 1]).record.write(folder / "evaluations" / label / "results.json")
    return folder


def test_the_costs_of_a_study_of_one_seed_are_those_of_its_methods(tmp_path, capsys):
    done(capsys, "report", made_study(tmp_path / "s", seeds=(1,)), "--out", tmp_path / "table.tex")
    text = (tmp_path / "table.tex").read_text()
    costs = text.split("Sizes and cost of training")[1].split("\\midrule\n")[1].split("\\bottomrule")[0]
    assert [line.split(" & ")[0] for line in costs.splitlines()] == ["a", "b"]


def test_a_report_takes_a_studys_folder(tmp_path, capsys):
    done(capsys, "report", made_study(tmp_path / "s"), "--out", tmp_path / "table.tex")
    text = (tmp_path / "table.tex").read_text()
    table = text.split("\\midrule\n")[1].split("\\bottomrule")[0]
    rows = [line.split(" & ")[0] for line in table.splitlines()]
    assert rows == ["teacher", "a", "b", "untrained"]
    assert "training seeds and rows" in text
    costs = text.split("Sizes and cost of training")[1].split("\\midrule\n")[1].split("\\bottomrule")[0]
    assert [line.split(" & ")[0] for line in costs.splitlines()] == ["a", "b"]  # not their runs besides
    done(capsys, "report", tmp_path / "s", "--out", tmp_path / "data.csv")
    lines = list(csv.DictReader((tmp_path / "data.csv").open()))
    known = {line["model"]: line for line in lines if line["metric"] == "rouge_l"}
    assert float(known["a"]["value"]) == pytest.approx(np.mean([2, 1, 1.5, 3, 1, 1.5]))
    assert known["a"]["deviation"] != ""
    assert (float(known["teacher"]["value"]), known["teacher"]["deviation"]) == (pytest.approx(28 / 3), "")
    assert float(known["teacher"]["low"]) < float(known["teacher"]["high"])


def test_compare_takes_studies_and_single_runs(tmp_path, capsys):
    one, two = made_study(tmp_path / "one"), made_study(tmp_path / "two", shift=1.0)
    said = done(capsys, "compare", one, "--baseline", "b", "--metrics", "rouge_l", "--out", tmp_path / "c.json").out
    record = Results.read(tmp_path / "c.json")
    assert record.kind == "study"
    (difference,) = record.differences
    assert (difference.model, difference.baseline, difference.difference.value) == ("a", "b", pytest.approx(-2))
    assert {each.model for each in record.evaluations} == {"a", "b", "teacher", "untrained"}
    assert {name: cost.steps for name, cost in record.training.items()} == {"a": 2, "b": 2}
    assert "a against b" in said
    single = tmp_path / "single.json"
    candidate("m", 0, [5, 5, 6]).record.write(single)
    done(capsys, "compare", one, two, f"mine={single}", "--baseline", "one/a", "--out", tmp_path / "d.json")
    record = Results.read(tmp_path / "d.json")
    assert {each.model for each in record.differences} == {"one/b", "two/a", "two/b"}
    assert "mine" in {each.model for each in record.evaluations}


def rewritten(folder: Path, **changes) -> None:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | changes))


def sized(folder: Path) -> Path:
    """A study whose students have sizes, by the records of their training."""
    for file in folder.glob("*-seed-*/results.json"):
        record, name = Results.read(file), file.parent.name
        record.models["student"] = ModelRecord(path=f"{file.parent}/student", parameters=len(name), sha256=name)
        record.write(file)
    return folder


def test_compare_tells_what_students_of_studies_and_single_runs_cost(tmp_path, capsys):
    one, two = sized(made_study(tmp_path / "one")), sized(made_study(tmp_path / "two"))
    single = candidate("m", 0, [5, 5, 6]).record
    single.models["m"] = ModelRecord(path="m", parameters=7, sha256="m")
    single.training["m"] = Training(method="kd", steps=9, seconds=1.0, peak_memory_bytes=1)
    single.write(tmp_path / "single.json")
    asked = (f"mine={tmp_path / 'single.json'}", "--metrics", "rouge_l", "--out", tmp_path / "c.json")
    said = done(capsys, "compare", one, *asked).out
    record = Results.read(tmp_path / "c.json")
    assert {name: model.parameters for name, model in record.models.items()} == {"a": 8, "b": 8, "mine": 7}
    assert {name: cost.steps for name, cost in record.training.items()} == {"a": 2, "b": 2, "mine": 9}
    assert "Parameters" in said
    done(capsys, "compare", one, two, *asked, "--overwrite")
    record = Results.read(tmp_path / "c.json")
    assert record.models.keys() == {"one/a", "one/b", "two/a", "two/b", "mine"}
    assert record.models["two/a"].path == str(two / "a-seed-*")


@pytest.mark.slow
def test_a_study_whose_baseline_has_no_run_yet_is_shown_against_another(tmp_path):
    folder = made_study(tmp_path / "s")
    rewritten(folder, baseline="late", methods=["a", "late", "b"])
    study, *_ = study_records(folder)
    assert {(each.model, each.baseline) for each in study.differences} == {("b", "a")}
    told = "Interim: The baseline, late, has no finished run: until then, differences are from a."
    assert told in study.notes


@pytest.mark.slow
def test_what_a_study_cannot_compare_stands_on_its_page_all_the_same(tmp_path, capsys):
    folder = made_study(tmp_path / "one")
    for name in ("a-seed-2", "b-seed-1", "b-seed-2"):
        (folder / name / "results.json").unlink()
    for reference in ("teacher", "untrained"):
        (folder / "evaluations" / reference / "results.json").unlink()
    trained, measured = study_records(folder)
    assert [record.evaluations[0].samples[0].scores["rouge_l"] for record in (trained, measured)] == [2, 2]
    told = "The methods were not compared: A comparison takes two models or more. Got a."
    assert told in capsys.readouterr().err
    assert trained.notes[:2] == [
        "Interim: 1 of 4 runs are done. Methods with fewer than 2 seeds: a (1). Without a run: b.",
        told,
    ]


@pytest.mark.slow
def test_studies_and_runs_of_one_name_are_told_apart(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(name).mkdir()
        made_study(Path(name, "s"), shift=float(name == "b"))
        candidate("m", 0, [5, 5, 6]).record.write(Path(name, "run.json"))
    asked = ("--metrics", "rouge_l", "--out", "c.json", "--overwrite")
    done(capsys, "compare", "a/s", "b/s", *asked)
    found = {(each.model, each.baseline): each.difference.value for each in Results.read(Path("c.json")).differences}
    assert found == {("a/s/b", "a/s/a"): pytest.approx(2), ("b/s/a", "a/s/a"): 0, ("b/s/b", "a/s/a"): pytest.approx(3)}
    done(capsys, "compare", "s=a/s", "b/s", *asked)
    assert {each.model for each in Results.read(Path("c.json")).differences} == {"s/b", "b/s/a", "b/s/b"}
    for same in (("a/s", "a/s"), ("a/s", "./a/s"), ("s=a/s", "s=b/s"), ("a/s", "a/run.json", "b/run.json")):
        ran = run(capsys, "compare", *same)
        assert ran.status == 2
        assert re.search("must have a label of its own. Got .* twice; name a .* by LABEL=", ran.err)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--metrics", "bleu"), "Expected metrics that rows of two models have scores of: .*rouge_l.* Got bleu"),
        (("--baseline", "teacher"), "The baseline must be one of a, b. Got teacher"),
        (("--all-pairs",), "leave --all-pairs out"),
    ],
)
def test_what_a_study_is_not_compared_by(tmp_path, capsys, arguments, told):
    ran = run(capsys, "compare", made_study(tmp_path / "s"), *arguments)
    assert ran.status == 2
    assert re.search(told, ran.err)


def test_a_study_of_one_seed_and_one_without_a_finished_run(tmp_path, capsys):
    folder = made_study(tmp_path / "s", seeds=(1,))
    done(capsys, "compare", folder, "--out", tmp_path / "c.json")
    record = Results.read(tmp_path / "c.json")
    assert record.kind == "compare"
    assert {(each.model, each.baseline) for each in record.differences} == {("b", "a")}
    assert {each.model for each in record.evaluations} == {"a", "b", "teacher", "untrained"}
    for name in ("a-seed-1", "b-seed-1"):
        (folder / name / "results.json").unlink()
    for command in (("compare", folder), ("report", folder, "--out", tmp_path / "x.md")):
        ran = run(capsys, *command)
        assert ran.status == 2
        assert "No run of the study in" in ran.err


def test_metrics_that_nothing_measures_are_refused_before_any_run(world, tmp_path, capsys):
    own = tmp_path / "mine.py"
    own.write_text("def letters(prediction, references):\n    return 1.0\n")
    evaluate = {"data": [world.test], "metrics": [f"{own}:letters"]}
    file = study_file(world, tmp_path / "out", evaluate=evaluate, metrics=["bleu", "own:letters", "judge_score"])
    ran = run(capsys, "study", file)
    assert ran.status == 2
    assert "metrics asks for bleu, judge_score, which is not measured of every run: there are loss, rouge_l" in ran.err
    assert not (tmp_path / "out").exists()
    evaluate["metrics"] = [f"{own}:lost"]
    ran = run(capsys, "study", study_file(world, tmp_path / "out", evaluate=evaluate))
    assert ran.status == 2
    assert "has no lost, which should be a function" in ran.err
    evaluate["metrics"] = [f"{own}:letters"]
    file = study_file(world, tmp_path / "out", evaluate=evaluate, metrics=["letters", "kl_to_teacher"])
    said = done(capsys, "study", file, "--dry-run").out
    evaluations = said.split("promptkd evaluate ")[1:]
    models = [each.split()[1] for each in evaluations]
    assert models == [world.teacher, world.student, f"{tmp_path}/out/kd-seed-1"]
    assert [f"--teacher {world.teacher}" in line for line in evaluations] == [False, True, True]
    assert "Measured before them: teacher, untrained." in said


def test_a_method_of_ones_own_in_a_study(world, tmp_path, capsys):
    own = tmp_path / "mine.py"
    own.write_text(
        "from promptkd.methods import Method\nfrom promptkd.objectives import reverse_kl\n"
        "from promptkd.responses import ResponseMix\n\n\ndef half(share=0.5):\n"
        "    return Method(ResponseMix(share), reverse_kl)\n"
    )
    methods = ["kd", f"{own}:half", {"name": "quarter", "method": f"{own}:half", "method_settings": {"share": 0.25}}]
    said = done(capsys, "study", study_file(world, tmp_path / "out", methods=methods), "--dry-run").out
    assert all(f"{name}-seed-1" in said for name in ("kd", "half", "quarter"))
    assert """--method-settings '{"share": 0.25}'""" in said
    methods[2]["method_settings"] = {"part": 1}
    ran = run(capsys, "study", study_file(world, tmp_path / "out", methods=[*methods, f"{own}:lost"]))
    assert ran.status == 2
    assert "quarter-seed-1: " in ran.err
    assert "takes no part: its settings are share" in ran.err
    assert "has no lost" in ran.err


def test_a_file_of_ones_own_stays_as_it_was_when_the_study_began(world, tmp_path, capsys):
    own, out = tmp_path / "mine.py", tmp_path / "out"
    text = (
        "from promptkd.methods import Method\nfrom promptkd.objectives import reverse_kl\n"
        "from promptkd.responses import ResponseMix\n\nhalf = Method(ResponseMix(0.5), reverse_kl)\n"
        "def letters(prediction, references):\n    return 1.0\n"
    )
    own.write_text(text)
    hashes = {str(own): file_sha256(own)}
    file = study_file(world, out, methods=["kd", f"{own}:half"], seeds=[1, 2])
    said = done(capsys, "study", file, "--dry-run").out
    assert said.count(f"--method-sha256 {hashes[str(own)]}") == 2
    settings = yaml.safe_load(file.read_text())
    (out / "half-seed-1" / "student").mkdir(parents=True)
    for kept, run_kept in ((hashes, {}), ({}, {"method_sha256": hashes[str(own)]})):  # and of an older study
        (out / "config.yaml").write_text(yaml.safe_dump(settings | ({"file_sha256": kept} if kept else {})))
        (out / "half-seed-1" / "config.yaml").write_text(yaml.safe_dump({"method": f"{own}:half"} | run_kept))
        own.write_text(text + "# changed\n")
        ran = run(capsys, "study", file)
        assert ran.status == 2
        told = f"{own} has changed since this study began. Put it back, give another --out, or delete what was made"
        assert f"{told} with the file: {out}/half-seed-1." in ran.err
        assert "sha256" not in ran.err
        own.write_text(text)
    own.write_text(text + "# changed\n")
    (out / "half-seed-1" / "config.yaml").unlink()
    (out / "half-seed-1" / "student").rmdir()
    (out / "config.yaml").write_text(yaml.safe_dump(settings | {"file_sha256": hashes}))
    ran = done(capsys, "study", file, "--dry-run")
    assert "Nothing has been made with it yet: its runs take it as it is now." in ran.err
    assert f"--method-sha256 {file_sha256(own)}" in ran.out
    (out / "evaluations" / "half-seed-1").mkdir(parents=True)
    file = study_file(world, out, evaluate={"data": [world.test], "metrics": [f"{own}:letters"]})
    assert f"made with the file: {out}/evaluations." in run(capsys, "study", file).err


@pytest.mark.parametrize("is_older", [False, True])
def test_data_stay_as_they_were_when_the_study_began(world, tmp_path, capsys, is_older):
    out, data = tmp_path / "out", tmp_path / "train.jsonl"
    shutil.copy(world.train, data)
    file = study_file(world, out, base={"data": str(data)}, seeds=[1, 2])
    made, known = out / "kd-seed-1", {str(data): file_sha256(data)}
    made.mkdir(parents=True)
    if is_older:  # a study that kept no hashes of data: its records have them
        train = DataRecord(path=str(data), rows=8, sha256=known[str(data)])
        Results(kind="distill", data={"train": train}).write(made / "results.json")
    (made / "student").mkdir()
    own = yaml.safe_load(file.read_text()) | ({} if is_older else {"file_sha256": known})
    (out / "config.yaml").write_text(yaml.safe_dump(own))
    data.write_text(data.read_text().splitlines()[0])
    ran = run(capsys, "study", file)
    assert ran.status == 2
    told = f"{data} has changed since this study began. Put it back, give another --out, or delete what was made"
    assert f"{told} with the file: {made}." in ran.err
    shutil.copy(world.train, data)
    assert "has changed" not in run(capsys, "study", file, "--dry-run").err


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_copied_run_of_other_data_is_refused_whenever_it_comes(world, tmp_path, capsys, has_begun):
    """Also beside a run of the same data."""
    out = tmp_path / "out"
    file = study_file(world, out, seeds=[1, 2])
    for seed, sha256 in ((1, file_sha256(Path(world.train))), (2, "0" * 64)):
        train = DataRecord(path=world.train, rows=12, sha256=sha256)
        Results(kind="distill", data={"train": train}).write(out / f"kd-seed-{seed}" / "results.json")
    if has_begun:
        known = {"file_sha256": {world.train: file_sha256(Path(world.train))}}
        (out / "config.yaml").write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | known))
    told = f"{world.train} is another than that of some finished runs. Put it back, give another --out, or delete what"
    ran = run(capsys, "study", file, "--dry-run")
    assert ran.status == 2
    assert f"{told} was made with the file: {out}/kd-seed-2." in ran.err


def test_the_folder_of_a_run_is_no_studys(world, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.yaml").write_text(kept := "out: r\ndata: d\nkeep: 2\n")
    for more in ((), ("--dry-run",)):
        said = refused(capsys, study_file(world, out), *more)
        told = f"--out must be a study's folder, or a new one. {out}/config.yaml is no study's. Give another --out."
        assert told in said
    assert (out / "config.yaml").read_text() == kept
    file = study_file(world, out)  # the user's own file may lie there
    settings = {key: value for key, value in yaml.safe_load(file.read_text()).items() if key != "seeds"}
    (out / "config.yaml").write_text(yaml.safe_dump(settings))
    assert "1 of 1 runs to do" in done(capsys, "study", out / "config.yaml", "--seeds", 1, "--dry-run").out


@pytest.mark.slow
@pytest.mark.parametrize("what", ["data", "models"])
def test_seeds_trained_on_other_data_or_models_are_not_pooled(tmp_path, what):
    folder = made_study(tmp_path / "s")
    for name, sha256 in (("a-seed-1", "aaa"), ("a-seed-2", "bbb"), ("b-seed-1", "bbb"), ("b-seed-2", "bbb")):
        record = Results.read(folder / name / "results.json")
        record.data["train"] = DataRecord(path="d", rows=1, sha256=sha256 if what == "data" else "d")
        of_teacher = {"path": "t", "parameters": 1, "sha256": sha256 if what == "models" else "t"}
        record.models |= {"teacher": ModelRecord(**of_teacher), "student": ModelRecord(**of_teacher | {"sha256": name})}
        record.write(folder / name / "results.json")
    changed = "train data" if what == "data" else "teacher"
    told = f"a-seed-1 and a-seed-2 were not trained alike: the {changed} changed between them .sha256 aaa and bbb."
    with pytest.raises(RequestError, match=told):
        study_comparison(read_study(folder))
    shutil.copy(folder / "a-seed-1" / "results.json", folder / "a-seed-2")
    assert study_comparison(read_study(folder)).differences  # methods may differ


# ---- on a Ray cluster ----


@pytest.mark.slow
def test_a_ray_cluster_of_two_nodes_runs_a_study(world, tmp_path, capsys, monkeypatch):
    """Each node has one core and each run takes one, so that two runs at a time are on two nodes."""
    pytest.importorskip("ray", reason="ray is not installed: pip install 'promptkd[ray]'")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(**{key: value for key, value in node.items() if key != "include_dashboard"})
        cluster.wait_for_nodes()
        file = study_file(world, tmp_path / "out", methods=["kd", {"name": "bad", "method": "kd", "student": "none"}])
        on_ray = ("--engine", "ray", "--ray-address", cluster.address)
        said = run(capsys, "study", file, *on_ray, "--cpus-per-run", 2)
        assert said.status == 2
        assert "No node of the cluster has --cpus-per-run 2" in said.err
        said = run(capsys, "study", file, *on_ray, "--seeds", 1, 2)
        assert said.status == 1, said.err
        assert "2 of 4 runs failed" in said.err
        logs = {name: tmp_path / "out" / "logs" / f"{name}.log" for name in ("kd-seed-1", "bad-seed-1", "kd-seed-2")}
        begun, ended = {}, {}
        for name, log in logs.items():
            begun[name], ended[name] = span_of(log)
        assert max(begun["kd-seed-1"], begun["bad-seed-1"]) < min(ended["kd-seed-1"], ended["bad-seed-1"])
        assert begun["kd-seed-2"] + 1 > min(ended["kd-seed-1"], ended["bad-seed-1"])  # there was no third core
        assert "kd-seed-2: done" in said.err
        assert "bad-seed-1 (status 2), see" in said.err
        assert {each.model for each in Results.read(tmp_path / "out" / "comparison.json").evaluations} == {"kd"}
    finally:
        cluster.shutdown()


def span_of(log: Path) -> tuple[float, float]:
    """When a run's log was begun and last written."""
    begun = time.mktime(time.strptime(log.read_text()[:19], "%Y-%m-%d %H:%M:%S"))
    return begun, log.stat().st_mtime
