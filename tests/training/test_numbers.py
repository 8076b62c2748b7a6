"""NaN and infinite losses and gradients: nothing moves, the rows are named, and training goes on only if asked to."""

import json
import math
import os
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from helpers.commands import TEMPLATE, done, json_lines, make_world, write_rows
from helpers.commands import rows as text_rows
from helpers.commands import run as command
from helpers.processes import together
from helpers.tiny import save_model, tiny_model, tiny_tokenizer, token_id
from helpers.trainers import FIXED_PROMPTKD, FixedResponses, config, log, rows, trainer
from promptkd.data.encode import EncodedData
from promptkd.errors import PromptKDError, RequestError
from promptkd.methods import named_method
from promptkd.objectives import reverse_kl
from promptkd.results import Results
from promptkd.training import DistillTrainer, FinetuneConfig, FinetuneTrainer
from promptkd.training.callbacks import quiet
from promptkd.training.guard import MOST_SKIPPED

pytestmark = pytest.mark.slow

BAD = token_id("&")  # in no row but those that are marked with it


def marked(*places, count=16):
    """Rows with fixed responses, those at `places` ending their prompts with the bad token."""
    examples = [
        replace(row, prompt_ids=[*row.prompt_ids, BAD]) if row.row in places else row for row in rows(count).examples
    ]
    return EncodedData(examples, 0)


def models(broken=None):
    """Student and teacher; the embedding of the bad token is NaN in the one that is named."""
    student = tiny_model("llama", layers=2, hidden=16, seed=1, tied=False)
    teacher = tiny_model("llama", layers=3, hidden=24, seed=2, tied=False)
    if broken is not None:
        with torch.no_grad():
            {"student": student, "teacher": teacher}[broken].get_input_embeddings().weight[BAD] = math.nan
    return student, teacher


class InfiniteGradient(torch.autograd.Function):
    """The identity forward."""

    @staticmethod
    def forward(context, values):
        return values.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * math.inf


def breaking(at, loss=False):
    """Reverse KL, whose gradient, or whose value alone, is infinite at one call."""
    calls = []

    def objective(student_logits, teacher_logits):
        calls.append(1)
        if len(calls) != at:
            return reverse_kl(student_logits, teacher_logits)
        if loss:
            return reverse_kl(student_logits, teacher_logits) + math.inf
        return reverse_kl(InfiniteGradient.apply(student_logits), teacher_logits)

    return objective


def state(run):
    """Everything that a step moves."""
    weights, groups = list(run.model.parameters()), list(run.optimizer.state.values())
    if isinstance(run, DistillTrainer) and run.adapter is not None:
        weights += run.adapter.parameters()
        groups += run.tuner.optimizer.state.values()
    return [each.detach().clone() for each in (*weights, *(each for group in groups for each in group.values()))]


class Snapshots(TrainerCallback):
    """The state after each step."""

    def __init__(self, run):
        self.run, self.kept = run, []
        run.add_callback(self)

    def on_step_end(self, args, state_, control, **kwargs):
        self.kept.append(state(self.run))


def same(left, right):
    """Bit for bit, a broken model's NaN included."""
    alike = (torch.allclose(*each, rtol=0, atol=0, equal_nan=True) for each in zip(left, right, strict=True))
    return len(left) == len(right) and all(alike)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------------------------- stop


@pytest.mark.parametrize(
    ("broken", "batch", "accumulation"), [("student", 4, 1), ("teacher", 2, 2), ("student", 1, 4), ("teacher", 1, 4)]
)
def test_a_broken_model_stops_the_run_before_anything_moves(tmp_path, broken, batch, accumulation):
    run = trainer(
        tmp_path,
        data=marked(6),
        models=models(broken),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        shuffle_dataset=False,
        save_strategy="steps",
        save_steps=1,
    )
    snapshots = Snapshots(run)
    with pytest.raises(PromptKDError) as caught:
        run.train()
    (before,) = snapshots.kept
    assert same(state(run), before)
    message = str(caught.value)
    assert message.startswith("Step 2 was not taken: gradient, loss, prompt gradient and prompt loss are NaN or ")
    assert f"The weights of the {broken} hold NaN or infinite numbers themselves." in message
    named = message.partition("on row")[2].partition(" of the data")[0].removeprefix("s").strip().split(", ")
    assert len(named) == batch  # of the micro-batch, not of the window
    assert "6" in named
    assert set(named) <= {"4", "5", "6", "7"}
    assert f"{tmp_path / 'checkpoint-1'} is intact; --resume starts from it." in message
    assert "or skip such steps by --on_nan skip" in message
    assert [each.name for each in tmp_path.iterdir() if each.is_dir()] == ["checkpoint-1"]


@pytest.mark.parametrize("loss", [False, True])
def test_a_stopped_step_leaves_the_student_alone_and_holds_no_copy_of_the_adapter(tmp_path, loss):
    """The student's part of the step comes after the adapter's, and breaks in the second step."""
    settings = {"models": models(), "shuffle_dataset": False, "chunk_tokens": 0, "prompt_learning_rate": 1e-3}
    method = replace(named_method("promptkd-full"), responses=FixedResponses(), objective=breaking(2, loss))
    run = trainer(tmp_path, method=method, **settings)
    students = []
    run.add_callback(StudentSnapshots(students))
    with pytest.raises(PromptKDError) as caught:
        run.train()
    (before,) = students
    assert same([each.detach() for each in run.model.parameters()], before)
    assert run.tuner._before is None
    what = "loss" if loss else "gradient"
    assert str(caught.value).startswith(
        f"Step 2 was not taken: {what} is NaN or infinite on rows 4, 5, 6, 7 of the data, counted from 0. "
        "No checkpoint was written yet."
    )


class StudentSnapshots(TrainerCallback):
    """The student's weights after each step."""

    def __init__(self, kept):
        self.kept = kept

    def on_step_end(self, args, state_, control, model=None, **kwargs):
        self.kept.append([each.detach().clone() for each in model.parameters()])


@pytest.mark.parametrize(
    ("name", "loss"),
    [("promptkd", False), ("promptkd", True), ("promptkd-lora", True), ("promptkd-full", False), ("okd", True)],
)
def test_a_skipped_step_puts_back_what_it_had_moved_of_the_teacher(tmp_path, name, loss):
    settings = {"models": models(), "shuffle_dataset": False, "chunk_tokens": 0, "prompt_learning_rate": 1e-3}
    method = replace(named_method(name), responses=FixedResponses(), objective=breaking(2, loss))
    run = trainer(tmp_path, method=method, on_nan="skip", max_steps=2, **settings)
    snapshots = Snapshots(run)
    run.train()
    before, after = snapshots.kept
    assert same(after, before)


def test_wrong_settings_are_refused(tmp_path):
    with pytest.raises(RequestError, match="on_nan must be one of stop, skip, got 'never'"):
        config(tmp_path, on_nan="never")
    with pytest.raises(RequestError, match="logging_nan_inf_filter would hide a loss"):
        config(tmp_path, logging_nan_inf_filter=True)
    with pytest.raises(RequestError, match="on_nan must be one of stop, skip"):
        FinetuneConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, on_nan="")


def test_a_trainer_that_was_stopped_can_train_again(tmp_path):
    """Nothing of the broken window is left: no metric of it, and no gradient."""
    plain = replace(FIXED_PROMPTKD, adapter=None)
    broken = replace(plain, objective=breaking(1))
    again, fresh = (
        trainer(tmp_path, models=models(), method=method, shuffle_dataset=False) for method in (broken, plain)
    )
    with pytest.raises(PromptKDError):
        again.train()
    again.student_loss.method = plain
    for run in (again, fresh):
        torch.manual_seed(0)  # draws the order of a window's rows, and sums round by their order
        run.train()
    assert same(state(again), state(fresh))


@pytest.mark.parametrize("part", ["rollout", "tuner", "student"])
def test_training_interrupted_inside_a_window_resumes_from_python(tmp_path, part):
    """Of three micro-batches per step, the second one of the second step is the last that was begun."""
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3, "max_steps": 4}
    settings |= {"save_strategy": "steps", "save_steps": 1}
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    run = trainer(tmp_path / "run", **settings)
    owner, name, call = {
        "rollout": (run, "rollout", 2),
        "tuner": (run.tuner, "_update", 2),
        "student": (run.student_loss, "_loss", 5),
    }[part]
    original, calls = getattr(owner, name), []

    class Interrupting:
        limit = run.rollout.limit

        def __call__(self, *args, **kwargs):
            calls.append(1)
            if len(calls) == call:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

    setattr(owner, name, Interrupting())
    with pytest.raises(KeyboardInterrupt):
        run.train()
    setattr(owner, name, original)
    run.train(resume_from_checkpoint=True)
    assert same(state(run), state(whole))
    assert log(run) == log(whole)


# ---------------------------------------------------------------------------------------------------------------- skip


def skipping(folder, **settings):
    """Eight steps over four windows, of which the second has the bad row."""
    defaults = {"max_steps": 8, "shuffle_dataset": False, "lr_scheduler_type": "linear", "on_nan": "skip"}
    return trainer(folder, data=marked(6), models=models("teacher"), **{**defaults, **settings})


def test_a_skipped_step_moves_nothing_and_is_counted(tmp_path, caplog):
    run = skipping(tmp_path)
    snapshots = Snapshots(run)
    run.train()
    moved = [not same(*each) for each in zip(snapshots.kept, snapshots.kept[1:], strict=False)]
    assert moved == [False, True, True, True, False, True, True]
    lines = log(run)
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 1, 1, 2, 2, 2]
    assert [("loss" in line, "student_kl" in line) for line in lines] == [
        (line["step"] not in (2, 6),) * 2 for line in lines
    ]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    weights = {line["step"]: line["lambda"] for line in lines if "lambda" in line}
    assert weights == {step: pytest.approx(1 - (step - 1) / 8) for step in (1, 3, 4, 5, 7, 8)}  # of all steps
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-3 * (1 - k / 8) for k in range(8)])
    assert run.guard.skipped == 2
    assert [message.partition(":")[0] for message in caplog.messages] == ["Step 2 was skipped", "Step 6 was skipped"]
    assert "rows 4, 5, 6, 7 of the data" in caplog.text


def test_a_step_whose_gradient_alone_is_infinite_is_in_no_mean(tmp_path):
    run = skipping(tmp_path, logging_steps=4, max_steps=4)
    steps, norm = count(1), run.accelerator.clip_grad_norm_

    def clipped(*args, **kwargs):
        return norm(*args, **kwargs) * (math.inf if next(steps) == 3 else 1)

    run.accelerator.clip_grad_norm_ = clipped
    run.train()
    assert run.guard.skipped == 2  # the bad row's and that one
    (line,) = log(run)
    assert line["student_kl"] == pytest.approx(line["loss"], rel=1e-6)


def test_a_mean_over_logged_steps_is_that_of_the_steps_taken(tmp_path):
    every, pairs = (skipping(tmp_path / str(steps), logging_steps=steps, max_steps=4) for steps in (1, 2))
    every.train()
    pairs.train()
    losses = {line["step"]: line["loss"] for line in log(every) if "loss" in line}
    assert [line["loss"] for line in log(pairs)] == pytest.approx([losses[1], (losses[3] + losses[4]) / 2], rel=1e-6)
    assert [line["student_kl"] for line in log(pairs)] == [pytest.approx(line["loss"], rel=1e-6) for line in log(pairs)]


def test_a_resumed_run_goes_on_counting(tmp_path):
    whole, resumed = (skipping(tmp_path / name, save_strategy="steps", save_steps=3) for name in ("whole", "resumed"))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert log(resumed) == log(whole)
    assert same(state(resumed), state(whole))


def test_many_skipped_steps_in_a_row_stop_the_run(tmp_path):
    run = trainer(tmp_path, data=marked(*range(16)), models=models("teacher"), max_steps=20, on_nan="skip")
    before = [each.detach().clone() for each in run.model.parameters()]
    with pytest.raises(PromptKDError, match=f"{MOST_SKIPPED} steps in a row .* the last of them step {MOST_SKIPPED}:"):
        run.train()
    assert same(list(run.model.parameters()), before)


# --------------------------------------------------------------------------------------------------------- fine-tuning


def finetuning(folder, **settings):
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "shuffle_dataset": False,
        "train_sampling_strategy": "sequential",
    }
    args = FinetuneConfig(output_dir=str(folder), **{**defaults, **settings})
    made = FinetuneTrainer(models("student")[0], args, marked(6), None, tiny_tokenizer())
    quiet(made)
    return made


def test_fine_tuning_stops_and_names_the_micro_batch(tmp_path):
    run = finetuning(tmp_path)
    snapshots = Snapshots(run)
    with pytest.raises(PromptKDError) as caught:
        run.train()
    assert same(state(run), snapshots.kept[-1])
    assert "gradient and loss are NaN or infinite on rows 6, 7 of the data" in str(caught.value)
    assert "The weights of the student hold" not in str(caught.value)
    assert "The weights of the model hold" in str(caught.value)


def test_fine_tuning_skips(tmp_path):
    run = finetuning(tmp_path, on_nan="skip")
    run.train()
    lines = log(run)
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 1]
    assert [line["step"] for line in lines if "loss" in line] == [1, 3, 4]
    assert all(math.isfinite(value) for line in lines for value in line.values())


# ------------------------------------------------------------------------------------------------------- commands, DDP


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A teacher that cannot read the character &, and a row that has it."""
    made = make_world(tmp_path_factory.mktemp("world"))
    teacher = str(save_model(made.folder / "broken", models("teacher")[1]))
    lines = text_rows(12)
    lines[7]["instruction"] += "&"
    return made._replace(teacher=teacher, train=str(write_rows(made.folder / "marked.jsonl", lines)))


def distill(world, out, *more):
    return (
        *("distill", "--student", world.student, "--teacher", world.teacher, "--data", world.train, "--out", out),
        *("--max_prompt_length", 40, "--max_completion_length", 8, "--template", TEMPLATE, "--use_cpu"),
        *("--max_steps", 6, "--per_device_train_batch_size", 4, "--save_strategy", "steps", "--save_steps", 1),
        *("--shuffle_dataset", "false", *more),
    )


def test_a_stopped_run_is_gone_on_with_by_skipping(world, tmp_path, capsys):
    out = tmp_path / "run"
    ran = command(capsys, *distill(world, out))
    assert ran.status == 1
    assert "Traceback" not in ran.err
    message = ran.err.splitlines()[-1]
    assert message.startswith("promptkd distill: Step 2 was not taken: ")
    assert "rows 4, 5, 6, 7 of the data" in message
    assert "The weights of the teacher hold NaN" in message
    assert not (out / "student").exists()
    checkpoint = files(out / "checkpoints")
    assert {name.split("/")[0] for name in checkpoint} == {"checkpoint-1"}

    done(capsys, *distill(world, out, "--resume", "--on_nan", "skip"))
    lines = json_lines(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    skipped = [line["step"] for line in lines if "loss" not in line]
    assert {2, 5} <= set(skipped)  # the row comes once an epoch of 3 steps, and the student may write the character
    assert lines[-1]["skipped_steps"] == len(skipped) < 6
    record = Results.read(out / "results.json")
    assert record.metrics["skipped_steps"].value == len(skipped)
    note = f"{len(skipped)} of 6 steps were skipped: their loss or gradient was NaN or infinite."
    assert note in record.notes
    assert note in (out / "report.html").read_text()


def trained_both_ways(folder):
    found = {}
    for on_nan in ("stop", "skip"):
        run = trainer(
            folder,
            data=marked(6),
            models=models("teacher"),
            max_steps=4,
            shuffle_dataset=False,
            on_nan=on_nan,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
        )
        try:
            run.train()
            told = ""
        except PromptKDError as error:
            told = str(error)
        weights = [each.detach().double().sum().item() for each in (*run.model.parameters(), *run.adapter.parameters())]
        found[on_nan] = {"told": told, "weights": weights, "log": log(run)}
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.barrier()


def test_processes_decide_alike(tmp_path):
    together(lambda: trained_both_ways(tmp_path), tmp_path, 2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for on_nan in ("stop", "skip"):
        assert first[on_nan]["weights"] == second[on_nan]["weights"]
        assert first[on_nan]["told"] == second[on_nan]["told"]
        assert all(map(math.isfinite, first[on_nan]["weights"]))
    assert first["stop"]["told"].startswith("Step 2 was not taken: ")
    assert " on row 6 of the data" in first["stop"]["told"]  # alone in its micro-batch, and on one process alone
    assert [line["skipped_steps"] for line in first["skip"]["log"]] == [0, 1, 1, 1]
