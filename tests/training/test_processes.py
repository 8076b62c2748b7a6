"""Several processes on CPU, by gloo: the same losses, prompt and student as one; nothing hangs.

They are started once for all checks (processes_worker.py), since each takes seconds to import its libraries.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DynamoBackend

import promptkd
from helpers import processes_worker
from helpers.commands import DISTILL_FILES, PROMPT_FILES, TRAINED_FILES, TRAINING, below, held, json_lines, make_world
from helpers.processes import CHECKS, SECONDS, port, start
from helpers.tiny import VOCABULARY
from promptkd.errors import RequestError
from promptkd.models import load_model
from promptkd.models.adapters import FullTeacher, LoraTeacher, SoftPromptAdapter
from promptkd.training.distributed import check_sharding

pytestmark = pytest.mark.slow

LAUNCH = Path(promptkd.__file__).parent / "recipes" / "launch"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What both of two processes saw, by check."""
    folder = tmp_path_factory.mktemp("two")
    start(folder, 2, CHECKS)
    return folder, {
        name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(2)] for name in CHECKS
    }


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What this process sees alone."""
    folder = tmp_path_factory.mktemp("one")
    return {
        name: processes_worker.CHECKS[name](folder / name)
        for name in ("fixed", "contrast", "moving", "uneven", "kept", "tuned")
    }


def assert_same(ours: dict, theirs: dict, tolerance: float = 1e-5) -> None:
    """Two outcomes agree in every logged figure, the prompt and the student."""
    assert len(ours["log"]) == len(theirs["log"])
    for mine, other in zip(ours["log"], theirs["log"], strict=True):
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            assert value == pytest.approx(other[name], rel=tolerance, abs=tolerance), (name, mine, other)
    torch.testing.assert_close(ours["prompt"], theirs["prompt"], rtol=tolerance, atol=tolerance)
    assert ours["student"].keys() == theirs["student"].keys()
    for name, weight in ours["student"].items():
        torch.testing.assert_close(weight, theirs["student"][name], rtol=tolerance, atol=tolerance)


def assert_same_prompt(outcomes: list[dict]) -> None:
    for each in outcomes:
        assert torch.equal(each["prompt"], outcomes[0]["prompt"])
        assert each["prompt"].isfinite().all()


def test_an_adapters_parameters_that_one_process_has_reached_get_its_gradient_on_all(two):
    _, seen = two
    for each in seen["reached"]:
        first, second, untouched = each["gradients"]
        assert first.tolist() == [10.0] * 2
        assert second.tolist() == [100.0] * 3
        assert untouched is None
        assert all(map(torch.equal, each["parameters"], seen["reached"][0]["parameters"]))


def test_kept_logits_are_read_by_each_process(one, two):
    _, seen = two
    for ours in seen["kept"]:
        for mine, other in zip(ours["log"], one["kept"]["log"], strict=True):
            assert mine["student_kl"] == pytest.approx(other["student_kl"], rel=1e-5)
        for name, weight in ours["student"].items():
            torch.testing.assert_close(weight, one["kept"]["student"][name], rtol=1e-5, atol=1e-5)


def test_fine_tuning_is_the_same_on_two_processes_also_sharded(one, two):
    _, seen = two
    for ours in (*seen["tuned"], seen["sharded"][0]["tuned"]):
        assert len(ours["log"]) == len(one["tuned"]["log"]) == 3
        for mine, other in zip(ours["log"], one["tuned"]["log"], strict=True):
            for name in ("loss", "grad_norm", "num_tokens"):  # the other metrics are means of micro-batches' means
                assert mine[name] == pytest.approx(other[name], rel=1e-5)
        for name, weight in ours["student"].items():
            torch.testing.assert_close(weight, one["tuned"]["student"][name], rtol=1e-5, atol=1e-5)


def test_one_process_of_four_micro_batches_is_two_of_two(one, two):
    _, seen = two
    assert_same(seen["fixed"][0], one["fixed"])
    assert_same_prompt(seen["fixed"])
    assert any("eval_kl_to_teacher" in entry for entry in one["fixed"]["log"])  # validation is compared as well


def test_the_mean_gaps_of_distillm2_are_those_of_all_processes(one, two):
    _, seen = two
    assert_same(seen["contrast"][0], one["contrast"])
    assert len({entry["alpha_teacher"] for entry in one["contrast"]["log"]}) > 1  # it follows the gaps


def test_what_is_left_of_an_epoch_is_left_on_every_process(one, two):
    _, seen = two
    assert_same(seen["uneven"][0], one["uneven"])


def test_a_process_without_responses_holds_nobody_up(two):
    _, seen = two
    assert_same_prompt([each["one"] for each in seen["empty"]])
    none = seen["empty"][0]["none"]
    assert [entry["loss"] for entry in none["log"]] == [0.0]
    assert all(weight.isfinite().all() for weight in none["student"].values())


def test_a_process_whose_rows_end_at_once_holds_nobody_up(two):
    _, seen = two
    for name in ("early", "mixed"):
        assert_same_prompt(seen[name])


def test_a_coefficient_that_moves_is_one_on_all_processes_and_survives_a_resumed_run(one, two):
    _, seen = two
    first, second = seen["moving"]
    assert first["states"] == second["states"]
    assert first["states"][0] == first["states"][1]
    assert first["t"] == pytest.approx(one["moving"]["t"], rel=1e-6)  # by the loss of all processes
    assert len(set(first["t"])) == 4


def test_the_replay_buffer_of_every_process_survives_a_resumed_run(two):
    _, seen = two
    for each in seen["resumed"]:
        whole, again = each["buffers"]
        assert whole == again
        assert len(whole) > 0
        assert torch.equal(each["whole"]["prompt"], each["again"]["prompt"])
    assert seen["resumed"][0]["buffers"] != seen["resumed"][1]["buffers"]
    first = seen["resumed"][0]
    assert all(
        torch.equal(weight, first["again"]["student"][name]) for name, weight in first["whole"]["student"].items()
    )


def test_every_process_gets_the_servers_answers_to_its_own_prompts(two):
    _, seen = two
    first, last = seen["served"]
    assert first["own"] == first["rows"] == 24
    assert last["own"] + last["data"] == last["rows"] == 24
    assert 0 < last["own"] < 24
    assert (first["requests"], last["requests"]) == (3, 0)  # the first process asks for all, once a step


def test_a_sharded_head_is_gathered_and_its_gradient_averaged(two):
    _, seen = two
    for each in seen["heads"]:
        assert each["gathered"]
        torch.testing.assert_close(each["gradient"], each["expected"], rtol=1e-5, atol=1e-6)


def test_fsdp2_shards_both_models_and_changes_nothing(one, two):
    _, seen = two
    for each in seen["sharded"]:
        assert all(share < 0.6 for share in each["shares"])  # of two processes
        assert all(units > 3 for units in each["units"])  # layer by layer
    assert_same(seen["sharded"][0]["fixed"], one["fixed"])
    assert_same_prompt([each["fixed"] for each in seen["sharded"]])


def test_fsdp2_samples_on_every_process_and_goes_on_from_a_checkpoint(two):
    folder, seen = two
    assert_same_prompt([each["early"] for each in seen["sharded"]])
    first, again = seen["sharded"][0]["first"], seen["sharded"][0]["again"]
    assert_same(again, first, 1e-7)
    saved = load_model(folder / "sharded-2" / "student")
    assert all(
        torch.equal(weight, again["student"][name])
        for name, weight in saved.state_dict().items()
        if name in again["student"]
    )
    assert saved.get_output_embeddings().weight.shape[0] == VOCABULARY


def test_a_run_is_launched_from_the_command_line(tmp_path):
    world, out = make_world(tmp_path), tmp_path / "run"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["--main_process_port", str(port()), "-m", "promptkd"]
    flags = ("--student", world.student, "--teacher", world.teacher, "--data", world.train, "--out", out)
    given = ("--eval-data", world.valid, *TRAINING, "--save_strategy", "epoch")
    ran = subprocess.run(
        [*command, "distill", *map(str, (*flags, *given))],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert ran.returncode == 0, ran.stderr
    written = below("student", TRAINED_FILES) | below("prompt", PROMPT_FILES) | {"baselines.json"}
    assert held(out) - {name for name in held(out) if name.startswith("checkpoints/")} == DISTILL_FILES | written
    told = ran.stderr.splitlines()
    for line in (f"Loaded the teacher: {world.teacher}.", "Distilling: 3 steps", "Distilling: step 3 of 3"):
        assert sum(each.startswith(line) for each in told) == 1, ran.stderr
    assert not any("Warning" in each or "rank1" in each for each in told), ran.stderr
    assert ran.stdout.count("Loss on references") == 1
    assert len([line for line in json_lines(out / "metrics.jsonl") if "loss" in line]) == 3


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_accelerate_knows_every_key_of_the_launch_configurations(name):
    file = LAUNCH / f"{name}.yaml"
    given = yaml.safe_load(file.read_text())
    parser = launch_command_parser()
    known = {action.dest for action in parser._actions}
    for section in ("fsdp_config", "deepspeed_config"):
        assert given.get(section, {}).keys() <= known, "accelerate would pass over it in silence"
    args, defaults, _ = _validate_launch_command(parser.parse_args(["--config_file", str(file), "-m", "promptkd"]))
    assert (args.use_fsdp, args.use_deepspeed) == (name == "fsdp2", name.startswith("zero"))
    assert defaults.num_processes == args.num_processes == given["num_processes"]
    assert f"accelerate launch --config_file {name}.yaml" in file.read_text()


def launched(*, fsdp: dict | None = None, zero: dict | None = None) -> SimpleNamespace:
    """What `check_sharding` sees of an accelerator."""
    full = {"fsdp_version": 2, "cpu_ram_efficient_loading": False, "state_dict_type": "FULL_STATE_DICT"}
    plugin = None if fsdp is None else SimpleNamespace(**full | fsdp)
    stage = None if zero is None else SimpleNamespace(**{"zero_stage": 3, "zero3_save_16bit_model": True} | zero)
    two = plugin is not None and plugin.fsdp_version == 2
    compiled = SimpleNamespace(backend=DynamoBackend.NO)
    state = SimpleNamespace(fsdp_plugin=plugin, deepspeed_plugin=stage, dynamo_plugin=compiled)
    return SimpleNamespace(is_fsdp2=two, state=state)


@pytest.mark.parametrize(
    ("accelerator", "settings", "words"),
    [
        (launched(fsdp={"fsdp_version": 1}), {}, "fsdp_version: 2"),
        (launched(fsdp={"cpu_ram_efficient_loading": True}), {}, "fsdp_cpu_ram_efficient_loading: false"),
        (launched(fsdp={"state_dict_type": "SHARDED_STATE_DICT"}), {}, "fsdp_state_dict_type: FULL_STATE_DICT"),
        (launched(zero={"zero3_save_16bit_model": False}), {}, "zero3_save_16bit_model: true"),
        (launched(zero={}), {"model": torch.nn.Linear(0, 3, bias=False)}, "zero3_init_flag: false"),
        (launched(fsdp={}), {"adapter": LoraTeacher}, "soft prompt"),
        (launched(zero={}), {"adapter": FullTeacher}, "soft prompt"),
        (launched(fsdp={}), {"needs_generate": True}, "vLLM"),
        (launched(fsdp={}), {"chunks": False}, "leave chunk_tokens out"),
    ],
)
def test_a_launch_that_would_hang_or_lose_the_student_is_refused(accelerator, settings, words):
    given = {"model": torch.nn.Linear(2, 3), "adapter": SoftPromptAdapter, "needs_generate": False}
    with pytest.raises(RequestError, match=words):
        check(accelerator, **given | settings)
    check(launched(fsdp={}), **given)
    check(launched(zero={}), **given | {"chunks": False})
    check(launched(zero={"zero_stage": 2, "zero3_save_16bit_model": False}), **given | {"adapter": FullTeacher})


def check(accelerator, *, model, **settings):
    check_sharding(accelerator, model, **settings)
