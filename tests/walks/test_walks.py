"""Ways through the product that users take, from their files to what they came for: the scripts beside this file.

A script is for people to read and run. Here its commands run in this process, one after the other, on tiny models.
"""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.byte_level import byte_level, byte_model
from helpers.commands import write_rows
from helpers.leaks import pickles_in
from helpers.processes import ForkedCommand
from helpers.standins import StandIn
from helpers.tiny import save_model
from helpers.tiny_demo import make_tiny_demo
from promptkd.cli import main
from promptkd.models import load_model
from promptkd.results import Results

HERE = Path(__file__).parent
SCRIPTS = ("lora_teacher.sh", "own_method.sh", "demo.sh")
SIZES = {"STEPS": "2", "BATCH": "4", "LAYERS": "2", "TOKENS": "8"}

pytestmark = pytest.mark.slow


def commands(script: str, sizes: dict[str, str] = SIZES) -> list[list[str]]:
    """The words of each promptkd command of a script, with `sizes` for its variables."""
    lines = (HERE / script).read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    found = [shlex.split(line) for line in lines if line.startswith("promptkd ")]
    return [[re.sub(r"\$(\w+)", lambda name: sizes[name[1]], word) for word in words[1:]] for words in found]


def walk(script: str, capsys: pytest.CaptureFixture[str], sizes: dict[str, str] = SIZES) -> str:
    """Run a script's commands; return all that they printed."""
    told = ""
    for words in commands(script, sizes):
        status = main(words)
        captured = capsys.readouterr()
        assert status == 0, f"promptkd {shlex.join(words)}\n{captured.err}"
        told += captured.out + captured.err
    return told


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to work in, with rows of a chat."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROMPTKD_CACHE", str(tmp_path / "cache"))
    for name, count in (("train", 12), ("valid", 4), ("test", 4)):
        rows = [
            {"messages": [{"role": "user", "content": f"the {name} {each}"}, {"role": "assistant", "content": "an"}]}
            for each in range(count)
        ]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    return tmp_path


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_a_script_that_stops_at_an_error(script):
    text = (HERE / script).read_text(encoding="utf-8")
    assert text.startswith("#!/bin/bash\n#")
    assert "set -euo pipefail" in text
    assert commands(script)


def test_from_a_lora_tuned_teacher_to_a_served_student(place, capsys):
    save_model(place / "base", byte_model("llama", layers=3, max_position_embeddings=1024), byte_level("smollm"))
    told = walk("lora_teacher.sh", capsys)
    student = AutoModelForCausalLM.from_pretrained(place / "serve/student", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(place / "serve/student")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        here, there = (model(**ids).logits for model in (student, load_model("runs/promptkd")))
    assert (here - there).abs().max() < 0.02 * there.abs().max()  # bfloat16
    ends = student.generation_config.eos_token_id
    assert tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends])
    assert load_model("serve/student.gguf").num_parameters() == student.num_parameters()
    assert "someone/student" in told
    assert not pickles_in(place)


def test_from_a_method_of_ones_own_to_a_table_for_a_paper(place, capsys, monkeypatch):
    monkeypatch.setattr("promptkd.study.processes.subprocess", StandIn(subprocess, Popen=ForkedCommand))
    tokenizer = byte_level("smollm")
    save_model(place / "teacher", byte_model("llama", layers=3, seed=2, max_position_embeddings=1024), tokenizer)
    save_model(place / "student", byte_model("llama", layers=2, seed=1, max_position_embeddings=1024), tokenizer)
    shutil.copy(HERE / "mine.py", place)
    study = (HERE / "study.yaml").read_text(encoding="utf-8")
    small = (
        study.replace("max_steps: 300", "max_steps: 2")
        .replace("seeds: [1, 2]", "seeds: [1]")
        .replace("size: 16", "size: 4")
        .replace("length: 256", "length: 8")
    )
    (place / "study.yaml").write_text(small, encoding="utf-8")
    walk("own_method.sh", capsys)
    table = (place / "paper/table.tex").read_text(encoding="utf-8")
    body = table.split("\\midrule\n")[1].split("\\bottomrule")[0]
    assert [line.split(" & ")[0] for line in body.splitlines()] == ["teacher", "kd", "hellinger", "untrained"]
    heads = table.split("\\toprule\n")[1].split("\\\\")[0]
    assert [each.split(" ")[0] for each in heads.split(" & ")] == ["Model", "Loss", "KL", "ROUGE-L"]
    assert {each.suffix for each in (place / "paper/figures").iterdir()} == {".svg", ".pdf"}
    measured = Results.read(place / "results/first.json").evaluations[0].metrics
    assert "own:answers_briefly" in measured


def test_the_demo_and_what_it_says_to_try(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(make_tiny_demo(tmp_path, monkeypatch))
    told = walk("demo.sh", capsys, {**SIZES, "LAYERS": "3"})
    script = (HERE / "demo.sh").read_text(encoding="utf-8")
    suggested = told.split("Try next:\n")[1].splitlines()
    assert all(each.strip() in script for each in suggested[:3])
    assert "ROUGE-L" in Path("demo.md").read_text(encoding="utf-8")
