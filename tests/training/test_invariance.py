"""Through the command line: how a window is cut into micro-batches changes nothing.

Methods sample and learn as they do for a user: the responses of a window are drawn row by row from seeds of
their own, so they are the same however the window is cut. The student is moved by plain SGD, for two reasons. Adam's
first steps are signs of gradients: they would hide a wrong divisor, and blow up the rounding of float32.
"""

from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from helpers.commands import TEMPLATE, World, done, make_world, steps
from helpers.tiny import END_ID, save_model, tiny_model
from promptkd.methods import METHODS, named_method
from promptkd.responses import writes_responses

pytestmark = pytest.mark.slow

WHOLE, CUT = (8, 1), ((2, 4), (1, 8))
"""Micro-batch x accumulation. Each method has one cut, in turn."""
SETTINGS = (
    *("--max_steps", 2, "--optim", "sgd", "--learning_rate", 0.1, "--lr_scheduler_type", "constant", "--use_cpu"),
    *("--max_prompt_length", 24, "--max_completion_length", 8, "--template", TEMPLATE, "--save_strategy", "no"),
    *("--overwrite", "--no-preflight"),
)
OF_METHOD = {
    "imitkd": ("--student_share", 0.5),
    "gkd": ("--student_share", 0.7, "--beta", 0.3),
    "distillm": ("--student_share", 1),  # twelve rows, so that the second window replays some of the first
    "promptkd-lora": ("--adapter_rank", 2),
    "okd": ("--adapter_rank", 2),
    "opd": ("--teacher_adapter", "prompt"),
    "distillm2": ("--teacher_adapter", "prompt", "--alpha", 0.2),
    "promptkd-full": ("--prompt_learning_rate", 1e-5),
}
SAMPLING = [name for name in METHODS if name in OF_METHOD or writes_responses(named_method(name).responses)]
"""Of the others, whose responses are the data's, test_methods.py says it."""
RELATIVE, ABSOLUTE = 1e-5, 1e-6
"""What float32 leaves open, for the figures of the log and for weights."""


class Trained(NamedTuple):
    log: list[dict]
    weights: dict[str, torch.Tensor]
    """Student and adapter, by file and name."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Its student often ends a response before the limit, so that micro-batches differ in tokens."""
    made = make_world(tmp_path_factory.mktemp("world"))
    student = tiny_model("llama", layers=2, hidden=16, seed=1)
    with torch.no_grad():
        student.get_output_embeddings().weight[END_ID] *= 3
    return made._replace(student=str(save_model(made.folder / "ending", student)))


def distill(capsys, world: World, out: Path, method: str, batch: int, accumulation: int) -> Trained:
    done(
        capsys,
        *("distill", "--method", method, "--student", world.student, "--teacher", world.teacher, "--data", world.train),
        *("--out", out, "--seed", 1, *SETTINGS, *OF_METHOD.get(method, ())),
        *("--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation),
    )
    files = sorted(out.rglob("*.safetensors"))
    weights = {f"{file.parent.name}/{name}": each for file in files for name, each in load_file(file).items()}
    return Trained(steps(out), weights)


def start(world: World) -> dict[str, torch.Tensor]:
    return {f"student/{name}": each for name, each in load_file(Path(world.student) / "model.safetensors").items()}


@pytest.mark.parametrize(("method", "cut"), zip(SAMPLING, cycle(CUT), strict=False))
def test_micro_batches_do_not_matter(world, tmp_path, capsys, method, cut):
    whole, run = (distill(capsys, world, tmp_path / f"{batch}", method, batch, times) for batch, times in (WHOLE, cut))
    before = start(world)
    assert [line["step"] for line in whole.log] == [1, 2]
    assert all(1.5 < line["response_length"] < 7.5 for line in whole.log)
    assert max(float((whole.weights[name] - each).abs().max()) for name, each in before.items()) > 100 * ABSOLUTE
    assert run.weights.keys() == whole.weights.keys()
    for line, expected in zip(run.log, whole.log, strict=True):
        assert line == pytest.approx(expected, rel=RELATIVE, abs=ABSOLUTE)
    for name, weight in run.weights.items():
        torch.testing.assert_close(weight, whole.weights[name], rtol=0, atol=10 * ABSOLUTE, msg=name)
