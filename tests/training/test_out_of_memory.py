"""Memory that runs out: one message with the phase, the batch and what needs less, and a run that can be resumed."""

import importlib
import re
import weakref
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace

import accelerate.optimizer
import pytest
import torch

import promptkd.evaluation.dataset_evaluation
import promptkd.training.rollout
import promptkd.training.sft
import promptkd.training.teacher_tuner
import promptkd.training.validation
from helpers.commands import LIMITS, World, distill, done, make_world, run, sft, steps, weights
from helpers.trainers import log, trainer
from promptkd.cli import COMMANDS, _out_of_memory, main
from promptkd.cli.outputs import _MICRO_BATCHES, _OF_MEMORY
from promptkd.errors import PromptKDError
from promptkd.results import Results
from promptkd.training import DistillConfig, FinetuneConfig
from promptkd.training.out_of_memory import advice

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...")
CPU = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1073741824 bytes.")
EACH_STEP = ("--eval_strategy", "steps", "--eval_steps", 1, "--select", "last", "--save_steps", 1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def undisturbed(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is validated after each step."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main([str(each) for each in distill(world, out, "--eval-data", world.valid, *EACH_STEP)]) == 0
    return out


def fail_in_second_step(patch, owner, name, error):
    """Let a function that is called once per optimizer step run out of memory in its second call."""
    original, calls = vars(owner)[name], []

    def failing(*args, **kwargs):
        calls.append(name)
        if len(calls) == 2:
            raise error
        return original(*args, **kwargs)

    patch.setattr(owner, name, failing)


ROLLOUT = (promptkd.training.rollout, "generate")
PROMPT = (promptkd.training.teacher.Teacher, "trained_hidden")
STUDENT = (promptkd.training.student_loss.StudentLoss, "_loss")
UPDATE = (accelerate.optimizer.AcceleratedOptimizer, "step")
VALIDATION = (promptkd.training.validation, "measure_rows")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "error", "told", "flags"),
    [
        (ROLLOUT, CUDA, "in the rollout phase of step 2, on 4 rows, ", "--generation_batch_size 16"),
        (
            PROMPT,
            CPU,
            "in the prompt phase of step 2, on 4 rows, ",
            "--teacher_gradient_checkpointing, --per_device_train_batch_size 2 --gradient_accumulation_steps 2. "
            "For a new run only: --teacher_dtype bfloat16.",
        ),
        (
            STUDENT,
            MemoryError(),
            "in the student phase of step 2, on 4 rows, ",
            "--gradient_checkpointing, --per_device_train_batch_size 2 --gradient_accumulation_steps 2, "
            "--chunk_tokens 128",
        ),
        (UPDATE, CUDA, "in the update phase of step 2.", "For a new run only: --student-lora-rank 16, "),
        (
            VALIDATION,
            CUDA,
            "in the validation after step 2.",
            "--per_device_eval_batch_size 4, --generation_batch_size 16",
        ),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_a_phase_that_is_too_large_is_named_and_the_run_resumes(
    world, undisturbed, tmp_path, capsys, monkeypatch, where, error, told, flags
):
    out, settings = tmp_path / "run", ("--eval-data", world.valid, *EACH_STEP)
    with monkeypatch.context() as patch:
        fail_in_second_step(patch, *where, error)
        ran = run(capsys, *distill(world, out, *settings))
    assert ran.status == 1
    (message,) = [line for line in ran.err.splitlines() if "memory" in line]
    assert message.startswith(f"promptkd distill: Out of memory {told}")
    assert flags in message
    assert "checkpoint-1 is intact; --resume starts from it." in message
    assert "Traceback" not in ran.err
    done(capsys, *distill(world, out, *settings), "--resume")
    assert weights(out / "student") == weights(undisturbed / "student")
    prompts = [(run / "prompt" / "adapter_model.safetensors").read_bytes() for run in (out, undisturbed)]
    assert prompts[0] == prompts[1]
    assert steps(out) == steps(undisturbed)


@pytest.mark.slow
def test_the_message_says_how_much_was_held_and_asked_for(world, tmp_path, capsys, monkeypatch):
    fail_in_second_step(monkeypatch, *STUDENT, CPU)
    said = run(capsys, *distill(world, tmp_path / "run")).err
    assert " GiB of the machine's " in said
    assert ", and 1.00 GiB more were asked for." in said
    assert "No checkpoint was written yet." in said


@pytest.mark.slow
def test_fine_tuning_names_its_batch(world, tmp_path, capsys, monkeypatch):
    fail_in_second_step(monkeypatch, promptkd.training.sft, "response_hidden", CUDA)
    ran = run(capsys, *sft(world, tmp_path / "run", "--save_steps", 1))
    assert ran.status == 1
    assert "Out of memory in the training phase of step 2, on 4 rows, the longest of " in ran.err
    assert "--gradient_checkpointing, --per_device_train_batch_size 2 --gradient_accumulation_steps 2" in ran.err
    assert "teacher" not in ran.err.partition("Out of memory")[2]
    done(capsys, *sft(world, tmp_path / "run", "--save_steps", 1), "--resume")


@pytest.mark.slow
def test_a_run_resumes_with_what_needs_less(world, tmp_path, capsys, monkeypatch):
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "run"
    done(capsys, *distill(world, undisturbed))
    with monkeypatch.context() as patch:
        fail_in_second_step(patch, *PROMPT, CUDA)
        assert run(capsys, *distill(world, out, "--save_steps", 1)).status == 1
    smaller = distill(world, out, "--save_steps", 1, "--resume", "--gradient_accumulation_steps", 2)
    smaller[smaller.index("--per_device_train_batch_size") + 1] = 2
    smaller += ["--generation_batch_size", 2, "--teacher_gradient_checkpointing", "--gradient_checkpointing"]
    done(capsys, *smaller, "--chunk_tokens", 16)
    for ours, theirs in zip(steps(out), steps(undisturbed), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    refused = distill(world, out, "--save_steps", 1, "--resume")
    refused[refused.index("--per_device_train_batch_size") + 1] = 2
    ran = run(capsys, *refused)
    assert ran.status == 2
    assert "gradient_accumulation_steps was 2" in ran.err  # half of the rows would be another run


@pytest.mark.slow
def test_a_dry_run_that_is_too_large_says_so_and_does_not_speak_of_resuming(world, tmp_path, capsys, monkeypatch):
    fail_in_second_step(monkeypatch, *PROMPT, CUDA)
    ran = run(capsys, *distill(world, tmp_path / "run", "--dry-run"))
    assert ran.status == 1
    assert "Out of memory in the prompt phase of step 2" in ran.err
    assert "--teacher_gradient_checkpointing" in ran.err
    assert "resume" not in ran.err
    assert "checkpoint-" not in ran.err


@pytest.mark.parametrize("settings", [DistillConfig, FinetuneConfig])
def test_the_rows_of_a_step_are_counted_with_the_defaults_that_the_trainers_have(settings):
    defaults = {each.name: each.default for each in fields(settings)}
    assert {name: defaults[name] for name in _MICRO_BATCHES} == _MICRO_BATCHES
    assert _OF_MEMORY - defaults.keys() <= {"chunk_tokens", "teacher_gradient_checkpointing", "teachers_resident"}


@pytest.mark.slow
def test_the_tensors_of_a_failed_step_are_free_again(tmp_path, monkeypatch):
    made, held = trainer(tmp_path), []

    def failing(self, *args, **kwargs):
        large = torch.zeros(10)
        held.append(weakref.ref(large))
        raise CUDA

    monkeypatch.setattr(promptkd.training.student_loss.StudentLoss, "_loss", failing)
    with pytest.raises(PromptKDError) as caught:
        made.train()
    assert caught.value.__cause__.__traceback__ is not None
    assert held[0]() is None


@pytest.mark.slow
def test_a_trainer_trains_on_after_it_ran_out_of_memory(tmp_path, monkeypatch):
    made = trainer(tmp_path / "a")
    with monkeypatch.context() as patch:
        fail_in_second_step(patch, *STUDENT, CUDA)
        with pytest.raises(PromptKDError, match="Out of memory in the student phase of step 2") as caught:
            made.train()
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    made.train()
    assert len(log(made)) == 3


# ---- commands that measure ----


@pytest.mark.slow
def test_evaluate_names_its_batch_and_keeps_its_answers(world, tmp_path, capsys, monkeypatch):
    request = ("evaluate", "--model", world.student, "--data", world.test, *LIMITS, "--batch-size", 2, "--out")
    undisturbed, interrupted = tmp_path / "undisturbed.json", tmp_path / "interrupted.json"
    assert re.search(r"Peak memory \d", done(capsys, *request, undisturbed).err)
    with monkeypatch.context() as patch:
        fail_in_second_step(patch, promptkd.evaluation.dataset_evaluation, "decode_rows", CUDA)
        ran = run(capsys, *request, interrupted)
    assert ran.status == 1
    assert "promptkd evaluate: Out of memory on up to 2 rows at a time, each of up to 48 tokens." in ran.err
    assert "a smaller --batch-size (now 2)" in ran.err
    assert "run the same command again to resume" in ran.err
    done(capsys, *request, interrupted)
    assert Results.read(interrupted).evaluations == Results.read(undisturbed).evaluations


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_that_memory_ran_out(name):
    kinds = ("commands", "options")
    module, options = (importlib.import_module(f"promptkd.cli.{kind}.{name.replace('-', '_')}") for kind in kinds)
    given = {each.name: 2 if each.default is MISSING else each.default for each in fields(options.Options)}
    told = _out_of_memory("Peak 1 GiB.", module, SimpleNamespace(**given))
    batch = r" on up to \d+ rows at a time(, each of up to [\d,]+ tokens)?"
    assert re.match(rf"Out of memory({batch})?\. Peak 1 GiB\. ", told)


def test_loading_says_what_makes_a_teacher_smaller(world, tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise CPU

    monkeypatch.setattr("promptkd.cli.training_run.load_model", full)
    ran = run(capsys, *distill(world, tmp_path / "run"))
    assert ran.status == 1
    assert "Less is needed with --teacher_dtype bfloat16, or --teacher_quantization 8bit." in ran.err
    assert not (tmp_path / "run").exists()


# ---- which settings ----


def settings(**changed):
    given = {"generation_batch_size": 8, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}
    given |= {"per_device_eval_batch_size": 1, "gradient_checkpointing": False, "chunk_tokens": 256}
    return SimpleNamespace(**{**given, **changed})


@pytest.mark.parametrize(
    ("args", "phase", "savings", "now", "anew"),
    [
        (settings(), "rollout", {}, ["--generation_batch_size 4"], []),
        (settings(generation_batch_size=1), "rollout", {}, [], []),
        (
            settings(per_device_train_batch_size=3),
            "prompt",
            {"recompute_teacher": True},
            ["--teacher_gradient_checkpointing", "--per_device_train_batch_size 1 --gradient_accumulation_steps 6"],
            [],
        ),
        (
            settings(per_device_train_batch_size=1, gradient_checkpointing=True, chunk_tokens=64),
            "student",
            {"lower_teacher": True, "lora_student": True},
            [],
            ["--teacher_dtype bfloat16", "--student-lora-rank 16"],
        ),
        (
            settings(chunk_tokens=0, per_device_train_batch_size=1, gradient_checkpointing=True),
            "student",
            {},
            ["--chunk_tokens 128"],
            [],
        ),
        (settings(), "validation", {}, ["--generation_batch_size 4"], []),
        (settings(), "update", {}, [], ["--optim adafactor"]),
        (settings(), "update", {"take_turns": True}, ["--teachers_resident one"], ["--optim adafactor"]),
        (settings(), "rollout", {"take_turns": True}, ["--teachers_resident one", "--generation_batch_size 4"], []),
        (settings(), "", {"lower_teacher": True}, [], ["--teacher_dtype bfloat16"]),
    ],
)
def test_only_settings_that_are_open_are_named(args, phase, savings, now, anew):
    assert advice(args, phase, **savings) == (now, anew)
