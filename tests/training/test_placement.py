"""Where models run on machines with several GPUs, as far as a machine without any can show it."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, dispatch_model
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import DynamoBackend

from helpers.commands import TRAINING, done, json_lines, make_world
from helpers.tiny import tiny_model
from helpers.trainers import log, pair, trainer
from promptkd.data.batch import right_pad
from promptkd.engine import response_hidden
from promptkd.errors import RequestError
from promptkd.generation import Decoding, generate
from promptkd.methods import named_method
from promptkd.models.adapters import FullTeacher, SoftPromptAdapter
from promptkd.models.placement import is_dispatched, place_to_run, settle_dispatched
from promptkd.models.prune import block_influence, prune_layers
from promptkd.training.distributed import (
    autocast,
    check_dispatched,
    check_sharding,
    place_teacher,
)

MODULES = (
    *("model.embed_tokens", "model.rotary_emb", "model.layers.0"),
    *("model.layers.1", "model.layers.2", "model.norm", "lm_head"),
)


def dispatched(model, device="cuda:1"):
    """The model with accelerate's hooks of a `device_map`, which says that its second half lies on `device`.

    All of it lies on the CPU, the only device there is: what the hooks would carry over is there already.
    """
    model = dispatch_model(model, dict.fromkeys(MODULES, "cpu"), force_hooks=True)
    model.hf_device_map = dict.fromkeys(MODULES[:3], "cuda:0") | dict.fromkeys(MODULES[3:], device)
    return model


def refuse_to_move(monkeypatch, model):
    def moved(*args, **kwargs):
        raise AssertionError(f"The whole model was moved: {args}, {kwargs}.")

    monkeypatch.setattr(model, "to", moved)


# ---- a teacher with a device_map ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tied"), [("promptkd", True), ("promptkd", False), ("promptkd-lora", True), ("okd", False), ("kd", True)]
)
def test_a_dispatched_teacher_stays_and_takes_the_same_steps(tmp_path, monkeypatch, name, tied):
    logs = []
    for spread in (False, True):
        student, teacher = pair()[0], tiny_model("llama", layers=3, hidden=24, seed=2, tied=tied)
        if spread:
            teacher = dispatched(teacher)
            refuse_to_move(monkeypatch, teacher)
        made = trainer(tmp_path / str(spread), models=(student, teacher), method=named_method(name), max_steps=2)
        made.train()
        logs.append(log(made))
    assert logs[0][0].keys() == logs[1][0].keys()
    for plain, there in zip(*logs, strict=True):
        assert there == {name: pytest.approx(value, rel=1e-4, abs=1e-7) for name, value in plain.items()}


def test_states_come_back_to_the_students_device_and_the_ends_stand_there():
    """The hooks that carry tensors: backbone in and out, embeddings and head on the student's device."""
    teacher = dispatched(tiny_model("llama", layers=3, tied=False))
    home = torch.device("cpu")
    settle_dispatched(teacher, home)
    for end in (teacher.get_input_embeddings(), teacher.get_output_embeddings()):
        hook = end._hf_hook
        assert isinstance(hook, AlignDevicesHook)
        assert (hook.execution_device, hook.io_same_device) == (home, False)
    carrier = teacher.base_model._hf_hook
    carrier = carrier.hooks[-1] if "hooks" in vars(carrier) else carrier
    assert carrier.io_same_device
    moves = []
    send = carrier.post_forward
    carrier.post_forward = lambda module, output: moves.append(carrier.input_device) or send(module, output)
    embedded = torch.randn(1, 4, 16, requires_grad=True)
    teacher.base_model(inputs_embeds=embedded).last_hidden_state.sum().backward()
    assert moves == [home]
    assert float(embedded.grad.abs().sum()) > 0


def test_only_several_devices_are_a_dispatched_model():
    model = tiny_model("llama")
    assert not is_dispatched(model)
    model.hf_device_map = {"": 0}
    assert not is_dispatched(model)
    model.hf_device_map = {"model": 0, "lm_head": 1}
    assert is_dispatched(model)
    assert place_teacher(model, SimpleNamespace()) is model


@pytest.mark.parametrize(
    ("devices", "processes", "adapter", "match"),
    [
        ((0, 1), 2, SoftPromptAdapter, "the other processes need their GPUs"),
        ((0, "disk"), 1, SoftPromptAdapter, "no layer may stay on the CPU or the disk"),
        ((0, "cpu"), 1, None, "no layer may stay on the CPU or the disk"),
        ((0, 1), 1, FullTeacher, "the whole teacher cannot be trained"),
    ],
)
def test_maps_that_cannot_be_used_are_refused(devices, processes, adapter, match):
    model = tiny_model("llama")
    model.hf_device_map = {"model": devices[0], "lm_head": devices[1]}
    with pytest.raises(RequestError, match=match):
        check_dispatched(model, SimpleNamespace(num_processes=processes), adapter)


def test_a_dispatched_model_that_is_only_run_stays_and_computes_the_same(monkeypatch):
    """What `generate`, `evaluate` and `prune` do with it: answers, states, the influence of layers, a student."""
    plain = tiny_model("llama", layers=3, hidden=24, seed=2, tied=False)
    spread = dispatched(tiny_model("llama", layers=3, hidden=24, seed=2, tied=False))
    refuse_to_move(monkeypatch, spread)
    assert place_to_run(spread, torch.device("cpu"), "") is spread
    batch = right_pad([[4, 5], [6]], [[6, 7, 8], [4]])
    decoding = Decoding(max_new_tokens=5, temperature=0.0)
    for work in (
        lambda model: torch.tensor(generate(model, [[4, 5, 6], [7]], decoding)),
        lambda model: response_hidden(model, batch),
        lambda model: torch.tensor(block_influence(model, [batch])),
        lambda model: response_hidden(prune_layers(model, [0, 2]), batch),
    ):
        torch.testing.assert_close(work(spread), work(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_command_takes_a_device_map(tmp_path, capsys):
    world = make_world(tmp_path)
    start = ("distill", "--student", world.student, "--teacher", world.teacher, "--data", world.train, *TRAINING)
    done(capsys, *start, "--out", tmp_path / "run", "--teacher_model_init_kwargs", '{"device_map": "auto"}')
    assert len([line for line in json_lines(tmp_path / "run" / "metrics.jsonl") if "student_kl" in line]) == 3


# ---- precision under DeepSpeed ----


def test_teachers_are_under_autocast_where_accelerates_does_nothing():
    """DeepSpeed's engine computes in bfloat16 by itself, and accelerate leaves the rest of the step in float32."""
    deepspeed = SimpleNamespace(native_amp=False, device=torch.device("cpu"), autocast=nullcontext)
    teacher = torch.nn.Linear(4, 4)
    for bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        with autocast(deepspeed, SimpleNamespace(bf16=bf16)):
            assert teacher(torch.ones(1, 4)).dtype == dtype


@pytest.mark.slow
def test_every_pass_of_a_step_is_under_that_autocast(tmp_path, monkeypatch):
    """As under ZeRO-2: accelerate's autocast does nothing, and the teacher is in float32."""
    made = trainer(tmp_path, method=named_method("promptkd"), max_steps=1, bf16=True)
    monkeypatch.setattr(made.accelerator, "native_amp", False)
    monkeypatch.setattr(made.accelerator, "autocast", nullcontext)
    seen = {"student": set(), "teacher": set()}
    made.train()  # with the trials of the engines, which are in float32
    for name, model in (("student", made.model), ("teacher", made.teacher.model)):
        for layer in model.base_model.layers:
            layer.mlp.down_proj.register_forward_hook(lambda _, __, output, name=name: seen[name].add(output.dtype))
    made.train()
    assert seen == {"student": {torch.bfloat16}, "teacher": {torch.bfloat16}}


def test_a_compiled_launch_is_refused(monkeypatch):
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(accelerator.state.dynamo_plugin, "backend", DynamoBackend.EAGER)
    with pytest.raises(RequestError, match="a compiled model cannot be run in parts; leave dynamo out"):
        check_sharding(accelerator, needs_generate=False)
