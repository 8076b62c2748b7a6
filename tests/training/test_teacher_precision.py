"""A teacher in lower precision, or quantized, beside a prompt and a student in float32."""

from dataclasses import replace

import pytest
import torch

from helpers.commands import LIMITS, done, make_world, run
from helpers.parts import parts, window
from helpers.tiny import save_model, tiny_model
from helpers.trainers import FIXED_PROMPTKD, config, log, rows, trainer
from promptkd.data.batch import right_pad
from promptkd.engine import response_hidden
from promptkd.errors import RequestError
from promptkd.methods import named_method
from promptkd.models import load_model
from promptkd.results import Results
from promptkd.training.config import chosen_method
from promptkd.training.teacher import teacher_settings

NO_BITSANDBYTES = "bitsandbytes is not installed: pip install bitsandbytes"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def teacher(dtype=torch.float32):
    return tiny_model("llama", layers=3, hidden=24, seed=2).to(dtype)


def student():
    return tiny_model("llama", layers=2, hidden=16, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("promptkd", torch.bfloat16),
        ("promptkd", torch.float16),
        ("promptkd-lora", torch.bfloat16),
        ("okd", torch.float16),
    ],
)
def test_what_is_trained_stays_in_float32_and_the_losses_are_near(tmp_path, dtype, kind):
    logs = []
    for precision in (torch.float32, dtype):
        taught = teacher(precision)
        models = (student(), taught)
        made = trainer(tmp_path / str(precision), models=models, method=named_method(kind), max_steps=1)
        made.train()
        logs.append(log(made)[0])
        assert {each.dtype for each in taught.parameters() if not each.requires_grad} == {precision}
        assert {each.dtype for each in (*made.model.parameters(), *made.adapter.parameters())} == {torch.float32}
    for name in ("prompt_kl", "student_kl"):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=0.1)
    assert logs[1]["prompt_grad_norm"] == pytest.approx(logs[0]["prompt_grad_norm"], rel=0.15)


def test_float16_gradients_do_not_vanish(tmp_path):
    """A mean over very many tokens has gradients below float16's least number; those of the sum come through."""
    norms = []
    for dtype in (torch.float32, torch.float16):
        part = parts(tmp_path / str(dtype), models=(student(), teacher(dtype)))
        made, tuner = replace(window(rows(4).examples), tokens=torch.tensor(10**9)), part.tuner()
        tuner.start(1)
        with part.phases("prompt"):
            tuner.step(made, part.student, part.student_loss().hidden_for_tuner, step=0, logs=True)
        norms.append(part.metrics.means(made, part.accelerator, {})["prompt_grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=0.15)


def test_states_in_float16_are_joined_under_an_autocast_to_bfloat16(device, own_engine):
    """Which torch's own cat refuses; on a GPU such a teacher comes of --teacher_dtype auto."""
    taught, batch = teacher().to(device, torch.float16), right_pad([[5, 6, 7], [8]], [[9, 10], [11]], device=device)
    prompt = taught.get_input_embeddings()(torch.arange(2, device=device)).detach()
    found = [response_hidden(taught, batch, prompt)]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found.append(response_hidden(taught, batch, prompt))
    torch.testing.assert_close(found[1].float(), found[0].float(), rtol=0.05, atol=0.05)


def test_a_float16_teacher_on_a_cpu_that_computes_in_bfloat16_is_refused(tmp_path):
    with pytest.raises(RequestError, match="Give --teacher_dtype bfloat16, or compute in float32 with --bf16 false"):
        trainer(tmp_path, models=(student(), teacher(torch.float16)), bf16=True)


def test_a_whole_teacher_is_not_trained_in_lower_precision(tmp_path):
    with pytest.raises(RequestError, match="trained in float32 alone"):
        trainer(tmp_path, models=(student(), teacher(torch.bfloat16)), method=named_method("promptkd-full"))


@pytest.mark.parametrize("setting", [{"teacher_dtype": "bfloat16"}, {"teacher_quantization": "4bit"}])
def test_that_is_told_before_a_model_is_loaded(tmp_path, setting):
    with pytest.raises(RequestError, match="trained in float32 alone"):
        chosen_method(config(tmp_path, method="promptkd-full", **setting))
    assert chosen_method(config(tmp_path, method="promptkd-lora", **setting)).adapter_class is not None


def test_settings_of_loading(tmp_path):
    assert teacher_settings(config(tmp_path, teacher_dtype="auto"), FIXED_PROMPTKD)["dtype"] == "auto"
    with pytest.raises(RequestError, match="Give it as --teacher_dtype"):
        teacher_settings(config(tmp_path, teacher_model_init_kwargs={"dtype": "bfloat16"}), FIXED_PROMPTKD)
    with pytest.raises(RequestError, match="teacher_dtype must be one of float32"):
        config(tmp_path, teacher_dtype="int8")


def test_bitsandbytes_is_asked_for_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("promptkd.training.teacher.find_spec", lambda name: None)
    with pytest.raises(RequestError, match="needs the package bitsandbytes"):
        teacher_settings(config(tmp_path, teacher_quantization="4bit"), FIXED_PROMPTKD)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_quantized_teacher_takes_the_whole_step(world, tmp_path, capsys, bits):
    pytest.importorskip("bitsandbytes", reason=NO_BITSANDBYTES)
    wide = save_model(tmp_path / "wide", tiny_model("llama", layers=3, hidden=64, seed=2))  # 4-bit blocks need 32 rows
    pair = ("--student", world.student, "--teacher", wide, "--data", world.train)
    run_ = ("distill", *pair, *LIMITS, "--max_steps", 2, "--per_device_train_batch_size", 4, "--use_cpu")
    done(capsys, *run_, "--out", tmp_path / "run", "--teacher-quantization", bits)
    (training,) = Results.read(tmp_path / "run" / "results.json").training.values()
    assert training.steps == 2


@pytest.mark.parametrize(("bits", "tolerance"), [("4bit", 1e-4), ("8bit", 0.2)])  # 8-bit rounds the states as well
def test_gradients_pass_a_quantized_teacher(tmp_path, bits, tolerance):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason=NO_BITSANDBYTES)
    folder = save_model(tmp_path / "wide", tiny_model("llama", layers=3, hidden=64, seed=2))
    settings = teacher_settings(config(tmp_path, teacher_quantization=bits), FIXED_PROMPTKD)
    quantized = load_model(folder, **settings).requires_grad_(False)
    plain = load_model(folder).requires_grad_(False)
    for name, layer in quantized.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            plain.get_submodule(name).weight.data.copy_(weight)
        elif isinstance(layer, bitsandbytes.nn.Linear8bitLt):
            plain.get_submodule(name).weight.data.copy_(layer.weight.data * layer.weight.SCB[:, None] / 127)
    batch, found = right_pad([[5, 6, 7], [8], [9, 10]], [[11, 12], [13, 14, 15], [16]]), []
    for model in (quantized, plain):
        with torch.no_grad():
            response_hidden(model, batch)  # as the plain teacher is read first
        prompt = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        hidden = response_hidden(model, batch, prompt)
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
        found.append(prompt.grad)
    assert float((found[0] - found[1]).norm() / found[1].norm()) < tolerance


@pytest.mark.slow
def test_the_command_takes_a_precision_and_refuses_others(world, tmp_path, capsys):
    pair = ("--student", world.student, "--teacher", world.teacher, "--data", world.train)
    run_ = ("distill", *pair, *LIMITS, "--max_steps", 1, "--per_device_train_batch_size", 4, "--use_cpu")
    done(capsys, *run_, "--out", tmp_path / "run", "--teacher-dtype", "bfloat16")
    refused = run(capsys, *run_, "--out", tmp_path / "other", "--teacher-dtype", "int3")
    assert refused.status == 2
    assert "bfloat16" in refused.err
