"""SKD from the command line: samples that the teacher corrects, with a soft prompt, and what is refused."""

import json

import pytest

from helpers.commands import done, make_world, run

SMALL = (
    *("--max_steps", 2, "--per_device_train_batch_size", 2, "--use_cpu", "--max_prompt_length", 32),
    *("--max_completion_length", 6, "--template", "Q: {{ instruction }} {{ input }}\nA: ", "--no-preflight"),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.slow
def test_a_run_logs_how_much_the_teacher_has_written_which_the_block_does_not_change(world, tmp_path, capsys):
    def logged(block):
        out = tmp_path / str(block)
        pair = ("--student", world.student, "--teacher", world.teacher, "--data", world.train, "--out", out)
        chosen = ("--method", "skd", "--teacher_adapter", "prompt", "--objective", "reverse_kl", "--skd_top_k", 40)
        done(capsys, "distill", *pair, *chosen, "--skd_block", block, *SMALL)
        assert (out / "prompt").is_dir()
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        return [line for line in lines if "replaced_share" in line]

    found = {block: logged(block) for block in (1, 3)}
    assert len(found[3]) == 2
    for mine, other in zip(*found.values(), strict=True):
        assert 0 < mine["replaced_share"] < 1
        assert mine["prompt_kl"] > 0
        assert mine["replaced_share"] == other["replaced_share"]
        assert mine["response_length"] == other["response_length"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--method", "gkd", "--skd_top_k", 5), "gkd takes no skd_top_k"),
        (("--method", "skd", "--skd_top_k", 0), "skd_top_k must be at least 1. Got 0"),
        (("--method", "skd", "--skd_top_p", 0), "skd_top_p must"),
        (("--method", "skd", "--repetition_penalty", 1.2), "generation_kwargs out, or set --student"),
    ],
)
def test_what_is_refused(world, tmp_path, capsys, flags, told):
    pair = ("--student", world.student, "--teacher", world.teacher, "--data", world.train, "--out", tmp_path / "run")
    ran = run(capsys, "distill", *pair, *SMALL, *flags)
    assert ran.status == 2
    assert told in " ".join(ran.err.split())
