"""What a run costs: measured in trial steps on the longest rows before it starts, and said and recorded at its end."""

import json
import os
import re
from dataclasses import replace

import pytest

import promptkd.training.rollout
from helpers.commands import TRAINING, done, make_world, run
from helpers.trainers import config, rows, trainer
from promptkd.data.encode import EncodedData, EncodedExample
from promptkd.generation import generate
from promptkd.methods import named_method
from promptkd.responses import (
    AdaptiveReplay,
    ResponseMix,
    Responses,
    Speculation,
    Speculative,
    TeacherMixed,
    writes_responses,
)
from promptkd.results import Results, Training
from promptkd.training.dry_run import at_its_most, longest_rows_first, take_trial_steps

PHASES = {"rollout", "prompt", "student", "update"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


# ---- the trial's rows and responses ----


def data_of(*lengths):
    """Rows of so many prompt and response tokens."""
    made = [
        EncodedExample([3] * prompt, [4] * response, ("abc",), "?", row)
        for row, (prompt, response) in enumerate(lengths)
    ]
    return EncodedData(made, 0)


LENGTHS = ((2, 8), (9, 2), (5, 5), (7, 1), (1, 1))


@pytest.mark.parametrize(
    ("method", "order"),
    [
        ("promptkd", [1, 3, 1, 3, 2]),  # responses reach the limit: the longest prompts
        ("kd", [1, 0, 1, 0, 2]),  # of the data's responses
        ("distillm2", [1, 2, 1, 2, 3]),  # of both, each behind the prompt
        ("dpkd", [1, 2, 1, 2, 3]),
    ],
)
def test_the_longest_rows_come_first_and_in_both_steps(tmp_path, method, order):
    args = config(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    ordered = longest_rows_first(data_of(*LENGTHS), args, named_method(method))
    assert [row.row for row in ordered.examples] == order
    assert not args.shuffle_dataset


@pytest.mark.parametrize("name", ["distillm2", "dpkd"])
def test_the_datas_responses_count_where_a_loss_reads_them_beside_the_students(tmp_path, name):
    """Twice the prompt, the limit L and the data's response: 4 + L + 9 is most. Prompt and L alone: least."""
    args, method = config(tmp_path, per_device_train_batch_size=1), at_its_most(named_method(name))
    data = data_of((4, 1), (2, 9), (3, 2))
    ordered = longest_rows_first(data, args, method)
    assert [row.row for row in ordered.examples] == [1, 1, 0]
    assert [row.row for row in longest_rows_first(data, args, named_method("promptkd")).examples] == [0, 0, 2]


@pytest.mark.slow
def test_the_trial_of_such_a_loss_names_the_tokens_of_both_responses(tmp_path):
    method = at_its_most(named_method("distillm2"))
    data = longest_rows_first(rows(), config(tmp_path), method)
    longest = max(2 * len(row.prompt_ids) + len(row.response_ids) for row in rows().examples)
    made = trainer(tmp_path, data=data, method=method, shuffle_dataset=False, max_steps=40)
    assert take_trial_steps(made).longest_row == longest + 8


def test_rows_of_less_than_two_steps_stay_as_many(tmp_path):
    args = config(tmp_path, per_device_train_batch_size=4)
    ordered = longest_rows_first(data_of(*LENGTHS), args, named_method("kd"))
    assert [row.row for row in ordered.examples] == [1, 0, 2, 3, 1]


@pytest.mark.parametrize(
    ("source", "writes", "most"),
    [
        (Responses(), False, Responses),
        (ResponseMix(0.0), False, ResponseMix),
        (ResponseMix(0.3), True, ResponseMix),
        (AdaptiveReplay(), True, ResponseMix),
        (TeacherMixed(0.2), True, TeacherMixed),
        (Speculative(0.0, Speculation()), False, Speculative),
        (Speculative(0.3, Speculation()), True, Speculative),
    ],
)
def test_a_trial_lets_the_student_write_whatever_it_may_write(source, writes, most):
    method = replace(named_method("gkd"), responses=source)
    assert writes_responses(source) == writes
    trial = at_its_most(method).responses
    assert type(trial) is most
    if most is ResponseMix:
        assert trial.student_share == float(writes)


def watched_generation(monkeypatch):
    """What the rollout asks `generate` for, and what it gets."""
    seen = []

    def watched(model, prompts, params, **settings):
        responses = generate(model, prompts, params, **settings)
        seen.append((prompts, responses))
        return responses

    monkeypatch.setattr(promptkd.training.rollout, "generate", watched)
    return seen


@pytest.mark.slow
def test_every_phase_runs_on_the_longest_rows_with_responses_at_their_limit(tmp_path, monkeypatch):
    seen = watched_generation(monkeypatch)
    method = named_method("promptkd")
    data = longest_rows_first(rows(), config(tmp_path), method)
    made = trainer(tmp_path, data=data, method=method, shuffle_dataset=False, max_steps=40)
    made.stop_ids = tuple(range(60))  # nearly any token would end a response
    trial = take_trial_steps(made)
    longest = sorted((len(row.prompt_ids) for row in rows().examples), reverse=True)[:4]
    assert len(seen) == 2
    for prompts, responses in seen:
        assert sorted(map(len, prompts), reverse=True) == longest
        assert [len(each) for each in responses] == [8] * 4
    assert set(trial.peak_memory_by_phase) == set(trial.seconds_by_phase) == PHASES
    assert all(seconds > 0 for seconds in trial.seconds_by_phase.values())
    assert sum(trial.seconds_by_phase.values()) <= trial.seconds
    assert max(trial.peak_memory_by_phase.values()) <= trial.peak_memory_bytes
    assert (trial.steps, trial.warm, trial.longest_row) == (40, True, longest[0] + 8)


@pytest.mark.slow
def test_responses_of_transformers_generate_reach_their_limit_too(tmp_path):
    method = named_method("promptkd")
    made = trainer(tmp_path, method=method, generation_kwargs={"num_beams": 1}, max_steps=2)
    made.rollout.stop_ids = tuple(range(60))
    made.rollout._generation.eos_token_id = list(range(60))
    lengths = []
    cut = made.rollout._cut

    def watched(inputs, responses, progress):
        lengths.extend(map(len, responses))
        return cut(inputs, responses, progress)

    made.rollout._cut = watched
    take_trial_steps(made)
    assert set(lengths) == {8}


# ---- what --dry-run says ----


def distill(world, out, *arguments):
    pair = ("--student", world.student, "--teacher", world.teacher)
    return ("distill", *pair, "--data", world.train, "--out", out, *TRAINING, *arguments)


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_dry_run_says_what_a_run_will_need_and_writes_nothing(world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = files(world.folder)
    validation = ("--eval-data", world.valid, "--eval_steps", 1, "--report_to", "tensorboard")
    ran = done(capsys, *distill(world, tmp_path / "run", *validation, "--dry-run"))
    assert not os.listdir(tmp_path)
    assert files(world.folder) == before
    memory, _, time = ran.out.partition("seconds per step")
    said = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in memory.splitlines() if "  " in line.strip())
    assert said["rows"] == "12"
    assert said["optimizer steps"] == "3 of 4 rows"
    assert said["rollouts per step"] == "up to 4"
    assert said["teacher"].startswith("168 trained, ")
    assert re.search(r"measured on the longest rows, of up to \d\d tokens", memory)
    assert "GiB, loading included" in said["peak"]
    assert "measured on one step after one to warm up" in time
    for phase in PHASES:
        assert re.fullmatch(r"\d+\.\d\d GiB", said[phase])
        assert re.search(rf"^  {phase} +\d+\.\d\d$", time, re.MULTILINE)
    assert re.search("expected time +at most", time)


@pytest.mark.slow
def test_a_dry_run_without_rollouts_and_one_that_is_to_be_resumed(world, tmp_path, capsys):
    ran = done(capsys, *distill(world, tmp_path / "run", "--dry-run", "--method", "kd", "--limit", 4))
    assert "none, the data's responses serve" in ran.out
    refused = run(capsys, *distill(world, tmp_path / "run", "--dry-run", "--resume"))
    assert refused.status == 2
    assert "Leave --resume out" in refused.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_dry_run_of_a_run_of_one_step_takes_one(world, tmp_path, capsys):
    request = list(distill(world, tmp_path / "run", "--dry-run"))
    request[request.index("--max_steps") + 1] = 1
    ran = done(capsys, *request)
    assert "the run's only step" in ran.out


# ---- what a run says at its end ----


@pytest.mark.slow
def test_a_run_says_and_records_its_peak_by_phase(world, tmp_path, capsys):
    out = tmp_path / "run"
    ran = done(capsys, *distill(world, out, "--prompt-refresh", "stale", "--eval-data", world.valid))
    (training,) = Results.read(out / "results.json").training.values()
    assert set(training.peak_memory_by_phase) == {*PHASES, "validation"}
    assert max(training.peak_memory_by_phase.values()) <= training.peak_memory_bytes
    (told,) = re.findall(r"Peak memory \d+\.\d\d GiB \((.*)\)\.", ran.err)
    assert {each.split()[-3] for each in told.split(", ")} == {*PHASES, "validation"}
    # the stale prompt is another algorithm, and is called one wherever the run is spoken of
    assert training.method == "promptkd, stale prompt"
    assert "another algorithm than PromptKD" in ran.err
    assert "another algorithm than PromptKD" in (out / "report.html").read_text()


def test_records_with_an_estimate_are_still_read_and_no_longer_written(tmp_path):
    record = Results(kind="distill", training={"a": Training(method="kd", steps=1, seconds=1.0, peak_memory_bytes=7)})
    old = json.loads(record.model_dump_json())
    old["training"]["a"]["predicted_memory_bytes"] = 5
    del old["training"]["a"]["peak_memory_by_phase"]
    file = tmp_path / "results.json"
    file.write_text(json.dumps(old))
    read = Results.read(file)
    assert read.training["a"].predicted_memory_bytes == 5
    assert read.training["a"].peak_memory_by_phase == {}
    read.write(file)
    assert "predicted_memory_bytes" not in file.read_text()
