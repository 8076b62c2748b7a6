"""Tiny models and data files on disk, and commands run in this process, for the tests of the command line."""

import json
import signal
from pathlib import Path
from typing import NamedTuple

import pytest

from helpers.tiny import save_model, tiny_model, tiny_tokenizer
from helpers.trainers import TIMINGS
from promptkd.cli import main

MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
TRAINED_FILES = MODEL_FILES | {"chat_template.jinja"}  # which writes the template of the training
PROMPT_FILES = {"adapter_config.json", "adapter_model.safetensors"}
METRICS = {
    *("loss", "rouge_l", "rouge_1", "exact_match", "eos_share", "cut_share"),
    *("response_length", "length_ratio", "distinct_1", "distinct_2"),
}
RUN_FILES = {"config.yaml", "metrics.jsonl", "results.json", "report.html"}
DISTILL_FILES = RUN_FILES | {"preflight.json"}

TEMPLATE = "Q: {{ instruction }} {{ input }}\nA: "
LIMITS = ("--max_prompt_length", 40, "--max_completion_length", 8, "--template", TEMPLATE)
TRAINING = (*LIMITS, "--max_steps", 3, "--per_device_train_batch_size", 4, "--learning_rate", 1e-3, "--use_cpu")


class World(NamedTuple):
    """What the commands start from."""

    folder: Path
    teacher: str
    student: str
    other: str
    """A model whose tokenizer cuts text differently."""
    train: str
    valid: str
    test: str


class Ran(NamedTuple):
    """How a command ended, and what it left on the terminal."""

    status: int
    out: str
    err: str


def make_world(folder: Path) -> World:
    """Models and data files in `folder`. Teacher and student share a vocabulary."""
    models = {
        "teacher": save_model(folder / "teacher", tiny_model("llama", layers=4, hidden=24, seed=2)),
        "student": save_model(folder / "student", tiny_model("llama", layers=2, hidden=16, seed=1)),
        "other": save_model(folder / "other", tiny_model("llama", layers=2, hidden=16), tiny_tokenizer(merges=())),
    }
    data = {
        "train": write_rows(folder / "train.jsonl", rows(12)),
        "valid": write_rows(folder / "valid.jsonl", rows(4, first=20)),
        "test": write_rows(folder / "test.jsonl", rows(5, first=30)),
    }
    return World(folder, **{name: str(path) for name, path in (models | data).items()})


def rows(count: int, *, first: int = 0) -> list[dict]:
    return [
        {"instruction": f"the {index}", "input": "an" * (index % 3), "output": "ab" * (1 + index % 3)}
        for index in range(first, first + count)
    ]


def distill(world: World, out: Path, *arguments: object) -> list[object]:
    """Without measurements of the models before training, which take longer than three steps, unless asked for."""
    pair = ("--student", world.student, "--teacher", world.teacher)
    measured = () if "--measure" in arguments else ("--measure", "student")
    measured += () if {"--preflight", "--no-preflight"} & set(map(str, arguments)) else ("--no-preflight",)
    return ["distill", *pair, "--data", world.train, "--out", out, *TRAINING, *measured, *arguments]


def sft(world: World, out: Path, *arguments: object) -> list[object]:
    return ["sft", "--model", world.student, "--data", world.train, "--out", out, *TRAINING, *arguments]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def write_rows(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> Ran:
    """Run a command in this process."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    return Ran(status, *capsys.readouterr())


def done(capsys: pytest.CaptureFixture[str], *arguments: object) -> Ran:
    """Run a command that must succeed."""
    ran = run(capsys, *arguments)
    assert ran.status == 0, ran.err
    return ran


def hear_interrupts() -> None:
    """For a new process: a suite that a shell started in the background ignores interrupts, and so do its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def held(folder: Path) -> set[str]:
    """Every file below `folder`; of a checkpoint, its folder alone."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {"/".join(path.parts[:2]) if path.parts[0] == "checkpoints" else path.as_posix() for path in paths}


def below(folder: str, names: set[str]) -> set[str]:
    return {f"{folder}/{name}" for name in names}


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(run: Path) -> list[dict]:
    """The lines of a run's log without what the clock says."""
    lines = json_lines(run / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]
