"""The memory estimate against what autograd keeps, its parts against shapes, and the dry run that prints it."""

import os
import re

import pytest
import torch
from peft import LoraConfig

from commands import TRAINING, done, make_world, run
from promptkd.data.packing import right_pad
from promptkd.engine import response_hidden
from promptkd.engine.recompute import recomputed_layers
from promptkd.methods import named_method
from promptkd.results import Results
from promptkd.training.memory import MemoryEstimate, estimate_memory, pass_cost
from tiny import VOCABULARY, tiny_model
from trainers import trainer

pytestmark = pytest.mark.usefixtures("own_engine")  # what the estimate says is worked out here for packed rows
WORD = 4 * VOCABULARY  # bytes of a token's logits


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def kept_by_autograd(model, lengths, prompt=None):
    requests = [[row + 1] for row in range(len(lengths))]  # that have no beginning in common
    batch = right_pad(requests, [[7] * (length - 1) for length in lengths])
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        response_hidden(model, batch, prompt)
    weights = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    return sum(each.untyped_storage().nbytes() for place, each in kept.items() if place not in weights)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])  # gemma2: a soft cap, whose scores are kept
def test_activations_are_those_that_autograd_keeps(architecture):
    model, lengths = tiny_model(architecture, layers=4, hidden=32), [70, 12, 33]
    read = [length - 1 for length in lengths]  # nothing is predicted from the last token
    assert pass_cost(model).kept(read) == pytest.approx(kept_by_autograd(model, lengths), rel=0.1)


def test_activations_of_long_rows_follow_from_short_ones():
    model = tiny_model(layers=4, hidden=32, max_position_embeddings=1024)
    assert pass_cost(model).kept([799]) == pytest.approx(kept_by_autograd(model, [800]), rel=0.1)


def test_a_prompted_pass_keeps_less_and_a_recomputed_one_far_less():
    model, lengths = tiny_model(layers=6, hidden=32).requires_grad_(False), [50, 20]
    prompt = torch.zeros(5, 32, requires_grad=True)
    behind = [length - 1 + 5 for length in lengths]
    prompted = pass_cost(model, prompted=True)
    assert prompted.kept(behind) == pytest.approx(kept_by_autograd(model, lengths, prompt), rel=0.1)
    with recomputed_layers(model):
        held = kept_by_autograd(model, lengths, prompt)
    recomputed = pass_cost(model, prompted=True, recomputed=True)
    assert recomputed.kept(behind) == pytest.approx(held, rel=0.1)
    assert held < 0.4 * prompted.kept(behind)
    assert prompted.working(behind) == prompted.kept(behind) // 6


def test_the_peak_is_what_stands_and_the_largest_phase():
    estimate = MemoryEstimate(
        {"weights": 5, "process": 2}, {"rollout": {"cache": 3, "logits": 1}, "update": {"all": 6}}
    )
    assert (estimate.largest, estimate.peak) == ("update", 13)


def test_parts_follow_from_the_shapes(tmp_path):
    made = trainer(tmp_path, method=named_method("promptkd"), gradient_accumulation_steps=2)
    student = 4 * sum(each.numel() for each in made.model.parameters())
    teacher = 4 * sum(each.numel() for each in made.teacher_model.parameters())
    prompt = 4 * 7 * 24
    estimate = estimate_memory(made)
    assert estimate.standing["student's weights"] == pytest.approx(student, rel=0.02)  # and the rotary frequencies
    assert estimate.standing["teacher's weights"] == pytest.approx(teacher + prompt, rel=0.02)
    assert estimate.standing["optimiser states"] == 2 * (student + prompt)
    assert set(estimate.phases) == {"rollout", "prompt step", "student step", "update"}
    assert estimate.phases["prompt step"]["adapter's gradients"] == prompt
    assert estimate.phases["prompt step"]["logits"] == 3 * 32 * WORD  # of three models, 4 x 8 tokens
    assert estimate.phases["student step"]["gradients"] == student + 4 * VOCABULARY * 16
    assert (
        estimate.phases["rollout"]["key-value cache"] == 2 * 2 * 8 * 4 * (16 + 8) * 8
    )  # 2 layers, 1 head of 8, 8 rows
    assert estimate.peak == sum(estimate.standing.values()) + max(
        sum(each.values()) for each in estimate.phases.values()
    )


def test_what_a_run_does_not_do_takes_no_memory(tmp_path):
    data = estimate_memory(trainer(tmp_path / "a", method=named_method("kd")))
    assert set(data.phases) == {"student step", "update"}
    lora = trainer(tmp_path / "b", peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = 4 * sum(each.numel() for each in lora.model.parameters() if each.requires_grad)
    estimate = estimate_memory(lora)
    assert estimate.standing["optimiser states"] == 2 * (trained + 4 * 7 * 24)
    assert estimate.phases["update"]["gradients"] == trained


def test_recomputing_and_smaller_chunks_are_seen(tmp_path):
    def prompt_step(name, **settings):
        return estimate_memory(trainer(tmp_path / name, **settings)).phases["prompt step"]

    plain = prompt_step("a")
    recomputed = prompt_step("b", teacher_gradient_checkpointing=True)
    assert recomputed["activations of the teacher"] < 0.8 * plain["activations of the teacher"]
    small = prompt_step("c", chunk_tokens=4)
    assert small["logits"] == 3 * 4 * WORD


def distill(world, out, *arguments):
    pair = ("--student", world.student, "--teacher", world.teacher)
    return ("distill", *pair, "--data", world.train, "--out", out, *TRAINING, *arguments)


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_dry_run_says_what_a_run_will_need_and_writes_nothing(world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = files(world.folder)
    validation = ("--eval-data", world.valid, "--eval_steps", 1, "--report_to", "tensorboard")
    ran = done(capsys, *distill(world, tmp_path / "run", *validation, "--dry-run"))
    assert not os.listdir(tmp_path)
    assert files(world.folder) == before
    said = dict(
        line.split(None, 1) if line.startswith("rows") else re.split(r"\s{2,}", line.strip(), maxsplit=1)
        for line in ran.out.splitlines()
        if "  " in line.strip()
    )
    assert said["rows"] == "12"
    assert said["optimiser steps"] == "3 of 4 rows"
    assert said["rollouts a step"] == "up to 4"
    assert said["teacher"].startswith("168 trained, ")
    assert "measured on one step after one to warm up" in said["seconds a step"]
    for part in ("process", "student's weights", "teacher's weights", "optimiser states", "key-value cache", "peak"):
        assert "GiB" in said[part]


def test_a_dry_run_without_rollouts_and_one_that_is_to_go_on(world, tmp_path, capsys):
    ran = done(capsys, *distill(world, tmp_path / "run", "--dry-run", "--method", "kd", "--limit", 4))
    assert "none, the data's responses serve" in ran.out
    refused = run(capsys, *distill(world, tmp_path / "run", "--dry-run", "--resume"))
    assert refused.status == 2
    assert "Leave --resume out" in refused.err
    assert not (tmp_path / "run").exists()


def test_a_run_says_its_peak_beside_the_predicted_one(world, tmp_path, capsys):
    out = tmp_path / "run"
    ran = done(capsys, *distill(world, out, "--prompt-refresh", "stale"))
    assert re.search(r"Peak memory \d+\.\d\d GiB\. \d+\.\d\d GiB had been predicted\.", ran.err)
    (training,) = Results.read(out / "results.json").training.values()
    assert training.predicted_memory_bytes > 0
    # the stale prompt is another algorithm, and is called one wherever the run is spoken of
    assert training.method == "promptkd, stale prompt"
    assert "another algorithm than PromptKD" in ran.err
    assert "another algorithm than PromptKD" in (out / "report.html").read_text()


def test_a_dry_run_of_a_run_of_one_step_takes_one(world, tmp_path, capsys):
    request = list(distill(world, tmp_path / "run", "--dry-run"))
    request[request.index("--max_steps") + 1] = 1
    ran = done(capsys, *request)
    assert "the run's only step" in ran.out
