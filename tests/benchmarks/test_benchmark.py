"""The step benchmark on tiny models: every variant scores the same tokens and finds the same losses."""

import json
import sys

import pytest
import torch
from benchmarks.floor import step_flops
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from benchmarks import prompt_every, rollout, speculative, step, variants
from helpers.commands import rows, write_rows
from helpers.tiny import save_model, tiny_model
from promptkd.data.batch import right_pad
from promptkd.data.encode import EncodedExample
from promptkd.engine import head_logits, response_hidden

pytestmark = pytest.mark.slow


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
    names = ["authors_256", "trl", "ours", "ours_256", "ours_reference", "ours_batch4"]
    record, printed = measured(tmp_path / "step.json", world, monkeypatch, capsys, names)
    found = record["variants"]
    assert list(found) == names
    assert set(record["ratios"]) == {"authors_256", "trl", "ours_reference"}
    for name, each in found.items():
        assert f"| {name} |" in printed
        assert each["peak_rss"] > 2**20
        assert 0 < each["ranges"]["total"][0] <= each["seconds"]["total"]
        assert each["tokens_per_second"] > 0
    for other in ("authors_256", "ours", "ours_reference"):
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


@pytest.mark.usefixtures("own_engine")
def test_the_floor_counts_the_products_of_both_steps():
    """torch's own counter over one row; it takes attention as full, which the floor takes as causal."""
    student, teacher = tiny_model("llama", layers=2), tiny_model("llama", layers=3, hidden=24).requires_grad_(False)
    row = EncodedExample([1, 2, 3, 4], [5, 6, 7], (), "", 0)
    batch, prompt = right_pad([row.prompt_ids], [row.response_ids]), torch.zeros(2, 24, requires_grad=True)

    def read(model, vectors=None):
        return head_logits(model, response_hidden(model, batch, vectors))

    for model in (student, teacher):
        read(model)  # layers are tried once
    with FlopCounterMode(display=False) as counter:
        read(student).sum().backward()
        read(teacher, prompt).sum().backward()
        with torch.no_grad():
            read(teacher)
            read(teacher, prompt)
    counted = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    products = sum(flops for name, flops in counted.items() if "attention" not in name)
    found = step_flops(student, teacher, [row], prompt_length=2)
    assert found["total"] - found["attention"] == products
    twice = step_flops(student, teacher, [row, row], prompt_length=2)
    assert twice["total"] - twice["head"] == found["total"] - found["head"]  # the whole row is shared


def test_rollouts_of_both_write_the_lengths_of_the_data(tmp_path, world, monkeypatch, capsys):
    written = {"ours": [], "generate": []}
    for name, way, where in (("ours", rollout.generate, rollout), ("generate", LlamaForCausalLM.generate, None)):

        def noting(*args, way=way, name=name, **settings):
            out = way(*args, **settings)
            prompts = 0 if name == "ours" else args[1].shape[1]
            written[name].append([len(row) - prompts for row in out])
            return out

        monkeypatch.setattr(where or LlamaForCausalLM, "generate", noting)
    options = ["--model", world["student"], "--data", world["data"], "--template", "Q: {{ instruction }}\nA: "]
    options += ["--batch-sizes", "2", "4", "--repeats", "1", "--json", str(tmp_path / "rollout.json")]
    monkeypatch.setattr(sys, "argv", ["rollout", *options])
    rollout.main()
    record = json.loads((tmp_path / "rollout.json").read_text())
    assert set(record) == {"2", "4"}
    assert all(set(each) == {"ours", "ours, unfused", "generate"} for each in record.values())
    assert all(speed > 0 for each in record.values() for speeds in each.values() for speed in speeds)
    fused, unfused = written["ours"][::2], written["ours"][1::2]
    for ours, other, padded in zip(fused, unfused, written["generate"], strict=True):
        assert ours == other
        assert max(ours) == max(padded)  # `generate` pads the others to it


def test_the_steps_of_a_prompt_that_rests_are_measured_in_turn(world, capsys):
    options = [part for name, path in world.items() for part in (f"--{name}", path)]
    prompt_every.main([*options, "--rounds", "1", "--rows", "2", "--prompt-tokens", "200", "--response-tokens", "4"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["`--prompt_every`", "---", "1", "2", "4"]
    assert [prompt_every.block_of(step) for step in range(14)] == [1, 1, *[1] * 4, *[2] * 4, *[4] * 4]


def test_the_speculative_sampler_is_measured_by_its_blocks(tmp_path, monkeypatch, capsys):
    models = [tiny_model("llama", layers=layers, vocabulary=49152, hidden=8, seed=1) for layers in (1, 2)]
    monkeypatch.setattr(speculative, "pair", lambda distance: models)
    out = tmp_path / "record.json"
    flags = ["--blocks", "1", "3", "--batch-sizes", "2", "--distances", "0.1", "--prompt", "4", "--response", "5"]
    monkeypatch.setattr(sys, "argv", ["speculative", *flags, "--repeats", "2", "--json", str(out)])
    speculative.main()
    (record,) = json.loads(out.read_text(encoding="utf-8"))
    assert record["tokens_per_second"].keys() == {"student", "1", "3"}
    assert {len(each) for each in record["tokens_per_second"].values()} == {2}
    assert 0 < record["replaced"] <= 1
    assert len(capsys.readouterr().out.splitlines()) == 5
