"""`evaluate` and `exposure-bias` against a teacher that reads a context, by hand; what is said where it reads none."""

import json
import shlex

import pytest
import torch

from helpers.commands import LIMITS, World, distill, done, json_lines, make_world, run, write_rows
from helpers.commands import rows as made_rows
from helpers.tiny import END_ID, VOCABULARY, save_model, tiny_model, tiny_tokenizer
from promptkd.errors import PromptKDError
from promptkd.evaluation import Decoding, exposure_bias, sample_continuations
from promptkd.models import SoftPrompt, load_model
from promptkd.results import Results

pytestmark = pytest.mark.slow

FLOAT32 = ("--dtype", "float32", "--teacher-dtype", "float32")
TEXT = "Say {{ reference }}."


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("promptkd.cli.commands.evaluate.measure_speed", lambda *arguments: None)


def evaluate(world, out, *arguments, data=None, measure="student"):
    pair = ("--model", world.student, "--teacher", world.teacher, "--data", data or world.test)
    return ("evaluate", *pair, "--out", out, *LIMITS, *FLOAT32, "--measure", measure, "--no-greedy", *arguments)


def exposure(world, out, *arguments, data=None, students=None):
    pair = ("--student", *(students or [world.student]), "--teacher", world.teacher, "--data", data or world.test)
    return ("exposure-bias", *pair, "--out", out, *LIMITS, *FLOAT32, *arguments)


def asked(row, context=""):
    """The tokens of a request behind a context, by the template's words alone."""
    text = f"Q: {row['instruction']} {row['input']}\nA: "
    return tiny_tokenizer()(f"{context}\n\n{text}" if context else text, add_special_tokens=False)["input_ids"]


def log_probs(model, prompt, response, soft=None):
    """log p(. | prompt, response before t) of each t, in float64, one row at a time; `soft` are vectors before it."""
    ids = torch.tensor([[*prompt, *response]])
    embedded = model.get_input_embeddings()(ids)
    if soft is not None:
        embedded = torch.cat([soft.double()[None], embedded], dim=1)
    with torch.no_grad():
        logits = model(inputs_embeds=embedded).logits[0, :, :VOCABULARY]
    return logits[-len(response) - 1 : -1].log_softmax(-1)


def kl(one, other):
    """Σ_v p_v log(p_v / q_v) of each token."""
    return [sum(float(p.exp() * (p - q)) for p, q in zip(*pair, strict=True)) for pair in zip(one, other, strict=True)]


def models(world):
    return load_model(world.student).double(), load_model(world.teacher).double()


def told(record, of="teacher teacher"):
    return record.models[of].context


def test_the_kl_is_to_the_teacher_that_reads_its_context_and_the_student_reads_none(world, tmp_path, capsys):
    file = tmp_path / "context.txt"
    file.write_text(TEXT, encoding="utf-8")
    ran = done(capsys, *evaluate(world, tmp_path / "a" / "r.json", "--teacher_prompt", file))
    assert f"context that the student does not see: the text of {file} ({len(TEXT)} characters)." in ran.err
    done(capsys, *evaluate(world, tmp_path / "b" / "r.json"))
    with_it, without = (Results.read(tmp_path / each / "r.json") for each in "ab")
    lines = json_lines(tmp_path / "a" / "r-test-seed10.jsonl")
    assert [each["token_ids"] for each in lines] == [
        each["token_ids"] for each in json_lines(tmp_path / "b" / "r-test-seed10.jsonl")
    ]
    student, teacher = models(world)
    for record, context in ((with_it, "Say {}."), (without, "")):
        nats = []
        for row, line in zip(made_rows(5, first=30), lines, strict=True):
            own = log_probs(student, asked(row), line["token_ids"])
            read = asked(row, context.format(row["output"]) if context else "")
            nats += kl(own, log_probs(teacher, read, line["token_ids"]))
        metrics = record.evaluations[0].metrics
        assert metrics["kl_to_teacher"].value == pytest.approx(sum(nats) / len(nats), rel=1e-4)
        assert metrics["loss"] == without.evaluations[0].metrics["loss"]
    gap = [each.evaluations[0].metrics["kl_to_teacher"].value for each in (with_it, without)]
    assert abs(gap[0] - gap[1]) > 0.01
    notes = "\n".join(with_it.notes)
    assert "test: the KL is to the teacher with its context." in notes
    assert "Warning: test: in 5 of 5 rows the teacher's context holds the row's reference." in notes
    assert (told(with_it), told(without)) == (TEXT, "")
    assert with_it.config["teacher_prompt"] == TEXT  # not the file, which may change
    assert "context" not in "\n".join(without.notes)
    assert "The teacher reads a context that the student does not see" in " ".join(ran.out.split())


def test_the_teachers_own_answers_are_behind_its_context(world, tmp_path, capsys, no_speed):
    done(capsys, *evaluate(world, tmp_path / "r.json", "--teacher_prompt", "Be kind.", measure="all"))
    record, (_, teacher) = Results.read(tmp_path / "r.json"), models(world)
    assert "test: the KL and the teacher's own answers are of the teacher with its context." in record.notes
    own = next(each for each in record.evaluations if each.model == "teacher teacher")
    nats, count = 0.0, 0
    for row, sample in zip(made_rows(5, first=30), own.samples, strict=True):
        assert "kind" not in sample.prompt
        wanted = [*tiny_tokenizer()(row["output"], add_special_tokens=False)["input_ids"], END_ID]
        found = log_probs(teacher, asked(row, "Be kind."), wanted)
        nats -= sum(float(found[at, index]) for at, index in enumerate(wanted))
        count += len(wanted)
    assert own.metrics["loss"].value == pytest.approx(nats / count, rel=1e-4)
    decoding = Decoding(max_new_tokens=8, stop_ids=[END_ID], vocabulary=VOCABULARY, seed=10)
    prompts = [asked(row, "Be kind.") for row in made_rows(5, first=30)]
    expected = sample_continuations(load_model(world.teacher), prompts, decoding, samples_per_row=1)
    written = json_lines(tmp_path / "r-test-teacher-seed10.jsonl")
    assert [line["token_ids"] for line in written] == [draws[0] for draws in expected]


def test_a_column_is_read_where_it_is_asked_for(world, tmp_path, capsys):
    lines = made_rows(5, first=30)
    hinted = [{**row, "hint": "abc"} if index % 2 else row for index, row in enumerate(lines)]
    data = write_rows(tmp_path / "rows.jsonl", hinted)
    columns = ("--columns", "hint=teacher_prompt")
    ran = done(capsys, *evaluate(world, tmp_path / "plain" / "r.json", *columns, data=data))
    assert "rows: the teacher does not read the column teacher_prompt. --teacher-prompt '' has it read." in ran.err
    ran = done(capsys, *evaluate(world, tmp_path / "own" / "r.json", *columns, "--teacher_prompt", "", data=data))
    assert (
        "rows: the KL is to the teacher with its context in 2 of the 5 rows, and without one in the others." in ran.err
    )
    assert "not used: 'teacher_prompt'" not in ran.err
    plain, own = (Results.read(tmp_path / each / "r.json") for each in ("plain", "own"))
    assert (told(plain), told(own)) == ("", "the rows' column teacher_prompt")
    pairs = zip(*(each.evaluations[0].samples for each in (plain, own)), strict=True)
    same = [one.scores["kl_to_teacher"] == pytest.approx(other.scores["kl_to_teacher"]) for one, other in pairs]
    assert same == [True, False, True, False, True]
    for command in (evaluate, exposure):
        ran = done(capsys, *command(world, tmp_path / "none" / f"{command.__name__}.json", "--teacher_prompt", ""))
        assert "test: no row has a context for the teacher, which reads what the student reads." in ran.err
        record = Results.read(tmp_path / "none" / f"{command.__name__}.json")
        assert told(record) == ""


@pytest.mark.parametrize("prompted", [False, True])
def test_exposure_bias_is_against_the_teacher_that_reads_its_context(world, tmp_path, capsys, prompted):
    """Its continuations and every error, with a soft prompt before the context or without."""
    soft, flags = None, ()
    if prompted:
        made = SoftPrompt.create(load_model(world.teacher), tiny_tokenizer(), length=3, start="random")
        made.save(tmp_path / "prompt", load_model(world.teacher))
        soft, flags = made().detach(), ("--prompt", tmp_path / "prompt")
    given = ("--samples-per-row", 2, "--teacher_prompt", TEXT, *flags)
    done(capsys, *exposure(world, tmp_path / "e.json", *given))
    record, (student, teacher) = Results.read(tmp_path / "e.json"), models(world)
    requests = made_rows(5, first=30)
    own, read = [asked(row) for row in requests], [asked(row, f"Say {row['output']}.") for row in requests]
    decoding = Decoding(max_new_tokens=8, stop_ids=[END_ID], vocabulary=VOCABULARY, seed=10)
    mine = sample_continuations(load_model(world.student), own, decoding, samples_per_row=2)
    theirs = sample_continuations(load_model(world.teacher), read, decoding, samples_per_row=2, prompt=soft)
    for samples, side in ((mine, "its own continuations"), (theirs, "the teacher's")):
        nats = []
        for ids, context, drawn in zip(own, read, samples, strict=True):
            for response in drawn:
                nats += kl(log_probs(teacher, context, response, soft), log_probs(student, ids, response))
        metric = record.metrics[f"student: KL(teacher || student) on {side}, nats/token"]
        assert metric.value == pytest.approx(sum(nats) / len(nats), rel=1e-4)
    (curve,) = record.curves
    assert curve.settings["context"] == told(record) == TEXT
    assert "test: the errors and the teacher's continuations are of the teacher with its context." in record.notes


def test_a_measurement_that_was_stopped_goes_on_with_the_same_context_alone(world, tmp_path, capsys):
    """Answers hold the KL to the teacher, so other contexts need other files."""
    done(capsys, *evaluate(world, tmp_path / "r.json", "--teacher_prompt", "Be kind."))
    again = done(capsys, *evaluate(world, tmp_path / "r.json", "--teacher_prompt", "Be kind."))
    assert "Resuming from 2 of 2 files" in again.err
    ran = run(capsys, *evaluate(world, tmp_path / "r.json"))
    assert "--teacher-prompt was 'Be kind.' and is now None" in ran.err
    settings = tmp_path / "r-settings.json"
    job = json.loads(settings.read_text())
    for name in ("--teacher-prompt", "--max-teacher-prompt-length"):  # as versions before it wrote them
        del job["settings"][name]
    settings.write_text(json.dumps(job))
    ran = run(capsys, *evaluate(world, tmp_path / "r.json", "--teacher_prompt", "Be kind."))
    assert "--teacher-prompt was None and is now 'Be kind.'" in ran.err


def test_a_stopped_exposure_bias_goes_on_with_the_same_context_alone(world, tmp_path, capsys, monkeypatch):
    calls = []

    def stopped(*arguments, **settings):
        calls.append(1)
        if len(calls) == 2:
            raise PromptKDError("stopped")
        return exposure_bias(*arguments, **settings)

    monkeypatch.setattr("promptkd.cli.commands.exposure_bias.exposure_bias", stopped)
    request = exposure(world, tmp_path / "e.json", "--samples-per-row", 1, students=[world.student, world.teacher])
    assert "stopped" in run(capsys, *request, "--teacher_prompt", "Be kind.").err
    assert "was begun with other settings: contexts_sha256 was" in run(capsys, *request).err
    assert "1 curves are measured already" in done(capsys, *request, "--teacher_prompt", "Be kind.").err


def test_measurements_with_and_without_a_context_are_not_compared(world, tmp_path, capsys):
    for name, context in (("with", ("--teacher_prompt", "Be kind.")), ("without", ())):
        done(capsys, *evaluate(world, tmp_path / name / "r.json", *context))
    records = [f"{name}={tmp_path / name / 'r.json'}" for name in ("with", "without")]
    done(capsys, "compare", *records, "--out", tmp_path / "c.json")
    compared = Results.read(tmp_path / "c.json")
    told = "kl_to_teacher of without was not compared: its record names another teacher, or context, than that of with."
    assert told in compared.notes
    assert "kl_to_teacher" not in {each.metric for each in compared.differences}
    assert "loss" in {each.metric for each in compared.differences}


def test_a_run_whose_teacher_read_a_context_is_told_once_where_it_is_measured_without(world, tmp_path, capsys):
    contexts = {"text": "Be kind, it's late.", "long": "Be kind. " * 30}
    for (name, text), method in zip(contexts.items(), ("promptkd", "gkd"), strict=True):
        limit = ("--max_teacher_prompt_length", 2000)
        done(capsys, *distill(world, tmp_path / name, "--method", method, "--teacher_prompt", text, *limit))
    data = write_rows(tmp_path / "rows.jsonl", [{**row, "teacher_prompt": "Be"} for row in made_rows(12)])
    done(capsys, *distill(world._replace(train=str(data)), tmp_path / "column", "--method", "gkd"))
    done(capsys, *distill(world, tmp_path / "none", "--method", "gkd"))
    advice = {
        "text": f"To measure with it: --teacher-prompt {shlex.quote(contexts['text'])}.",
        "long": "give --teacher-prompt a file that holds teacher_prompt of the run's config.yaml.",
        "column": "give --teacher-prompt '' and rows with the column teacher_prompt.",
    }
    for name in (*advice, "none"):
        place = tmp_path / name
        ran = done(capsys, *evaluate(world._replace(student=str(place)), tmp_path / f"{name}.json"))
        said = [line for line in ran.err.splitlines() if "In training the teacher" in line]
        if name == "none":
            assert not said
            continue
        (line,) = said
        assert line.startswith(f"In training the teacher of {place} read a context; here {world.teacher} is measured")
        assert line.endswith(advice[name])
        assert line in Results.read(tmp_path / f"{name}.json").notes
    students = [str(tmp_path / name / "student") for name in ("text", "none")]
    ran = done(capsys, *exposure(world, tmp_path / "e.json", "--samples-per-row", 1, students=[students[0]]))
    assert ran.err.count("In training the teacher of") == 1
    soft = ("--samples-per-row", 1, "--prompt", tmp_path / "text")
    ran = done(capsys, *exposure(world, tmp_path / "p.json", *soft, students=[students[1]]))
    assert ran.err.count(f"In training the teacher of {tmp_path / 'text'} read a context") == 1
    given = ("--samples-per-row", 1, "--teacher_prompt", "Be kind.")
    ran = done(capsys, *exposure(world, tmp_path / "f.json", *given, students=[students[0]]))
    assert "In training" not in ran.err


@pytest.mark.parametrize("command", [evaluate, exposure])
def test_requests_that_are_refused(world, tmp_path, capsys, command):
    for message, *flags in (
        ("--max-teacher-prompt-length limits what the teacher reads", "--max-teacher-prompt-length", 9),
        ("--teacher_prompt does not compile as a Jinja template", "--teacher_prompt", "{{ hint"),
        ("line 1: --teacher_prompt cannot be rendered: 'hint' is undefined", "--teacher_prompt", "{{ hint }}"),
        ("--max-teacher-prompt-length 24 keeps all.", "--teacher_prompt", "Be kind.", "--max-teacher-prompt-length", 5),
    ):
        ran = run(capsys, *command(world, tmp_path / "r.json", *flags))
        assert ran.status == 2
        assert message in ran.err
    assert not (tmp_path / "r.json").exists()


def test_a_context_is_of_a_teacher(world, tmp_path, capsys):
    alone = ("evaluate", "--model", world.student, "--data", world.test, "--out", tmp_path / "r.json", *LIMITS)
    assert "--teacher-prompt is of a --teacher." in run(capsys, *alone, "--teacher_prompt", "Be kind.").err


@pytest.mark.parametrize("command", [evaluate, exposure])
def test_a_context_over_a_limit_drops_its_row_and_one_over_the_positions_is_refused(world, tmp_path, capsys, command):
    lines = [{**row, "teacher_prompt": "a" * (5 + 400 * (at == 3))} for at, row in enumerate(made_rows(5, first=30))]
    data = write_rows(tmp_path / "rows.jsonl", lines)
    flags = ("--teacher_prompt", "", "--max-teacher-prompt-length", 60)
    done(capsys, *command(world, tmp_path / "r.json", *flags, data=data))
    record = Results.read(tmp_path / "r.json")
    assert (record.data["rows"].rows, record.data["rows"].dropped) == (4, 1)
    assert any(
        "over --max-prompt-length 40" in note and "--max-teacher-prompt-length 60" in note for note in record.notes
    )
    short = save_model(tmp_path / "short", tiny_model("gpt2", n_positions=64))
    ran = run(capsys, *command(world._replace(teacher=str(short)), tmp_path / "s.json", *flags[:2], data=data))
    assert ran.status == 2
    assert "The teacher has 64 positions" in ran.err
    assert "leave long rows out by a lower --max-teacher-prompt-length." in ran.err
