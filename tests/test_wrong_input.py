"""Wrong requests: exit status 2, one message that says what is wrong, nothing written, and no model loaded for it."""

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

import promptkd.models
from commands import LIMITS, World, done, make_world, rows, run, write_rows

BROKEN = "\n".join([*map(json.dumps, rows(6)), '{"instruction": "the",']) + "\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The models and the data, and every broken thing beside them, by the names that the table below uses."""
    made = make_world(tmp_path_factory.mktemp("world"))
    folder = made.folder
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jsonl").write_text(BROKEN)
    write_rows(folder / "field.jsonl", [*rows(2), {"question": "the"}])
    write_rows(folder / "requests.jsonl", [*rows(4), {"instruction": "the"}])
    write_rows(folder / "silent.jsonl", [{"prompt": "", "completion": "an"}, {"prompt": "the", "completion": "an"}])
    (folder / "typo.yaml").write_text("learning_rat: 1e-3\n")
    (folder / "file").write_text("")
    (folder / "notes").mkdir()
    (folder / "notes" / "notes.txt").write_text("mine")
    (folder / "broken-run").mkdir()
    (folder / "broken-run" / "results.json").write_text('{"schema_version": 1, "kind": "distill",')
    (folder / "other-run").mkdir()
    (folder / "other-run" / "results.json").write_text('{"accuracy": 0.9}')
    (folder / "binary-run").mkdir()
    (folder / "binary-run" / "results.json").write_bytes(b"\xff\xfe\x00")
    shutil.copytree(made.student, folder / "damaged")
    (folder / "damaged" / "model.safetensors").write_bytes(b"none")
    shutil.copytree(made.student, folder / "weightless")
    (folder / "weightless" / "model.safetensors").unlink()
    return made


class Case(NamedTuple):
    request: tuple[object, ...]
    """W stands for the world's folder; OUT does not exist yet."""
    message: str
    """What the message must hold."""
    loads: bool = False
    """Whether a model had to be loaded to find out."""


TRAINING = (*LIMITS, "--max_steps", 1, "--per_device_train_batch_size", 4, "--use_cpu")
PAIR = ("--student", "W/student", "--teacher", "W/teacher")
DATA = ("--data", "W/train.jsonl")
VALID = ("--eval-data", "W/valid.jsonl")


def distill(*arguments, pair=PAIR, data=DATA, out="OUT"):
    return ("distill", *pair, *data, "--out", out, *TRAINING, *arguments)


def sft(*arguments, data=DATA, out="OUT"):
    return ("sft", "--model", "W/student", *data, "--out", out, *TRAINING, *arguments)


def prune(*arguments, out="OUT"):
    return ("prune", "--model", "W/teacher", "--out", out, *arguments)


def generate(*arguments, model="W/student", out="OUT"):
    return ("generate", "--model", model, "--data", "W/test.jsonl", "--out", out, *arguments)


def evaluate(*arguments, model="W/student", data=("--data", "W/test.jsonl"), out="OUT"):
    return ("evaluate", "--model", model, *data, "--out", out, *arguments)


CASES = {
    # data
    "missing file": Case(distill(data=("--data", "W/none.jsonl")), "No such file or folder: W/none.jsonl"),
    "missing validation file": Case(sft("--eval-data", "W/none.jsonl"), "No such file or folder: W/none.jsonl"),
    "missing file to evaluate on": Case(evaluate(data=("--data", "W/none.jsonl")), "No such file or folder"),
    "empty file": Case(distill(data=("--data", "W/empty.jsonl")), "W/empty.jsonl holds no rows"),
    "broken JSON": Case(distill(data=("--data", "W/broken.jsonl")), "W/broken.jsonl, line 7: not valid JSON"),
    "broken JSON in validation": Case(distill("--eval-data", "W/broken.jsonl"), "W/broken.jsonl, line 7"),
    "broken JSON in sft": Case(sft(data=("--data", "W/broken.jsonl")), "W/broken.jsonl, line 7"),
    "broken JSON in evaluate": Case(evaluate(data=("--data", "W/broken.jsonl")), "W/broken.jsonl, line 7"),
    "broken JSON in prune": Case(prune("--layers", 2, "--data", "W/broken.jsonl"), "W/broken.jsonl, line 7"),
    "missing field": Case(sft(data=("--data", "W/field.jsonl")), "W/field.jsonl, line 3: expected {"),
    "missing response": Case(sft(data=("--data", "W/requests.jsonl")), "W/requests.jsonl, line 5: the row has no"),
    "missing response in kd": Case(
        distill("--method", "kd", data=("--data", "W/requests.jsonl")), "W/requests.jsonl, line 5: the row has no"
    ),
    "missing response in validation": Case(distill("--eval-data", "W/requests.jsonl"), "line 5: the row has no"),
    "empty prompt": Case(distill(data=("--data", "W/silent.jsonl")), "W/silent.jsonl, line 1: 'prompt' is empty"),
    "missing response in dpkd": Case(
        distill("--method", "dpkd", data=("--data", "W/requests.jsonl")), "W/requests.jsonl, line 5: the row has no"
    ),
    "flag of another method": Case(distill("--method", "kd", "--beta", 0.3), "kd takes no beta. Leave it out"),
    "no suffix": Case(sft(data=("--data", "W/file")), "must be a data file that ends in one of"),
    "the same data twice": Case(evaluate(data=("--data", "W/test.jsonl", "W/test.jsonl")), "must be given once"),
    "limit 0": Case(distill("--limit", 0), "must be at least 1. Got 0"),
    "negative limit": Case(evaluate("--limit=-3"), "must be at least 1. Got -3"),
    "validation limit 0": Case(sft(*VALID, "--eval-limit", 0), "must be at least 1. Got 0"),
    # models
    "another vocabulary": Case(
        distill(pair=("--student", "W/student", "--teacher", "W/other")), "share their tokens but cut text differently"
    ),
    "another vocabulary in evaluate": Case(evaluate("--teacher", "W/other"), "cut text differently"),
    "no model": Case(generate(model="W/notes"), "W/notes is no model: expected config.json"),
    "no model to tune": Case(("sft", "--model", "W/notes", *DATA, "--out", "OUT"), "W/notes is no model"),
    "a file as model": Case(generate(model="W/file"), "Got the file W/file"),
    "missing path": Case(generate(model="W/none"), "No such model: W/none does not exist"),
    "missing relative path": Case(evaluate(model="runs/none/student"), "No such model: runs/none/student"),
    "missing hub name": Case(generate(model="nobody/none"), "Could not load a causal language model from nobody/none"),
    "missing teacher": Case(
        distill(pair=("--student", "W/student", "--teacher", "W/none")), "No such model: W/none does not exist"
    ),
    "model without weights": Case(generate(model="W/weightless"), "language model from W/weightless", loads=True),
    # flags and files of them
    "unknown flag": Case(distill("--learnin-rate", 1), "--learnin-rate is unknown. Did you mean --learning-rate?"),
    "unknown key": Case(
        distill("--config", "W/typo.yaml"), "the key learning_rat is unknown. Did you mean learning_rate?"
    ),
    "missing configuration": Case(sft("--config", "W/none.yaml"), "--config expects a YAML file. W/none.yaml"),
    "seeds in words": Case(evaluate("--seeds", "ten"), "--seeds expects one or more values, each a whole number"),
    "a flag that another one sets": Case(distill("--output_dir", "W/x"), "--output_dir is set by --out here"),
    "transformers' own resuming": Case(sft("--resume_from_checkpoint", "true"), "is set by --resume here"),
    "unknown command": Case(("distil",), "Did you mean 'distill'?"),
    # folders
    "folder that is not empty": Case(distill(out="W/notes"), "W/notes is not empty. Go on with the run in it"),
    "foreign files": Case(distill("--overwrite", out="W/notes"), "W/notes holds notes.txt, which no run wrote"),
    "resuming no run": Case(sft("--resume", out="W/notes"), "--resume needs a run in W/notes"),
    "resume and overwrite": Case(distill("--resume", "--overwrite"), "Give one of them"),
    "run in a file": Case(distill(out="W/file"), "--out must be a folder. W/file is a file"),
    "run below a file": Case(sft(out="W/file/run"), "W/file is not a folder that can be written to"),
    "student that is not empty": Case(prune("--keep", 0, out="W/notes"), "W/notes is not empty"),
    "student over foreign files": Case(prune("--keep", 0, "--overwrite", out="W/notes"), "holds notes.txt, which"),
    "student over a model": Case(prune("--keep", 0, "--overwrite", out="W/other"), "holds config.json"),
    "student over its teacher": Case(prune("--keep", 0, "--overwrite", out="W/teacher"), "another folder than --model"),
    "student below a file": Case(prune("--keep", 0, out="W/file/s"), "W/file is not a folder that can be written to"),
    "neither sampled nor greedy": Case(evaluate("--temperature", 0, "--no-greedy"), "leaves them out. Give one"),
    "no such metric": Case(evaluate("--metrics", "W/none.py"), "Could not load the metric W/none.py"),
    "results that exist": Case(evaluate(out="W/file"), "W/file exists. Replace it by --overwrite"),
    "results in a folder": Case(evaluate(out="W/notes"), "--out must be a file. W/notes is a folder"),
    "results below a file": Case(evaluate(out="W/file/r.json"), "W/file is not a folder that can be written to"),
    "responses that exist": Case(generate(out="W/file"), "W/file exists. Replace it by --overwrite"),
    # layers
    "zero layers": Case(prune("--layers", 0, "--choose", "even"), "--layers must be at least 1, got 0"),
    "no layers": Case(prune(), "give either --layers N or --keep"),
    "layers twice over": Case(
        prune("--layers", 2, "--choose", "even", "--keep", 0), "give either --layers N or --keep"
    ),
    "no data for the influence": Case(prune("--layers", 2), "choosing by influence needs --data"),
    "more layers than there are": Case(
        prune("--layers", 5, *DATA, *LIMITS), "between 1 and 4 layers, the number its teacher has. Got 5", loads=True
    ),
    "more layers, evenly": Case(prune("--layers", 5, "--choose", "even"), "between 1 and 4 layers", loads=True),
    "a layer that is not there": Case(prune("--keep", 0, 4), "The teacher has layers 0 … 3. Got 4", loads=True),
    "repeated layers": Case(prune("--keep", 1, 1), "once each, in rising order. Got [1, 1]", loads=True),
    "no rows to measure on": Case(prune("--layers", 2, *DATA, "--rows", 0), "--rows must be at least 1, got 0"),
    # settings
    "unknown method": Case(distill("--method", "promptk"), "Got 'promptk'"),
    "negative learning rate": Case(distill("--learning-rate=-1"), "learning_rate must be 0 or more, got -1"),
    "all of the settings wrong": Case(
        distill("--prompt_length=-1", "--prompt_kl", "sideways", "--temperature", 0), "; temperature must be above 0"
    ),
    "too short for the template": Case(
        evaluate("--max_prompt_length", 9), "The shortest prompt has 139 tokens, template included, and the limit is 9"
    ),
    "limit 0 on the prompt": Case(evaluate("--max_prompt_length", 0), "must be at least 1 token. Got 0"),
    "unknown template": Case(evaluate("--template", "alpca"), "Got 'alpca'"),
    "broken template": Case(evaluate("--template", "{{ instruction"), "The Jinja template does not compile"),
    "template with another name": Case(generate("--template", "{{ question }}"), "Got question"),
    "no chat template": Case(generate("--template", "chat"), "The tokenizer has no chat template"),
    "negative temperature": Case(evaluate("--temperature=-1"), "--temperature must be 0 (greedy) or more, got -1.0"),
    "negative temperature in generate": Case(
        generate("--temperature=-0.5"), "--temperature must be 0 (greedy) or more"
    ),
    "all of decoding wrong": Case(
        generate("--top-p", 0, "--top-k=-1", "--batch-size", 0, "--seed=-1"),
        "--top-p must lie above 0 and at most at 1, got 0.0; --top-k must be 0 (off) or more, got -1; "
        "--batch-size must be at least 1, got 0; seeds must be 0 or more, got -1.",
    ),
    "a seed twice": Case(evaluate("--seeds", 1, 2, 1), "each seed must be given once, got 1 2 1"),
    "validation without rows": Case(distill("--eval_strategy", "epoch"), "Validation needs rows: give --eval-data"),
    "steps of validation without rows": Case(sft("--eval_steps", 2), "Validation needs rows: give --eval-data"),
    "validation by unsaid steps": Case(distill(*VALID, "--eval_strategy", "steps"), "needs --eval_steps"),
    "checkpoints that would miss the best": Case(
        distill(*VALID, "--eval_steps", 1, "--save_steps", 2), "one is written at each validation. Got --save_steps 2"
    ),
    "no checkpoints to choose from": Case(sft(*VALID, "--save_strategy", "no"), "Got --save_strategy no"),
    "too few rows for a step": Case(
        distill("--gradient_accumulation_steps", 4), "One optimiser step takes 16 rows", loads=True
    ),
    "too many positions": Case(distill("--prompt_length", 500), "The teacher has 512 positions", loads=True),
    "LoRA of rank 0": Case(distill("--student-lora-rank", 0), "--student-lora-rank must be at least 1. Got 0"),
    "nothing to merge": Case(distill("--merge"), "give --student-lora-rank with it"),
    "layers of the demo": Case(("demo", "--layers", 31, "--out", "OUT"), "--layers must lie between 1 and 30"),
    # report
    "no runs": Case(("report", "--out", "OUT"), "RUNS is missing"),
    "no results": Case(
        ("report", "W/notes", "--out", "OUT", "--format", "html"), "Expected a results file at W/notes/results.json"
    ),
    "no such run": Case(("report", "W/none", "--out", "OUT", "--format", "html"), "Expected a results file at W/none"),
    "broken results": Case(
        ("report", "W/broken-run", "--out", "OUT", "--format", "html"), "W/broken-run/results.json is not a results"
    ),
    "results of something else": Case(
        ("report", "W/other-run", "--out", "OUT", "--format", "html"), "is not a results record"
    ),
    "page that exists": Case(("report", "W/notes", "--out", "W/file", "--format", "html"), "W/file exists"),
}

CASES |= {
    "damaged model": Case(generate(model="W/damaged"), "language model from W/damaged", loads=True),
    "results that are no text": Case(
        ("report", "W/binary-run", "--out", "OUT", "--format", "html"), "W/binary-run/results.json"
    ),
    "negative learning rate in sft": Case(sft("--learning-rate=-1"), "learning_rate must be 0 or more"),
    "unknown schedule of the prompt": Case(distill("--prompt_lr_scheduler_type", "cosin"), "prompt_lr_scheduler_type"),
    "no accumulation": Case(distill("--gradient_accumulation_steps", 0), "gradient_accumulation_steps"),
    "no rows to decode at a time": Case(distill("--generation_batch_size", 0), "generation_batch_size"),
    "negative seed": Case(distill("--seed=-1"), "seed"),
}


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, id=name) for name, case in CASES.items()),
    ],
)
def test_wrong_input(world, tmp_path, capsys, monkeypatch, case):
    loaded = []
    load_model = promptkd.models.load_model
    monkeypatch.setattr(promptkd.models, "load_model", lambda *a, **k: loaded.append(a) or load_model(*a, **k))
    before = state(world.folder)
    ran = run(capsys, *(placed(each, world, tmp_path) for each in case.request))
    assert ran.status == 2, ran.err
    *progress, message = ran.err.splitlines()
    assert placed(case.message, world, tmp_path) in message
    assert message.startswith(("promptkd: ", f"promptkd {case.request[0]}: "))
    assert case.loads or not progress
    assert bool(loaded) == case.loads
    assert not [line for line in progress if line.startswith(("promptkd", "Traceback"))]
    assert not ran.out
    assert not list(tmp_path.iterdir())
    assert state(world.folder) == before


def placed(text: object, world: World, tmp_path: Path) -> str:
    """`text` with the two names that stand for folders spelled out."""
    return str(tmp_path / "new" / "out") if text == "OUT" else str(text).replace("W/", f"{world.folder}/")


def state(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}


def test_several_wrong_flags_are_told_together(world, tmp_path, capsys):
    ran = run(capsys, "sft", "--modell", world.student, "--limit", "x", "--config", world.folder / "typo.yaml")
    assert ran.status == 2
    told = ("--modell is unknown", "--limit expects", "learning_rat is unknown", "--data is missing")
    assert all(part in ran.err for part in told)
    assert ran.err.count("promptkd sft: ") == 1


def test_a_wrong_request_leaves_the_run_that_it_would_replace(world, tmp_path, capsys):
    out = tmp_path / "run"
    done(capsys, *(placed(each, world, tmp_path) for each in distill(out=out)))
    before = state(out)
    wrong = (
        distill("--overwrite", data=("--data", "W/broken.jsonl"), out=out),
        distill("--overwrite", "--method", "none", out=out),
        distill("--overwrite", pair=("--student", "W/student", "--teacher", "W/other"), out=out),
        distill("--overwrite", pair=("--student", "W/weightless", "--teacher", "W/teacher"), out=out),
    )
    for request in wrong:
        assert run(capsys, *(placed(each, world, tmp_path) for each in request)).status == 2
    assert state(out) == before


def test_an_empty_folder_stays_empty(world, tmp_path, capsys):
    request = ("distill", "--student", world.student, "--teacher", world.teacher, "--data", world.train)
    ran = run(capsys, *request, "--out", tmp_path, *TRAINING, "--gradient_accumulation_steps", 8)
    assert ran.status == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("command", ["distill", "prune", "generate"])
def test_a_place_without_permission(world, tmp_path, capsys, command):
    requests = {
        "distill": distill(out=tmp_path / "locked" / "run"),
        "prune": prune("--keep", 0, out=tmp_path / "locked" / "student"),
        "generate": generate(out=tmp_path / "locked" / "responses.jsonl"),
    }
    (tmp_path / "locked").mkdir(mode=0o555)
    ran = run(capsys, *(placed(each, world, tmp_path) for each in requests[command]))
    assert ran.status == 2
    assert "is not a folder that can be written to" in ran.err
