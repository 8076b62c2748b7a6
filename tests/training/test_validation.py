"""Which checkpoint is kept where ROUGE cannot score the rows, and what the run says of it."""

import json
import logging

import pytest

import promptkd.training.validation
from helpers.commands import World, distill, done, json_lines, make_world, sft, write_rows
from helpers.trainers import rows, trainer
from promptkd.data.encode import EncodedData, EncodedExample
from promptkd.results import Metric, Results

CHINESE = [{"instruction": f"请回答第{n}题", "output": f"这第{n}个ab"} for n in "一二三四五六七八"]
UNSCORED = "ROUGE cannot score 8 of 8 rows by words"
BY_LOSS = "The checkpoint is chosen by the validation loss"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def best(run):
    state = json.loads(max((run / "checkpoints").glob("*/trainer_state.json")).read_text())
    return state["best_metric"], state["best_global_step"]


@pytest.mark.slow
@pytest.mark.parametrize("command", [distill, sft])
def test_other_scripts_are_chosen_by_loss_and_the_run_says_so(world, tmp_path, capsys, monkeypatch, command):
    chinese, out = write_rows(tmp_path / "chinese.jsonl", CHINESE), tmp_path / "run"
    summarize, losses = promptkd.training.validation.summarize, iter((3.0, 1.0, 2.0))
    monkeypatch.setattr(
        promptkd.training.validation,
        "summarize",
        lambda scored: summarize(scored) | {"loss": Metric(value=next(losses))},
    )
    ran = done(capsys, *command(world, out, "--eval-data", chinese, "--eval_steps", 1))
    assert best(out) == (1.0, 2)  # ROUGE-L, low at each validation whatever is answered, would keep another
    record = Results.read(out / "results.json")
    page = (out / "report.html").read_text()
    for told in (UNSCORED, BY_LOSS, "--rouge_tokenizer"):
        assert sum(told in line for line in ran.err.splitlines()) == 1
        assert sum(told in note for note in record.notes) == 1
        assert told in page
    assert "UserWarning" not in ran.err


@pytest.mark.slow
def test_tokens_of_other_scripts_choose_by_rouge(world, tmp_path, capsys):
    chinese, out = write_rows(tmp_path / "chinese.jsonl", CHINESE), tmp_path / "run"
    tokens = ("--rouge_tokenizer", "characters")
    ran = done(capsys, *distill(world, out, "--eval-data", chinese, "--eval_steps", 3, *tokens))
    (line,) = (line for line in json_lines(out / "metrics.jsonl") if "eval_loss" in line)
    assert best(out) == (line["eval_rouge_l"], 3)
    assert UNSCORED not in ran.err
    record = Results.read(out / "results.json")
    assert record.evaluations[0].rouge_tokenizer == "characters"
    assert "ROUGE compares characters (--rouge_tokenizer)." in record.notes


def chosen(folder, references, **settings):
    data = EncodedData([EncodedExample([2], [3], tuple(each), "?", row) for row, each in enumerate(references)], 0)
    made = trainer(folder, data=rows(), eval_data=data, metric_for_best_model="rouge_l", **settings)
    return made.args.metric_for_best_model, made.args.greater_is_better, made.notes[1:]


def test_a_trainer_in_python_does_the_same(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="promptkd.training.validation"):
        metric, higher, notes = chosen(tmp_path, [["答案"], ["an answer"]])
    assert (metric, higher) == ("loss", False)
    assert BY_LOSS in notes[1]
    assert BY_LOSS in caplog.text
    assert chosen(tmp_path, [["an answer", "答案"], ["yes"]]) == ("rouge_l", True, [])
    assert chosen(tmp_path, [["答案"]], rouge_tokenizer="unicode")[:2] == ("rouge_l", True)
