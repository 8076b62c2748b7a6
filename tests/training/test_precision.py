"""One precision for training, validation and every command that measures; float32 for what is trained."""

import logging
import os
import platform
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from peft import LoraConfig

from helpers.commands import LIMITS, TRAINING, done, json_lines, make_world, run, write_rows
from helpers.standins import OnResults, StandIn
from helpers.tiny import END_ID, tiny_tokenizer
from helpers.trainers import FIXED_PROMPTKD, config, pair, rows, trainer
from promptkd import precision
from promptkd.engine import devices
from promptkd.engine import units as engine_units
from promptkd.engine.units import has_bfloat16_units
from promptkd.errors import RequestError
from promptkd.evaluation import measure
from promptkd.evaluation.dataset_evaluation import SetEvaluation, measure_rows
from promptkd.evaluation.measure import Decoding, row_batches
from promptkd.methods import named_method
from promptkd.models import load_model
from promptkd.precision import compute_dtype, computing, teacher_precision
from promptkd.results import Results
from promptkd.training import DistillConfig, FinetuneConfig
from promptkd.training.config import BaseConfig, use_one_gpu
from promptkd.training.student import precision_notes
from promptkd.training.teacher import teacher_settings

BF16 = ("--bf16", "true")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def units(monkeypatch):
    """Every device has bfloat16 units."""
    for place in ("promptkd.precision", "promptkd.training.config"):
        monkeypatch.setattr(f"{place}.has_bfloat16_units", lambda device: True)


# ---- what a device has, and what follows ----


@pytest.mark.parametrize(("avx512", "amx"), [(False, False), (True, False), (False, True)])
def test_units_of_a_cpu(monkeypatch, avx512, amx):
    cpu = StandIn(torch.cpu, _is_avx512_bf16_supported=lambda: avx512, _is_amx_tile_supported=lambda: amx)
    monkeypatch.setattr(engine_units, "platform", StandIn(platform, machine=lambda: "x86_64"))
    monkeypatch.setattr(engine_units, "torch", StandIn(torch, cpu=cpu))
    assert has_bfloat16_units("cpu") == (avx512 or amx)


@pytest.mark.parametrize("extension", [False, True])
def test_units_of_an_arm_cpu(monkeypatch, extension):
    backends = StandIn(torch.backends, mkldnn=StandIn(torch.backends.mkldnn, is_available=lambda: True))
    mkldnn = StandIn(torch.ops.mkldnn, _is_mkldnn_bf16_supported=lambda: extension)
    monkeypatch.setattr(engine_units, "platform", StandIn(platform, machine=lambda: "aarch64"))
    monkeypatch.setattr(engine_units, "torch", StandIn(torch, backends=backends, ops=StandIn(torch.ops, mkldnn=mkldnn)))
    assert has_bfloat16_units("cpu") == extension


@pytest.mark.parametrize("native", [False, True])
def test_units_of_a_gpu_are_not_emulated_ones(monkeypatch, native):
    supported = lambda including_emulation=True: including_emulation or native  # noqa: E731
    cuda = StandIn(torch.cuda, is_available=lambda: True, is_bf16_supported=supported)
    monkeypatch.setattr(engine_units, "torch", StandIn(torch, cuda=cuda))
    assert has_bfloat16_units(torch.device("cuda", 1)) == native


def test_other_devices_count_as_without():
    assert not has_bfloat16_units("mps")


@pytest.mark.parametrize("has", [False, True])
def test_auto_follows_the_device_and_a_choice_does_not(monkeypatch, has):
    monkeypatch.setattr(precision, "has_bfloat16_units", lambda device: has)
    assert compute_dtype("auto", "cpu") == (torch.bfloat16 if has else torch.float32)
    assert (compute_dtype("float32", "cpu"), compute_dtype("bfloat16", "cpu")) == (torch.float32, torch.bfloat16)
    assert teacher_precision(None, "cpu") == ("bfloat16" if has else "float32")
    assert teacher_precision(None, "cpu", trained=True) == "float32"
    assert teacher_precision("auto", "cpu") == "auto"


def test_computing_changes_products_and_no_weights():
    layer, states = torch.nn.Linear(4, 4), torch.ones(2, 4)
    for dtype in (torch.float32, torch.bfloat16):
        with computing("cpu", dtype):
            assert layer(states).dtype == dtype
    assert layer.weight.dtype == torch.float32


# ---- training ----


def test_training_computes_in_bfloat16_where_there_are_units(tmp_path, units):
    made = config(tmp_path)
    assert (made.bf16, made.device.type) == (True, "cpu")
    assert not config(tmp_path, bf16=False).bf16


def test_without_another_device_bfloat16_needs_no_use_cpu(tmp_path):
    """transformers would refuse it: "Your setup doesn't support bf16/gpu"."""
    made = config(tmp_path, bf16=True, use_cpu=False)
    assert made.device.type == torch.accelerator.current_accelerator(check_available=True) or "cpu"
    assert made.use_cpu == (made.device.type == "cpu")


def test_the_teachers_default_precision(tmp_path, units):
    assert teacher_settings(config(tmp_path), FIXED_PROMPTKD)["dtype"] == "bfloat16"
    assert teacher_settings(config(tmp_path), named_method("promptkd-full"))["dtype"] == "float32"
    assert teacher_settings(config(tmp_path, teacher_dtype="float32"), FIXED_PROMPTKD)["dtype"] == "float32"


@pytest.fixture
def mac(monkeypatch):
    """A machine with Apple's GPU, as we, torch and accelerate see it."""
    backends = StandIn(torch.backends, mps=StandIn(torch.backends.mps, is_available=lambda: True))
    accelerator = StandIn(torch.accelerator, current_accelerator=lambda check_available: torch.device("mps"))
    monkeypatch.setattr(devices, "torch", StandIn(torch, backends=backends, accelerator=accelerator))
    monkeypatch.setattr("accelerate.state.is_mps_available", lambda: True)


@pytest.mark.parametrize("kind", [DistillConfig, FinetuneConfig])
@pytest.mark.parametrize("bf16", [None, True, False])
def test_a_mac_trains_on_its_cpu(tmp_path, mac, kind, bf16):
    """There is no float64 on MPS, which accelerate would choose."""
    assert PartialState().default_device.type == "mps"
    made = kind(output_dir=str(tmp_path), report_to="none", bf16=bf16)
    assert (made.device.type, made.use_cpu, made.leaves_mps) == ("cpu", True, True)
    assert made.bf16 == (has_bfloat16_units("cpu") if bf16 is None else bf16)
    asked = kind(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    assert (asked.device.type, asked.leaves_mps) == ("cpu", False)  # there is nothing to say


@pytest.mark.slow
def test_a_run_on_a_mac_says_why_it_uses_the_cpu(world, tmp_path, capsys, mac):
    start = ("distill", "--student", world.student, "--teacher", world.teacher, "--data", world.train, *TRAINING[:-1])
    ran = done(capsys, *start, "--out", tmp_path / "run")
    assert ran.err.count(devices.CPU_FOR_MPS) == 1
    assert Results.read(tmp_path / "run" / "results.json").notes.count(devices.CPU_FOR_MPS) == 1


@pytest.mark.slow
def test_a_student_in_lower_precision_is_raised_and_it_is_said(tmp_path, caplog):
    student, teacher = pair()
    with caplog.at_level(logging.WARNING, logger="promptkd.training.student"):  # which a command silences
        made = trainer(tmp_path, models=(student.to(torch.bfloat16), teacher), max_steps=1)
    assert {each.dtype for each in made.model.parameters()} == {torch.float32}
    assert "came in bfloat16 and were raised to float32" in made.notes[1]
    assert made.notes[1] in caplog.messages
    made.train()
    student, teacher = pair()
    wide = trainer(tmp_path / "b", models=(student.to(torch.bfloat16).float(), teacher), max_steps=1)
    assert len(wide.notes) == 1
    wide.train()
    for mine, expected in zip(made.model.parameters(), wide.model.parameters(), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.slow
def test_models_that_were_trained_in_bfloat16_are_trained_again_and_teach(tmp_path):
    """accelerate leaves its autocast around the forward of a model that it has prepared."""
    student, teacher = pair()
    for step, models in enumerate([(student, teacher), (student, teacher), (pair()[0], student)]):
        made = trainer(tmp_path / str(step), models=models, bf16=True, max_steps=1)
        made.train()


def test_frozen_weights_below_an_adapter_stay(tmp_path):
    student, teacher = pair()
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    made = trainer(tmp_path, models=(student.to(torch.bfloat16), teacher), peft_config=lora, max_steps=1)
    kept = {each.requires_grad: each.dtype for each in made.model.parameters()}
    assert kept == {True: torch.float32, False: torch.bfloat16}


def test_several_gpus_are_not_used_by_data_parallel(tmp_path):
    """transformers would wrap the model in `nn.DataParallel`; its batch size counts the GPUs as well."""

    class WithGpus(DistillConfig):
        n_gpu = property(lambda self: vars(self).get("_n_gpu", 0))

    settled = WithGpus(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    settled._n_gpu = 4
    use_one_gpu(settled)
    assert (settled.n_gpu, settled.train_batch_size) == (1, settled.per_device_train_batch_size)


def test_a_run_says_that_further_gpus_are_not_used(monkeypatch):
    gpus = StandIn(torch, cuda=StandIn(torch.cuda, device_count=lambda: 4))
    monkeypatch.setattr("promptkd.training.student.torch", gpus)
    args = {"bf16": True, "fp16": False, "device": torch.device("cuda", 0), "leaves_mps": False}
    (_, advice) = precision_notes(SimpleNamespace(**args, world_size=1), None)
    assert advice.startswith("4 GPUs are visible and one is trained on.")
    assert "accelerate launch --num_processes 4 -m promptkd" in advice
    assert len(precision_notes(SimpleNamespace(**args, world_size=4), None)) == 1


def test_what_a_gpu_cannot_do_is_refused_in_a_sentence(tmp_path):
    args = config(tmp_path)
    on_gpu = SimpleNamespace(**{**vars(args), "full_determinism": True, "device": torch.device("cuda")})
    refused = [text for wrong, text in BaseConfig.checks(on_gpu) if wrong]
    assert [text.partition(",")[0] for text in refused] == ["full_determinism would stop the first sampled response"]
    for settings in ({"torch_compile": True}, {"torch_compile_backend": "eager"}):
        with pytest.raises(RequestError, match="torch_compile is not supported"):
            config(tmp_path, **settings)
    with pytest.raises(RequestError, match="auto_find_batch_size would change how many rows"):
        config(tmp_path, auto_find_batch_size=True)


@pytest.fixture
def determinism_ends():
    """transformers sets it for the whole process, and variables of the environment with it."""
    environment, cudnn = dict(os.environ), torch.backends.cudnn
    flags = cudnn.deterministic, cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    cudnn.deterministic, cudnn.benchmark = flags
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.slow
@pytest.mark.usefixtures("determinism_ends")
def test_full_determinism_on_a_cpu(tmp_path):
    logs = []
    for folder in ("a", "b"):
        made = trainer(tmp_path / folder, full_determinism=True, method=named_method("promptkd"), max_steps=2)
        made.train()
        logs.append([entry["student_kl"] for entry in made.state.log_history if "student_kl" in entry])
    assert logs[0] == logs[1]
    assert len(logs[0]) == 2


# ---- validation and the commands ----


def test_batches_do_not_depend_on_the_order_of_rows():
    data = rows(20).examples
    batches = [{row.row for row in batch} for batch in row_batches(data, 8)]
    assert batches == [{row.row for row in batch} for batch in row_batches(data[::-1], 8)]
    assert sorted(row.row for batch in row_batches(data, 8) for row in batch) == list(range(20))


@pytest.mark.slow
def test_validation_and_evaluate_measure_in_the_same_batches(tmp_path, monkeypatch):
    """On units for bfloat16 a product is rounded by what shares its batch; tiny models do not show that."""
    data, (student, teacher), tokenizer = rows(41).examples, pair(), tiny_tokenizer()
    seen: list = []

    def written_down(module, name):
        work = vars(module)[name]
        monkeypatch.setattr(
            module,
            name,
            lambda model, first, *rest, **named: (
                seen.append((name, first if name != "response_hidden" else first.input_ids.tolist())),
                work(model, first, *rest, **named),
            )[1],
        )

    written_down(measure, "generate")
    written_down(measure, "response_hidden")
    decoding = Decoding(max_new_tokens=5, stop_ids=[END_ID])
    measure_rows(student, tokenizer, data, decoding, teacher=teacher)
    validation, seen[:] = sorted(seen, key=str), []
    job = SetEvaluation(student, tokenizer, data, file_of=lambda part: tmp_path / f"{part}.jsonl", teacher=teacher)
    job.run(decoding, [10], greedy=False, model_label="model", data_label="data")
    assert len(validation) == 2 + 6 + 2 * 6  # 32 rows at a time are decoded, 8 scored, for the KL by two models
    assert validation == sorted(seen, key=str)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "teacher_dtype"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_validation_is_what_evaluate_says_of_the_saved_student(world, tmp_path, capsys, dtype, teacher_dtype):
    lines = [
        {"instruction": "the " * (1 + index * 7 % 5), "input": "an" * (index % 6), "output": "ab" * (1 + index % 3)}
        for index in range(41)  # more than one batch
    ]
    valid = write_rows(tmp_path / "valid.jsonl", lines)
    teacher = ("--teacher", world.teacher, "--teacher-dtype", teacher_dtype)
    training = (*TRAINING, "--bf16", str(dtype == "bfloat16").lower(), "--select", "last")
    trained = tmp_path / "run"
    start = ("distill", "--student", world.student, *teacher, "--data", world.train, "--eval-data", valid)
    done(capsys, *start, "--out", trained, *training)
    limits = ("--template", LIMITS[-1], "--max-prompt-length", 40, "--max-completion-length", 8)
    measure = (
        "evaluate",
        "--model",
        trained,
        *teacher,
        "--data",
        valid,
        *limits,
        "--no-greedy",
        "--measure",
        "student",
        "--dtype",
        dtype,
    )
    done(capsys, *measure, "--out", tmp_path / "results.json")
    (validation,) = [line for line in json_lines(trained / "metrics.jsonl") if "eval_loss" in line]
    found = Results.read(tmp_path / "results.json").evaluations[0].metrics
    recorded = Results.read(trained / "results.json").evaluations[0].metrics
    assert {"loss", "rouge_l", "kl_to_teacher", "response_length"} <= found.keys()
    for name, metric in found.items():
        assert validation[f"eval_{name}"] == pytest.approx(metric.value, abs=1e-6, rel=1e-6), name
        assert recorded[name].value == pytest.approx(metric.value, abs=1e-6, rel=1e-6), name


@pytest.mark.slow
def test_the_precision_that_was_taken_is_said_and_recorded(world, tmp_path, capsys):
    out = tmp_path / "results.json"
    measure = ("evaluate", "--model", world.student, "--data", world.test, *LIMITS, "--no-greedy", "--out", out)
    ran = done(capsys, *measure, "--dtype", "bfloat16", "--teacher", world.teacher, "--teacher-dtype", "float32")
    assert "Computing in bfloat16 on cpu." in ran.err
    record = Results.read(out)
    assert {"Computed in bfloat16 on cpu.", "The teacher's weights were loaded in float32."} <= set(record.notes)
    assert (record.config["dtype"], record.config["teacher_dtype"]) == ("bfloat16", "float32")
    again = run(capsys, *measure, "--dtype", "float32", "--teacher", world.teacher)
    assert again.status == 2
    assert "--dtype was 'bfloat16' and is now 'float32'" in again.err
    alone = run(capsys, *measure, "--teacher-dtype", "float32", "--overwrite")
    assert alone.status == 2
    assert "--teacher-dtype is of a --teacher" in alone.err


@pytest.mark.slow
def test_training_says_its_precision(world, tmp_path, capsys, caplog):
    start = ("distill", "--student", world.student, "--teacher", world.teacher, "--data", world.train, *TRAINING, *BF16)
    low = ("--model_init_kwargs", '{"dtype": "bfloat16"}')
    ran = done(capsys, *start, *low, "--out", tmp_path / "run")
    notes = Results.read(tmp_path / "run" / "results.json").notes
    for text in (
        "Computed in bfloat16, with trained weights in float32, on cpu.",
        "The weights to train came in bfloat16 and were raised to float32: lower precision loses small updates.",
    ):
        assert notes.count(text) == 1
        assert ran.err.count(text) == 1
        assert text not in caplog.text  # the command's own line is enough
    assert load_model(tmp_path / "run", dtype="auto").dtype == torch.float32


COMMANDS = {
    "generate": lambda world, out: ("--model", world.student, "--data", world.test, "--out", out, *LIMITS),
    "exposure-bias": lambda world, out: (
        *("--student", world.student, "--teacher", world.teacher, "--data", world.test, "--out", out, *LIMITS),
        *("--samples-per-row", 1),
    ),
    "prune": lambda world, out: (
        *("--model", world.teacher, "--layers", 2, "--data", world.train, "--out", out, *LIMITS),
    ),
    "chat": lambda world, out: (world.student, "--prompt", "the", "--max-completion-length", 3),
}


def test_commands_that_run_a_model_say_why_they_use_a_macs_cpu(world, tmp_path, capsys, mac):
    ran = done(capsys, "chat", *COMMANDS["chat"](world, tmp_path / "out"), "--dtype", "float32")
    assert "Computing in float32 on cpu." in ran.err
    assert ran.err.count(devices.CPU_FOR_MPS) == 1


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compute_as_they_are_told(world, tmp_path, capsys, monkeypatch, command, dtype):
    seen = set()
    monkeypatch.setattr("promptkd.precision.has_bfloat16_units", lambda device: True)
    out = tmp_path / "out"
    with OnResults(torch.nn.functional.linear, lambda result, *_: seen.add(result.dtype)):
        ran = done(capsys, command, *COMMANDS[command](world, out), "--dtype", dtype)
    wanted = "float32" if dtype == "float32" else "bfloat16"
    assert f"Computing in {wanted} on cpu." in ran.err
    assert (torch.bfloat16 in seen) == (wanted == "bfloat16" or command == "exposure-bias")  # whose teacher is bfloat16
    if command == "prune":
        assert load_model(out, dtype="auto").dtype == torch.float32
        assert Results.read(out / "results.json").notes == [f"Computed in {wanted} on cpu."]
