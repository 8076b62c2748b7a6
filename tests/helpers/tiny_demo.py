"""The demo in seconds: a tiny teacher in place of the embedded one, and few rows and steps."""

from pathlib import Path

import pytest

from helpers.byte_level import byte_level, byte_model
from helpers.commands import write_rows
from helpers.tiny import save_model
from promptkd.demo import pipeline
from promptkd.demo.pipeline import DemoSettings

SMALL = DemoSettings(
    layers=3, steps=2, batch_size=2, tuning_steps=2, recovery_steps=2, max_response_length=8, influence_rows=4
)


def make_tiny_demo(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let `promptkd demo` start from the models and rows that this puts into `folder`."""
    model = byte_model("llama", layers=4, seed=1, max_position_embeddings=1024)
    teacher = save_model(folder / "teacher", model, byte_level("smollm", chat=False))
    for split in ("train", "validation", "test"):
        rows = [{"instruction": f"the {split} {each}", "input": "", "output": "an"} for each in range(5)]
        write_rows(folder / f"{split}.jsonl", rows)
    monkeypatch.setenv("PROMPTKD_CACHE", str(folder / "cache"))
    monkeypatch.setattr("promptkd.cli.commands.demo.teacher_file", lambda: teacher)
    monkeypatch.setattr(pipeline, "teacher_file", lambda: teacher)
    monkeypatch.setattr(pipeline, "data_file", lambda split: folder / f"{split}.jsonl")
    monkeypatch.setattr(pipeline, "file_sha256", lambda file: file.name)  # the tiny teacher is a folder
    monkeypatch.setattr(
        "promptkd.cli.commands.demo.DemoSettings", lambda **given: DemoSettings(**{**vars(SMALL), **given})
    )
    return folder
