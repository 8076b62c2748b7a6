"""The step benchmark on tiny models: every variant scores the same tokens and finds the same losses."""

import json
import sys

import pytest
from benchmarks import step, variants

from commands import rows, write_rows
from tiny import save_model, tiny_model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Paths of a student, a teacher and rows; the models have room for the authors' padding."""
    folder = tmp_path_factory.mktemp("world")
    made = {
        name: save_model(folder / name, tiny_model("llama", layers=layers, seed=layers, max_position_embeddings=1024))
        for name, layers in (("student", 1), ("teacher", 2))
    }
    made["data"] = write_rows(folder / "rows.jsonl", rows(12))
    return {name: str(path) for name, path in made.items()}


@pytest.fixture
def in_this_process(monkeypatch, capsys):
    """Processes cost seconds each; what they are given is what counts here."""

    def start(command, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", command[command.index("benchmarks.variants") :])
        capsys.readouterr()
        variants.main()
        return capsys.readouterr().out

    monkeypatch.setattr(step, "start", start)


def measured(file, world, monkeypatch, capsys, names):
    options = [part for name, path in world.items() for part in (f"--{name}", path)] + ["--json", str(file)]
    options += ["--template", "Q: {{ instruction }}\nA: ", "--batch-size", "2", "--repeats", "1", "--variants", *names]
    monkeypatch.setattr(sys, "argv", ["step", *options])
    step.main()
    return json.loads(file.read_text()), capsys.readouterr().out


def test_variants_find_the_same_losses(tmp_path, world, monkeypatch, capsys, in_this_process):
    names = ["authors_256", "trl", "ours", "ours_256", "ours_without_packing", "ours_batch4"]
    record, printed = measured(tmp_path / "step.json", world, monkeypatch, capsys, names)
    found = record["variants"]
    assert list(found) == names
    assert set(record["ratios"]) == {"authors_256", "trl", "ours_without_packing"}
    for name, each in found.items():
        assert f"| {name} |" in printed
        assert each["peak_rss"] > 2**20
        assert each["seconds"]["total"] == pytest.approx(each["ranges"]["total"][0], rel=0.99)
        assert each["tokens_per_second"] > 0
    for other in ("authors_256", "ours", "ours_without_packing"):
        for theirs, ours in zip(found[other]["losses"], found["ours_256"]["losses"], strict=True):
            assert theirs == pytest.approx(ours, rel=1e-4)
    first = found["ours_256"]["losses"][0]
    assert first["prompt_loss"] > 0
    assert first["student_loss"] > 0
    assert found["ours"]["over_floor"] > 1
    assert "over_floor" not in found["trl"]


def test_a_variant_that_there_is_not_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["step", "--variants", "theirs"])
    with pytest.raises(SystemExit):
        step.main()
    assert "theirs" in capsys.readouterr().err
