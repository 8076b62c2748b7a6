"""Teachers that are made of the student: its start and its moving average."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig

from helpers.commands import distill, done, make_world, run, weights
from helpers.tiny import tiny_tokenizer
from helpers.trainers import FIXED_PROMPTKD, FixedResponses, config, log, pair, rows
from promptkd.data import EncodedData
from promptkd.engine import ChunkedLoss
from promptkd.errors import RequestError
from promptkd.methods import Method, named_method
from promptkd.methods.token_method import cross_entropy, mixed_loss
from promptkd.objectives import forward_kl
from promptkd.results import Results
from promptkd.training import DistillTrainer
from promptkd.training.callbacks import quiet
from promptkd.training.own_teacher import MovingAverage

MOVING = Method(FixedResponses(), loss=lambda step: mixed_loss(forward_kl, 0.5, step))  # the rows' tokens move it
LORA = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")


def own(folder, teacher="ema", *, method=MOVING, data=None, peft_config=None, eval_data=None, **settings):
    settings = {"prompt_learning_rate": 1e-3 if method.adapter is None else 1e-2, **settings}
    args = config(folder, **settings)
    made = DistillTrainer(
        pair()[0], teacher, args, data or rows(), eval_data, tiny_tokenizer(), method=method, peft_config=peft_config
    )
    quiet(made)
    return made


def informed():
    """Rows with a context that only the teacher reads."""
    made = rows(8).examples
    return EncodedData([replace(row, teacher_prompt_ids=[61, 60, 59, *row.prompt_ids]) for row in made], 0)


def trained(ours):
    return {name: each.detach().clone() for name, each in ours.model.named_parameters() if each.requires_grad}


@pytest.mark.slow
def test_the_start_stays_and_is_a_copy(tmp_path):
    ours = own(tmp_path, "self")
    start = trained(ours)
    ours.train()
    assert all(torch.equal(start[name], each) for name, each in ours.teacher.model.named_parameters())
    assert not any(torch.equal(start[name], each) for name, each in trained(ours).items())
    assert "teacher_ema_decay" not in log(ours)[0]


@pytest.mark.slow
@pytest.mark.parametrize("peft_config", [None, LORA], ids=["whole", "lora"])
def test_the_average_follows_each_step_by_its_rate(tmp_path, peft_config):
    ours = own(tmp_path, peft_config=peft_config, teacher_ema_decay=0.75, learning_rate=0.1)
    expected, seen = trained(ours), [trained(ours)]
    held = dict(ours.teacher.model.named_parameters())
    step = ours.guard.end_step

    def noted(*arguments, **settings):
        step(*arguments, **settings)
        seen.append(trained(ours))  # before the optimizer moves

    ours.guard.end_step = noted
    ours.train()
    for student in [*seen[2:], trained(ours)]:
        expected = {name: 0.75 * each + 0.25 * student[name] for name, each in expected.items()}
    assert len(seen) == 4
    for name, each in expected.items():
        torch.testing.assert_close(held[name], each, rtol=1e-6, atol=1e-7)
        assert held[name].dtype == torch.float32
        assert not torch.equal(held[name], trained(ours)[name])


@pytest.mark.slow
def test_a_lora_student_shares_what_is_not_trained(tmp_path):
    ours = own(tmp_path, peft_config=LORA)
    student, teacher = (dict(each.named_parameters()) for each in (ours.model, ours.teacher.model))
    assert student.keys() == teacher.keys()
    for name, each in student.items():
        assert (each.data_ptr() == teacher[name].data_ptr()) != each.requires_grad
        assert each is not teacher[name]
        assert not teacher[name].requires_grad
    ours.train()
    assert set(ours.extra_state.state_dict()["average"]) == set(trained(ours))


@pytest.mark.slow
@pytest.mark.parametrize(("decay", "is_start"), [(1.0, True), (0.0, False)])
def test_the_ends_of_the_rate(tmp_path, decay, is_start):
    ours = own(tmp_path, teacher_ema_decay=decay)
    start = trained(ours)
    ours.train()
    for name, each in ours.teacher.model.named_parameters():
        assert torch.equal(each, start[name] if is_start else trained(ours)[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "teacher"),
    [(MOVING, "ema"), (FIXED_PROMPTKD, "self"), (named_method("opsd"), "self"), (named_method("opsd"), "ema")],
    ids=["moving", "prompt", "opsd", "opsd, ema"],
)
def test_a_resumed_run_has_the_bits_of_an_undisturbed_one(tmp_path, method, teacher):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "data": informed()}
    saving |= {"teacher_ema_decay": 0.5} if teacher == "ema" else {}
    whole = own(tmp_path, teacher, method=method, **saving)
    whole.train()
    again = own(tmp_path, teacher, method=method, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert log(again) == log(whole)
    for mine, other in ((again.model, whole.model), (again.teacher.model, whole.teacher.model)):
        assert all(torch.equal(*each) for each in zip(mine.parameters(), other.parameters(), strict=True))


@pytest.mark.slow
def test_a_step_that_is_skipped_leaves_the_average_as_it_is(tmp_path):
    def broken(step):
        loss = cross_entropy(step)
        return ChunkedLoss(loss.total * (math.nan if step.progress else 1.0), loss.metrics)

    ours = own(tmp_path, method=Method(FixedResponses(), loss=broken), on_nan="skip", max_steps=2, learning_rate=0.1)
    kept = []
    ours.train()
    held, start = dict(ours.teacher.model.named_parameters()), dict(pair()[0].named_parameters())
    for name, student in trained(ours).items():
        kept.append(torch.allclose(held[name], start[name] + 0.01 * (student - start[name]), rtol=0, atol=1e-7))
    assert ours.guard.skipped == 1
    assert all(kept)


def test_a_step_that_overflows_at_the_loss_scale_leaves_the_average_as_it_is():
    student, accelerator = torch.nn.Linear(2, 1, bias=False), Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)  # as in float16 on a GPU
    optimizer = accelerator.prepare(torch.optim.SGD(student.parameters(), lr=0.1))
    average = MovingAverage(student, 0.5, accelerator, SimpleNamespace(skipped_in_a_row=0))
    (mean,), start = average.model.parameters(), student.weight.detach().clone()
    for size, moves in ((1.0, True), (math.inf, False), (1.0, True)):
        before = mean.clone()
        accelerator.scaler.scale(student(torch.full((2,), size)).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.on_step_end(None, None, None)
        assert torch.equal(mean, before) != moves
    assert not torch.equal(student.weight, start)


@pytest.mark.slow
def test_validation_is_against_the_average_and_a_trained_prompt_goes_before_it(tmp_path):
    ours = own(tmp_path, method=FIXED_PROMPTKD, eval_data=rows(4, seed=3), teacher_ema_decay=0.5, learning_rate=0.05)
    assert ours.evaluate()["eval_kl_to_teacher"] == pytest.approx(0.0, abs=1e-6)
    ours.train()
    assert ours.evaluate()["eval_kl_to_teacher"] > 1e-4
    assert log(ours)[1]["prompt_kl"] > 0


def test_what_does_not_go_together_is_refused(tmp_path):
    cases = (
        ("self", {"teacher_ema_decay": 0.5}, "teacher_ema_decay is that of a moving average"),
        ("ema", {"teacher_dtype": "bfloat16"}, "kept in float32"),
        ("ema", {"teacher_model_init_kwargs": {"a": 1}}, "teacher_model_init_kwargs cannot be set"),
        ("self", {"teacher_dtype": "bfloat16"}, "teacher_dtype cannot be set"),  # of a student that came as a model
        ("ema", {"method": named_method("promptkd-lora")}, "cannot be trained as well"),
        ("ema", {"method": named_method("seqkd")}, "reads no teacher"),
    )
    for teacher, settings, told in cases:
        with pytest.raises(RequestError, match=told):
            own(tmp_path, teacher, **settings)


@pytest.mark.slow
def test_nothing_is_learned_of_oneself_without_a_context_and_the_run_says_so(tmp_path):
    objective = replace(MOVING, loss=None, objective=forward_kl)
    for teacher in ("self", "ema"):
        ours = own(tmp_path, teacher, method=objective)
        (note,) = [each for each in ours.notes if "nothing is learned" in each]
        assert {"self": "the student's start", "ema": "moving average of the student, decay 0.99"}[teacher] in note
        ours.train()
        assert log(ours)[0]["student_loss" if "student_loss" in log(ours)[0] else "student_kl"] == 0
    assert not [each for each in own(tmp_path, "self", method=FIXED_PROMPTKD).notes if "nothing is learned" in each]


@pytest.mark.slow
def test_a_student_learns_of_its_own_start_that_sees_more(tmp_path):
    informed = EncodedData([replace(row, teacher_prompt_ids=[5, *row.prompt_ids]) for row in rows(4).examples], 0)
    ours = own(tmp_path, "self", method=Method(FixedResponses(), forward_kl), data=informed, learning_rate=3e-3)
    assert not [each for each in ours.notes if "nothing is learned" in each]
    ours.train()
    first, *_, last = [each for each in log(ours) if "loss" in each]
    assert first["student_kl"] > 0.01
    assert last["student_kl"] < first["student_kl"]


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["self", "ema"])
def test_a_run_of_the_command_line_names_its_teacher_and_resumes(tmp_path, capsys, teacher):
    world = make_world(tmp_path / "world")._replace(teacher=teacher)
    settings = ("--method", "kd", "--cross_entropy_share", 0.5, "--save_strategy", "steps", "--save_steps", 2)
    measured = ("--eval-data", world.valid, "--measure", "all", "--select", "last", "--preflight")
    request = distill(world, tmp_path / "run", *settings, *measured)
    said = done(capsys, *request).err
    assert "nothing is learned from it but rounding" in said
    record = Results.read(tmp_path / "run" / "results.json")
    about = {"self": "the student's start", "ema": "moving average of the student, decay 0.99"}[teacher]
    assert record.models["teacher"].about == about
    assert [each.model for each in record.evaluations] == ["student", "student before training"]
    assert f"Teacher: {about}." in record.notes
    before, log_before = weights(tmp_path / "run" / "student"), (tmp_path / "run" / "metrics.jsonl").read_text()
    (tmp_path / "run" / "results.json").unlink()
    assert "Resuming from" in done(capsys, *request, "--resume").err
    assert weights(tmp_path / "run" / "student") == before
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == log_before.count("\n")


def test_a_setting_of_a_moving_average_is_refused_before_anything_is_loaded(tmp_path, capsys):
    world = make_world(tmp_path / "world")
    ran = run(capsys, *distill(world, tmp_path / "run", "--teacher_ema_decay", 0.5))
    assert ran.status == 2
    assert "teacher_ema_decay is that of a moving average" in ran.err
