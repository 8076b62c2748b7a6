"""The recipes of the package: listed, printed, and taken by their names."""

import ast
from pathlib import Path

import pytest
import yaml

from helpers.commands import distill, done, make_world, run
from promptkd.cli.parsing.config_file import read_config
from promptkd.cli.recipes import recipes, summary_of


def test_they_are_listed_with_a_line_each(capsys):
    lines = done(capsys, "recipe").out.splitlines()
    assert len(lines) == len(recipes()) > 25
    assert {line.split()[0] for line in lines} == recipes().keys()
    assert {"kd", "promptkd-opt-1.3b", "study", "launch/fsdp2", "minimal_loop"} <= recipes().keys()


@pytest.mark.parametrize("name", recipes())
def test_each_is_printed_as_it_stands_under_a_line_that_says_what_it_is(capsys, name):
    file = recipes()[name]
    text = done(capsys, "recipe", name).out
    assert text == file.read_text(encoding="utf-8")
    (ast.parse if file.suffix == ".py" else yaml.safe_load)(text)
    summary = summary_of(file)
    assert summary.endswith(".")
    assert 20 < len(summary) < 120


@pytest.mark.parametrize(("name", "told"), [("minilm", "Did you mean minillm?"), ("xyz", "lists them")])
def test_a_wrong_name_is_refused(capsys, name, told):
    ran = run(capsys, "recipe", name)
    assert ran.status == 2
    assert told in ran.err
    assert "kd" not in ran.out


def test_a_configuration_is_a_file_or_else_a_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gkd").mkdir()  # a run's folder, say
    assert read_config(Path("gkd"))["method"] == "gkd"
    (tmp_path / "kd").write_text("method: mine")
    assert read_config(Path("kd")) == {"method": "mine"}
    ran = run(capsys, "distill", "--config", "nothing")
    assert ran.status == 2
    assert "nothing: No such file or directory. A recipe goes by its name; `promptkd recipe` lists them." in ran.err


@pytest.mark.slow
def test_a_run_by_a_recipes_name(tmp_path, capsys):
    world = make_world(tmp_path)
    done(capsys, *distill(world, tmp_path / "run", "--config", "gkd"), "--gradient_accumulation_steps", 1)
    used, recipe = read_config(tmp_path / "run" / "config.yaml"), read_config(recipes()["gkd"])
    assert used["method"] == "gkd"
    assert (used["beta"], used["student_share"]) == (recipe["beta"], recipe["student_share"])
