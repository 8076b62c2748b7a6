"""Several teachers: each row learns of its own, each has a prompt of its own, and one may be resident at a time."""

import copy
import gc
import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig

from helpers.commands import PROMPT_FILES, distill, done, make_world, run, weights, write_rows
from helpers.commands import rows as json_rows
from helpers.processes import together
from helpers.tiny import save_model, tiny_model, tiny_tokenizer
from helpers.trainers import FIXED_PROMPTKD, FixedResponses, config, log, pair, rows, trainer
from promptkd.data import EncodedData
from promptkd.errors import RequestError
from promptkd.methods import Method, named_method
from promptkd.objectives import reverse_kl
from promptkd.results import Results
from promptkd.training import DistillTrainer
from promptkd.training.callbacks import quiet
from promptkd.training.dry_run import longest_rows_first
from promptkd.training.residence import bring, send_away
from promptkd.training.teachers import named_teachers

PLAIN = Method(FixedResponses(), reverse_kl)
NAMES = ("a", "b")


def named(data: EncodedData, names=NAMES) -> EncodedData:
    """Rows dealt out to teachers."""
    dealt = [replace(row, teacher=names[index % len(names)]) for index, row in enumerate(data.examples)]
    return replace(data, examples=dealt)


def teachers(*, alike=False):
    first = pair()[1]
    return {"a": first, "b": copy.deepcopy(first) if alike else tiny_model("llama", layers=2, hidden=12, seed=7)}


def test_a_dry_run_has_a_row_of_each_teacher_however_short(tmp_path):
    data = rows()
    short = min(data.examples, key=lambda row: len(row.prompt_ids + row.response_ids))
    dealt = [replace(row, teacher="b" if row is short else "a") for row in data.examples]
    method = named_method("kd")
    ordered = longest_rows_first(replace(data, examples=dealt), config(tmp_path), method).examples
    assert {row.teacher for row in ordered[:2]} == set(NAMES)
    assert len(ordered) == len(dealt)


def several(folder, *, models=None, data=None, eval_data=None, method=FIXED_PROMPTKD, peft_config=None, **settings):
    if method.adapter is None:
        settings = {"prompt_learning_rate": 1e-3, **settings}
    made = DistillTrainer(
        pair()[0],
        models or teachers(),
        config(folder, **settings),
        data or named(rows()),
        eval_data,
        tiny_tokenizer(),
        method=method,
        teacher_processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )
    quiet(made)
    return made


def prompts(ours):
    return [each.adapter.module().detach().clone() for each in ours.teachers]


def student(ours):
    return [each.detach().clone() for each in ours.model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("method", [PLAIN, named_method("dpkd")], ids=["tokens", "rows"])
def test_two_copies_of_a_teacher_are_one(tmp_path, method):
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "temperature": 1.0}
    one = trainer(tmp_path / "one", method=method, **settings)
    one.train()
    two = several(tmp_path / "two", models=teachers(alike=True), method=method, **settings)
    two.train()
    for mine, other in zip(student(one), student(two), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-6)
    key = "student_kl" if method is PLAIN else "student_loss"
    for mine, other in zip(log(one), log(two), strict=True):
        assert mine[key] == pytest.approx(other[key], rel=1e-5)


@pytest.mark.slow
def test_rows_of_one_teacher_leave_the_prompt_of_the_other_untouched(tmp_path):
    data = named(rows(4), ("a",))
    data.examples.append(replace(rows(5).examples[4], teacher="b"))  # which no step of one epoch reaches
    ours = several(tmp_path, data=data, max_steps=1, shuffle_dataset=False)
    before = prompts(ours)
    ours.train()
    after = prompts(ours)
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    logged = log(ours)[0]
    assert logged["prompt_kl[a]"] == pytest.approx(logged["prompt_kl"])
    assert not [name for name in logged if name.endswith("[b]") and not name.startswith(("prompt_norm", "prompt_dist"))]


@pytest.mark.slow
def test_each_prompt_learns_of_its_own_rows_as_in_a_run_of_its_own(tmp_path):
    """The loss of a prompt is a mean over the tokens of its teacher's rows, however they lie in micro-batches."""
    data = named(rows(8))
    both = several(tmp_path / "both", data=data, max_steps=1, per_device_train_batch_size=8, shuffle_dataset=False)
    pieces = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    split = several(tmp_path / "split", data=data, max_steps=1, shuffle_dataset=False, **pieces)
    for each in (both, split):
        each.train()
    for name, mine, other in zip(NAMES, prompts(both), prompts(split), strict=True):
        own = EncodedData([row for row in data.examples if row.teacher == name], 0)
        alone = trainer(tmp_path / name, data=own, models=(pair()[0], teachers()[name]), max_steps=1)
        alone.train()
        torch.testing.assert_close(mine, alone.adapter.module().detach(), rtol=0, atol=1e-5)
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
        for metric in ("prompt_kl", "prompt_regularizer", "prompt_grad_norm", "prompt_norm"):
            assert log(both)[0][f"{metric}[{name}]"] == pytest.approx(log(alone)[0][metric], rel=1e-4, abs=1e-6)
        assert log(both)[0][f"student_kl[{name}]"] == pytest.approx(log(alone)[0]["student_kl"], rel=1e-4)
    tokens = {name: sum(len(row.response_ids) for row in data.examples if row.teacher == name) for name in NAMES}
    mean = sum(tokens[name] * log(both)[0][f"student_kl[{name}]"] for name in NAMES) / sum(tokens.values())
    assert log(both)[0]["student_kl"] == pytest.approx(mean, rel=1e-6)
    assert both.trainable_share()[0] == sum(each.numel() for each in prompts(both))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["promptkd", "promptkd-lora", "okd"])
def test_one_resident_at_a_time_computes_the_same_bits(tmp_path, monkeypatch, method):
    monkeypatch.setenv("PROMPTKD_CACHE", str(tmp_path / "cache"))
    runs = []
    for resident in ("all", "one"):
        made = several(tmp_path / resident, method=named_method(method), teachers_resident=resident, max_steps=2)
        made.train()
        runs.append(made)
    assert log(runs[0]) == log(runs[1])
    assert all(torch.equal(*each) for each in zip(*map(student, runs), strict=True))
    away = [sum(part.numel() == 0 for part in each.backbone.parameters()) for each in runs[1].teachers]
    assert min(away) == 0 < max(away)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_weights_that_are_away_take_no_memory_and_come_back(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTKD_CACHE", str(tmp_path))
    models = [tiny_model(seed=1), tiny_model(seed=2)]
    held = [[each.detach().clone() for each in model.parameters()] for model in models]
    for model in models:
        send_away(model, torch.device("cpu"))
        assert all(each.untyped_storage().nbytes() == 0 for each in model.parameters())
    for at in (0, 1, 1, 0):
        bring(models[at])
        assert all(torch.equal(*each) for each in zip(models[at].parameters(), held[at], strict=True))
        assert all(each.numel() == 0 for each in models[1 - at].parameters())
    del models, model
    gc.collect()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2, target_modules="all-linear")], ids=["whole", "lora"])
def test_a_resumed_run_has_the_bits_of_an_undisturbed_one(tmp_path, peft_config):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "peft_config": peft_config, "on_nan": "skip"}
    whole = several(tmp_path, **settings)
    whole.train()
    again = several(tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert log(again) == log(whole)
    assert all(torch.equal(*each) for each in zip(student(again), student(whole), strict=True))
    assert all(torch.equal(*each) for each in zip(prompts(again), prompts(whole), strict=True))
    again.tuner.rollback()
    moved = [not torch.equal(*each) for each in zip(prompts(again), prompts(whole), strict=True)]
    assert moved == [True, True]
    renamed = {"models": {"a": teachers()["a"], "c": teachers()["b"]}, "data": named(rows(), ("a", "c"))}
    other = several(tmp_path, **renamed, peft_config=peft_config)
    with pytest.raises(RequestError, match="holds no teacher c, but a, b"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.slow
def test_what_would_save_memory_is_asked_of_all_teachers(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTKD_CACHE", str(tmp_path / "cache"))
    for rounded, lower in ((("a",), True), (("a", "b"), False)):
        models = teachers()
        for name in rounded:
            models[name].to(torch.bfloat16)
        found = several(tmp_path, models=models).savings()
        assert (found["lower_teacher"], found["take_turns"]) == (lower, True)
    assert not several(tmp_path, teachers_resident="one").savings()["take_turns"]
    assert not several(tmp_path, method=named_method("promptkd-full")).savings()["take_turns"]  # they cannot
    assert not trainer(tmp_path).savings()["take_turns"]


@pytest.mark.slow
def test_a_run_that_was_too_large_resumes_with_one_teacher_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTKD_CACHE", str(tmp_path / "cache"))
    whole = several(tmp_path, save_strategy="steps", save_steps=1)
    whole.train()
    again = several(tmp_path, teachers_resident="one")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert all(torch.equal(*each) for each in zip(student(again), student(whole), strict=True))
    assert all(torch.equal(*each) for each in zip(prompts(again), prompts(whole), strict=True))


@pytest.mark.slow
def test_validation_measures_each_row_against_its_own_teacher(tmp_path):
    data = rows(6, seed=3)
    ours = several(tmp_path, eval_data=named(data))
    found = ours.evaluate()
    for name, model in teachers().items():
        own = EncodedData([row for row in named(data).examples if row.teacher == name], 0)
        alone = trainer(tmp_path, models=(pair()[0], model), eval_data=own).evaluate()
        assert found[f"eval_kl_to_teacher[{name}]"] == pytest.approx(alone["eval_kl_to_teacher"], rel=1e-5)
    low, high = sorted(found[f"eval_kl_to_teacher[{name}]"] for name in NAMES)
    assert low < found["eval_kl_to_teacher"] < high


def test_what_does_not_go_together_is_refused(tmp_path):
    unnamed, unknown = rows(), named(rows(), ("a", "b", "c"))
    cases = (
        ({"data": unnamed}, "one of a, b. Got a row without the column 'teacher' in row 0 of train_dataset"),
        ({"data": unknown}, "Got the unknown teacher 'c' in row 2"),
        ({"data": named(rows(), ("a",))}, "No row of train_dataset is of the teacher b"),
        ({"models": {"a": pair()[1], "b": "self"}}, "can only be alone"),
        ({"method": named_method("seqkd")}, "reads no teacher"),
        ({"method": named_method("promptkd-full"), "teachers_resident": "one"}, "cannot take turns"),
    )
    for settings, told in cases:
        with pytest.raises(RequestError, match=told.replace(".", r"\.")):
            several(tmp_path, **settings)
    with pytest.raises(RequestError, match="teachers_resident is of several"):
        trainer(tmp_path, teachers_resident="one")
    ours = several(tmp_path, method=named_method("minillm"))
    with pytest.raises(RequestError, match="with one teacher only"):
        ours.train()


def test_teachers_that_differ_in_vocabulary_or_end_are_refused(tmp_path):
    for tokenizer, told in ((tiny_tokenizer(merges=()), "Teacher b: .* split text differently"),):
        with pytest.raises(RequestError, match=told):
            DistillTrainer(
                pair()[0],
                teachers(),
                config(tmp_path),
                named(rows()),
                None,
                tiny_tokenizer(),
                teacher_processing_class={"a": tiny_tokenizer(), "b": tokenizer},
            )


def test_names_come_from_folders_unless_they_are_given():
    assert named_teachers("runs/x") == {"": "runs/x"}
    assert named_teachers(["runs/x/", "y=runs/z", "owner/m"]) == {"x": "runs/x/", "y": "runs/z", "m": "owner/m"}
    for given, told in (
        (["runs/x", "other/x"], "--teacher x-1=runs/x --teacher x-2=other/x"),
        (["runs/x", "self"], "can only be alone"),
        (["runs/x", "a b=y"], "may hold letters"),
    ):
        with pytest.raises(RequestError, match=told):
            named_teachers(given)


def trained_together(folder):
    # with one row a process, one has no row of teacher b
    data = named(rows(2), NAMES)
    made = several(folder, data=data, per_device_train_batch_size=1, shuffle_dataset=False, max_steps=1)
    made.train()
    torch.save(
        {"student": student(made), "prompts": prompts(made), "log": log(made)}, folder / str(made.args.process_index)
    )


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    together(lambda: trained_together(tmp_path), tmp_path, 2)
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    alone = several(tmp_path / "alone", data=named(rows(2)), per_device_train_batch_size=2, max_steps=1)
    alone.train()
    for key, mine in (("student", student(alone)), ("prompts", prompts(alone))):
        for one, other, own in zip(first[key], second[key], mine, strict=True):
            assert torch.equal(one, other)
            torch.testing.assert_close(one, own, rtol=0, atol=2e-6)
    shared = {name: value for name, value in log(alone)[0].items() if "[" in name}
    assert {name: first["log"][0][name] for name in shared} == pytest.approx(shared, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_a_run_of_the_command_line(tmp_path, capsys):
    world = make_world(tmp_path / "world")
    second = save_model(tmp_path / "world" / "second", tiny_model("llama", layers=2, hidden=12, seed=7))
    for file, count in (("train", 12), ("valid", 4)):
        lines = [line | {"teacher": ("teacher", "math")[at % 2]} for at, line in enumerate(json_rows(count))]
        write_rows(tmp_path / "world" / f"{file}.jsonl", lines)
    out = tmp_path / "run"
    settings = ("--teachers_resident", "one", "--save_strategy", "steps", "--save_steps", 2, "--select", "last")
    request = distill(world, out, *settings, "--eval-data", world.valid, "--measure", "all")
    request += ["--teacher", f"math={second}"]
    said = done(capsys, *request).err
    assert "nothing reads" not in said
    assert "Loaded the teacher math" in said
    record = Results.read(out / "results.json")
    assert {"teacher teacher", "teacher math", "student"} <= record.models.keys()
    assert {"kl_to_teacher[teacher]", "kl_to_teacher[math]"} <= record.metrics.keys()
    assert record.config["teacher"] == [world.teacher, f"math={second}"]
    for name in ("teacher", "math"):
        assert {path.name for path in (out / "prompt" / name).iterdir()} == PROMPT_FILES
    assert [each.model for each in record.evaluations] == ["student", "student before training", "teacher"]
    points = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {"prompt_kl[math]", "student_kl[teacher]"} <= points[0].keys()
    before = weights(out / "student")
    assert "Resuming from" in done(capsys, *request, "--resume").err
    assert weights(out / "student") == before
    ran = run(capsys, *request[:-1], f"other={second}", "--overwrite")
    assert ran.status == 2
    assert "Got the unknown teacher 'math' in row 1 of the train data" in ran.err


def test_the_tokenizer_of_a_single_teacher_may_come_by_its_name(tmp_path):
    other = tiny_tokenizer(merges=())
    for given in (other, {"only": other}):
        with pytest.raises(RequestError, match=r"vocabular|split"):
            one(tmp_path, teacher_processing_class=given)
    one(tmp_path, teacher_processing_class={"only": tiny_tokenizer()})
    with pytest.raises(RequestError, match="Got one of 'other', which is no teacher's name"):
        one(tmp_path, teacher_processing_class={"other": tiny_tokenizer()})


def one(folder, **given):
    student, teacher = pair()
    settings = config(folder, prompt_learning_rate=1e-3)
    return DistillTrainer(student, {"only": teacher}, settings, rows(), None, tiny_tokenizer(), method=PLAIN, **given)
