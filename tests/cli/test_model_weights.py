"""How commands that only run a model hold its weights: their precision, and the devices that they are spread over."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel

from helpers.commands import LIMITS, done, make_world, run, weights
from helpers.tiny import save_model, tiny_model
from promptkd.cli import _out_of_memory, inference_run
from promptkd.cli.inference_run import InferenceRun
from promptkd.cli.options import evaluate as evaluate_options
from promptkd.errors import RequestError
from promptkd.models import load_model
from promptkd.models.load import saved_dtype
from promptkd.precision import model_precision
from promptkd.results import Results

MAP = '{"device_map": {"": "cpu"}}'
COMMANDS = {
    "generate": lambda world, model, out: ("--model", model, "--data", world.test, "--out", out, *LIMITS),
    "evaluate": lambda world, model, out: ("--model", model, "--data", world.test, "--out", out, *LIMITS),
    "exposure-bias": lambda world, model, out: (
        *("--student", model, "--teacher", world.teacher, "--data", world.test, "--out", out, *LIMITS),
        *("--samples-per-row", 1, "--teacher-dtype", "float32"),
    ),
    "prune": lambda world, model, out: ("--model", model, "--layers", 2, "--data", world.train, "--out", out, *LIMITS),
    "chat": lambda world, model, out: (model, "--prompt", "the", "--max-completion-length", 3),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def half(world):
    """A model that was saved in bfloat16."""
    model = tiny_model("llama", layers=4, hidden=24, seed=2).to(torch.bfloat16)
    return str(save_model(world.folder / "half", model))


@pytest.fixture
def loaded(monkeypatch):
    """The dtype and settings of each model that a command loads, by the end of its name."""
    found = {}

    def load(name, *, dtype, trust_remote_code, **settings):
        model = load_model(name, dtype=dtype, trust_remote_code=trust_remote_code, **settings)
        found[str(name).rpartition("/")[2]] = (str(model.dtype).removeprefix("torch."), settings)
        return model

    monkeypatch.setattr(inference_run, "load_model", load)
    return found


# ---- precision ----


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_weights_are_held_as_asked(world, half, loaded, tmp_path, capsys, command):
    """And on a CPU in float32 unless asked, whatever their files have."""
    done(capsys, command, *COMMANDS[command](world, half, tmp_path / "default"))
    assert loaded["half"][0] == "float32"
    for choice, held in (("bfloat16", "bfloat16"), ("auto", "bfloat16"), ("float32", "float32")):
        arguments = COMMANDS[command](world, half, tmp_path / choice)
        ran = done(capsys, command, *arguments, "--model-dtype", choice, "--dtype", "auto")
        assert loaded["half"][0] == held
        assert (f"The weights of {half} were loaded in bfloat16" in ran.err) == (held == "bfloat16")
    if command == "exposure-bias":
        assert loaded["teacher"][0] == "float32"


def test_a_model_saved_in_bfloat16_is_held_so_on_a_gpu_that_computes_in_it():
    half, single = torch.bfloat16, torch.float32
    for device, computes, saved, expected in (
        ("cuda", half, "bfloat16", "bfloat16"),
        ("cuda", half, "float32", "float32"),  # a trained student, which validation measured so
        ("cuda", half, "float16", "float32"),
        ("cuda", single, "bfloat16", "float32"),
        ("cpu", half, "bfloat16", "float32"),
    ):
        assert model_precision(None, device, computes=computes, saved=saved) == expected
    assert model_precision("float16", "cpu", computes=single, saved="float32") == "float16"


def test_the_commands_ask_for_that_on_a_gpu(world, half, monkeypatch):
    asked = []

    def load(name, *, dtype, trust_remote_code, **settings):
        asked.append((dtype, settings))
        return load_model(name, dtype=dtype)

    monkeypatch.setattr("promptkd.precision.has_bfloat16_units", lambda device: True)
    monkeypatch.setattr(inference_run, "load_model", load)
    monkeypatch.setattr(inference_run, "place_to_run", lambda model, device, less: model)
    options = {"dtype": "auto", "model_dtype": None, "model_init_kwargs": None, "trust_remote_code": False}
    monkeypatch.setattr(inference_run, "fastest_device", lambda: torch.device("cuda"))
    for changed, name in (({}, half), ({"dtype": "float32"}, half), ({}, world.student)):
        InferenceRun(SimpleNamespace(**(options | changed))).load_model(name)
    quantized = {"model_init_kwargs": {"quantization_config": {"load_in_4bit": True}}}
    InferenceRun(SimpleNamespace(**(options | quantized))).load_model(half)
    assert [dtype for dtype, _ in asked] == ["bfloat16", "float32", "float32", "bfloat16"]
    assert asked[0][1] == {}
    assert asked[-1][1]["device_map"] == {"": torch.device("cuda")}  # where a weight is quantized, it stays


def test_what_a_model_was_saved_in(world, half, tmp_path):
    assert (saved_dtype(half), saved_dtype(world.student)) == ("bfloat16", "float32")


def test_a_pruned_student_is_the_same_whatever_the_precision_of_its_teacher(world, half, tmp_path, capsys):
    """bfloat16 weights are float32 numbers: only the influence is measured by rounded states."""
    for name, extra in {"wide": (), "low": ("--model-dtype", "bfloat16")}.items():
        done(capsys, "prune", "--model", half, "--layers", 2, "--choose", "even", "--out", tmp_path / name, *extra)
    assert load_model(tmp_path / "low", dtype="auto").dtype == torch.float32
    assert weights(tmp_path / "low") == weights(tmp_path / "wide")
    assert json.loads((tmp_path / "low" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.slow
def test_answers_of_other_weights_are_not_taken_over(world, half, tmp_path, capsys):
    measure = ("evaluate", "--model", half, "--data", world.test, *LIMITS, "--no-greedy", "--out", tmp_path / "a.json")
    done(capsys, *measure)
    again = run(capsys, *measure, "--model-dtype", "bfloat16")
    assert again.status == 2
    assert "--model-dtype was 'float32' and is now 'bfloat16'" in again.err
    done(capsys, *measure, "--model-init-kwargs", MAP)  # results do not depend on it
    logits = ("generate", "--model", half, "--data", world.train, *LIMITS, "--keep-logits", 4, "--score")
    logits += ("--out", tmp_path / "kept")
    done(capsys, *logits)
    other = run(capsys, *logits, "--model-dtype", "bfloat16")
    assert other.status == 2
    assert "weights in bfloat16" in other.err


@pytest.mark.slow
def test_a_record_says_how_the_weights_were_held(world, half, tmp_path, capsys):
    measure = ("evaluate", "--model", half, "--data", world.test, *LIMITS, "--no-greedy", "--out", tmp_path / "a.json")
    done(capsys, *measure, "--dtype", "bfloat16", "--model-dtype", "bfloat16")
    record = Results.read(tmp_path / "a.json")
    assert f"The weights of {half} were loaded in bfloat16." in record.notes
    assert record.config["model_dtype"] == "bfloat16"


# ---- where they are ----


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_with_a_device_map_is_not_moved(world, half, tmp_path, capsys, monkeypatch, command):
    """And gives what it gives without one."""

    def move(model, *args, **kwargs):
        assert "hf_device_map" not in vars(model)
        return plain(model, *args, **kwargs)

    plain = PreTrainedModel.to
    outs = [tmp_path / "a.json", tmp_path / "b.json"]
    if command == "prune":
        outs = [tmp_path / "a", tmp_path / "b"]
    texts = [done(capsys, command, *COMMANDS[command](world, half, outs[0])).out]
    monkeypatch.setattr("transformers.PreTrainedModel.to", move)
    extra = ("--teacher-model-init-kwargs", MAP) if command == "exposure-bias" else ()
    texts.append(
        done(capsys, command, *COMMANDS[command](world, half, outs[1]), "--model-init-kwargs", MAP, *extra).out
    )
    assert texts[0].replace("a.json", "b.json") == texts[1]
    if command == "prune":
        assert weights(outs[0]) == weights(outs[1])
    elif command == "generate":
        assert outs[0].read_bytes() == outs[1].read_bytes()


@pytest.mark.slow
def test_a_teacher_of_evaluate_takes_a_device_map(world, loaded, tmp_path, capsys):
    measure = ("evaluate", "--model", world.student, "--data", world.test, *LIMITS, "--measure", "student")
    teacher = ("--teacher", world.teacher, "--teacher-model-init-kwargs", MAP)
    done(capsys, *measure, *teacher, "--out", tmp_path / "a.json")
    assert loaded["teacher"][1]["device_map"] == {"": "cpu"}
    assert "device_map" not in loaded["student"][1]


# ---- what is refused ----


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        (
            ("--dtype", "float32", "--model-dtype", "bfloat16"),
            "--model-dtype bfloat16 lets the model compute in that, and --dtype float32 in float32; leave one out",
        ),
        (("--model-init-kwargs", '{"dtype": "bfloat16"}'), "holds dtype: bfloat16. Give it as --model-dtype instead"),
        (("--model-init-kwargs", '{"revision": "main"}'), "holds revision: main. Download it"),
        (("--model-init-kwargs", '{"trust_remote_code": true}'), "Give it as --trust-remote-code instead"),
        (
            ("--teacher-model-init-kwargs", '{"device_map": "auto"}'),
            "--teacher-model-init-kwargs is of a --teacher. Give one, or leave it out.",
        ),
        (("--model-init-kwargs", '{"devicemap": "auto"}'), "from_pretrained takes no devicemap. Leave it out"),
        (("--model-init-kwargs", '{"device_map": {"": 7}}'), "device"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(world, tmp_path, capsys, extra, match):
    ran = run(capsys, "evaluate", "--model", world.student, "--data", world.test, "--out", tmp_path / "a.json", *extra)
    assert ran.status == 2
    assert match in ran.err
    assert "Traceback" not in ran.err


def test_a_quantized_model_is_not_pruned(world, tmp_path, capsys, monkeypatch):
    def load(name, **settings):
        model = load_model(name)
        model.is_quantized = True
        return model

    monkeypatch.setattr(inference_run, "load_model", load)
    ran = run(capsys, "prune", "--model", world.teacher, "--layers", 2, "--choose", "even", "--out", tmp_path / "out")
    assert ran.status == 2
    assert "A quantized model cannot be pruned" in ran.err


def test_running_out_of_memory_while_a_map_is_filled_is_no_fault_of_the_files(world, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("promptkd.models.load.AutoModelForCausalLM", SimpleNamespace(from_pretrained=full))
    with pytest.raises(torch.OutOfMemoryError):
        load_model(world.student)


@pytest.mark.parametrize(("changed", "told"), [({}, True), ({"model_dtype": "bfloat16"}, False)])
def test_less_memory_is_taken_by_weights_in_bfloat16(changed, told):
    given = {"batch_size": 1, "max_completion_length": 8, "dtype": "auto", "model_dtype": None} | changed
    text = _out_of_memory("Full.", evaluate_options, SimpleNamespace(**given))
    assert ("--model-dtype bfloat16" in text) == told


def test_layers_off_the_gpus_are_refused(world):
    model = load_model(world.student)
    model.hf_device_map = {"model": 0, "lm_head": "cpu"}
    with pytest.raises(RequestError, match=r"leaves some on the cpu\. Give more GPUs, or --model-dtype bfloat16"):
        inference_run.place_to_run(model, torch.device("cuda"), "--model-dtype bfloat16")
    model.hf_device_map = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(RequestError, match="leaves some on the disk"):
        inference_run.place_to_run(model, torch.device("cpu"), "")
