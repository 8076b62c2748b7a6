"""Every recipe is read by `promptkd distill`, says where its values come from, and trains."""

from pathlib import Path

import pytest

import promptkd.cli.options.distill
from helpers.commands import World, done, make_world, run
from promptkd.cli.parsing.config_file import read_config
from promptkd.cli.parsing.parser import merged_config, parse_options
from promptkd.errors import RequestError
from promptkd.methods import METHODS
from promptkd.results import Results

FOLDER = Path(promptkd.__file__).parent / "recipes"
RECIPES = {path.stem: path for path in sorted(FOLDER.glob("*.yaml")) if path.stem != "study"}  # see test_study
REQUIRED = ("--student", "S", "--teacher", "T", "--data", "D", "--out", "O")

# gmkim-ai/PromptKD, scripts/*/promptkd/*.sh: LR (and TEACHER_LR), BATCH_SIZE, GRAD_ACC, --epochs
PUBLISHED = {
    "gpt2-base": (5e-5, 2, 16, 20),
    "gpt2-medium": (1e-5, 2, 4, 20),
    "gpt2-large": (5e-6, 2, 4, 15),
    "opt-1.3b": (5e-6, 16, 1, 10),
    "opt-2.7b": (5e-6, 16, 1, 10),
    "opt-6.7b": (5e-6, 16, 1, 10),
    "llama-7b": (5e-6, 16, 1, 10),
}

SMALL = (
    "--no-preflight",
    *("--max_steps", 2, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2, "--use_cpu"),
    *("--max_prompt_length", 32, "--max_completion_length", 4, "--template", "Q: {{ instruction }} {{ input }}\nA: "),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def merged(path: Path, *flags: str) -> dict:
    parsed = parse_options("distill", promptkd.cli.options.distill, [*REQUIRED, "--config", str(path), *flags])
    return merged_config(*parsed)


def test_there_is_a_recipe_for_each_method_and_each_published_setting():
    assert RECIPES.keys() >= METHODS.keys()
    names = (*PUBLISHED, "context", "every", "qwen", "skd", "smollm2", "taid", "veto")
    others = {f"promptkd-{name}" for name in names}
    assert RECIPES.keys() - METHODS.keys() == others | {"summarization-promptkd", "dialogue-promptkd", "kd-kept"}


@pytest.mark.parametrize("name", RECIPES)
def test_the_command_reads_each_recipe_whole(name):
    ours, given = merged(RECIPES[name]), read_config(RECIPES[name])
    assert {key: ours[key] for key in given} == given
    others = {"promptkd-skd": "skd", "kd-kept": "kd"}
    assert ours["method"] == (name if name in METHODS else others.get(name, "promptkd"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_source_stands_beside_each_value(name):
    lines = RECIPES[name].read_text(encoding="utf-8").splitlines()
    bare = [line for line in lines if line and not line.startswith("#") and "  # " not in line]
    assert bare == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_settings_are_the_scripts(name):
    rate, batch, accumulation, epochs = PUBLISHED[name]
    config = read_config(RECIPES[f"promptkd-{name}"])
    assert config["learning_rate"] == config["prompt_learning_rate"] == rate
    assert config["per_device_train_batch_size"] == batch
    assert config["gradient_accumulation_steps"] == accumulation
    assert config["num_train_epochs"] == epochs
    assert config["warmup_steps"] == config["prompt_warmup_steps"] == 100
    assert config["lr_scheduler_type"] == config["prompt_lr_scheduler_type"] == "constant_with_warmup"
    assert config["weight_decay"] == config["prompt_weight_decay"] == 0.01
    assert config["max_prompt_length"] + config["max_completion_length"] == 512
    assert config["seed"] == 10


def test_flags_win_over_a_recipe():
    assert merged(RECIPES["gkd"])["beta"] == 1.0
    assert merged(RECIPES["gkd"], "--beta", "0.25")["beta"] == 0.25


def test_an_unknown_key_fails_and_the_nearest_known_one_is_named(tmp_path, capsys):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(RECIPES["promptkd"].read_text(encoding="utf-8") + "prompt_lenght: 7\n", encoding="utf-8")
    with pytest.raises(RequestError, match=r"prompt_lenght is unknown\. Did you mean prompt_length\?"):
        merged(wrong)
    ran = run(capsys, "distill", *REQUIRED, "--config", wrong)
    assert ran.status == 2
    assert "prompt_lenght is unknown" in ran.err


# of the published settings, which differ in numbers alone, one
TRAINED = [name for name in RECIPES if name == "promptkd-gpt2-base" or name.removeprefix("promptkd-") not in PUBLISHED]


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_each_recipe_takes_two_steps(world, tmp_path, capsys, name, monkeypatch):
    """As on a device that multiplies bfloat16, which most users have and this suite's machine may not."""
    for place in ("promptkd.precision", "promptkd.training.config"):
        monkeypatch.setattr(f"{place}.has_bfloat16_units", lambda device: True)
    out = tmp_path / "run"
    if name == "kd-kept":
        monkeypatch.chdir(tmp_path)  # where its kept_logits lie
        scored = ("--model", world.teacher, "--data", world.train, "--out", "train.logits", "--score")
        done(capsys, "generate", *scored, "--keep-logits", 8, *SMALL[-6:])
    pair = ("--student", world.student, "--teacher", world.teacher, "--data", world.train, "--out", out)
    done(capsys, "distill", "--config", RECIPES[name], *pair, *SMALL)
    record = Results.read(out / "results.json")
    assert [point["step"] for point in record.history[0].points] == [1, 2]
    chosen = {str(flag).removeprefix("--") for flag in SMALL}
    kept = {key: value for key, value in read_config(RECIPES[name]).items() if key not in chosen}
    assert {key: record.config[key] for key in kept} == kept
