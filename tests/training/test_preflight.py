"""Before training: what is measured on a few rows, and that the run does not depend on it."""

import pytest
import torch

from helpers.commands import World, distill, done, make_world, run, steps, weights, write_rows
from helpers.tiny import END, END_ID, tiny_model, tiny_tokenizer
from helpers.trainers import config, pair, rows, trainer
from promptkd.methods import named_method
from promptkd.results import Results
from promptkd.training import DistillTrainer
from promptkd.training.callbacks import ProgressBar
from promptkd.training.preflight import preflight


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def model(layers, seed, *, end=0.0):
    """A random GPT-2 whose logit of the end token is raised by `end`."""
    made = tiny_model("gpt2", layers=layers, hidden=16, seed=seed, tied=False)
    made.lm_head.bias = torch.nn.Parameter(torch.zeros(made.config.vocab_size))
    with torch.no_grad():
        made.lm_head.bias[END_ID] = end
    return made


def seen(tmp_path, student, teacher, data=None, **settings):
    data = data or rows()
    made = trainer(tmp_path, models=(student, teacher), data=data, method=named_method("gkd"), **settings)
    return preflight(made, data)


def plain_values(student, teacher, examples):
    """Mean loss of each model on the references, from the models' own forward."""
    found = []
    for each in (student, teacher):
        nats = tokens = 0
        for row in examples:
            ids = torch.tensor([row.prompt_ids + row.response_ids])
            log_q = each(ids).logits[0].log_softmax(-1)
            start = len(row.prompt_ids)
            nats -= sum(float(log_q[start + at - 1, token]) for at, token in enumerate(row.response_ids))
            tokens += len(row.response_ids)
        found.append(nats / tokens)
    return found


def test_losses_are_those_of_the_models_on_rows_spread_over_the_data(tmp_path):
    student, teacher, data = model(2, 1), model(3, 2), rows(16)
    found = seen(tmp_path, student, teacher, data)
    assert (found.rows, found.measured_rows, found.limit) == ("16 rows", 8, 8)
    assert [found.student_loss, found.teacher_loss] == pytest.approx(
        plain_values(student, teacher, data.examples[::2]), rel=1e-5
    )
    assert found.kl_per_response == pytest.approx(found.kl_to_teacher * found.response_length)
    assert 0 <= found.top_overlap <= 1
    assert found.ends == found.teacher_ends == [END]


def test_equal_models_are_seen_to_be_equal(tmp_path):
    found = seen(tmp_path, model(2, 1), model(2, 1))
    assert found.kl_to_teacher == pytest.approx(0, abs=1e-6)
    assert found.top_overlap == 1
    assert found.student_loss == pytest.approx(found.teacher_loss)


def test_the_teachers_cut_answers_are_counted(tmp_path):
    ends, never = (seen(tmp_path, model(2, 1), model(3, 2, end=end)) for end in (40.0, -40.0))
    assert (ends.teacher_cut, ends.teacher_answers, ends.teacher_length) == (0, 8, 1)
    assert (never.teacher_cut, never.teacher_answers, never.teacher_length) == (8, 8, 8)


def test_nothing_is_drawn_and_nothing_changes(tmp_path):
    student, teacher, data = model(2, 1), model(3, 2), rows()
    made = trainer(tmp_path, models=(student, teacher), data=data, method=named_method("promptkd"))
    before, state = [each.clone() for each in made.model.parameters()], torch.get_rng_state()
    training = made.model.training
    preflight(made, data)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, before, made.model.parameters()))
    assert made.model.training == training


@pytest.mark.slow
def test_the_screen_is_on_terminal_record_and_page_and_the_run_is_the_same(world, tmp_path, capsys):
    with_it, without = tmp_path / "with", tmp_path / "without"
    ran = done(capsys, *distill(world, with_it, "--eval-data", world.valid, "--preflight"))
    silent = done(capsys, *distill(world, without, "--eval-data", world.valid, "--no-preflight"))
    record = Results.read(with_it / "results.json")
    assert record.preflight.measured_rows == 4  # of the validation data
    page = (with_it / "report.html").read_text()
    for told in ("the teacher's answers", "KL(student || teacher)", "same top token", "loss on the references"):
        assert told in ran.err
        assert told not in silent.err
    assert "same top token" in page
    advice = [note for note in record.notes if note.startswith("Before training: ")]
    assert advice  # random models know nothing of the rows
    assert all(note in ran.err for note in advice)
    assert Results.read(without / "results.json").preflight is None
    assert steps(with_it) == steps(without)
    assert weights(with_it / "student") == weights(without / "student")


@pytest.mark.slow
def test_rows_without_references_and_runs_that_are_resumed(world, tmp_path, capsys):
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"the {index}"} for index in range(12)])
    done(capsys, *distill(world._replace(train=str(prompts)), tmp_path / "run", "--preflight"))
    found = Results.read(tmp_path / "run" / "results.json").preflight
    assert found.student_loss is None
    assert found.kl_to_teacher > 0
    again = run(capsys, "distill", "--out", tmp_path / "run", "--resume", "--no-preflight")  # it may change
    assert again.status == 0, again.err
    assert "Before training" not in again.err


@pytest.mark.slow
def test_a_run_that_was_interrupted_keeps_what_it_saw(world, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"

    def interrupted(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ProgressBar, "on_step_begin", interrupted)
        ran = run(capsys, *distill(world, out, "--save_steps", 1, "--preflight"))
    assert ran.status == 130
    advice = [line for line in ran.err.splitlines() if line.startswith("Before training: ")]
    assert advice
    again = done(capsys, "distill", "--out", out, "--resume")
    assert "Before training" not in again.err  # it is not measured again
    record = Results.read(out / "results.json")
    assert [note for note in record.notes if note.startswith("Before training: ")] == advice
    assert record.preflight.measured_rows == 8
    assert "same top token" in (out / "report.html").read_text()


def test_models_that_are_not_compared_are_not_measured(tmp_path):
    args = config(tmp_path, method="seqkd", max_steps=1, prompt_learning_rate=1e-3)
    others = {"teacher_processing_class": tiny_tokenizer(merges=())}
    made = DistillTrainer(*pair(), args, rows(), None, tiny_tokenizer(), **others)
    found = preflight(made, rows())
    assert (found.rows, found.measured_rows, found.kl_to_teacher) == (f"{len(rows().examples)} rows", 0, None)
