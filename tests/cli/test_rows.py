"""What commands say of their rows, and the template that a student takes from its teacher."""

import logging
import shutil

import datasets
import pytest
from transformers import AutoTokenizer

from helpers.commands import done, json_lines, run, write_rows
from helpers.tiny import save_model, tiny_model, tiny_tokenizer
from helpers.trainers import config
from promptkd.cli import main
from promptkd.results import Results
from promptkd.training import DistillTrainer

pytestmark = pytest.mark.slow

FEW = ("--max_steps", 1, "--per_device_train_batch_size", 2, "--max_completion_length", 12, "--use_cpu")

SHORT = ("--max-completion-length", 4, "--limit", 4)
TUNED_ON = {  # by whether there is an input
    True: "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\nthe\n\n### Input:\nit\n\n### Response:\n",
    False: "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\na\n\n### Response:\n",
}


def ask(text):
    return {"role": "user", "content": text}


def say(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base student, and a teacher with a chat template, a token of whose own ends a turn."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "student", tiny_model("llama", layers=2, hidden=16, seed=1), tiny_tokenizer())
    save_model(folder / "teacher", tiny_model("llama", layers=3, hidden=24, seed=2), tiny_tokenizer(chat=True))
    return folder


def test_a_base_student_takes_the_teachers_template_for_good(models, tmp_path, capsys):
    data = write_rows(tmp_path / "d.jsonl", [{"messages": [ask("the"), say("an"), ask("it"), say("a")], "id": 1}] * 4)
    pair = ("--student", models / "student", "--teacher", models / "teacher", "--data", data)
    how = ("--template", "teacher", "--turns", "all", "--method", "kd")
    told = done(capsys, "distill", *pair, "--out", tmp_path / "run", *how, *FEW).err
    lines = told.splitlines()
    owner = f"{models / 'teacher'} (the teacher's)"
    named = f"Template: the chat template of {owner}. Assistant turns that are trained: all of each row (--turns all)."
    assert lines[0] == named
    assert lines[1] == f"{data}: 4 rows, 8 examples (one per assistant turn)."
    assert lines[2].startswith(f"{data}: not used: 'id' (4 rows).")
    results = Results.read(tmp_path / "run" / "results.json")
    assert results.notes[:2] == [lines[0], lines[2]]
    assert (results.data["train"].rows, results.data["train"].examples) == (4, 8)
    saved, teacher = (
        AutoTokenizer.from_pretrained(each) for each in (tmp_path / "run" / "student", models / "teacher")
    )
    assert saved.chat_template == teacher.chat_template
    out = tmp_path / "e.json"
    told = done(
        capsys, "evaluate", "--model", tmp_path / "run", "--data", data, "--out", out, "--max-completion-length", 4
    )
    assert (
        Results.read(out).evaluations[0].samples[0].prompt == "<|user|>the<|assistant|>an<|end|><|user|>it<|assistant|>"
    )


def test_a_teacher_without_a_template_has_none_to_give(models, tmp_path, capsys):
    data = write_rows(tmp_path / "d.jsonl", [{"instruction": "the", "output": "an"}] * 4)
    pair = ("--student", models / "teacher", "--teacher", models / "student", "--data", data)
    ran = run(capsys, "distill", *pair, "--out", tmp_path / "run", "--template", "teacher", *FEW)
    assert ran.status == 2
    assert "has no chat template" in ran.err
    ran = run(
        capsys, "sft", "--model", models / "student", "--data", data, "--out", tmp_path / "o", "--template", "teacher"
    )
    assert ran.status == 2
    assert '"teacher" (of distill)' in ran.err


@pytest.mark.parametrize("command", ["generate", "exposure-bias", "evaluate", "sft"])
def test_columns_and_template_variables_are_flags_of_every_command_that_reads_rows(models, tmp_path, capsys, command):
    data = write_rows(tmp_path / "d.jsonl", [{"ask": [ask("the"), say("an")]}] * 4)
    model = models / "teacher"
    own = {
        "generate": ("--model", model, "--out", tmp_path / "g.jsonl"),
        "evaluate": ("--model", model, "--out", tmp_path / "g.json"),
        "exposure-bias": ("--student", model, "--teacher", model, "--out", tmp_path / "g.json", "--samples-per-row", 1),
        "sft": ("--model", model, "--out", tmp_path / "g", *FEW),
    }[command]
    short = () if command == "sft" else ("--max-completion-length", 4)
    told = done(capsys, command, *own, *short, "--data", data, "--columns", "ask=messages").err
    assert f"{data}: 4 rows." in told
    ran = run(
        capsys,
        command,
        *own,
        "--data",
        data,
        "--columns",
        "ask=messages",
        "--overwrite",
        "--chat_template_kwargs",
        '{"x": 1}',
    )
    assert ran.status == 2
    assert "chat_template_kwargs sets x, which the template does not read" in ran.err
    ran = run(capsys, command, *own, "--data", data, "--columns", "ask=question_text", "--overwrite")
    assert ran.status == 2
    assert "--columns takes OLD=NEW" in ran.err


def test_rows_that_end_with_the_user_and_long_rows_are_said_and_recorded(models, tmp_path, capsys):
    rows = [{"messages": [ask("the"), say("an")]}] * 4 + [
        {"messages": [ask("the")]},
        {"messages": [ask("it"), say("a" * 30)]},
    ]
    data = write_rows(tmp_path / "d.jsonl", rows)
    told = done(capsys, "sft", "--model", models / "teacher", "--data", data, "--out", tmp_path / "r", *FEW).err
    notes = Results.read(tmp_path / "r" / "results.json").notes
    assert f"{data}: 1 row ends with the user and was dropped, since a response is needed." in notes
    warning = f"Warning: {data}: 1 of 5 rows (20%) are over --max_prompt_length 256 or --max_completion_length 12"
    assert f"{warning} and were dropped. --max_completion_length 31 keeps 95%." in notes
    assert all(note in told for note in notes[:3])
    pair = ("--student", models / "teacher", "--teacher", models / "teacher", "--data", data)
    done(capsys, "distill", *pair, "--out", tmp_path / "on-policy", *FEW)  # the student writes the responses
    assert Results.read(tmp_path / "on-policy" / "results.json").data["train"].rows == 6


def test_the_trainer_takes_the_same_rows(tmp_path, caplog):
    conversations = [{"from": "human", "value": "the"}, {"from": "gpt", "value": "an"}]
    table = datasets.Dataset.from_list([{"talk": conversations, "id": 3}] * 4)
    student, teacher = (tiny_model("llama", layers=2, hidden=16, seed=seed) for seed in (1, 2))
    args = config(tmp_path, template="teacher", columns={"talk": "conversations"}, max_steps=1)
    tokenizers = {"processing_class": tiny_tokenizer(), "teacher_processing_class": tiny_tokenizer(chat=True)}
    with caplog.at_level(logging.WARNING, logger="promptkd.training.setup"):  # which a command silences
        trainer = DistillTrainer(student, teacher, args, table, **tokenizers)
    (row, *_) = trainer.train_dataset
    assert tokenizers["processing_class"].decode(row.prompt_ids) == "<|user|>the<|assistant|>"
    assert tokenizers["processing_class"].decode(row.response_ids) == "an<|end|>"
    assert "train_dataset: not used: 'id' (4 rows)." in caplog.text
    trainer.train()


@pytest.fixture(scope="module")
def tuned(models, tmp_path_factory):
    """The run of a chat model that was tuned on the Alpaca template, and its rows."""
    folder = tmp_path_factory.mktemp("tuned")
    rows = [{"instruction": "the", "input": "it", "output": "an"}, {"instruction": "a", "output": "an"}]
    data = write_rows(folder / "d.jsonl", rows * 2)
    tuning = ("sft", "--model", models / "teacher", "--data", data, "--out", folder / "run", "--template", "alpaca")
    assert main([str(each) for each in (*tuning, *FEW)]) == 0
    return folder / "run", data


def prompts_of(capsys, model, data, out, *arguments):
    """The prompts that `evaluate` gives the model, and what it says."""
    told = done(capsys, "evaluate", "--model", model, "--data", data, "--out", out, *SHORT, *arguments).err
    return {sample.prompt for sample in Results.read(out).evaluations[0].samples}, told


def test_a_model_is_run_on_the_template_that_it_was_trained_on(tuned, tmp_path, capsys):
    run_folder, data = tuned
    expected = {TUNED_ON[True], TUNED_ON[False]}
    copied = shutil.copytree(run_folder / "model", tmp_path / "copied")
    for number, model in enumerate((run_folder, run_folder / "model", copied)):
        out = tmp_path / f"{number}.json"
        found, told = prompts_of(capsys, model, data, out)
        assert found == expected
        note = "Template: alpaca, on which the model was trained."
        assert note in told.splitlines()
        assert note in Results.read(out).notes
    (by_chat, told) = prompts_of(capsys, copied, data, tmp_path / "c.json", "--template", "chat")
    assert TUNED_ON[False] in by_chat  # the saved chat template writes the same; an input is a part of the message
    assert "Template: the chat template of the model." in told
    out = tmp_path / "g.jsonl"
    done(capsys, "generate", "--model", run_folder, "--data", data, "--out", out, *SHORT)
    assert {line["prompt"] for line in json_lines(out)} == expected
    done(
        capsys,
        "distill",
        "--student",
        run_folder,
        "--teacher",
        run_folder,
        "--data",
        data,
        "--out",
        tmp_path / "next",
        *FEW,
    )
    assert (
        Results.read(tmp_path / "next" / "results.json")
        .notes[0]
        .startswith(f"Template: alpaca, on which {run_folder} was trained.")
    )


def test_a_run_of_an_earlier_version_is_read_by_its_settings(tuned, models, tmp_path, capsys, monkeypatch):
    data = tuned[1]
    for inside in ("model", "student", "checkpoints/checkpoint-3"):
        old = tmp_path / inside.replace("/", "-")
        shutil.copytree(models / "teacher", old / inside)
        (old / "config.yaml").write_text("template: alpaca\ndata: d.jsonl\nout: run\nkeep: 2\n")
        found, told = prompts_of(capsys, old / inside, data, old / "e.json")
        assert found == {TUNED_ON[True], TUNED_ON[False]}
        assert "on which the model was trained" in told
    monkeypatch.chdir(old / inside)
    assert "on which the model was trained" in prompts_of(capsys, ".", data, old / "g.json")[1]
    trained = ("--data", data, "--out", tmp_path / "next", *FEW)
    done(capsys, "sft", "--model", old / inside, *trained)
    assert Results.read(tmp_path / "next" / "results.json").notes[0].startswith("Template: alpaca, on which")
    broken = "template: '{{ prompt }}'\ndata: d.jsonl\nout: run\nkeep: 2\n"
    (old / "config.yaml").write_text(broken)
    ran = run(capsys, "evaluate", "--model", old / inside, "--data", data, "--out", old / "h.json", *SHORT)
    assert ran.status == 2
    assert str(old / "config.yaml") in ran.err
    done(
        capsys,
        "evaluate",
        "--model",
        old / inside,
        "--data",
        data,
        "--out",
        old / "h.json",
        *SHORT,
        "--template",
        "chat",
    )
    (old / "config.yaml").write_text("template: alpaca\n")  # another tool's
    assert "the chat template of the model" in prompts_of(capsys, old / inside, data, old / "f.json")[1]


def test_answers_to_prompts_of_another_template_are_not_taken_up(tuned, models, tmp_path, capsys):
    data = tuned[1]
    old = shutil.copytree(models / "teacher", tmp_path / "run" / "model")
    prompts_of(capsys, old, data, tmp_path / "e.json")
    (tmp_path / "run" / "config.yaml").write_text("template: alpaca\ndata: d.jsonl\nout: run\nkeep: 2\n")
    again = ("evaluate", "--model", old, "--data", data, "--out", tmp_path / "e.json", *SHORT)
    (tmp_path / "e.json").unlink()
    ran = run(capsys, *again)
    assert ran.status == 2
    assert "template of the training" in ran.err


@pytest.mark.parametrize("command", ["sft", "distill"])
def test_prompts_of_another_template_than_the_validation_rows_are_told(models, tmp_path, capsys, command):
    train = write_rows(tmp_path / "train.jsonl", [{"prompt": "the it", "completion": "an"}] * 4)
    valid = write_rows(
        tmp_path / "valid.jsonl", [{"instruction": each, "output": "an"} for each in ("a", "an", "it", "i")]
    )
    trained = {
        "sft": ("--model", models / "teacher"),
        "distill": ("--student", models / "teacher", "--teacher", models / "teacher"),
    }
    method = ("--method", "seqkd") if command == "distill" else ()
    request = (
        command,
        *trained[command],
        "--data",
        train,
        "--eval-data",
        valid,
        "--out",
        tmp_path / "run",
        *method,
        *FEW,
    )
    told = done(capsys, *request).err
    (note,) = [each for each in Results.read(tmp_path / "run" / "results.json").notes if "texts, and none ends" in each]
    assert "'<|assistant|>': the first ends with 'the it'" in note
    assert note in told


def test_a_model_that_is_trained_on_texts_of_the_named_template_is_saved_with_it(models, tmp_path, capsys):
    texts = write_rows(tmp_path / "d.jsonl", [{"prompt": TUNED_ON[False], "completion": "an"}] * 4)
    pair = ("--student", models / "teacher", "--teacher", models / "teacher", "--data", texts)
    for template, expected in (("alpaca", "alpaca"), ("chat", None)):
        out = ("--out", tmp_path / template, "--template", template)
        done(capsys, "distill", *pair, "--method", "seqkd", *FEW, *out)
        saved = AutoTokenizer.from_pretrained(tmp_path / template / "student")
        assert saved.init_kwargs.get("promptkd_template") == expected


def test_the_template_of_a_teacher_is_what_it_was_trained_on(tuned, models, tmp_path, capsys):
    run_folder, data = tuned
    pair = ("--student", models / "teacher", "--teacher", run_folder, "--data", data, "--method", "kd", *FEW)
    done(capsys, "distill", *pair, "--template", "teacher", "--out", tmp_path / "run", "--max_prompt_length", 400)
    found, _ = prompts_of(capsys, tmp_path / "run", data, tmp_path / "e.json")
    assert found == {TUNED_ON[True], TUNED_ON[False]}


def test_a_template_is_told_where_another_file_holds_texts(tuned, tmp_path, capsys):
    run_folder, data = tuned
    texts = write_rows(tmp_path / "texts.jsonl", [{"prompt": "the", "completion": "an"}] * 2)
    out = tmp_path / "e.json"
    told = done(capsys, "evaluate", "--model", run_folder, "--data", texts, data, "--out", out, *SHORT).err
    assert "Template: alpaca, on which the model was trained." in told.splitlines()
