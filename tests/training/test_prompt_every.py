"""`--prompt_every N`: the teacher's adapter moves in the first of every N steps, and rests in the others."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import TrainerCallback

import promptkd.models.adapters
from helpers.commands import distill, done, make_world
from helpers.tiny import tiny_tokenizer
from helpers.trainers import FIXED_PROMPTKD, FixedResponses, config, log, pair, rows, trainer
from minimal_loop import kl, response_log_probs, start_prompt
from minimal_loop import step as whole_step
from promptkd.engine import response_hidden
from promptkd.errors import RequestError
from promptkd.methods import named_method
from promptkd.objectives import reverse_kl
from promptkd.results import Results
from promptkd.training.dry_run import Trial, longest_rows_first, take_trial_steps

OF_THE_PROMPT = {"prompt_kl", "prompt_regularizer", "lambda", "prompt_grad_norm", "prompt_learning_rate"}


def student_step(teacher, student, soft_prompt, optimizer, batch):
    """The student's part of a step alone, with the prompt as it stands."""
    tokens, loss = sum(len(response) for _, response in batch), 0.0
    for request, response in batch:
        target = response_log_probs(teacher, request, response, soft_prompt).detach()
        loss = loss + kl(response_log_probs(student, request, response), target) / tokens
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    return None, loss.item()


def flat_loop(steps, every, *, window=4, rate=1e-2):
    """PromptKD written flat, its prompt's part in steps 0, N, 2N …, with a rate that falls to 0 over those."""
    student, teacher = pair(torch.float64)
    soft_prompt = start_prompt(teacher.requires_grad_(False), tiny_tokenizer())
    prompt_optimizer = torch.optim.AdamW([soft_prompt], lr=rate, weight_decay=0.0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0)
    data = [(row.prompt_ids, row.response_ids) for row in rows(32).examples]
    own, losses = len(range(0, steps, every)), []
    for k in range(steps):
        batch = data[k * window : (k + 1) * window]
        if k % every:
            losses.append(student_step(teacher, student, soft_prompt, optimizer, batch))
        else:
            prompt_optimizer.param_groups[0]["lr"] = rate * (1 - k // every / own)
            losses.append(whole_step(teacher, student, soft_prompt, prompt_optimizer, optimizer, batch, k, steps))
    return losses, student, soft_prompt


@pytest.mark.slow
@pytest.mark.parametrize(("every", "batch", "accumulation"), [(2, 2, 2), (4, 4, 1)])
def test_steps_equal_the_flat_ones(tmp_path, float64_inside, every, batch, accumulation):
    losses, student, soft_prompt = flat_loop(5, every)
    ours = trainer(
        tmp_path,
        data=rows(32),
        models=pair(torch.float64),
        max_steps=5,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        shuffle_dataset=False,
        prompt_every=every,
        prompt_lr_scheduler_type="linear",
    )
    ours.train()
    for k, (entry, (prompt_loss, student_kl)) in enumerate(zip(log(ours), losses, strict=True)):
        assert entry["student_kl"] == pytest.approx(student_kl, rel=1e-10)
        assert OF_THE_PROMPT & entry.keys() == (OF_THE_PROMPT if k % every == 0 else set())
        if k % every == 0:
            assert entry["lambda"] == pytest.approx(1 - k / 5)
            total = entry["prompt_kl"] + entry["lambda"] * entry["prompt_regularizer"]
            assert total == pytest.approx(prompt_loss, rel=1e-10)
    torch.testing.assert_close(ours.adapter.module.embeddings, soft_prompt, rtol=0, atol=1e-10)
    for mine, theirs in zip(ours.model.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


def count_passes(monkeypatch):
    """The teacher's passes in their order, as they come."""
    passes = []

    def counted(model, batch, prompt=None):
        passes.append("plain" if prompt is None else "prompted")
        return response_hidden(model, batch, prompt)

    monkeypatch.setattr(promptkd.models.adapters, "response_hidden", counted)
    return passes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("refresh", "moving"), [("fresh", ["plain", "prompted", "prompted"]), ("stale", ["plain", "prompted"])]
)
def test_between_its_steps_the_teacher_runs_once(tmp_path, monkeypatch, refresh, moving):
    passes = count_passes(monkeypatch)
    ours = trainer(tmp_path, prompt_refresh=refresh, prompt_every=3, max_steps=4)
    ours.train()
    assert passes == [*moving, "prompted", "prompted", *moving]
    lags = [entry.get("prompt_lag") for entry in log(ours)]
    assert lags == ([1, 0, 0, 1] if refresh == "stale" else [None] * 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["promptkd", "promptkd-lora", "promptkd-full", "okd"])
def test_every_adapter_moves_in_its_own_steps_alone(tmp_path, name):
    states = []

    class Kept(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            states.append([each.detach().clone() for each in ours.adapter.parameters()])

    method = replace(named_method(name), responses=FixedResponses())
    ours = trainer(tmp_path, method=method, prompt_every=2, max_steps=5)
    ours.add_callback(Kept())
    states.append([each.detach().clone() for each in ours.adapter.parameters()])
    ours.train()
    moved = [any(map(lambda a, b: not torch.equal(a, b), *each)) for each in pairwise(states)]
    assert moved == [True, False, True, False, True]


@pytest.mark.slow
def test_a_resumed_run_equals_the_undisturbed_one_bit_for_bit(tmp_path):
    settings = {
        "max_steps": 6,
        "method": named_method("promptkd"),
        "prompt_every": 3,
        "logging_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,  # between two of the prompt's steps
        "prompt_lr_scheduler_type": "cosine",
    }
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    resumed = trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert log(resumed) == log(whole)
    assert torch.equal(resumed.adapter.module.embeddings, whole.adapter.module.embeddings)
    for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.slow
def test_a_skipped_step_rolls_nothing_back_that_an_earlier_one_has_moved(tmp_path):
    calls = []

    def objective(student_logits, teacher_logits):
        calls.append(1)
        return reverse_kl(student_logits, teacher_logits) + (float("inf") if len(calls) == 2 else 0.0)

    method = replace(FIXED_PROMPTKD, objective=objective)
    run = trainer(tmp_path, method=method, on_nan="skip", max_steps=2, prompt_every=2, chunk_tokens=0)
    run.train()
    assert run.guard.skipped == 1
    assert run.adapter.module.distance() > 0


@pytest.mark.slow
def test_a_step_of_the_prompt_measures_what_a_later_line_shows(tmp_path):
    """At λ = 0 the plain teacher is read for the log alone, and no step of the prompt is a logged one here."""
    run = trainer(tmp_path, regularizer_schedule="none", logging_steps=2, prompt_every=2, max_steps=4)
    run.train()
    lines = log(run)
    assert [line["step"] for line in lines] == [2, 4]
    assert all(line["prompt_kl"] > 0 and line["prompt_norm"] > 0 for line in lines)
    assert lines[1]["prompt_regularizer"] > 0


def test_a_method_without_an_adapter_refuses_it(tmp_path):
    with pytest.raises(RequestError, match="without a teacher adapter takes no prompt_every"):
        trainer(tmp_path, method=named_method("kd"), prompt_every=2)
    with pytest.raises(RequestError, match="prompt_every must be at least 1, got 0"):
        config(tmp_path, prompt_every=0)


# ---- what a dry run says, and a run ----


@pytest.mark.parametrize(
    ("steps", "every", "between", "expected"),
    [(10, 1, None, 30.0), (10, 4, 1.0, 3 * 3.0 + 7 * 1.0), (8, 4, 1.0, 12.0), (2, 4, None, 6.0)],
)
def test_the_expected_time_counts_both_kinds_of_steps(steps, every, between, expected):
    spent = {"seconds": 3.0, "seconds_by_phase": {}, "seconds_between": between, "prompt_every": every}
    trial = Trial(
        steps=steps, **spent, warm=True, longest_row=1, peak_memory_bytes=1, peak_memory_by_phase={}, sampled=False
    )
    assert trial.expected_seconds == expected


@pytest.mark.slow
def test_a_trial_measures_a_step_with_the_prompt_and_one_without(tmp_path, monkeypatch):
    args = config(tmp_path, prompt_every=5)
    data = longest_rows_first(rows(), args, FIXED_PROMPTKD)
    first, second, third = (data.examples[start : start + 4] for start in (0, 4, 8))
    assert first == second == third
    made = trainer(tmp_path, data=data, prompt_every=5, shuffle_dataset=False, max_steps=40)
    passes = count_passes(monkeypatch)
    trial = take_trial_steps(made)
    assert passes == [*["plain", "prompted", "prompted"] * 2, "prompted"]
    assert trial.seconds_between is not None
    assert trial.seconds_by_phase["prompt"] > 0
    assert trial.warm


@pytest.mark.slow
def test_the_command_says_what_it_is(tmp_path, capsys):
    world = make_world(tmp_path)
    request = distill(world, tmp_path / "run", "--prompt_every", 2)
    forecast = done(capsys, *request, "--dry-run").out
    assert "without the prompt's part" in forecast
    assert "on average" in forecast
    assert "one step in 2 having the prompt's part" in forecast
    told = done(capsys, *request).err
    assert "--prompt_every 2: what is trained of the teacher moves in the first of every 2 steps alone" in told
    record = Results.read(tmp_path / "run" / "results.json")
    (training,) = record.training.values()
    assert training.method == "promptkd, prompt every 2 steps"
    assert any(note.startswith("--prompt_every 2") for note in record.notes)
