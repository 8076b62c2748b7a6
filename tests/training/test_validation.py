"""Which checkpoint is kept where ROUGE cannot score the rows, and what the run says of it."""

import json
import logging

import pytest

import promptkd.training.validation
from helpers.commands import World, distill, done, json_lines, make_world, sft, write_rows
from helpers.trainers import rows, trainer
from promptkd.data.encode import EncodedData, EncodedExample
from promptkd.results import Metric, Results, RowResult
from promptkd.training.checkpoint import kept_step

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


VALIDATED = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
BY_ROUGE = VALIDATED | {"load_best_model_at_end": True, "metric_for_best_model": "rouge_l"}


def validated(folder, losses, rouge, **settings):
    """A trainer whose validations after steps 1, 2, … give these metrics."""
    made = trainer(folder, eval_data=rows(4, seed=5), max_steps=len(losses), **BY_ROUGE, **settings)

    def metrics(**kwargs):
        found = {"eval_loss": losses[made.state.global_step - 1], "eval_rouge_l": rouge[made.state.global_step - 1]}
        made.log(dict(found))
        return found

    made.evaluate = metrics
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("losses", "rouge", "kept"),
    [
        ([3.0, 1.0, 2.0], [0.0, 0.0, 0.0], 2),
        ([3.0, 2.0, 1.0], [0.0, 0.7, 0.7], 3),
        ([1.0, 3.0, 2.0], [0.7, 0.7, 0.0], 1),
        ([2.0, 1.0, 3.0], [0.5, 0.5, 0.7], 3),
        ([2.0, 2.0, 2.0], [0.5, 0.5, 0.5], 1),
    ],
)
def test_of_equal_checkpoints_the_loss_chooses(tmp_path, losses, rouge, kept):
    made = validated(tmp_path, losses, rouge)
    made.train()
    assert (made.state.best_global_step, kept_step(made)) == (kept, kept)
    assert made.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{kept}")


@pytest.mark.slow
def test_a_resumed_run_knows_the_loss_of_the_best(tmp_path):
    losses, rouge = [2.0, 1.0, 3.0, 0.5], [0.0, 0.0, 0.0, 0.0]
    validated(tmp_path, losses, rouge).train()
    for step, kept in ((3, 4), (2, 4)):
        made = validated(tmp_path, losses, rouge)
        made.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert made.state.best_global_step == kept
    made = validated(tmp_path, [2.0, 1.0, 3.0, 1.5], rouge)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert made.state.best_global_step == 2


@pytest.mark.slow
@pytest.mark.parametrize("command", [distill, sft])
def test_the_step_that_is_kept_is_said(world, tmp_path, capsys, monkeypatch, command):
    out, losses = tmp_path / "run", iter((3.0, 1.0, 2.0))
    summarize = promptkd.training.validation.summarize

    def summarized(scored):
        return summarize(scored) | {"loss": Metric(value=next(losses)), "rouge_l": Metric(value=0.0)}

    monkeypatch.setattr(promptkd.training.validation, "summarize", summarized)
    ran = done(capsys, *command(world, out, "--eval-data", world.valid, "--eval_steps", 1))
    told = "Kept step 2 of 3, by ROUGE-L 0.0, ties by loss."
    record = Results.read(out / "results.json")
    assert told in ran.err
    assert told in record.notes
    assert told in (out / "report.html").read_text()
    (model,) = (each for name, each in record.models.items() if name in ("student", "model"))
    assert " after 2 of 3 steps of " in model.about


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "recorded", "measured"),
    [
        (("--eval_steps", 1), 1, 3),
        (("--eval_steps", 1, "--select", "last"), 2, 3),
        (("--eval_steps", 2, "--select", "last"), 1, 2),  # the last step was not validated
        (("--eval_steps", 1, "--lora-rank", 2, "--merge"), 3, 4),  # merging rounds
    ],
)
def test_what_validation_measured_of_the_kept_step_is_not_measured_again(
    world, tmp_path, capsys, monkeypatch, more, recorded, measured
):
    summarize, measure_rows = promptkd.training.validation.summarize, promptkd.training.validation.measure_rows
    passes: list[list[RowResult]] = []
    losses = iter((3.0, 1.0, 2.0))
    monkeypatch.setattr(
        promptkd.training.validation,
        "summarize",
        lambda scored: summarize(scored) | {"loss": Metric(value=next(losses)), "rouge_l": Metric(value=0.0)},
    )
    monkeypatch.setattr(
        promptkd.training.validation,
        "measure_rows",
        lambda *args, **kwargs: passes.append(measure_rows(*args, **kwargs)) or passes[-1],
    )
    out = tmp_path / "run"
    done(capsys, *sft(world, out, "--eval-data", world.valid, *more))
    (evaluation,) = Results.read(out / "results.json").evaluations
    assert len(passes) == measured
    assert evaluation.samples == passes[recorded]


@pytest.mark.slow
@pytest.mark.parametrize(("more", "written"), [((), {1, 2, 3}), (("--save_steps", 2), {2, 3})])
def test_without_a_choice_checkpoints_come_with_validations_too(world, tmp_path, capsys, more, written):
    out = tmp_path / "run"
    last = ("--eval_steps", 1, "--select", "last", "--keep", "none")
    done(capsys, *sft(world, out, "--eval-data", world.valid, *last, *more))
    assert {int(each.name.removeprefix("checkpoint-")) for each in (out / "checkpoints").iterdir()} == written
