"""`promptkd compare` on what other commands wrote, and the cost of training that `distill` and `sft` record."""

import json
from pathlib import Path

import pytest

from helpers.commands import LIMITS, TRAINING, World, done, held, make_world, run
from promptkd.cli import main
from promptkd.results import DataRecord, Evaluation, Results, RowResult
from promptkd.training.callbacks import ProgressBar
from promptkd.training.checkpoint import write_manifest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def runs(world: World) -> Path:
    """Two runs with validation, and one without."""
    folder = world.folder / "runs"
    training = ["--data", world.train, *TRAINING]
    tuned = ["sft", "--model", world.student, *training]
    distilled = ["distill", "--student", world.student, "--teacher", world.teacher, "--method", "kd", *training]
    requests = {
        "kd": [*distilled, "--eval-data", world.valid],
        "sft": [*tuned, "--eval-data", world.valid],
        "unmeasured": tuned,
    }
    for name, request in requests.items():
        assert main([*map(str, request), "--out", str(folder / name)]) == 0
    return folder


def record(label: str = "m", scores: tuple[float, ...] = (1, 2, 3), **decoding) -> Results:
    rows = [
        RowResult(row=row, prompt=f"{row}", references=[], response="", scores={"rouge_l": score})
        for row, score in enumerate(scores)
    ]
    made = Evaluation(
        model=label,
        data="test",
        decoding={"temperature": 0.0, "max_new_tokens": 8, **decoding},
        metrics={},
        samples=rows,
    )
    return Results(
        kind="evaluate", evaluations=[made], data={"test": DataRecord(path="t", rows=len(rows), sha256="ab")}
    )


def test_two_runs(runs, tmp_path, capsys):
    out = tmp_path / "new" / "comparison.json"
    ran = done(capsys, "compare", runs / "kd", runs / "sft" / "results.json", "--out", out)
    assert held(tmp_path) == {"new/comparison.json"}
    results = Results.read(out)
    assert results.kind == "compare"
    assert {(each.model, each.baseline, each.data) for each in results.differences} == {("sft", "kd", "validation")}
    measured = {each.metric: each for each in results.differences}
    assert {"loss", "rouge_l", "exact_match", "eos_share"} <= measured.keys()
    assert all(each.p_value <= each.p_adjusted <= 1 for each in measured.values())
    kd, sft = (Results.read(runs / name / "results.json").evaluations[0].samples for name in ("kd", "sft"))
    gains = [mine.scores["rouge_l"] - theirs.scores["rouge_l"] for mine, theirs in zip(sft, kd, strict=True)]
    assert measured["rouge_l"].difference.value == pytest.approx(sum(gains) / 4)
    assert {(each.model, each.data) for each in results.evaluations} == {("kd", "validation"), ("sft", "validation")}
    assert results.models["kd"] == Results.read(runs / "kd" / "results.json").models["student"]
    assert [each.method for each in results.training.values()] == ["kd", "sft"]
    assert "sft against kd on validation (4 rows)" in ran.out
    assert "Cannot tell sft and kd apart on" in ran.out  # four rows never can
    assert any(note.startswith("On validation: Cannot tell sft and kd apart on") for note in results.notes)
    assert "Parameters" in ran.out

    ran = run(capsys, "compare", runs / "kd", runs / "sft", "--out", out)
    assert (ran.status, "exists. Replace it by --overwrite" in ran.err) == (2, True)
    done(capsys, "compare", runs / "kd", runs / "sft", "--out", out, "--overwrite", "--baseline", "sft")
    assert {each.baseline for each in Results.read(out).differences} == {"sft"}
    done(capsys, "report", out, "--out", tmp_path / "page.html")
    assert "sft" in (tmp_path / "page.html").read_text()


def test_results_of_evaluate(world, runs, tmp_path, capsys):
    def evaluated(name, model, *arguments):
        request = ("evaluate", "--model", model, "--data", world.test, "--teacher", world.teacher, *LIMITS)
        request += ("--measure", "student")
        done(capsys, *request, "--out", tmp_path / name, *arguments)
        return tmp_path / name

    seeds, out = ("--seeds", 10, 20), tmp_path / "comparison.json"
    student, kd = evaluated("student.json", world.student, *seeds), evaluated("kd.json", runs / "kd", *seeds)
    ran = done(capsys, "compare", student, kd, "--out", out)
    assert "kd against student on test, sampled (5 rows, 2 seeds)" in ran.out
    assert "kd against student on test, greedy (5 rows)" in ran.out
    results = Results.read(out)
    tested = [(each.data, each.metric) for each in results.differences]
    assert [data for data, metric in tested if metric == "loss"] == ["test, sampled"]
    assert [data for data, metric in tested if metric == "rouge_l"] == ["test, sampled", "test, greedy"]
    assert ("test, sampled", "kl_to_teacher") in tested
    measured = {"kd": Results.read(kd), "student": Results.read(student)}
    for label, record in measured.items():  # the figures are those that evaluate reports
        for theirs, ours in zip(
            record.evaluations, [each for each in results.evaluations if each.model == label], strict=True
        ):
            for metric, figure in ours.metrics.items():
                assert figure.value == pytest.approx(theirs.metrics[metric].value), metric
    assert results.training == {"kd": Results.read(runs / "kd" / "results.json").training["kd"]}

    ran = done(capsys, "compare", f"small={student}", f"large={kd}", "--metrics", "rouge_l")
    assert "large against small on test" in ran.out
    assert "Loss on references" not in ran.out
    ran = run(capsys, "compare", student, evaluated("k.json", runs / "kd", *seeds, "--top-k", 3))
    assert ran.status == 2
    assert "top_k (0 and 3)" in ran.err
    assert not ran.out


def test_several_models_of_one_record(tmp_path, capsys):
    both = record("a")
    both.evaluations += record("b", (2, 3, 5)).evaluations
    both.write(tmp_path / "results.json")
    assert "b against a on test (3 rows)" in done(capsys, "compare", tmp_path).out
    assert "a against b on test" in done(capsys, "compare", tmp_path, "--baseline", "b").out


WRONG = {
    "one run": (("a.json",), "two models or more. Got a."),
    "no run": ((), "RUNS is missing"),
    "missing file": (("a.json", "none.json"), "Expected a results file at none.json"),
    "a page": (("a.json", "page.html"), "page.html is not a results record"),
    "no evaluation": (("a.json", "empty.json"), "empty.json holds no evaluation to compare: it is the record of `sft`"),
    "the same label twice": (("a.json", "again.json"), "Got a twice; name a run by LABEL=RUN"),
    "no shared data": (("a.json", "other.json"), "share no data set: a has rows of test; b has rows of elsewhere"),
    "another decoding": (("a.json", "longer.json"), "a and b differ on test in max_new_tokens (8 and 9)"),
    "one name for two": (("x=two.json", "a.json"), "x=two.json gives one name to 2 models: c, d"),
    "unknown baseline": (("a.json", "b.json", "--baseline", "c"), "The baseline must be one of a, b. Got c"),
    "unknown metric": (("a.json", "b.json", "--metrics", "bleu"), "scores of: rouge_l. Got bleu"),
    "a folder to write": (("a.json", "b.json", "--out", "."), "--out must be a file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests(tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    two, other = record("c"), record("b")
    two.evaluations += record("d").evaluations
    other.evaluations[0].data = "elsewhere"
    written = {
        "a": record("a"),
        "again": record("a"),
        "b": record("b"),
        "longer": record("b", max_new_tokens=9),
        "two": two,
        "other": other,
        "empty": Results(kind="sft"),
    }
    for name, each in written.items():
        each.write(Path(f"{name}.json"))
    Path("page.html").write_text("<html></html>")
    before = held(tmp_path)
    arguments, message = WRONG[case]
    ran = run(capsys, "compare", *arguments)
    assert ran.status == 2
    (line,) = ran.err.splitlines()
    assert line.startswith("promptkd compare: ")
    assert message in line
    assert not ran.out
    assert held(tmp_path) == before


def test_a_run_that_was_not_measured(runs, capsys):
    ran = run(capsys, "compare", runs / "kd", runs / "unmeasured")
    assert ran.status == 2
    assert "Measure its model by `promptkd evaluate`" in ran.err


# ---- what training cost ----


def test_runs_record_what_they_cost(runs):
    kd, sft = (Results.read(runs / name / "results.json") for name in ("kd", "sft"))
    assert (list(kd.training), list(sft.training)) == (["kd"], ["sft"])
    distilled, tuned = kd.training["kd"], sft.training["sft"]
    assert (distilled.method, distilled.steps) == ("kd", 3)
    assert (tuned.method, tuned.steps, tuned.tokens_per_second) == ("sft", 3, None)
    speeds = sorted(point["tokens_per_second"] for point in kd.history[0].points if "tokens_per_second" in point)
    assert distilled.tokens_per_second == speeds[1]
    validated = sum(point.get("eval_seconds", 0) for point in kd.history[0].points)
    steps = sum(
        point[name]
        for point in kd.history[0].points
        for name in point
        if name.startswith("seconds_") and "loss" in point
    )
    assert steps <= distilled.seconds <= kd.timings["train"] - validated
    assert distilled.peak_memory_bytes > 2**26


@pytest.mark.parametrize("after", [2, 5])  # before the only checkpoint, and behind it
def test_a_resumed_run_counts_what_it_took_before(world, tmp_path, capsys, monkeypatch, after):
    out = tmp_path / "run"
    request = ["sft", "--model", world.student, "--data", world.train, "--out", out, *TRAINING, "--save_steps", 3]
    request[request.index("--max_steps") + 1] = 6

    def stop(self, args, state, control, **kwargs):
        if state.global_step == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ProgressBar, "on_step_begin", stop)
        assert run(capsys, *request).status == 130
    before = 0.0
    if after > 3:
        file = out / "checkpoints" / "checkpoint-3" / "trainer_state.json"
        state = json.loads(file.read_text())
        assert 0 < state["stateful_callbacks"]["promptkd_cost"]["seconds"] < 60
        before = 1000.0  # as if the first three steps had taken so long, and so much
        state["stateful_callbacks"]["promptkd_cost"] = {"seconds": before, "peak_memory_bytes": 2**50}
        file.write_text(json.dumps(state))
        write_manifest(file.parent)
    done(capsys, *request, "--resume")
    cost = Results.read(out / "results.json").training["run"]
    assert cost.steps == 6
    assert before < cost.seconds < before + 60
    assert (cost.peak_memory_bytes == 2**50) == (after > 3)
    done(capsys, *request, "--resume")  # finished already
    assert Results.read(out / "results.json").training["run"] == cost


def test_models_that_were_measured_in_two_precisions_are_told(tmp_path, capsys):
    for name, note in (
        ("a", "Computed in float32 on cpu."),
        ("b", "Computed in bfloat16 on cuda."),
        ("c", "Computed."),
    ):
        made = record(name)
        made.notes = ["Template: alpaca.", note]
        made.write(tmp_path / f"{name}.json")
    told = "not all were measured in one precision (float32: a; bfloat16: b)"
    assert told in " ".join(done(capsys, "compare", *(tmp_path / f"{each}.json" for each in "abc")).out.split())
    assert "precision" not in done(capsys, "compare", *(tmp_path / f"{each}.json" for each in "ac")).out
