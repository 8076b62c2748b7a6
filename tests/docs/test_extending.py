"""The code of docs/extending.md runs, trains, and writes what the page says."""

import math
import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import promptkd.training
from helpers.commands import TEMPLATE, TRAINING, done, make_world, rows
from helpers.tiny import tiny_tokenizer
from helpers.trainers import log, pair
from promptkd.methods import METHODS, Method
from promptkd.objectives import total_variation
from promptkd.responses import ResponseMix
from promptkd.training import DistillTrainer

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
SMALL = {"max_prompt_length": 40, "max_completion_length": 8, "template": TEMPLATE, "use_cpu": True}


class Ran(NamedTuple):
    trainer: DistillTrainer
    before: list[torch.Tensor]
    """The student's weights before the block."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("extending")


@pytest.fixture(scope="module")
def ran(folder: Path) -> list[Ran]:
    """What each block did. They share one namespace, as on the page; each has a fresh pair and short rows."""
    results = []
    namespace = {"tokenizer": tiny_tokenizer(), "rows": rows(12)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(promptkd.training, "DistillConfig", partial(promptkd.training.DistillConfig, **SMALL))
        for block in BLOCKS:
            namespace["student"], namespace["teacher"] = pair()
            before = [weight.detach().clone() for weight in namespace["student"].parameters()]
            exec(compile(block, str(PAGE), "exec"), namespace)
            results.append(Ran(namespace["trainer"], before))
    return results


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_each_block_trains_the_student(ran, block):
    trainer, before = ran[block]
    losses = [entry["loss"] for entry in log(trainer)]
    assert len(losses) == trainer.args.max_steps
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-3:]) / 3 < 0.9 * losses[0]
    assert all(not torch.equal(new, old) for new, old in zip(trainer.model.parameters(), before, strict=True))


def test_the_page_shows_four_things(ran):
    """An objective, a loss, a source of responses and a teacher adapter, each in use."""
    objective, loss, source, adapter = (each.trainer for each in ran)
    assert objective.method.objective.__name__ == "hellinger"
    assert objective.adapter.module.distance() > 0
    assert loss.method.per_row
    assert [entry["student_share"] for entry in log(source)] == pytest.approx([k / 15 for k in range(15)])
    distances = [entry["adapter_distance"] for entry in log(adapter)]
    assert 0 < distances[0] < distances[-1]
    assert adapter.trainable_share()[0] == 24


def test_what_is_saved_stands_where_the_page_says(ran, folder):
    for name in ("hellinger/student/model.safetensors", "hellinger/prompt/adapter_model.safetensors"):
        assert (folder / "runs" / name).is_file(), name
    assert (folder / "runs/shift/hidden_shift/hidden_shift.safetensors").is_file()


def test_a_method_in_the_dictionary_is_known_to_the_command_line(tmp_path, capsys, monkeypatch):
    world = make_world(tmp_path)
    monkeypatch.setitem(METHODS, "hellinger", lambda settings: Method(ResponseMix(0.5), total_variation, "prompt"))
    pair = ("--student", world.student, "--teacher", world.teacher, "--data", world.train, "--out", tmp_path / "run")
    done(capsys, "distill", "--method", "hellinger", *pair, *TRAINING)
    assert (tmp_path / "run" / "results.json").is_file()
