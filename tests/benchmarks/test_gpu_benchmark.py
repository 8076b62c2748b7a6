"""`python -m benchmarks.gpu` on a CPU with tiny shapes: all parts run, and what is wrong or not in time is told."""

import io
import json
import os
import re
import sys
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.gpu import runner
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.parts import PARTS, Part, chosen_parts
from benchmarks.gpu.targets import TARGETS, verdicts

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The record of one whole run, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("gpu"), io.StringIO()
    limits = ["--patience", "10", "--seconds", "3000"]  # the suite may share its cores
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setenv("OUT", str(folder))
        patch.setenv("PYTHONWARNINGS", "ignore")
        patch.delenv("PROMPTKD_ENGINE", raising=False)
        patch.setattr(sys, "argv", ["benchmarks.gpu", "--device", "cpu", "--tiny", *limits])
        assert main() == 0, printed.getvalue()
    return json.loads((folder / "gpu.json").read_text()), printed.getvalue()


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(ran):
    record, printed = ran
    assert [part["number"] for part in record["parts"].values()] == [part.number for part in PARTS]
    for name, part in record["parts"].items():
        assert part["status"] == "done", name
        assert part["error"] is None
        assert part["seconds"] >= 0
        assert part["results"], name
        for result in part["results"]:
            assert f"  {result}: " in printed
    assert {"torch", "triton", "transformers", "trl", "card", "driver"} <= record["machine"].keys()
    assert record["command"][1:3] == ["-m", "benchmarks.gpu"]
    assert record["date"].endswith("+00:00")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["losses", "agreement", "decoding"])
def test_what_can_be_right_on_a_cpu_is(ran, name):
    checks = ran[0]["parts"][name]["checks"]
    assert len(checks) >= 3
    assert [each["name"] for each in checks if not each["passed"]] == []


@pytest.mark.slow
def test_what_means_nothing_on_a_cpu_says_so(ran):
    record, printed = ran
    for name, what in (
        ("memory", "peak memory"),
        ("rollouts", "0.5B, generate with a static cache"),
        ("heads", "memory over TRL's"),
        ("profiled", "cudaStreamSynchronize and its like"),
    ):
        assert record["parts"][name]["skipped"][what] == "needs CUDA"
        assert f"{what}: skipped: needs CUDA" in printed
    found = {each["name"]: each["verdict"] for each in record["targets"]}
    assert found.keys() == TARGETS.keys()
    assert found.pop("loss_error") == "met"
    assert set(found.values()) == {"not measured"}


def test_times_of_a_cpu_or_of_tiny_shapes_are_no_verdict():
    measured = {"rollout_speed": 20_000.0, "loss_error": 1e-4, "step_over_floor": 1.5}
    on_card = {each["name"]: each["verdict"] for each in verdicts(measured, on_card=True)}
    assert (on_card["rollout_speed"], on_card["loss_error"], on_card["step_over_floor"]) == ("met", "missed", "met")
    assert on_card["memory"] == "not measured"
    elsewhere = {each["name"]: each["verdict"] for each in verdicts(measured, on_card=False)}
    assert (elsewhere["rollout_speed"], elsewhere["loss_error"]) == ("not measured", "missed")


def test_parts_are_chosen_by_number_or_name():
    assert [part.name for part in chosen_parts(["rollouts", "2", "6"])] == ["losses", "rollouts"]
    assert chosen_parts(None) == list(PARTS)
    with pytest.raises(ValueError, match="Got 12, loses"):
        chosen_parts(["12", "loses"])


def test_all_limits_together_are_within_eight_minutes():
    assert sum(part.seconds for part in PARTS) <= 480


def test_the_document_names_parts_and_tests_that_there_are():
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    table = text.split("## What was measured on which card")[1].split("\n## ")[0]
    lines = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    assert {cells[1].strip("`") for cells in lines if not cells[1].startswith("none")} == {part.name for part in PARTS}
    assert {cells[2] for cells in lines} == {"not yet"}  # a figure of a card changes this line and that one together
    named = re.findall(r"`(tests/\w+/\w+\.py)(?:::(\w+))?`", table)
    assert len(named) >= 10
    for file, test in named:
        assert f"def {test}" in (ROOT / file).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------- parts that fail, hang or die

TRIAL = [Part(1, "machine", 1, ""), Part(2, "losses", 0.5, ""), Part(3, "agreement", 1, ""), Part(4, "decoding", 1, "")]


def fake_worker(connection, parts, device, tiny, ends, patience):
    """The part "losses" never ends, and the process of "agreement" dies."""
    connection.send({"kind": "machine", "value": {"device": device}})
    for part in parts:
        connection.send({"kind": "begin", "part": part.name})
        connection.send({"kind": "result", "name": "early", "value": part.number})
        if part.name == "losses":
            time.sleep(600)
        if part.name == "agreement":
            os._exit(1)
        connection.send({"kind": "end", "error": None})


@pytest.mark.slow
def test_a_part_that_hangs_or_dies_is_told_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "work", fake_worker)
    monkeypatch.setattr(runner, "_GRACE", 0.2)
    file = tmp_path / "gpu.json"
    record = runner.Record(file, {"device": "cpu", "tiny": True}, TRIAL)
    started = time.monotonic()
    runner.run_parts(TRIAL, record, device="cpu", tiny=True, seconds=300, patience=1)
    assert time.monotonic() - started < 100
    parts = json.loads(file.read_text())["parts"]
    states = [parts[part.name]["status"] for part in TRIAL]
    assert states == ["done", "out of time", "failed", "done"]
    assert "died" in parts["agreement"]["error"]
    assert [parts[part.name]["results"] for part in TRIAL] == [{"early": part.number} for part in TRIAL]
    assert parts["memory"]["status"] == "not asked for"
    assert not record.is_right
    assert "out of time after" in capsys.readouterr().out


def test_no_part_begins_when_all_time_is_spent(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "work", fake_worker)
    record = runner.Record(tmp_path / "gpu.json", {"device": "cpu", "tiny": True}, TRIAL)
    runner.run_parts(TRIAL, record, device="cpu", tiny=True, seconds=0, patience=1)
    assert {record.parts[part.name]["status"] for part in TRIAL} == {"not run"}
    assert "1 machine: not run" in capsys.readouterr().out


class Sent(list):
    """A connection that keeps what is sent."""

    send = list.append


@pytest.fixture
def settings_stay(monkeypatch):
    """A worker sets its process up as it likes; here it is the tests' own."""
    import transformers

    for name in ("TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    for name in ("set_verbosity_error", "disable_progress_bar"):
        monkeypatch.setattr(transformers.utils.logging, name, lambda: None)


@pytest.mark.slow
def test_a_worker_goes_on_behind_what_a_part_raises(monkeypatch, settings_stay):
    """And ends a part from within when its time is up, whatever the part catches."""
    from benchmarks.gpu import agreement, decoding, losses, machine, worker

    def broken(bench):
        with bench.attempt("what may fail"):
            raise RuntimeError("it did")
        raise KeyError("no such thing")

    def endless(bench):
        while True:
            try:
                time.sleep(0.01)
            except Exception:
                raise AssertionError("a library would take the time limit for a failure") from None

    def bounded(bench):
        with bench.attempt("what takes long", seconds=0.1):
            endless(bench)
        bench.report("behind it", 1)

    for module, run in ((machine, broken), (losses, endless), (agreement, bounded), (decoding, lambda bench: None)):
        monkeypatch.setattr(module, "run", run)
    sent = Sent()
    worker.work(sent, TRIAL, "cpu", True, time.monotonic() + 100, patience=2)
    ends = [message["error"] for message in sent if message["kind"] == "end"]
    assert ends[0]["status"] == "failed"
    assert "no such thing" in ends[0]["text"]
    assert "broken" in ends[0]["traceback"]
    assert ends[1] == {"status": "out of time", "text": "1 s were not enough"}
    assert ends[2:] == [None, None]
    skipped = {message["name"]: message["reason"] for message in sent if message["kind"] == "skipped"}
    assert skipped == {"what may fail": "RuntimeError: it did", "what takes long": "OutOfTime: 0 s were not enough"}
    assert {"kind": "result", "name": "behind it", "value": 1} in sent


def test_without_a_gpu_the_run_ends_at_once(monkeypatch, settings_stay):
    import torch
    from benchmarks.gpu import worker

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sent = Sent()
    worker.work(sent, TRIAL, "cuda", False, time.monotonic() + 100, patience=1)
    assert [message["kind"] for message in sent] == ["impossible"]
    assert "--device cpu --tiny" in sent[0]["text"]


# --------------------------------------------------------------------------------- the checks can tell right from wrong


def bench_and_checks():
    import torch
    from benchmarks.gpu.bench import Bench

    checks = {}

    def send(message):
        if message["kind"] == "check":
            checks[message["name"]] = message["passed"]

    return Bench(torch.device("cpu"), True, time.monotonic() + 1000, send), checks


@pytest.mark.slow
def test_a_wrong_loss_is_found(monkeypatch):
    """A KL without its entropy, which is a cross-entropy, has another value and, as forward KL, the same gradient."""
    from benchmarks.gpu import losses

    from promptkd.objectives import forward_kl

    def without_entropy(student, teacher):
        return -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1)

    monkeypatch.setattr(losses, "FORMS", {"plain": (False, None)})
    bench, checks = bench_and_checks()
    losses.run(bench)
    assert all(checks.values())
    assert losses.OBJECTIVES["forward_kl"] is forward_kl
    monkeypatch.setitem(losses.OBJECTIVES, "forward_kl", without_entropy)
    losses.run(bench)
    assert not checks["float32 losses"]
    assert not checks["bias"]
    assert checks["float32 gradients"]


@pytest.mark.slow
def test_samples_of_another_temperature_are_found(monkeypatch):
    import torch
    from benchmarks.gpu import decoding

    bench, checks = bench_and_checks()
    original = decoding.generate

    def warmer(model, prompts, params, **settings):
        return original(model, prompts, replace(params, temperature=0.9), **settings)

    monkeypatch.setattr(decoding, "generate", warmer)
    decoding._compare_samples(bench, "float32", torch.float32, autocast=False)
    assert checks == {"samples, float32": False}


@pytest.mark.slow
def test_states_without_a_window_are_found(monkeypatch):
    """The engine reads a model whose window is the rows' whole length; the reference has the right one."""
    import torch
    from benchmarks.gpu import agreement
    from benchmarks.gpu.shapes import sharp_model

    bench, checks = bench_and_checks()
    model = sharp_model("mistral", bench, sliding_window=8)
    wide = sharp_model("mistral", bench, sliding_window=1000)
    original = agreement._states

    def states(read, batch, vectors):
        ours = read is model and agreement.VARIABLE not in os.environ
        return original(wide if ours else read, batch, vectors)

    agreement._compare_states(bench, "mistral", model, torch.float32)
    assert all(checks.values())
    monkeypatch.setattr(agreement, "_states", states)
    monkeypatch.delenv(agreement.VARIABLE, raising=False)
    agreement._compare_states(bench, "mistral", model, torch.float32)
    assert not any(checks.values())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "gemm"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas", "gemm"),
        ("void flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128>>", "attention"),
        ("Memcpy DtoD (Device -> Device)", "copies and fills"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel>", "element by element"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("triton_poi_fused_mul_0", "triton"),
        ("reverse_kl_rows", "triton"),
        ("something else", "other"),
    ],
)
def test_kernels_are_told_by_their_names(name, kind):
    from benchmarks.gpu.profiled import kind_of_kernel

    assert kind_of_kernel(name) == kind
