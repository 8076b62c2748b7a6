"""The code of docs/extending.md runs, trains, and writes what the page says."""

import importlib
import math
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import promptkd.training
from helpers.commands import TEMPLATE, TRAINING, done, make_world, rows
from helpers.processes import exit_code, forked
from helpers.tiny import tiny_tokenizer
from helpers.trainers import log, pair
from promptkd.methods import METHODS, Method, named_method
from promptkd.models.adapters import SoftPromptFactory
from promptkd.objectives import total_variation
from promptkd.responses import ResponseMix
from promptkd.results import Results
from promptkd.training import DistillTrainer

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
FILE = "# src/promptkd/methods/hellinger.py\n"
"""How the block begins that is a file of its own."""
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
        patch.setitem(METHODS, "hellinger", None)  # gone again at the end
        patch.setattr(promptkd.training, "DistillConfig", partial(promptkd.training.DistillConfig, **SMALL))
        for block in BLOCKS:
            namespace["student"], namespace["teacher"] = pair()
            before = [weight.detach().clone() for weight in namespace["student"].parameters()]
            exec(compile(block, str(PAGE), "exec"), namespace)
            if not block.startswith(FILE):
                results.append(Ran(namespace["trainer"], before))
    return results


@pytest.mark.parametrize("block", range(len(BLOCKS) - 1))  # but for the file
def test_each_block_trains_the_student(ran, block):
    trainer, before = ran[block]
    losses = [entry["loss"] for entry in log(trainer)]
    assert len(losses) == trainer.args.max_steps
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-3:]) / 3 < 0.9 * losses[0]
    assert all(not torch.equal(new, old) for new, old in zip(trainer.model.parameters(), before, strict=True))


def test_the_page_shows_six_things(ran):
    """An objective, a named method, a loss, a moving coefficient, a source of responses and an adapter, each in use."""
    objective, named, loss, moving, source, adapter = (each.trainer for each in ran)
    assert objective.method.objective.__name__ == "hellinger"
    assert objective.adapter.module.distance() > 0
    assert named.method.objective.func.__name__ == "squared_hellinger"
    assert named.adapter.module.length == 4
    assert loss.method.per_row
    betas = [entry["beta"] for entry in log(moving)]
    assert betas[:2] == [0.0, 0.1]
    assert sorted(betas) == betas
    assert [entry["student_share"] for entry in log(source)] == pytest.approx([k / 15 for k in range(15)])
    distances = [entry["adapter_distance"] for entry in log(adapter)]
    assert 0 < distances[0] < distances[-1]
    assert adapter.trainable_share()[0] == 24


def test_what_is_saved_stands_where_the_page_says(ran, folder):
    for name in ("hellinger/student/model.safetensors", "hellinger/prompt/adapter_model.safetensors"):
        assert (folder / "runs" / name).is_file(), name
    assert (folder / "runs/shift/hidden_shift/hidden_shift.safetensors").is_file()


def test_one_file_is_a_method_with_flags_and_help(tmp_path):
    """The page's file in the folder of methods, and nothing else: help, flags and training know it."""
    (block,) = (each for each in BLOCKS if each.startswith(FILE))
    package = Path(promptkd.__file__).parent
    shutil.copytree(package, tmp_path / "promptkd", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / FILE.removeprefix("# src/").strip()).write_text(block, encoding="utf-8")
    world = make_world(tmp_path)

    def distill(*arguments):
        said = tmp_path / "said"
        return exit_code(forked(lambda: main_of_the_copy(tmp_path, arguments), said)), said.read_text()

    assert "gkd, hellinger, kd" in distill("--help")[1]
    pair = ("--student", world.student, "--teacher", world.teacher, "--data", world.train, "--out", tmp_path / "run")
    status, said = distill("--method", "hellinger", "--sharpness", 2, *pair, *TRAINING)
    assert status == 0, said
    record = Results.read(tmp_path / "run" / "results.json")
    assert record.config["sharpness"] == 2


def main_of_the_copy(folder: Path, arguments: tuple[object, ...]) -> int:
    """`promptkd distill` of the package in `folder`, in a forked process that has imported the other one."""
    for name in [each for each in sys.modules if each.partition(".")[0] == "promptkd"]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    cli = importlib.import_module("promptkd.cli")
    assert Path(cli.__file__).is_relative_to(folder)
    return cli.main(["distill", *map(str, arguments)])


def test_the_old_form_of_a_named_method_warns_and_works(tmp_path, capsys, monkeypatch):
    """A function in the dictionary, which names its adapter."""
    world = make_world(tmp_path)
    monkeypatch.setitem(METHODS, "hellinger", lambda settings: Method(ResponseMix(0.5), total_variation, "prompt"))
    pair = ("--student", world.student, "--teacher", world.teacher, "--data", world.train, "--out", tmp_path / "run")
    with pytest.warns(FutureWarning) as warned:
        assert named_method("hellinger").adapter == SoftPromptFactory()
    assert [str(each.message).rpartition(". ")[0] for each in warned] == [
        "A function as METHODS['hellinger'] is deprecated; write a subclass of NamedMethod (docs/extending.md)",
        "Method(teacher_adapter='prompt') is deprecated; write Method(adapter=SoftPromptFactory)",
    ]
    done(capsys, "distill", "--method", "hellinger", *pair, *TRAINING)
    assert (tmp_path / "run" / "prompt").is_dir()
