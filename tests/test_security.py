"""Nothing that a file, a model or a server says takes over the machine, and no secret is written down."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from helpers.commands import TRAINING, World, done, make_world, rows, run, write_rows
from helpers.hostile import ESCAPE, OVERRIDE, pickle_that_writes
from helpers.leaks import pickles_in
from helpers.tiny import save_model, tiny_model
from promptkd.cli.parsing.parser import merged_config
from promptkd.cli.terminal import say
from promptkd.errors import RequestError
from promptkd.io.redact import is_secret, redacted, without_secret_values, without_secrets
from promptkd.models import SoftPrompt, load_model, load_tokenizer
from promptkd.report import render_csv, render_markdown, render_report, terminal_table
from promptkd.report.text import compared_text
from promptkd.results import Difference, Evaluation, Metric, ModelRecord, Results, RowResult
from promptkd.training import DistillConfig
from promptkd.training.checkpoint import write_manifest

MARKUP = "<script>alert(1)</script><img src=x onerror=alert(2)>"
HOSTILE = f"{MARKUP}{ESCAPE}{OVERRIDE}\x9b2J"
SECRETS = {"HF_TOKEN": "hf_plantedInTheEnvironment", "OPENAI_API_KEY": "sk-plantedInTheEnvironment"}
FLAGS = {
    "--hub_token": "hf_plantedInAFlag",
    "--run_name": "http://me:plantedInAnAddress@h:1/?key=plantedInAQuery",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


# ------------------------------------------------------------------------------------------------------------- pickles


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside safetensors"])
def test_a_pickled_model_is_never_unpickled(tmp_path, beside):
    planted = tmp_path / "planted"
    folder = save_model(tmp_path / "model", tiny_model())
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "adapter_model.bin"):
        (folder / name).write_bytes(pickle_that_writes(planted))
    if beside:
        load_model(folder)
        load_tokenizer(folder)
    else:
        (folder / "model.safetensors").unlink()
        with pytest.raises(RequestError, match="unpickling can run code"):
            load_model(folder)
    assert not planted.exists()


def test_the_planted_pickle_works(tmp_path):
    import pickle

    pickle.loads(pickle_that_writes(tmp_path / "planted"))
    assert (tmp_path / "planted").exists()


def test_a_pickled_soft_prompt_is_never_unpickled(tmp_path):
    SoftPrompt(torch.zeros(2, 24)).save(tmp_path / "prompt", tiny_model("llama", hidden=24))
    (tmp_path / "prompt" / "adapter_model.safetensors").unlink()
    (tmp_path / "prompt" / "adapter_model.bin").write_bytes(pickle_that_writes(tmp_path / "planted"))
    with pytest.raises(RequestError, match="Expected a PEFT adapter"):
        SoftPrompt.load(tmp_path / "prompt")
    assert not (tmp_path / "planted").exists()


@pytest.fixture(scope="module")
def stopped(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose last checkpoint is one step before its end."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("promptkd.cli.training_run.TrainingRun.record", lambda *_: None)
        assert run_quietly(*distill(world, out)) == 0
    shutil.rmtree(out / "checkpoints" / "checkpoint-3")
    return out


def distill(world: World, out: Path, *further: object) -> tuple[object, ...]:
    pair = ("--student", world.student, "--teacher", world.teacher, "--data", world.train)
    return ("distill", *pair, "--out", out, *TRAINING, "--save_steps", 1, *further)


def run_quietly(*arguments: object) -> int:
    from promptkd.cli import main

    return main([str(argument) for argument in arguments])


PICKLED = {
    "optimizer.pt": "optimizer",
    "scheduler.pt": "optimizer",
    "rng_state.pth": "rng_state",
    "method.pt": "method",
}
"""Files of older versions, and what holds the same today."""


@pytest.mark.slow
@pytest.mark.parametrize("name", PICKLED)
def test_a_planted_pickle_in_a_checkpoint_is_not_unpickled(world, stopped, tmp_path, capsys, name):
    out, planted = tmp_path / "run", tmp_path / "planted"
    checkpoint = out / "checkpoints" / "checkpoint-2"
    shutil.copytree(stopped, out)
    (checkpoint / f"{PICKLED[name]}.json").unlink()
    for each in {name, "optimizer.pt", "scheduler.pt"} if PICKLED[name] == "optimizer" else {name}:
        (checkpoint / each).write_bytes(pickle_that_writes(planted))
    for beside in ("training_args.bin", "pytorch_model.bin"):
        (checkpoint / beside).write_bytes(pickle_that_writes(planted))
    write_manifest(checkpoint)  # whoever plants a pickle can write a manifest
    ran = run(capsys, *distill(world, out, "--resume"))
    assert not planted.exists()
    assert ran.status == 1
    assert "holds more than tensors" in ran.err


def test_a_run_leaves_no_pickle(stopped):
    assert (stopped / "checkpoints" / "checkpoint-2" / "optimizer.safetensors").exists()
    assert pickles_in(stopped) == []


def test_a_pickle_is_known_by_its_bytes(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "new")
    torch.save({"a": torch.ones(1)}, tmp_path / "old", _use_new_zipfile_serialization=False)
    (tmp_path / "plain").write_bytes(pickle_that_writes(tmp_path / "planted"))
    (tmp_path / "none").write_text("{}")
    assert pickles_in(tmp_path) == ["new", "old", "plain"]


@pytest.mark.parametrize("command", ["sft", "distill"])
def test_training_uploads_nothing_and_says_what_does(world, tmp_path, capsys, command):
    models = (
        ("--model", world.student) if command == "sft" else ("--student", world.student, "--teacher", world.teacher)
    )
    secret = "hf_plantedInAFlag"
    for flags in (["--push_to_hub", "--hub_model_id", "me/x", "--hub_token", secret], ["--hub_strategy", "end"]):
        ran = run(capsys, command, *models, "--data", world.train, "--out", tmp_path / "run", *TRAINING, *flags)
        assert (ran.status, secret in ran.err) == (2, False)
        assert "promptkd publish RUN OWNER/NAME" in ran.err
        assert not (tmp_path / "run").exists()


def test_arguments_hold_no_token_and_tell_trackers_none(tmp_path):
    args = DistillConfig(
        str(tmp_path),
        hub_token="hf_planted",
        model_init_kwargs={"token": "hf_planted", "revision": "main"},
        use_vllm=True,
        vllm_server_base_url="http://me:planted@h:1",
    )
    assert args.hub_token is None
    assert args.to_dict()["model_init_kwargs"] == {"revision": "main"}
    assert "planted" not in args.to_json_string() + str(args.to_sanitized_dict())


@pytest.mark.slow
def test_the_best_checkpoint_is_one_of_the_run(world, tmp_path, capsys):
    out, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    pair = ("--student", world.student, "--teacher", world.teacher, "--data", world.train)
    request = ("distill", *pair, "--out", out, *TRAINING, "--eval-data", world.valid, "--eval_steps", 1)
    done(capsys, *request)
    state = out / "checkpoints" / "checkpoint-3" / "trainer_state.json"
    saved = json.loads(state.read_text())
    best = Path(saved["best_model_checkpoint"]).name
    shutil.copytree(out / "checkpoints" / best, elsewhere / best)
    (elsewhere / best / "model.safetensors").write_bytes(b"of another")
    state.write_text(json.dumps(saved | {"best_model_checkpoint": str(elsewhere / best)}))
    done(capsys, *request, "--resume")


# ---------------------------------------------------------------------------------------------------- code of a model


@pytest.fixture
def with_code(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """A model of a known type whose folder brings code along, and what that code writes."""
    folder, planted = save_model(tmp_path / "model", tiny_model()), tmp_path / "planted"
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": names}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "evil.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        f"open({str(planted)!r}, 'w').close()\n"
        "class EvilConfig(LlamaConfig):\n    pass\n"
        "class EvilModel(LlamaForCausalLM):\n    config_class = EvilConfig\n"
        "class Tokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder, planted


@pytest.mark.slow
def test_code_that_comes_with_a_model_runs_on_request_alone(with_code, tmp_path, capsys):
    folder, planted = with_code
    request = ("prune", "--model", folder, "--keep", 0, "--out")
    done(capsys, *request, tmp_path / "plain")
    assert not planted.exists()
    assert Results.read(tmp_path / "plain" / "results.json").notes == []
    done(capsys, *request, tmp_path / "trusted", "--trust-remote-code")
    assert planted.exists()
    record = Results.read(tmp_path / "trusted" / "results.json")
    assert record.config["trust_remote_code"] is True
    assert record.notes == ["Code that came with a model was allowed to run (--trust_remote_code)."]
    assert record.notes[0] in render_report([record])


def test_a_template_reaches_no_python(tmp_path, capsys, world):
    attack = "{{ instruction.__class__.__mro__[1].__subclasses__() }}"
    request = ("generate", "--model", world.student, "--data", world.test, "--template", attack)
    ran = run(capsys, *request, "--out", tmp_path / "out.jsonl")
    assert ran.status == 2
    assert "unsafe" in ran.err
    model = shutil.copytree(world.student, tmp_path / "model")
    held = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(held | {"promptkd_template": attack}))
    ran = run(capsys, "generate", "--model", model, "--data", world.test, "--out", tmp_path / "out.jsonl")
    assert ran.status == 2
    assert "unsafe" in ran.err


# ------------------------------------------------------------------------------------------------------------- secrets


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        *((name, True) for name in ("hub_token", "token", "api-key", "OPENAI_API_KEY", "password", "client_secret")),
        *((name, False) for name in ("eos_token", "pad_token", "key_variable", "chunk_tokens", "max_length")),
    ],
)
def test_names_of_secrets(name, secret):
    assert is_secret(name) is secret


def test_addresses_and_mappings_lose_their_secrets():
    assert redacted("see http://me:pw@host:1/v1?a=1&api_key=xyz#f.") == "see http://***@host:1/v1?a=1&api_key=***#f."
    assert redacted("a@b.c, http://host/a@b") == "a@b.c, http://host/a@b"
    assert redacted("a title hf_abcDEF0123456789xyz, hf_internal_testing/x") == "a title ***, hf_internal_testing/x"
    given = {"kwargs": {"token": "t", "eos_token": "e"}, "urls": ["https://me:pw@h"], "hub_token": "t", "limit": 3}
    assert without_secret_values(given) == {"kwargs": {"eos_token": "e"}, "urls": ["https://***@h"], "limit": 3}
    arguments = ["--model_init_kwargs", '{"token": "xyz", "a": 1}', "--hub-token=xyz", "--x", "http://me:pw@h"]
    assert without_secrets(arguments) == [
        "--model_init_kwargs",
        '{"token": ***, "a": 1}',
        "--hub-token=***",
        "--x",
        "http://***@h",
    ]


def test_what_the_environment_holds_as_a_secret_is_starred(monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "abcdef0123456789")
    monkeypatch.setenv("SOME_KEY", "short")
    assert redacted("failed with abcdef0123456789, not short") == "failed with ***, not short"
    say("Loaded abcdef0123456789.")
    assert capsys.readouterr().err == "Loaded ***.\n"


def test_a_judge_keeps_no_key_in_its_fields(world, tmp_path, capsys):
    answers = write_rows(tmp_path / "a.jsonl", [{"row": 0, "prompt": "a", "completion": "b", "references": ["c"]}])
    request = ("judge", "--responses", answers, "--judge-model", "J", "--out", tmp_path / "j.json", "--endpoint")
    ran = run(capsys, *request, "http://127.0.0.1:9/v1", "--extra-body", '{"user": {"api_key": "sk-planted"}}')
    assert (ran.status, "sk-planted" in ran.err) == (2, False)
    assert "--extra-body must hold no key" in ran.err
    ran = run(capsys, *request, "http://me:planted@127.0.0.1:9/v1")
    assert (ran.status, "planted" in ran.err) == (2, False)


def test_an_error_does_not_repeat_a_password(tmp_path, capsys, world):
    request = ("generate", "--model", world.student, "--out", tmp_path / "o", "--data", "https://me:planted@h/d.jsonl")
    ran = run(capsys, *request)
    assert (ran.status, "planted" in ran.err) == (2, False)


# ------------------------------------------------------------------------------- one run with everything against it

SCRIPT = """
import json, os, socket, sys, traceback
asked = []
def refuse(*arguments, **_):
    asked.append("".join(traceback.format_stack(limit=12)))
    raise OSError("no network here")
socket.getaddrinfo = refuse
socket.socket.connect = refuse
socket.socket.connect_ex = refuse
from promptkd.cli import main
status = {}
_, commands, found = sys.argv
for name, arguments in json.load(open(commands)):
    print(f"== {name}", flush=True)
    print(f"== {name}", file=sys.stderr, flush=True)
    sys.argv = ["promptkd", *arguments]  # which records keep
    status[name] = main(arguments)
json.dump({"status": status, "asked": asked}, open(found, "w"))
"""


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str], dict]:
    """Every command on local files, in a process without sockets, with planted secrets, names and rows."""
    folder = tmp_path_factory.mktemp("hostile")
    world = make_world(folder / "world")
    planted = [row | {"instruction": f"{row['instruction']} {MARKUP}{ESCAPE}{OVERRIDE}"} for row in rows(8)]
    for row in planted:
        row["output"] += f" {MARKUP}{ESCAPE}"
    name = f"d{ESCAPE}{OVERRIDE}<img src=x>".replace("/", "")
    data = write_rows(folder / f"{name}.jsonl", planted)
    out, run_at = folder / "out", folder / "out" / f"r{ESCAPE}{OVERRIDE}"
    limits = ("--max_prompt_length", 120, "--max_completion_length", 90, "--template", "{{ instruction }}")
    training = (*limits, "--max_steps", 1, "--per_device_train_batch_size", 4, "--use_cpu")
    pair, rows_of = ("--student", world.student, "--teacher", world.teacher), ("--data", data)
    secrets = [part for flag in FLAGS.items() for part in flag]
    secrets += ["--model_init_kwargs", '{"token": "hf_plantedInAMapping"}']
    distill = (*pair, *rows_of, "--eval-data", data, "--out", run_at, *training, *secrets)
    measured = ("--model", run_at, *rows_of, *limits)
    commands = [
        ("prune", "prune", "--model", world.teacher, "--keep", 0, 1, "--out", out / "pruned"),
        ("sft", "sft", "--model", world.student, *rows_of, "--out", out / "sft", *training, *secrets[:2]),
        ("distill", "distill", *distill),
        ("generate", "generate", *measured, "--out", out / "a.jsonl"),
        (
            "evaluate",
            "evaluate",
            *measured,
            "--teacher",
            world.teacher,
            "--measure",
            "student",
            "--out",
            out / "e.json",
        ),
        ("exposure-bias", "exposure-bias", *pair, *rows_of, *limits, "--out", out / "b.json"),
        ("compare", "compare", f"a{ESCAPE}={out / 'e.json'}", f"b={out / 'e.json'}", "--out", out / "c.json"),
        ("report", "report", run_at, out / "e.json", out / "b.json", out / "c.json", "--out", out / "report.html"),
        ("chat", "chat", run_at, "--prompt", f"the {ESCAPE}", "--max-completion-length", 5),
        ("export", "export", run_at, "--to", "safetensors", "--out", out / "exported"),
        ("publish", "publish", run_at, "me/small", "--license", "mit", "--dry-run"),
        ("lost", "generate", "--model", out / f"lost{ESCAPE}{OVERRIDE}", *rows_of, "--out", out / "none.jsonl"),
    ]
    (folder / "script.py").write_text(SCRIPT)
    (folder / "commands.json").write_text(json.dumps([(each, list(map(str, rest))) for each, *rest in commands]))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_HUB")} | SECRETS
    environment |= {"HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, folder / "script.py", folder / "commands.json", folder / "found.json"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
        check=False,
    )
    assert (folder / "found.json").exists(), process.stderr
    return out, process, json.loads((folder / "found.json").read_text())


@pytest.mark.slow
def test_every_command_runs_without_network(hostile_run):
    _, process, found = hostile_run
    assert found["status"] == dict.fromkeys(found["status"], 0) | {"lost": 2}, process.stderr
    assert found["asked"] == []


@pytest.mark.slow
def test_the_first_command_of_a_process_says_its_own_lines_alone(hostile_run):
    """Libraries that are imported for it have nothing to say."""
    out, process, _ = hostile_run
    first, second = (text.split("== sft\n")[0].splitlines() for text in (process.stderr, process.stdout))
    assert second == ["== prune"]
    assert first[:2] == ["== prune", "Kept layers 0, 1."]
    assert first[3].startswith("Peak memory ")
    assert len(first) == 4
    assert json.loads((out / "pruned" / "results.json").read_text())["command"][1:3] == ["prune", "--model"]


@pytest.mark.slow
def test_no_secret_is_written_or_shown(hostile_run):
    out, process, _ = hostile_run
    planted = [*SECRETS.values(), *FLAGS.values(), "planted"]
    files = [each for each in out.rglob("*") if each.is_file()]
    assert len(files) > 30
    for each in files:
        content = each.read_bytes()
        assert not [secret for secret in planted if secret.encode() in content], each
    assert not [secret for secret in planted if secret in process.stdout + process.stderr]


@pytest.mark.slow
def test_no_terminal_is_given_an_escape_code(hostile_run):
    _, process, _ = hostile_run
    said = process.stdout + process.stderr
    assert "␛]52;c;" in process.stderr
    assert not set(said) & {"\x1b", "\x07", OVERRIDE, "\x9b"}


@pytest.mark.slow
def test_pages_hold_no_markup_of_a_model(hostile_run):
    out, _, _ = hostile_run
    pages = [out / "report.html", *out.glob("*/report.html")]
    assert len(pages) == 3
    for page in pages:
        text = page.read_text()
        assert "alert(" not in text.replace("&lt;script&gt;alert(1)", "").replace("onerror=alert(2)&gt;", "")
        assert "<img" not in text
        assert "\x1b" not in text


@pytest.mark.slow
def test_what_was_written_for_the_next_command_is_plain_data(hostile_run):
    out, _, _ = hostile_run
    for config in out.glob("*/config.yaml"):
        assert "hub_token" not in yaml.safe_load(config.read_text())
    assert pickles_in(out) == []


# ---------------------------------------------------------------------------------------------------- hostile records


def test_every_form_of_a_report_shows_hostile_text_as_text():
    answer = RowResult(row=0, prompt=HOSTILE, references=[HOSTILE], response=HOSTILE, scores={HOSTILE: 1.0})
    measured = Evaluation(model=HOSTILE, data=HOSTILE, metrics={HOSTILE: Metric(value=1.0)}, samples=[answer])
    difference = Difference(
        model=HOSTILE, baseline="b", metric=HOSTILE, difference=Metric(value=1.0), better="higher", data=HOSTILE
    )
    record = Results(
        kind="compare",
        command=["promptkd", HOSTILE],
        evaluations=[measured, measured.model_copy(update={"model": "b"})],
        differences=[difference],
        models={HOSTILE: ModelRecord(path=HOSTILE, parameters=1, sha256=HOSTILE)},
        config={HOSTILE: HOSTILE},
        notes=[HOSTILE],
    )
    page = render_report([record], title=HOSTILE)
    assert "<script>alert" not in page
    assert "<img" not in page
    for text in (page, render_markdown([record], title=HOSTILE), render_csv([record])):
        assert not set(text) & {"\x1b", "\x07", "\x9b"}
    for text in (terminal_table([record]), compared_text(record)):
        assert not set(text) & {"\x1b", "\x07", "\x9b", OVERRIDE}
    assert "<img" not in render_markdown([record], title=HOSTILE)


def test_a_merged_configuration_is_plain_and_keeps_no_secret():
    from promptkd.cli.options.sft import Options

    options = Options(model="https://me:pw@h/m", data="d", out=Path("o"))
    merged = merged_config(options, {"hub_token": "t", "model_init_kwargs": {"token": "t"}})
    assert merged["model"] == "https://***@h/m"
    assert merged["model_init_kwargs"] == {}
    assert "hub_token" not in merged
