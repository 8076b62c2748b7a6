"""The demo's data (form, splits, leaks) and its whole course on a tiny teacher."""

import json
import re
from collections import Counter

import pytest

from helpers.tiny_demo import make_tiny_demo
from promptkd.cli import main
from promptkd.data import read_examples
from promptkd.demo.pipeline import data_file
from promptkd.results import Results

SPLITS = {"train": 300, "validation": 50, "test": 50}


def rows(split):
    return [json.loads(line) for line in data_file(split).read_text(encoding="utf-8").splitlines()]


def words(text):
    return re.findall(r"\w+", text.lower())


@pytest.mark.parametrize("split", SPLITS)
def test_form(split):
    content = rows(split)
    assert len(content) >= SPLITS[split]
    assert len(read_examples(data_file(split))) == len(content)
    for row in content:
        assert row.keys() == {"task", "instruction", "input", "output"}
        assert row["instruction"].strip() == row["instruction"] != ""
        assert row["output"].strip() == row["output"] != ""
        assert 1 <= len(words(row["output"])) <= 45
        assert not re.search(r"\b(Sure!|Certainly|As an AI)", row["output"])
    tasks = Counter(row["task"] for row in content)
    assert len(tasks) == 9
    assert min(tasks.values()) >= 0.05 * len(content)


def test_no_row_twice_and_no_leak_between_splits():
    content = {split: rows(split) for split in SPLITS}
    everything = [row for split in SPLITS for row in content[split]]
    keys = [(tuple(words(row["instruction"])), tuple(words(row["input"]))) for row in everything]
    assert max(Counter(keys).values()) == 1
    trained_passages = {row["input"] for row in content["train"] if row["input"]}
    trained_answers = {tuple(words(row["output"])) for row in content["train"] if len(words(row["output"])) > 8}
    for split in ("validation", "test"):
        for row in content[split]:
            assert row["input"] not in trained_passages, row
            assert tuple(words(row["output"])) not in trained_answers, row


def test_near_duplicates_do_not_cross_splits():
    """No held-out request shares most of its words with a training request (passage included)."""
    trained = [set(words(row["instruction"] + " " + row["input"])) for row in rows("train")]
    for split in ("validation", "test"):
        for row in rows(split):
            mine = set(words(row["instruction"] + " " + row["input"]))
            if len(mine) >= 6:
                overlap = max(len(mine & other) / len(mine | other) for other in trained)
                assert overlap < 0.75, row


@pytest.fixture
def tiny_demo(tmp_path, monkeypatch):
    return make_tiny_demo(tmp_path, monkeypatch)


@pytest.mark.slow
def test_the_whole_course(tiny_demo, capsys):
    out = tiny_demo / "run"
    assert main(["demo", "--out", str(out), "--layers", "3", "--steps", "2"]) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "results.json", "report.html", "student", "prompt"}
    results = Results.read(out / "results.json")
    assert [each.model for each in results.evaluations] == ["teacher", "pruned", "recovered", "distilled"]
    assert {"loss", "rouge_l", "eos_share", "kl_to_teacher"} <= results.evaluations[3].metrics.keys()
    assert [each.name for each in results.history] == ["tuning the teacher", "recovery", "promptkd"]
    assert all(each.difference.rows == 5 for each in results.differences)
    assert len(results.history[2].points) == 2
    first = capsys.readouterr()
    assert "distilled" in first.out
    assert "from the cache" not in first.err
    assert "The demo has 5 stages and takes about" in first.err
    assert "Measuring distilled on 5 requests" in first.err
    assert set(results.inference) == {"teacher", "distilled"}
    assert results.models["pruned"].about == "3 of the teacher's 4 layers; nothing is trained yet"
    kept = (out / "student" / "model.safetensors").read_bytes()
    assert main(["demo", "--out", str(out), "--layers", "3", "--steps", "2", "--overwrite"]) == 0
    second = capsys.readouterr()
    assert second.err.count("comes from the cache") == 2
    assert second.err.count(": from the cache") == 2
    assert "by the pace of this machine before" in second.err
    assert (out / "student" / "model.safetensors").read_bytes() == kept  # stages from the cache change nothing


@pytest.mark.parametrize(
    ("flags", "told"),
    [(["--layers", "0"], "lie in [1, 30]"), (["--steps", "0"], "at least 1"), (["--seed", "-1"], "0 or more")],
)
def test_wrong_requests(tmp_path, capsys, flags, told):
    assert main(["demo", "--out", str(tmp_path / "run"), *flags]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_an_interrupted_demo_left_is_taken_up_by_a_flag_that_it_has(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("layers: 3\n")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    told = "is not empty. Start it again by --overwrite (finished stages come from the cache) or give another --out."
    assert told in capsys.readouterr().err
