"""From rows to a served model: answers end in transformers as they do here, whatever ends the base models brought."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.byte_level import END, START, byte_level, byte_model
from helpers.commands import done, json_lines, write_rows
from helpers.tiny import save_model
from promptkd.results import Results

pytestmark = pytest.mark.slow

LIMITS = ("--max_completion_length", 16, "--max_prompt_length", 160, "--per_device_train_batch_size", 8)
SLOWLY, FAST = (
    (*LIMITS, "--save_strategy", "no", "--lr_scheduler_type", "constant", "--learning_rate", rate, "--use_cpu")
    for rate in (3e-3, 1e-2)
)
SHORT = (*LIMITS, "--max_steps", 2, "--use_cpu", "--no-preflight", "--measure", "student")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTKD_CACHE", str(tmp_path / "cache"))


def base(folder, *, end, chat=True, **settings):
    """A base model that ends a text with `end` and was never trained to end a turn."""
    tokenizer = byte_level(chat=chat, end=end)
    eos = tokenizer.eos_token_id
    return save_model(folder, byte_model(hidden=32, eos_token_id=eos, pad_token_id=None, **settings), tokenizer)


def as_transformers_serves(folder, request):
    """The tokens that the saved folder answers with, by its own generation settings and nothing else."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    turn = [{"role": "user", "content": request}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        written = model.generate(**ids, max_new_tokens=16, do_sample=False)
    return written[0, ids["input_ids"].shape[1] :].tolist()


def test_a_tuned_chat_base_stops_when_transformers_serves_it(tmp_path, capsys):
    """Its template ends a turn with one token, the base ends a text with another, and only the first was trained."""
    folder = base(tmp_path / "base", end=START)
    said = [[{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": "ab"}] for n in range(8)]
    data = write_rows(tmp_path / "rows.jsonl", [{"messages": messages} for messages in said])
    out = tmp_path / "tuned"
    done(capsys, "sft", "--model", folder, "--data", data, "--out", out, "--max_steps", 50, *FAST)
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    written = as_transformers_serves(out / "model", "say 1")
    assert written == tokenizer("ab<|im_end|>", add_special_tokens=False)["input_ids"]
    ends = json.loads((out / "model" / "generation_config.json").read_text())["eos_token_id"]
    assert sorted(ends) == sorted(tokenizer.convert_tokens_to_ids([END, START]))
    answers = tmp_path / "answers.jsonl"
    done(capsys, "generate", "--model", out, "--data", data, "--out", answers, "--temperature", 0, *LIMITS[:4])
    assert all(line["ended"] and line["completion"] == "ab" for line in json_lines(answers))


def test_a_student_keeps_ending_where_it_and_its_teacher_end_with_different_tokens(tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", [{"instruction": f"say {n}", "output": "ab"} for n in range(8)])
    runs = {}
    for name, end, settings in (("student", START, {"seed": 1}), ("teacher", END, {"seed": 2, "layers": 3})):
        folder, runs[name] = base(tmp_path / name, end=end, chat=False, **settings), tmp_path / f"tuned-{name}"
        done(capsys, "sft", "--model", folder, "--data", data, "--out", runs[name], "--max_steps", 50, *FAST)
    out = tmp_path / "run"
    pair = ("--student", runs["student"], "--teacher", runs["teacher"], "--data", data, "--out", out)
    ran = done(capsys, "distill", *pair, "--method", "gkd", "--max_steps", 60, *SLOWLY)
    assert "End tokens differ" in ran.err + ran.out
    lines = [line for line in json_lines(out / "metrics.jsonl") if "cut_share" in line]
    assert lines[-1]["cut_share"] == 0
    assert lines[-1]["response_length"] < 5
    assert any("End tokens differ" in note for note in Results.read(out / "results.json").notes)


@pytest.mark.parametrize("student", ["folder", "gguf"])
def test_the_padding_of_heads_in_gguf_files_is_no_vocabulary(tmp_path, capsys, student):
    data = write_rows(tmp_path / "rows.jsonl", [{"instruction": f"the {n}", "output": "an"} for n in range(8)])
    tokenizer, models = byte_level("qwen2"), {}
    for name, extra, layers in (("teacher", 87, 3), ("student", 23, 2)):
        folder = save_model(tmp_path / name, byte_model("qwen2", extra=extra, layers=layers), tokenizer)
        models[name] = {"folder": folder, "gguf": tmp_path / f"{name}.gguf"}
        done(capsys, "export", folder, "--to", "gguf", "--out", models[name]["gguf"])
    pair = ("--student", models["student"][student], "--teacher", models["teacher"]["gguf"])
    done(capsys, "distill", *pair, "--data", data, "--out", tmp_path / "run", *SHORT)
    assert Results.read(tmp_path / "run" / "results.json").training
