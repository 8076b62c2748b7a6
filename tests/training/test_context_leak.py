"""What only the teacher reads never reaches the student: whatever a run embeds is watched, by each of its models."""

import pytest
from torch import nn

from helpers.commands import distill, done, make_world, sft, write_rows
from helpers.commands import rows as text_rows
from helpers.leaks import holding
from helpers.tiny import tiny_tokenizer

pytestmark = pytest.mark.slow

SECRET = "Zq-Xj9"  # in no row and in no template, and nothing that random models write by chance


class Read:
    """Every text that is embedded, by the student, whose embeddings are trained, or by a frozen teacher."""

    def __init__(self, monkeypatch):
        self.texts = {"student": [], "teacher": []}
        tokenizer, embed = tiny_tokenizer(), nn.Embedding.forward

        def spied(module, ids):
            reader = "student" if module.weight.requires_grad else "teacher"
            for row in ids.reshape(-1, ids.shape[-1]) if ids.dim() else ids.reshape(1, 1):
                self.texts[reader].append(tokenizer.decode(row.tolist()))
            return embed(module, ids)

        monkeypatch.setattr(nn.Embedding, "forward", spied)

    def has(self, model, text):
        return any(text in each for each in self.texts[model])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Rows whose teacher is told the secret and, behind it, the answer."""
    made = make_world(tmp_path_factory.mktemp("world"))
    for name, count, first in (("train", 12, 0), ("valid", 4, 20)):
        rows = text_rows(count, first=first)
        told = [row | {"teacher_prompt": f"{SECRET} say {row['output']}"} for row in rows]
        made = made._replace(**{name: str(write_rows(made.folder / f"told-{name}.jsonl", told))})
    return made


@pytest.mark.parametrize(("method", "teacher"), [("promptkd", None), ("minillm", None), ("skd", None), ("opcd", "ema")])
def test_a_context_reaches_the_teacher_alone(world, tmp_path, capsys, caplog, monkeypatch, method, teacher):
    """Through preflight, rollouts of the student or of both, the steps of both, and validation."""
    run, read = tmp_path / "run", Read(monkeypatch)
    world = world._replace(teacher=teacher or world.teacher)
    measured = ("--preflight",) if method == "promptkd" else ()
    validated = ("--eval-data", world.valid, "--eval_strategy", "steps", "--eval_steps", 3)
    shown = done(capsys, *distill(world, run, "--method", method, *validated, *measured)).err
    assert "in 12 of them it holds the row's reference" in shown  # of the training rows
    assert "Warning: in 4 of 4 validation rows the teacher's context holds the row's reference" in shown
    assert "context" not in caplog.text  # the command's own lines are enough
    assert read.has("teacher", SECRET)
    assert read.has("student", "Q: the 2")
    assert not read.has("student", SECRET)
    assert not holding(run / "student", SECRET)


def test_where_no_teacher_reads_nobody_reads_a_context(world, tmp_path, capsys, monkeypatch):
    read = Read(monkeypatch)
    limits = ("--template", "Q: {{ instruction }} {{ input }}\nA: ", "--max-completion-length", 4)
    done(capsys, *sft(world, tmp_path / "tuned"))
    done(capsys, "evaluate", "--model", world.student, "--data", world.valid, "--out", tmp_path / "e.json", *limits)
    done(capsys, "generate", "--model", world.teacher, "--data", world.valid, "--out", tmp_path / "g.jsonl", *limits)
    assert read.has("student", "Q: the ")
    assert not read.has("student", SECRET)
    assert not read.has("teacher", SECRET)
