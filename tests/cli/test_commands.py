"""Every command from its arguments to the files that it leaves, on tiny models."""

import importlib
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import promptkd.training.validation
from helpers.commands import (
    DISTILL_FILES,
    LIMITS,
    METRICS,
    MODEL_FILES,
    PROMPT_FILES,
    RUN_FILES,
    TEMPLATE,
    TRAINED_FILES,
    TRAINING,
    World,
    below,
    distill,
    done,
    hear_interrupts,
    held,
    json_lines,
    make_world,
    run,
    sft,
    steps,
    weights,
    write_rows,
)
from helpers.tiny import save_model, tiny_model, tiny_tokenizer
from promptkd.cli import COMMANDS
from promptkd.cli.parsing.config_file import read_config
from promptkd.cli.parsing.fields import choices, common_fields, training_fields
from promptkd.data import encode_examples, read_examples, resolve_template
from promptkd.methods import METHODS
from promptkd.results import Metric, Results, file_sha256
from promptkd.training.callbacks import ProgressBar
from promptkd.training.state_files import read_state

pytestmark = pytest.mark.slow

STEP = {"step", "epoch", "loss", "learning_rate", "grad_norm"}
DISTILLED = {"student_kl", "entropy", "top_overlap", "response_length", "cut_share"}
TIMED = {"tokens_per_second", "seconds_rollout", "seconds_prompt", "seconds_student"}
PROMPTED = {"prompt_kl", "prompt_regularizer", "lambda", "prompt_norm", "prompt_grad_norm", "prompt_learning_rate"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def record(folder: Path) -> Results:
    return Results.read(folder / "results.json")


# ---- prune ----


@pytest.mark.parametrize(
    ("choice", "kept"),
    [(("--layers", 2, "--rows", 8), None), (("--layers", 2, "--choose", "even"), [0, 3]), (("--keep", 1, 2), [1, 2])],
)
def test_prune(world, tmp_path, capsys, choice, kept):
    out = tmp_path / "deep" / "student"
    done(capsys, "prune", "--model", world.teacher, "--data", world.train, "--out", out, *LIMITS, *choice)
    assert held(out) == MODEL_FILES | {"results.json"}
    assert [each.name for each in out.parent.iterdir()] == ["student"]
    results = record(out)
    assert results.kind == "prune"
    if kept is None:
        influence = [results.metrics[f"influence_{index}"].value for index in range(4)]
        kept = sorted(sorted(range(4), key=influence.__getitem__)[2:])
    assert results.config["kept"] == kept
    assert results.models["student"].path == str(out)
    assert results.models["student"].sha256 == file_sha256(out / "config.json", out / "model.safetensors")
    student, teacher = (AutoModelForCausalLM.from_pretrained(each) for each in (out, world.teacher))
    assert student.config.num_hidden_layers == len(student.model.layers) == 2
    for mine, index in zip(student.model.layers, kept, strict=True):
        for name, tensor in mine.state_dict().items():
            assert torch.equal(tensor, teacher.model.layers[index].state_dict()[name])


def test_prune_replaces_its_own_student_alone(world, tmp_path, capsys):
    out = tmp_path / "student"
    request = ("prune", "--model", world.teacher, "--out", out)
    done(capsys, *request, "--keep", 0, 1)
    done(capsys, *request, "--keep", 2, "--overwrite")
    assert held(out) == MODEL_FILES | {"results.json"}
    assert record(out).config["kept"] == [2]
    (out / "notes.txt").write_text("mine")
    before = held(out)
    assert "holds notes.txt, which it did not write" in run(capsys, *request, "--keep", 1, "--overwrite").err
    assert held(out) == before


# ---- sft ----


def test_sft(world, tmp_path, capsys):
    out = tmp_path / "run"
    ran = done(capsys, *sft(world, out, "--eval-data", world.valid))
    assert held(out) == RUN_FILES | below("model", TRAINED_FILES) | {"checkpoints/checkpoint-3"}
    lines = json_lines(out / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert all(line.keys() >= STEP for line in lines[:3])
    results = record(out)
    assert results.kind == "sft"
    assert results.history[0].points == lines
    assert {name: data.rows for name, data in results.data.items()} == {"train": 12, "validation": 4}
    (evaluation,) = results.evaluations
    assert (evaluation.model, evaluation.data) == ("model", "validation")
    assert set(evaluation.metrics) == METRICS
    assert len(evaluation.samples) == 4
    assert "rouge" in ran.out.lower()
    AutoModelForCausalLM.from_pretrained(out / "model")


def test_the_loss_of_sft_counts_response_tokens_alone(world, tmp_path, capsys):
    one_batch = [12 if each == 4 else 1 if each == 3 else each for each in sft(world, tmp_path / "run")]
    done(capsys, *one_batch)
    model = AutoModelForCausalLM.from_pretrained(world.student)
    tokenizer = AutoTokenizer.from_pretrained(world.student)
    nats = tokens = 0.0
    for row in encode_examples(read_examples(world.train), tokenizer, LIMITS[-1]).examples:
        with torch.no_grad():
            logits = model(torch.tensor([row.prompt_ids + row.response_ids])).logits[0, len(row.prompt_ids) - 1 : -1]
        nats -= float(logits.log_softmax(-1)[range(len(row.response_ids)), row.response_ids].sum())
        tokens += len(row.response_ids)
    assert steps(tmp_path / "run")[0]["loss"] == pytest.approx(nats / tokens, rel=1e-4)


# ---- distill ----


@pytest.mark.parametrize("method", ["promptkd", "kd", "gkd"])
def test_distill(world, tmp_path, capsys, method):
    out = tmp_path / "run"
    done(capsys, *distill(world, out, "--method", method, "--preflight"))
    prompt = below("prompt", PROMPT_FILES) if method == "promptkd" else set()
    assert held(out) == DISTILL_FILES | below("student", TRAINED_FILES) | prompt | {"checkpoints/checkpoint-3"}

    lines = json_lines(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line.keys() >= STEP | DISTILLED | TIMED for line in lines)
    assert all(("repetition" in line) == (method != "kd") for line in lines)  # of the student's own responses
    assert all(PROMPTED & line.keys() == (PROMPTED if prompt else set()) for line in lines)

    config = read_config(out / "config.yaml")
    assert (config["method"], config["student"], config["out"]) == (method, world.student, str(out))
    assert (config["learning_rate"], config["max_steps"], config["template"]) == (1e-3, 3, LIMITS[-1])
    assert config["select"] == "rouge_l"  # a default
    assert not {"resume", "overwrite"} & config.keys()

    results = record(out)
    assert (results.kind, results.config) == ("distill", config)
    assert results.history[0].points == lines
    assert results.data["train"].sha256 == file_sha256(Path(world.train))
    saved = out / "student"
    assert results.models["student"].sha256 == file_sha256(saved / "config.json", saved / "model.safetensors")
    assert results.models["teacher"].path == world.teacher
    assert results.timings["train"] > 0
    assert not results.evaluations
    assert "<html" in (out / "report.html").read_text()

    loaded, info = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not any(info.values())
    start = AutoModelForCausalLM.from_pretrained(world.student)
    assert all(not torch.equal(new, old) for new, old in zip(loaded.parameters(), start.parameters(), strict=True))
    assert weights(saved) == weights(out / "checkpoints" / "checkpoint-3")


def test_the_prompt_loads_in_peft_on_the_teacher(world, tmp_path, capsys):
    out = tmp_path / "run"
    done(capsys, *distill(world, out, "--prompt_length", 5, "--prompt_learning_rate", 0.1))
    teacher = AutoModelForCausalLM.from_pretrained(world.teacher)
    ids = torch.tensor([[5, 9, 12]])
    prompted = PeftModel.from_pretrained(teacher, out / "prompt")(input_ids=ids).logits
    saved = load_file(out / "prompt" / "adapter_model.safetensors")["prompt_embeddings"]
    assert saved.shape == (5, 24)
    whole = teacher(inputs_embeds=torch.cat([saved, teacher.get_input_embeddings()(ids)[0]])[None]).logits
    torch.testing.assert_close(prompted, whole)


@pytest.mark.parametrize(
    ("method", "folder", "files"),
    [
        ("promptkd", "prompt", PROMPT_FILES),
        ("promptkd-lora", "teacher_lora", PROMPT_FILES | {"README.md", "base_model.json"}),
        ("promptkd-full", "teacher", {"config.json", "generation_config.json", "model.safetensors"}),
        ("okd", "online_module", {"online_module.safetensors"}),
    ],
)
def test_whatever_of_the_teacher_is_trained_has_a_folder_of_its_own_and_validation_is_by_the_plain_one(
    world, tmp_path, capsys, method, folder, files
):
    """The KL is that to the teacher as it came: validation in the run equals evaluate on its student."""
    out, trained = tmp_path / "run", ("--method", method, "--prompt_learning_rate", 0.1)
    ran = done(capsys, *distill(world, out, "--eval-data", world.valid, "--select", "loss", *trained))
    told = record(out).metrics
    numbers, share = (told[f"teacher_trained_{name}"].value for name in ("numbers", "share"))
    assert f"{numbers:,.0f} parameters of the teacher are trained, {share:.4%} of its parameters" in ran.err
    assert share == pytest.approx(numbers / record(out).models["teacher"].parameters)
    student = RUN_FILES | below("student", TRAINED_FILES) | {"checkpoints/checkpoint-3"}
    assert held(out) == student | below(folder, files)
    lines = json_lines(out / "metrics.jsonl")
    moved = "prompt_norm" if method == "promptkd" else "adapter_distance"
    assert moved in [line for line in lines if "loss" in line][-1]

    request = ("evaluate", "--model", out, "--teacher", world.teacher, "--data", world.valid, *LIMITS)
    done(capsys, *request, "--out", tmp_path / "results.json", "--seeds", 10, "--measure", "student")
    inside, after = record(out), Results.read(tmp_path / "results.json")
    assert inside.evaluations[0].metrics == after.evaluations[0].metrics
    assert inside.evaluations[0].samples == after.evaluations[0].samples
    assert inside.models["teacher"] == after.models["teacher teacher"]
    last = [line for line in lines if "eval_loss" in line][-1]
    for name in METRICS | {"kl_to_teacher"}:
        assert last[f"eval_{name}"] == pytest.approx(inside.evaluations[0].metrics[name].value, rel=1e-6)

    shorter = [1 if each == 3 else each for each in distill(world, out, "--method", "kd", "--overwrite")]
    done(capsys, *shorter)
    assert held(out) == student - {"checkpoints/checkpoint-3"} | {"checkpoints/checkpoint-1"}


@pytest.mark.parametrize("merged", [False, True])
def test_a_lora_student_is_saved_as_an_adapter_or_merged(world, tmp_path, capsys, merged):
    out = tmp_path / "run"
    merge = ("--merge",) if merged else ()
    done(capsys, *distill(world, out, "--student-lora-rank", 2, "--eval-data", world.valid, *merge))
    of_adapter = PROMPT_FILES | {"README.md", "base_model.json", *TRAINED_FILES} - {"config.json", "model.safetensors"}
    files = TRAINED_FILES if merged else of_adapter
    assert {path.name for path in (out / "student").iterdir()} == files
    scored = ("--data", world.valid, "--teacher", world.teacher, "--out", tmp_path / "results.json", *LIMITS)
    scored += ("--measure", "student")
    done(capsys, "evaluate", "--model", out, *scored)
    inside, after = record(out).evaluations[0], Results.read(tmp_path / "results.json").evaluations[0]
    for name, metric in inside.metrics.items():  # an adapter is merged when it is loaded, which rounds otherwise
        assert after.metrics[name].value == pytest.approx(metric.value, rel=1e-5)


# ---- generate ----


def test_generate(world, tmp_path, capsys):
    def answers(name, *arguments):
        out = tmp_path / name / "responses.jsonl"
        done(capsys, "generate", "--model", world.student, "--data", world.test, "--out", out, *LIMITS, *arguments)
        assert held(out.parent) == {"responses.jsonl"}
        return json_lines(out)

    lines = answers("a")
    assert [line["row"] for line in lines] == [0, 1, 2, 3, 4]
    assert set(lines[0]) == {"row", "prompt", "completion", "references", "tokens", "ended"}
    assert lines[0]["prompt"] == "Q: the 30 \nA: "
    assert lines[1]["references"] == ["abab"]
    assert all(0 < line["tokens"] <= 8 for line in lines)
    assert answers("b", "--batch-size", 2) == lines
    assert answers("c", "--limit", 3) == lines[:3]
    assert answers("d", "--seed", 11) != lines
    assert answers("e", "--temperature", 0) == answers("f", "--temperature", 0, "--seed", 11)


def test_generate_needs_no_references(world, tmp_path, capsys):
    data = write_rows(tmp_path / "requests.jsonl", [{"prompt": "the an"}, {"prompt": "an"}])
    out = tmp_path / "responses.jsonl"
    done(capsys, "generate", "--model", world.student, "--data", data, "--out", out, *LIMITS)
    assert [line["prompt"] for line in json_lines(out)] == ["the an", "an"]
    assert [line["references"] for line in json_lines(out)] == [[], []]


def test_generated_rows_are_read_back_token_for_token(world, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", [{"instruction": "say <|end|> now"}, {"instruction": "the"}])
    out, model = tmp_path / "responses.jsonl", tmp_path / "model"
    save_model(model, tiny_model("llama", layers=2), tiny_tokenizer(chat=True))
    done(capsys, "generate", "--model", model, "--data", data, "--out", out, "--max-completion-length", 8)
    tokenizer, template = tiny_tokenizer(chat=True), resolve_template("auto", tiny_tokenizer(chat=True))
    asked, read = (
        encode_examples(read_examples(path), tokenizer, template, need_response=False)
        for path in (data, write_rows(tmp_path / "read.jsonl", [{**line, "ended": True} for line in json_lines(out)]))
    )
    assert [row.prompt_ids for row in read.examples] == [row.prompt_ids for row in asked.examples]
    assert ["prompt_token_ids" in line for line in json_lines(out)] == [True, False]


def test_generated_responses_are_data_for_distill(world, tmp_path, capsys):
    lengths = ("--max_prompt_length", 40, "--max_completion_length", 120)
    request = ("generate", "--model", world.teacher, "--data", world.train, "--template", TEMPLATE, *lengths)
    done(capsys, *request, "--out", tmp_path / "all.jsonl")
    done(capsys, *request, "--out", tmp_path / "ended.jsonl", "--ended-only")
    ended = [line for line in json_lines(tmp_path / "all.jsonl") if line["ended"]]
    assert json_lines(tmp_path / "ended.jsonl") == ended
    assert 4 <= len(ended) < 12
    training = ("--method", "seqkd", "--max_steps", 1, "--per_device_train_batch_size", 4, "--use_cpu", *lengths)
    models = ("--student", world.student, "--teacher", world.teacher, "--out", tmp_path / "run")
    done(capsys, "distill", *models, "--data", tmp_path / "ended.jsonl", *training)
    used = record(tmp_path / "run").data["train"]
    assert used.rows + used.dropped == len(ended)
    with_cut = ("distill", *models, "--data", tmp_path / "all.jsonl", *training, "--overwrite")
    told = done(capsys, *with_cut).err
    found = record(tmp_path / "run").data["train"]
    assert (found.rows, found.dropped, found.cut) == (used.rows, used.dropped, 12 - len(ended))
    assert f"{12 - len(ended)} responses that were cut at the length limit" in told
    ran = run(capsys, *with_cut, "--overlong", "error")
    assert ran.status == 2
    assert "the response was cut at the length limit" in ran.err


# ---- report ----


def test_report(world, tmp_path, capsys):
    done(capsys, *distill(world, tmp_path / "first", "--eval-data", world.valid))
    done(capsys, *sft(world, tmp_path / "second", "--eval-data", world.valid))
    out = tmp_path / "pages" / "page.html"
    named = (tmp_path / "first", tmp_path / "second" / "results.json")
    ran = done(capsys, "report", *named, "--out", out, "--title", "Two runs & a title")
    assert held(out.parent) == {"page.html"}
    page = out.read_text()
    assert "Two runs &amp; a title" in page
    assert 'src="http' not in page
    assert "rouge" in ran.out.lower()
    assert "exists" in run(capsys, "report", tmp_path / "first", "--out", out).err
    done(capsys, "report", tmp_path / "first", "--out", out, "--overwrite")
    assert "Two runs" not in out.read_text()


# ---- one after another ----


def test_the_whole_way(world, tmp_path, capsys, monkeypatch):
    """sft of the teacher, prune, sft, distill, generate, evaluate and report, by relative paths and run folders."""
    monkeypatch.chdir(tmp_path)
    training = (*TRAINING, "--data", world.train, "--eval-data", world.valid)
    done(capsys, "sft", "--model", world.teacher, "--out", "runs/teacher", *training)
    done(capsys, "prune", "--model", "runs/teacher", "--layers", 2, "--data", world.train, "--out", "student", *LIMITS)
    done(capsys, "sft", "--model", "student", "--out", "runs/recovered", *training)
    models = ("--student", "runs/recovered", "--teacher", "runs/teacher")
    done(capsys, "distill", *models, "--out", "runs/promptkd", *training)
    done(capsys, "generate", "--model", "runs/promptkd", "--data", world.test, "--out", "responses.jsonl", *LIMITS)
    scored = ("--data", world.test, "--teacher", "runs/teacher", "--out", "results.json")
    done(capsys, "evaluate", "--model", "runs/promptkd", *scored, *LIMITS)
    done(capsys, "report", "runs/promptkd", "runs/recovered", "student", "results.json", "--out", "report.html")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        *("runs", "student", "responses.jsonl", "report.html", "results.json", "results-settings.json"),
        *(f"results-test-{part}.jsonl" for part in ("seed10", "greedy", "references")),
        *(f"results-test-teacher-{part}.jsonl" for part in ("seed10", "greedy", "references")),
    }
    run_record, scores = record(Path("runs/promptkd")), Results.read(Path("results.json"))
    assert scores.models["promptkd"].sha256 == run_record.models["student"].sha256
    assert scores.models["teacher teacher"].sha256 == record(Path("runs/teacher")).models["model"].sha256
    answers = [line["completion"] for line in json_lines(Path("responses.jsonl"))]
    assert answers == [sample.response for sample in scores.evaluations[0].samples]


# ---- resuming ----


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Ctrl-C when so many optimizer steps are done."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(ProgressBar, "on_step_begin", on_step_begin)


LONGER = ("--max_steps", 6, "--save_steps", 3, "--lr_scheduler_type", "cosine")


def longer(request: list[object], *arguments: object) -> list[object]:
    """Six steps in place of three, with a checkpoint in their middle."""
    place = request.index("--max_steps")
    return [*request[:place], *request[place + 2 :], *LONGER, *arguments]


@pytest.mark.parametrize(("command", "after"), [(distill, 5), (sft, 3)])  # two steps behind a checkpoint, and at it
def test_a_run_that_was_interrupted_ends_like_one_that_was_not(world, tmp_path, capsys, monkeypatch, command, after):
    done(capsys, *longer(command(world, tmp_path / "whole")))
    with monkeypatch.context() as patch:
        interrupt(patch, after)
        ran = run(capsys, *longer(command(world, tmp_path / "cut")))
    assert ran.status == 130
    request = [command.__name__, "--out", tmp_path / "cut", "--resume"]
    shown = shlex.join(map(str, request))
    assert ran.err.endswith(f"\npromptkd {command.__name__}: Interrupted. To resume: promptkd {shown}\n")
    assert "Traceback" not in ran.err
    assert held(tmp_path / "cut") == {"config.yaml", "metrics.jsonl", "checkpoints/checkpoint-3"}
    assert len(steps(tmp_path / "cut")) == after

    ran = done(capsys, *request)
    assert "Resuming from" in ran.err
    assert held(tmp_path / "cut") == held(tmp_path / "whole")
    assert steps(tmp_path / "cut") == steps(tmp_path / "whole")
    assert len(steps(tmp_path / "cut")) == 6
    for file in ("student/model.safetensors", "prompt/adapter_model.safetensors", "model/model.safetensors"):
        if (tmp_path / "whole" / file).exists():
            assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


def test_sft_counts_its_tokens_on(world, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        run(capsys, *longer(sft(world, out)))
    done(capsys, *longer(sft(world, out, "--resume")))
    counts = [line["num_tokens"] for line in steps(out)]
    assert counts == sorted(counts)


def test_an_interrupted_run_keeps_its_best_checkpoint(world, tmp_path, capsys, monkeypatch):
    chosen = ("--eval-data", world.valid, "--select", "loss", "--eval_steps", 1)
    requests = {name: distill(world, tmp_path / name, *chosen) for name in ("whole", "cut")}
    done(capsys, *requests["whole"])
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        assert run(capsys, *requests["cut"]).status == 130
    done(capsys, *requests["cut"], "--resume")
    assert steps(tmp_path / "cut") == steps(tmp_path / "whole")
    assert weights(tmp_path / "cut" / "student") == weights(tmp_path / "whole" / "student")
    assert record(tmp_path / "cut").evaluations == record(tmp_path / "whole").evaluations


def test_resuming_by_the_runs_own_configuration(world, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    done(capsys, *distill(world, out))
    whole = weights(out / "student")
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        assert run(capsys, *distill(world, out, "--overwrite")).status == 130  # how it was begun is no setting
    assert not (out / "results.json").exists()
    before = (out / "config.yaml").read_bytes()
    done(capsys, "distill", "--config", out / "config.yaml", "--resume")
    assert (out / "config.yaml").read_bytes() == before
    assert weights(out / "student") == whole


@pytest.mark.parametrize("last", [3, 4])  # the end of an epoch, and the middle of the next
def test_resuming_a_finished_run_changes_nothing(world, tmp_path, capsys, last):
    out = tmp_path / "run"
    request = [last if each == 3 else each for each in distill(world, out)]
    done(capsys, *request)
    before = weights(out / "student"), json_lines(out / "metrics.jsonl"), held(out)
    done(capsys, *request, "--resume")
    assert (weights(out / "student"), json_lines(out / "metrics.jsonl"), held(out)) == before


def test_resuming_with_other_settings_is_refused(world, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt(patch, 1)
        run(capsys, *distill(world, out))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    ran = run(capsys, *distill(world, out, "--resume", "--prompt_length", 3))
    assert ran.status == 2
    assert "prompt_length was None and is now 3" in ran.err
    assert f"--out {out} --resume" in ran.err
    ran = run(capsys, "distill", "--out", out, "--resume", "--prompt_length", 3)
    assert ran.status == 2
    assert "prompt_length was None and is now 3" in ran.err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("command", [distill, sft])
def test_a_run_is_not_resumed_on_other_rows(world, tmp_path, capsys, monkeypatch, command):
    out, data = tmp_path / "run", tmp_path / "train.jsonl"
    data.write_text(text := Path(world.train).read_text())
    asked = longer(command(world._replace(train=str(data)), out))
    with monkeypatch.context() as patch:
        interrupt(patch, 4)
        run(capsys, *asked)
    data.write_text(text.replace("the 3", "an 3"))
    ran = run(capsys, *asked, "--resume")
    assert ran.status == 2
    assert "the training rows are others than when it was written" in ran.err
    data.write_text(text)
    done(capsys, *asked, "--resume")


def test_the_settings_of_a_moved_run_are_found_with_it(world, tmp_path, capsys, monkeypatch):
    out, moved = tmp_path / "run", tmp_path / "moved"
    done(capsys, *longer(sft(world, tmp_path / "whole")))
    with monkeypatch.context() as patch:
        interrupt(patch, 4)
        run(capsys, *longer(sft(world, out)))
    out.rename(moved)
    done(capsys, "sft", "--resume", "--keep", 3, "--out", moved)
    assert not out.exists()
    assert weights(moved / "model") == weights(tmp_path / "whole" / "model")
    assert read_config(moved / "config.yaml")["keep"] == 3


def test_resume_alone_needs_a_run_of_the_same_command(world, tmp_path, capsys):
    done(capsys, *sft(world, tmp_path / "run"))
    nothing = tmp_path / "nothing"
    told = {
        nothing: f"takes the settings of the run in --out, but {nothing / 'config.yaml'} is not there.",
        tmp_path / "run": "so another command wrote it. Resume a run with the command that started it.",
    }
    for out, message in told.items():
        ran = run(capsys, "distill", "--out", out, "--resume")
        assert (ran.status, ran.err.count("\n")) == (2, 1)
        assert message in ran.err
        assert not nothing.exists()
    (tmp_path / "run" / "config.yaml").write_text("model: [")
    assert "not readable as YAML" in run(capsys, "sft", "--out", tmp_path / "run", "--resume").err
    assert "--model is missing" in run(capsys, "sft", "--out", tmp_path / "run").err


# ---- configuration ----


def test_flags_win_over_the_file_and_the_file_over_the_defaults(world, tmp_path, capsys):
    file = tmp_path / "kd.yaml"
    limits = "max-prompt-length: 40\nmax_completion_length: 8\nper_device_train_batch_size: 4\nuse_cpu: true\n"
    models = (
        f"student: {world.student}\nteacher: {world.teacher}\ndata: {world.train}\ntemplate: '{{{{ instruction }}}}'\n"
    )
    rest = "method: kd\nmax_steps: 5\nlearning_rate: 2e-3\nlr_scheduler_type: constant\n"
    file.write_text(models + limits + rest)
    done(capsys, "distill", "--config", file, "--max-steps=2", "--out", tmp_path / "run")
    lines = steps(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2]  # the flag's
    assert lines[0]["learning_rate"] == 2e-3  # the file's
    assert "prompt_kl" not in lines[0]
    merged = read_config(tmp_path / "run" / "config.yaml")
    assert (merged["max_steps"], merged["method"], merged["select"]) == (2, "kd", "rouge_l")

    done(capsys, "distill", "--config", tmp_path / "run" / "config.yaml", "--out", tmp_path / "again")
    assert steps(tmp_path / "again") == lines
    assert weights(tmp_path / "again" / "student") == weights(tmp_path / "run" / "student")


# ---- which checkpoint is kept ----


@pytest.mark.parametrize(
    ("select", "figures", "best"),
    [
        ("rouge_l", (1.0, 3.0, 2.0), 2),
        ("kl_to_teacher", (3.0, 1.0, 2.0), 2),
        ("loss", (1.0, 2.0, 3.0), 1),
        ("last", (3.0, 1.0, 2.0), 3),
    ],
)
def test_the_best_checkpoint_by_validation_is_kept(world, tmp_path, capsys, monkeypatch, select, figures, best):
    summarize, told = promptkd.training.validation.summarize, iter(figures)

    def told_figures(scored):
        metrics = summarize(scored)
        return metrics if select == "last" else metrics | {select: Metric(value=next(told))}

    monkeypatch.setattr(promptkd.training.validation, "summarize", told_figures)
    out = tmp_path / "run"
    keep = ("--keep", 5, "--save_strategy", "steps", *(("--save_steps", 1) if select == "last" else ()))
    validation = ("--eval-data", world.valid, "--eval_steps", 1, "--select", select)
    done(capsys, *distill(world, out, *validation, *keep))
    kept = load_file(out / "student" / "model.safetensors")
    for step in (1, 2, 3):
        checkpoint = out / "checkpoints" / f"checkpoint-{step}"
        saved = load_file(checkpoint / "model.safetensors")
        assert all(torch.equal(kept[name], tensor) for name, tensor in saved.items()) == (step == best)
        prompt = read_state(checkpoint / "method")["adapter"]["embeddings"]
        final = load_file(out / "prompt" / "adapter_model.safetensors")["prompt_embeddings"]
        assert torch.equal(prompt, final) == (step == best)


def test_validation_comes_with_every_epoch_or_as_asked(world, tmp_path, capsys):
    def validated(name, *arguments):
        done(capsys, *sft(world, tmp_path / name, "--eval-data", world.valid, *arguments))
        return [line["step"] for line in json_lines(tmp_path / name / "metrics.jsonl") if "eval_loss" in line]

    assert validated("epochs") == [3]
    assert validated("steps", "--eval_steps", 2) == [2, 3]
    assert validated("never", "--eval_strategy", "no") == []
    assert len(record(tmp_path / "never").evaluations) == 1  # the finished model is measured all the same


# ---- from outside ----


def python(*arguments: object, **settings) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, preexec_fn=hear_interrupts, **pipes, **settings)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_no_library_that_takes_seconds(command):
    process = python("-X", "importtime", "-m", "promptkd", *([command] if command else []), "--help")
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert f"Usage: promptkd {command or 'COMMAND'}" in stdout
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in stderr.splitlines() if "|" in line}
    assert "promptkd" in imported  # so the listing was read
    assert not imported & {
        "torch",
        "transformers",
        "trl",
        "datasets",
        "peft",
        "accelerate",
        "numpy",
        "pydantic",
        "yaml",
    }


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("distill", {"--prompt-kl", "--student-share", "--lr-scheduler-type", "--use-vllm", "--deepspeed"}),
        ("sft", {"--overlong", "--eval-temperature", "--lr-scheduler-type", "--deepspeed"}),
    ],
)
def test_help_all_shows_the_training_flags(capsys, command, flags):
    shown = shown_flags(done(capsys, command, "--help-all").out)
    assert shown >= flags
    assert shown >= shown_flags(done(capsys, command, "--help").out)
    assert len(shown) > 100


@pytest.mark.parametrize("name", ["distill", "sft"])
def test_common_training_flags_are_what_their_classes_say(name):
    """Read from the source for `--help`, they have the types, defaults and texts of the imported classes."""
    command = importlib.import_module(f"promptkd.cli.options.{name}")
    known = training_fields(command)
    for field in common_fields(command):
        if field.name == "method":
            assert sorted(choices(field.annotation)) == sorted(METHODS)
            field = replace(field, annotation=known["method"].annotation)
        assert field == replace(known[field.name], limits={})  # the help does not show them


def shown_flags(text: str) -> set[str]:
    return {line.split()[0].rstrip(",") for line in text.splitlines() if line.startswith("  --")}
