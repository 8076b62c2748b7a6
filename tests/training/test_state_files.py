"""States as JSON and safetensors: whatever goes in comes back, nothing is pickled, older checkpoints are still read."""

import functools
import json
import math
import random
import shutil
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.leaks import pickles_in
from helpers.tiny import tiny_model, tiny_tokenizer
from helpers.trainers import log, rows, trainer
from promptkd.errors import PromptKDError
from promptkd.methods import named_method
from promptkd.training import FinetuneConfig, FinetuneTrainer
from promptkd.training.callbacks import quiet
from promptkd.training.saving import random_states, set_random_states
from promptkd.training.state_files import has_state, read_state, write_state


def alike(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return type(other) is torch.Tensor and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and bool((one == other).all())
    if isinstance(one, dict):
        return list(one) == list(other) and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(alike, one, other))
    return type(one) is type(other) and (one == other or (one != one and other != other))


def test_a_state_comes_back_with_its_types_and_bits(tmp_path):
    whole = torch.arange(6.0).reshape(2, 3)
    state = {
        "param_groups": [
            {"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "params": [0, 1], "foreach": None, "maximize": False}
        ],
        "state": {0: {"step": torch.tensor(3.0), "moment": whole}, 1: {"half": torch.ones(2, dtype=torch.bfloat16)}},
        "views": [whole[0], whole.t(), whole],  # share memory, and one is not contiguous
        "replay": {4: [5, 6]},
        "a.b": torch.ones(1),
        "a": {"b": torch.zeros(1), "best": math.inf, "worst": math.nan},
        "numpy": np.arange(3, dtype=np.uint32),
        "text": "λ ␛",
        "tensor": {"tensor": "not one"},
    }
    write_state(tmp_path / "x", state)
    assert alike(state, read_state(tmp_path / "x"))
    assert pickles_in(tmp_path) == []
    write_state(tmp_path / "numbers", OrderedDict(a=np.float64(0.5), b=np.int64(3)))
    assert read_state(tmp_path / "numbers") == {"a": 0.5, "b": 3}
    assert not (tmp_path / "numbers.safetensors").exists()


@pytest.mark.parametrize("value", [functools.partial(int), {1, 2}, torch.nn.Parameter, b"bytes", object()])
def test_what_only_a_pickle_could_keep_is_refused_by_name(tmp_path, value):
    with pytest.raises(PromptKDError, match=r"x\.schedule\.0 is a .* Choose another optimizer"):
        write_state(tmp_path / "x", {"schedule": [value]})
    assert not has_state(tmp_path / "x")


@pytest.mark.parametrize("text", ["", "[", '{"tensor": "lost"}', '{"run": "code"}', '{"a": 1, "b": 2}', '{"tuple": 1}'])
def test_a_damaged_state_is_named(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(PromptKDError, match=r"x\.json is damaged"):
        read_state(tmp_path / "x")


def test_random_states_come_back(tmp_path):
    before = random_states()
    write_state(tmp_path / "rng", before)
    drawn = random.random(), np.random.rand(), torch.rand(2)
    set_random_states(read_state(tmp_path / "rng"))
    again = random.random(), np.random.rand(), torch.rand(2)
    assert alike(drawn, again)


def finetuned(folder: Path, **settings) -> FinetuneTrainer:
    args = FinetuneConfig(str(folder), max_steps=4, per_device_train_batch_size=4, use_cpu=True, **settings)
    made = FinetuneTrainer(tiny_model("llama"), args, rows(), None, tiny_tokenizer())
    quiet(made)
    return made


def distilled(folder: Path, **settings):
    return trainer(folder, method=named_method("promptkd"), max_steps=4, lr_scheduler_type="cosine", **settings)


@pytest.mark.slow
@pytest.mark.parametrize("make", [distilled, finetuned])
def test_a_checkpoint_holds_no_pickle_and_one_of_an_older_version_resumes_to_the_same_bits(tmp_path, make):
    saved = {"save_strategy": "steps", "save_steps": 2}
    whole = make(tmp_path / "new", **saved)
    whole.train()
    whole.save_model(str(tmp_path / "new" / "by the user"))
    assert pickles_in(tmp_path) == []
    older(tmp_path / "new" / "checkpoint-2")
    for name in ("new", "old"):
        resumed = make(tmp_path / f"resumed {name}", **saved)
        checkpoint = tmp_path / "new" / "checkpoint-2"
        resumed.train(resume_from_checkpoint=str(checkpoint if name == "old" else checkpoint.with_name("kept")))
        assert log(resumed)[-2:] == log(whole)[-2:]
        for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(mine, theirs)


def older(checkpoint: Path) -> None:
    """Give a checkpoint the files of an older version; what it was is kept beside it, as "kept"."""
    shutil.copytree(checkpoint, checkpoint.with_name("kept"))
    optimizer = read_state(checkpoint / "optimizer")
    torch.save(optimizer["optimizer"], checkpoint / "optimizer.pt")
    torch.save(optimizer["scheduler"], checkpoint / "scheduler.pt")
    torch.save(read_state(checkpoint / "rng_state"), checkpoint / "rng_state.pth")
    torch.save(read_state(checkpoint / "method"), checkpoint / "method.pt")
    for name in ("optimizer", "rng_state", "method"):
        for suffix in (".json", ".safetensors"):
            (checkpoint / f"{name}{suffix}").unlink(missing_ok=True)
    assert {"optimizer.pt", "method.pt"} <= {each.name for each in checkpoint.iterdir()}
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 2
