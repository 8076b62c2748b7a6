"""Kept teacher logits from the command line: written, resumed, read by `distill`, and refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

import promptkd.data.kept_writing
from helpers.commands import (
    DISTILL_FILES,
    LIMITS,
    TEMPLATE,
    TRAINED_FILES,
    TRAINING,
    World,
    below,
    done,
    held,
    make_world,
    run,
    write_rows,
)
from helpers.tiny import VOCABULARY
from promptkd.cli.commands import generate as command
from promptkd.data.kept_logits import KeptIndex
from promptkd.evaluation import kept_scoring
from promptkd.results import Results

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def scoring(world, out, *arguments, kept=8):
    asked = ("--model", world.teacher, "--data", world.train, "--out", out, *LIMITS)
    return ["generate", *asked, "--score", "--keep-logits", kept, *arguments]


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(promptkd.data.kept_writing, "SHARD_TOKENS", 12)


def test_score_keeps_the_logits_of_the_data(world, tmp_path, capsys):
    out = tmp_path / "train.logits"
    ran = done(capsys, *scoring(world, out))
    assert held(out) == {"index.json", "logits-00000.safetensors"}
    index, shard = KeptIndex.read(out), load_file(out / "logits-00000.safetensors")
    tokens = index.tokens
    assert index.rows == 12
    assert {name: (tuple(each.shape), each.dtype) for name, each in shard.items()} == {
        "token_ids": ((tokens, 8), torch.uint16),
        "log_probs": ((tokens, 8), torch.float16),
        "rest_log_mass": ((tokens,), torch.float16),
        "offsets": ((13,), torch.int64),
        "row_keys": ((12, 16), torch.uint8),
    }
    mass = shard["log_probs"].float().exp().sum(-1) + shard["rest_log_mass"].float().exp()
    assert (mass - 1).abs().max() < 2e-3
    assert "12 rows, " in ran.err
    assert "tokens is" in ran.err
    assert "nats of its entropy" in ran.err


def test_a_killed_scoring_goes_on_where_it_was(world, tmp_path, capsys, monkeypatch, small_shards):
    whole, out = tmp_path / "whole", tmp_path / "killed"
    done(capsys, *scoring(world, whole))
    assert len(KeptIndex.read(whole).shards) > 2
    scored = []
    score = kept_scoring.top_log_probs

    def interrupted(teacher, rows, *arguments, **settings):
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(rows)
        return score(teacher, rows, *arguments, **settings)

    monkeypatch.setattr(kept_scoring, "top_log_probs", interrupted)
    assert run(capsys, *scoring(world, out)).status == 130
    assert held(out) == {"index.json", "logits-00000.safetensors", "logits-00001.safetensors"}
    again = []
    monkeypatch.setattr(
        kept_scoring, "top_log_probs", lambda t, rows, *a, **s: again.append(rows) or score(t, rows, *a, **s)
    )
    ran = done(capsys, *scoring(world, out))
    assert "rows are kept already" in ran.err
    assert sum(map(len, scored)) + sum(map(len, again)) == 12
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }
    ran = done(capsys, *scoring(world, out))
    assert "is finished already" in ran.err


def test_responses_are_written_and_their_logits_kept(world, tmp_path, capsys):
    out = tmp_path / "responses.jsonl"
    lengths = ("--max_prompt_length", 40, "--max_completion_length", 120, "--template", TEMPLATE, "--limit", 5)
    asked = ("--model", world.teacher, "--data", world.train, "--out", out, *lengths, "--keep-logits", 5)
    ran = done(capsys, "generate", *asked, "--seed", 3)
    assert {path.name for path in tmp_path.iterdir()} == {"responses.jsonl", "responses.logits"}
    assert "will take up to" in ran.err
    index = json.loads((tmp_path / "responses.logits" / "index.json").read_text())
    assert index["settings"]["sampling"]["seed"] == 3
    ran = done(capsys, "generate", *asked, "--seed", 3)
    assert "is finished already" in ran.err
    ran = run(capsys, "generate", *asked, "--seed", 4)
    assert ran.status == 2
    assert "sampling was" in ran.err


@pytest.mark.parametrize("keeps", [(), ("--keep-logits", 5)])
def test_killed_decoding_goes_on_where_it_was(world, tmp_path, capsys, monkeypatch, keeps):
    def asked(folder, *arguments):
        lengths = ("--max_prompt_length", 40, "--max_completion_length", 60, "--template", TEMPLATE, "--limit", 6)
        given = ("--model", world.teacher, "--data", world.train, "--out", tmp_path / folder / "responses.jsonl")
        return ["generate", *given, *lengths, *keeps, "--batch-size", 2, *arguments]

    done(capsys, *asked("whole"))
    decode, decoded = command.generate, []

    def counted(model, prompts, *arguments, **settings):
        if len(decoded) == 4:
            raise KeyboardInterrupt
        written = decode(model, prompts, *arguments, **settings)
        decoded.extend(prompts)
        return written

    unfinished = "responses.jsonl.unfinished"
    with monkeypatch.context() as patch:
        patch.setattr(command, "generate", counted)
        ran = run(capsys, *asked("killed"))
        assert ran.status == 130
        assert "To resume: promptkd generate" in ran.err
        assert held(tmp_path / "killed") == {unfinished}
        ran = run(capsys, *asked("killed", "--seed", 3))
        assert ran.status == 2
        assert "seed was 10 and is now 3" in ran.err
        decoded.clear()
        assert "4 of 6 responses are written already" in done(capsys, *asked("killed")).err
    assert len(decoded) == 2
    whole = held(tmp_path / "whole")
    assert unfinished not in whole
    assert held(tmp_path / "killed") == whole
    for name in whole - {"responses.logits/index.json"}:  # which names the file of the responses
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_overwriting_starts_from_scratch_and_resumes_without_the_flag(world, tmp_path, capsys, monkeypatch):
    out = tmp_path / "responses.jsonl"
    asked = ["generate", "--model", world.teacher, "--data", world.train, "--out", out, *LIMITS]
    done(capsys, *asked, "--seed", 3)
    before = out.read_bytes()

    def killed(*arguments, **settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command, "generate", killed)
        assert run(capsys, *asked, "--overwrite").status == 130
    assert out.read_bytes() == before
    done(capsys, *asked)
    assert out.read_bytes() != before
    assert held(tmp_path) == {"responses.jsonl"}


def test_with_a_student_the_error_is_that_of_its_divergences(world, tmp_path, capsys):
    out = tmp_path / "logits"
    ran = done(capsys, *scoring(world, out, "--student", world.student))
    error = KeptIndex.read(out).error
    assert 0 < error["forward_kl_kept"] < error["forward_kl"]
    assert "Forward KL to" in ran.err
    whole = ("--student", world.student, "--logits-dtype", "float32", "--overwrite")
    done(capsys, *scoring(world, out, *whole, kept=VOCABULARY + 9))
    error = KeptIndex.read(out).error
    assert KeptIndex.read(out).settings.kept == VOCABULARY
    assert error["rest_mass_max"] == 0
    assert error["forward_kl_gap"] < 1e-6
    assert error["entropy_lost"] < 1e-6


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--score",), "--score is for logits that are kept"),
        (("--student", "S"), "--student is for logits that are kept"),
        (("--logits-dtype", "float32"), "--logits-dtype is for logits"),
        (("--keep-logits", 4, "--turns", "all"), "give --score"),
        (("--keep-logits", 4, "--score", "--ended-only"), "--score writes none"),
        (("--keep-logits", 0), "at least 1"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(world, tmp_path, capsys, arguments, told):
    asked = ("--model", world.teacher, "--data", world.train, "--out", tmp_path / "out", *LIMITS)
    ran = run(capsys, "generate", *asked, *arguments)
    assert ran.status == 2
    assert told in ran.err
    assert not list(tmp_path.iterdir())


def test_other_settings_rows_and_files_are_refused(world, tmp_path, capsys):
    out = tmp_path / "logits"
    done(capsys, *scoring(world, out))
    ran = run(capsys, *scoring(world, out, kept=9))
    assert ran.status == 2
    assert "kept was 8 and is now 9" in ran.err
    ran = run(capsys, *scoring(world, out, "--limit", 3))
    assert ran.status == 2
    assert "was begun on other rows: 12 rows" in ran.err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for more in ((), ("--overwrite",)):
        ran = run(capsys, *scoring(world, tmp_path / "mine", *more))
        assert ran.status == 2
        assert "holds notes.txt" in ran.err
    assert held(tmp_path / "mine") == {"notes.txt"}


def test_a_full_disk_is_told_before_anything_is_scored(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(promptkd.data.kept_writing.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 100}))
    ran = run(capsys, *scoring(world, tmp_path / "logits"))
    assert ran.status == 2
    assert "The logits take 0.00 GiB, and the disk" in ran.err
    assert not (tmp_path / "logits").exists()


def learning(world, logits, out, *arguments):
    given = ("--student", world.student, "--kept_logits", logits, "--data", world.train, "--out", out)
    return ["distill", "--method", "kd", *given, *TRAINING, *arguments]


def test_distill_needs_no_teacher(world, tmp_path, capsys):
    logits, out = tmp_path / "logits", tmp_path / "run"
    done(capsys, *scoring(world, logits))
    ran = done(capsys, *learning(world, logits, out, "--dry-run"))
    assert f"none in memory, its logits in {logits}" in ran.out
    assert not out.exists()
    ran = done(capsys, *learning(world, logits, out, "--eval-data", world.valid))
    assert DISTILL_FILES | {"baselines.json"} | below("student", TRAINED_FILES) <= held(out)
    assert "No teacher is loaded, so neither it nor the KL to it is measured here" in ran.err
    record = Results.read(out / "results.json")
    assert (record.models["teacher"].path, record.models["teacher"].parameters > 0) == (world.teacher, True)
    assert {each.model for each in record.evaluations} == {"student before training", "student"}
    assert "kl_to_teacher" not in record.evaluations[0].metrics
    assert any("8 of 97 tokens" in note for note in record.notes)
    done(capsys, "distill", "--out", out, "--resume")
    done(capsys, *learning(world, logits, tmp_path / "named", "--teacher", world.teacher))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--teacher", "{other}"), "is another model"),
        (("--teacher", "self"), "is another model"),
        (("--eval-data", "{valid}", "--select", "kl_to_teacher"), "--select kl_to_teacher needs the teacher"),
        (("--teacher_prompt", "Be brief."), "give the teacher a context of its own"),
        (("--student_share", 0.5), "asks the teacher about tokens that a model writes"),
        (("--max_prompt_length", 50, "--data", "{long}"), "max_prompt_length 40 (now 50)"),
    ],
)
def test_distill_refuses_what_kept_logits_cannot_serve(world, tmp_path, capsys, arguments, told):
    logits, out = tmp_path / "logits", tmp_path / "run"
    done(capsys, *scoring(world, logits))
    long = write_rows(tmp_path / "long.jsonl", [{"instruction": "a" * 40, "input": "", "output": "ab"}] * 8)
    asked = [str(each).format(**world._asdict(), long=long) for each in arguments]
    given = [str(each) for each in learning(world, logits, out)]
    for flag in set(asked) & {"--max_prompt_length", "--data"}:
        at = given.index(flag)
        del given[at : at + 2]
    ran = run(capsys, *given, *asked)
    assert ran.status == 2
    assert told in ran.err
    assert not out.exists()


def test_distill_without_either_says_so(world, tmp_path, capsys):
    ran = run(
        capsys, "distill", "--student", world.student, "--data", world.train, "--out", tmp_path / "run", *TRAINING
    )
    assert ran.status == 2
    assert "--teacher is missing" in ran.err
    assert "--kept_logits" in ran.err
