"""LoRA folders in the commands: a later stage starts from exactly what the earlier one ended with."""

import json
import re

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model

from helpers.commands import LIMITS, TRAINING, distill, done, make_world, run
from promptkd.models import load_model
from promptkd.results import Results

pytestmark = pytest.mark.slow
IDS = torch.arange(60)[None]


STEPS = [each for each in TRAINING if each not in ("--learning_rate", 1e-3)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """With a LoRA-tuned teacher as PEFT saves it, without a tokenizer."""
    made = make_world(tmp_path_factory.mktemp("world"))
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(load_model(made.teacher), lora).save_pretrained(made.folder / "tuned")
    return made


@pytest.fixture
def first(world, tmp_path, capsys, monkeypatch):
    """The LoRA student of a first stage, whose own student was named relatively."""
    monkeypatch.chdir(world.folder)
    pair = ("--student", "student", "--teacher", "teacher", "--student-lora-rank", 4, "--method", "kd")
    settings = ("--data", "train.jsonl", "--learning_rate", 0.02, "--save_strategy", "no")
    done(capsys, "distill", *pair, *settings, *STEPS, "--out", tmp_path / "first")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "first"


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def close(one, other):
    torch.testing.assert_close(logits(one), logits(other), rtol=1e-4, atol=1e-4)


def test_a_student_of_an_earlier_stage_goes_through_every_later_one(world, first, tmp_path, capsys):
    start = load_model(first)
    assert (logits(start) - logits(load_model(world.student))).abs().max() > 0.1
    still = ("--data", world.train, "--learning_rate", 0, "--save_strategy", "no", *STEPS)
    distilled = ("distill", "--student", "first", "--teacher", world.teacher, "--method", "kd", *still, "--out")
    tuned = ("sft", "--model", "first", *still, "--out")
    ran = done(capsys, *distilled, tmp_path / "new", "--student-lora-rank", 2)
    told = f"The student is {world.folder}/student with {first}/student (LoRA of rank 4) merged into its weights."
    assert told in ran.err
    record = Results.read(tmp_path / "new" / "results.json")
    assert told in record.notes
    config = json.loads((tmp_path / "new" / "student" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"]) == (f"{world.folder}/student", 6)
    trained = r"[\d,]+ of [\d,]+ parameters are trained\."
    assert re.search(rf"New LoRA weights beside first: rank 2, {trained}", ran.err)
    assert "rollout" not in ran.err  # kd samples nothing
    assert "rollout" not in record.training["new"].peak_memory_by_phase
    ran = done(capsys, *distilled, tmp_path / "on", "--student-lora-continue", "--student-lora-rank", 4)
    assert re.search(rf"Training goes on with the adapter of first: rank 4, {trained}", ran.err)
    assert json.loads((tmp_path / "on" / "student" / "adapter_config.json").read_text())["r"] == 4
    done(capsys, *distilled, tmp_path / "whole")
    done(capsys, *tuned, tmp_path / "sft", "--lora-rank", 2)
    ran = done(capsys, *tuned, tmp_path / "goes on", "--lora-continue")
    assert re.search(rf"Training goes on with the adapter of first: rank 4, {trained}", ran.err)
    done(capsys, *tuned, tmp_path / "merged", "--lora-rank", 2, "--merge")
    for name in ("new", "on", "whole", "sft", "merged"):
        close(load_model(tmp_path / name), start)
    for name in ("new/student", "on/student", "sft/model"):
        close(AutoPeftModelForCausalLM.from_pretrained(tmp_path / name), start)
    assert (tmp_path / "merged" / "model" / "model.safetensors").is_file()


def test_a_tuned_teacher_without_a_tokenizer_serves_every_command(world, tmp_path, capsys):
    tuned, out = world.folder / "tuned", tmp_path / "run"
    done(capsys, *distill(world._replace(teacher=str(tuned)), out))
    assert "merged model" in (out / "prompt" / "base_model.json").read_text()
    scored = ("--data", world.valid, *LIMITS)
    done(capsys, "evaluate", "--model", tuned, "--teacher", tuned, *scored, "--out", tmp_path / "evaluated.json")
    record = Results.read(tmp_path / "evaluated.json")
    (model, teacher) = record.models.values()
    assert [each.path for each in model.adapters] == [str(tuned)]
    assert model.base.path == world.teacher
    assert model == teacher.model_copy(update={"path": model.path})
    assert record.evaluations[0].metrics["kl_to_teacher"].value == pytest.approx(0, abs=1e-6)
    assert any("(LoRA of rank 2) merged into its weights." in note for note in record.notes)
    done(capsys, "generate", "--model", tuned, *scored, "--out", tmp_path / "answers.jsonl")
    done(capsys, "chat", tuned, "--prompt", "the", "--max-completion-length", 4)
    done(capsys, "prune", "--model", tuned, "--layers", 2, "--choose", "even", "--out", tmp_path / "pruned")
    both = ("--teacher", tuned, "--student", tmp_path / "pruned", "--prompt", out, *scored)
    done(capsys, "exposure-bias", *both, "--samples-per-row", 1, "--out", tmp_path / "bias.json")
    done(capsys, "export", tuned, "--to", "safetensors", "--out", tmp_path / "exported", "--dtype", "f32")
    close(load_model(tmp_path / "exported"), load_model(tuned))


REFUSED = {
    "another rank": (("--student-lora-continue", "--student-lora-rank", 3), "rank is 3, and the adapter in .* has 4"),
    "another scale": (("--student-lora-continue", "--student-lora-alpha", 5), "alpha is 5, and the adapter .* has 32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_adapter_than_the_folders_cannot_go_on(world, first, tmp_path, capsys, case):
    flags, message = REFUSED[case]
    ran = run(capsys, *distill(world._replace(student="first"), tmp_path / "out", *flags))
    assert ran.status == 2
    assert re.search(message, ran.err)
    assert not (tmp_path / "out").exists()


def test_a_plain_student_has_no_adapter_to_go_on_with(world, tmp_path, capsys):
    ran = run(capsys, *distill(world, tmp_path / "out", "--student-lora-continue"))
    assert ran.status == 2
    assert "is a plain model. Leave it out; --student-lora-rank trains a new one." in ran.err
