"""What is published: the files, the card, what is refused, and what a hub on loopback is sent."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.commands import LIMITS, MODEL_FILES, TRAINED_FILES, World, distill, done, make_world, run
from helpers.hub_server import HubServer, hub
from helpers.leaks import holding, is_pickle
from helpers.tiny import save_model, tiny_model
from promptkd.cli.commands.publish import _base, _defaults, _template
from promptkd.cli.options.publish import Options
from promptkd.data.templates import TRAINED_ON
from promptkd.errors import RequestError
from promptkd.publish import Published, collect, hub_origin, model_card
from promptkd.publish.bundle import names_a_place
from promptkd.report.text import markdown_text
from promptkd.results import Difference, Evaluation, Metric, Results

TOKEN = "hf_plantedForTheHub0123"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world with three runs and an evaluation of the first: a whole student, LoRA weights, and a pruned model."""
    from promptkd.cli import main

    world = make_world(tmp_path_factory.mktemp("world"))
    runs = world.folder / "runs"
    measured = ("--model", runs / "whole", "--data", world.test, "--out", world.folder / "test.json", *LIMITS)
    for arguments in (
        distill(world, runs / "whole", "--eval-data", world.valid),
        distill(world, runs / "lora", "--student-lora-rank", 2),
        ("prune", "--model", world.teacher, "--keep", 0, 1, "--out", runs / "pruned"),
        ("evaluate", *measured),
    ):
        assert main([str(each) for each in arguments]) == 0
    return world


@pytest.fixture
def server(monkeypatch):
    with hub(monkeypatch, TOKEN) as served:
        yield served


def publish(world: World, name: str, *arguments: object, repository: str = "me/small") -> tuple[object, ...]:
    return ("publish", world.folder / "runs" / name, repository, "--license", "apache-2.0", *arguments)


def card_of(files: dict[str, bytes]) -> tuple[dict, str]:
    _, header, text = files["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(header), text


def sent(server: HubServer) -> bytes:
    return b"\n".join(address.encode() + body for address, body in server.sent)


# ---- the upload ----


@pytest.mark.slow
def test_a_student_is_uploaded_and_loads(world, server, tmp_path, capsys):
    ran = done(capsys, *publish(world, "whole", "--private", "--results", world.folder / "test.json"))
    repository = server.repositories["me/small"]
    assert repository.private
    assert repository.files.keys() == TRAINED_FILES | {"README.md"}
    assert f"Uploaded: {server.address}/me/small" in ran.err
    for name, content in repository.files.items():
        (tmp_path / name).write_bytes(content)
        assert not is_pickle(tmp_path / name)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tmp_path)
    trained = AutoModelForCausalLM.from_pretrained(world.folder / "runs/whole/student")
    for mine, theirs in zip(loaded.parameters(), trained.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    header, text = card_of(repository.files)
    assert header == {
        **{"license": "apache-2.0", "pipeline_tag": "text-generation", "library_name": "transformers"},
        "tags": ["promptkd", "distillation"],
    }
    record = Results.read(world.folder / "runs/whole/results.json")
    assert record.data["train"].sha256 in text
    assert "promptkd's method `promptkd`" in text
    assert "learning_rate: 0.001" in text
    assert "On validation, sampled" in text
    assert "On test, greedy" in text
    assert text.count("[") > 20  # intervals
    assert "vllm serve me/small" in text
    assert "--to gguf" not in text  # its tokenizer is of a kind that `export` refuses


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("whole",), ("whole", "--prompt", "--base", "me/teacher"), ("lora", "--merge")])
def test_neither_token_nor_folder_reaches_the_hub(world, server, capsys, arguments):
    ran = done(capsys, *publish(world, *arguments))
    for secret in (TOKEN, str(world.folder), str(Path.home()) + "/", str(Path.cwd())):
        assert secret.encode() not in sent(server), secret
    assert TOKEN not in ran.out + ran.err
    assert not holding(world.folder, TOKEN)
    (repository,) = server.repositories.values()
    for name in ("config.json", "adapter_config.json"):
        if name in repository.files:
            assert "_name_or_path" not in json.loads(repository.files[name])


@pytest.mark.slow
def test_a_dry_run_lists_what_would_be_uploaded_and_asks_nobody(world, server, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    ran = done(capsys, *publish(world, "whole", "--dry-run"))
    assert server.sent == []
    listed = {line.split()[1] for line in ran.out.splitlines() if line.startswith("  ") and line[2:18].strip()}
    assert TRAINED_FILES | {"README.md"} <= listed
    assert "license: apache-2.0" in ran.out


@pytest.mark.slow
def test_an_adapter_names_a_base_of_the_hub_or_is_merged(world, server, capsys):
    ran = run(capsys, *publish(world, "lora"))
    assert ran.status == 2
    assert "belongs to student, a model of this machine" in ran.err
    assert "--base OWNER/NAME, or give --merge" in ran.err
    assert server.sent == []
    done(capsys, *publish(world, "lora", "--base", "me/base", repository="me/lora"))
    files = server.repositories["me/lora"].files
    adapter = TRAINED_FILES - MODEL_FILES | {"adapter_config.json", "adapter_model.safetensors"}
    held = adapter | {"README.md", "tokenizer.json", "tokenizer_config.json"}
    assert files.keys() - {"generation_config.json"} == held
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "me/base"
    header, text = card_of(files)
    assert (header["base_model"], header["base_model_relation"]) == (["me/base"], "adapter")
    assert "--lora-modules lora=me/lora" in text
    done(capsys, *publish(world, "lora", "--merge", "--dtype", "bf16", repository="me/merged"))
    files = server.repositories["me/merged"].files
    assert "model.safetensors" in files
    assert "adapter_config.json" not in files
    assert json.loads(files["config.json"])["dtype"] == "bfloat16"


@pytest.mark.slow
def test_a_soft_prompt_and_a_pruned_model_are_uploaded(world, server, capsys):
    done(capsys, *publish(world, "whole", "--prompt", "--base", "me/teacher", repository="me/prompt"))
    files = server.repositories["me/prompt"].files
    assert files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert "PeftModel.from_pretrained" in files["README.md"].decode()
    done(capsys, *publish(world, "pruned", repository="me/pruned"))
    assert server.repositories["me/pruned"].files.keys() == MODEL_FILES | {"README.md"}


@pytest.mark.slow
def test_a_repository_is_replaced_on_request_alone(world, server, capsys):
    done(capsys, *publish(world, "whole"))
    files = server.repositories["me/small"].files
    files |= {"pytorch_model.bin": b"old", ".gitattributes": b"kept"}
    ran = run(capsys, *publish(world, "whole"))
    assert ran.status == 2
    assert "me/small exists and holds" in ran.err
    ran = run(capsys, *publish(world, "whole", "--overwrite", "--private"))
    assert ran.status == 2
    assert "is public" in ran.err
    done(capsys, *publish(world, "whole", "--overwrite"))
    assert files.keys() == TRAINED_FILES | {"README.md", ".gitattributes"}


@pytest.mark.slow
@pytest.mark.parametrize(("status", "exit_status", "told"), [(403, 2, "may write to me"), (500, 1, "status 500")])
def test_a_hub_that_refuses_or_fails_is_told(world, server, capsys, monkeypatch, status, exit_status, told):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    server.fails_with = status
    ran = run(capsys, *publish(world, "whole"))
    assert (ran.status, TOKEN in ran.err) == (exit_status, False)
    assert told in ran.err


@pytest.mark.slow
def test_an_upload_needs_a_token_that_is_valid_and_a_hub(world, server, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_anotherTokenOfSomeone")
    ran = run(capsys, *publish(world, "whole"))
    assert (ran.status, "hf_another" in ran.err) == (2, False)
    assert "the token is not valid" in ran.err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    ran = run(capsys, *publish(world, "whole"))
    assert ran.status == 2
    assert "hf auth login" in ran.err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    ran = run(capsys, *publish(world, "whole"))
    assert ran.status == 2
    assert "HF_HUB_OFFLINE forbids" in ran.err


# ---- wrong requests ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("whole", ("--merge",), "is no adapter: leave --merge and --base out"),
        ("whole", ("--base", "me/base"), "is no adapter"),
        ("whole", ("--prompt", "--merge"), "--merge and --dtype are of the student"),
        ("whole", ("--prompt", "--results", "TEST"), "--results are of a student"),
        ("lora", ("--dtype", "bf16", "--base", "me/base"), "Give --merge with it"),
        ("lora", ("--base", "/home/me/base"), "--base must be OWNER/NAME"),
        ("lora", ("--base", "base"), "--base must be OWNER/NAME"),
        ("pruned", ("--prompt",), "does not exist"),
        ("none", (), "Expected the folder of a run"),
        ("", (), "holds no results.json"),
        ("lora", ("--merge", "--results", "TEST"), "measured other models"),
        ("whole", ("--results", "JUDGED"), "is of `judge` and names no weights, so it does not say"),
    ],
)
def test_wrong_requests_are_told(world, tmp_path, capsys, name, arguments, told):
    judged = Evaluation(model="student", data="test", metrics={"judge_score": Metric(value=50.0)})
    Results(kind="judge", evaluations=[judged]).write(tmp_path / "judged.json")
    files = {"TEST": world.folder / "test.json", "JUDGED": tmp_path / "judged.json"}
    given = [files.get(each, each) for each in arguments]
    ran = run(capsys, *publish(world, name, *given, "--dry-run"))
    assert ran.status == 2
    assert told in ran.err


@pytest.mark.slow
def test_the_license_and_the_names_are_asked_for(world, capsys):
    ran = run(capsys, "publish", world.folder / "runs/whole", "me/small", "--dry-run")
    assert ran.status == 2
    assert "--license is missing: The license, by the hub's identifier" in ran.err
    ran = run(capsys, "publish", world.folder / "runs/whole", "--license", "mit")
    assert "REPOSITORY is missing" in ran.err
    for repository, license_ in (("small", "mit"), ("a/b/c", "mit"), ("me/small", "My own words")):
        ran = run(capsys, "publish", world.folder / "runs/whole", repository, "--license", license_)
        assert ran.status == 2
        assert "Cannot publish" in ran.err


# ---- files ----


@pytest.fixture
def model(tmp_path) -> Path:
    return save_model(tmp_path / "model", tiny_model())


def test_only_named_files_are_taken(model):
    for name in ("optimizer.pt", "training_args.bin", "notes.txt", ".env", "pytorch_model.bin", "evil.py"):
        (model / name).write_bytes(b"\x80\x02}q\x00.")
    (model / "checkpoint-3").mkdir()
    shutil.copy(model / "model.safetensors", model / "checkpoint-3")
    bundle = collect(model, base=None)
    assert bundle.files.keys() == MODEL_FILES
    assert len(bundle.left_out) == 7


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("model.safetensors", b"\x80\x02}q\x00.", "is no safetensors file"),
        ("model.safetensors", b"PK\x03\x04", "is no safetensors file"),
        ("tokenizer.json", b"\x80\x02}q\x00.", "is not valid JSON"),
        ("config.json", b"[]", "must hold a JSON object"),
        ("tokenizer.model", b"PK\x03\x04data.pkl", "is a pickle or an archive"),
        ("chat_template.jinja", b"\xff\xfe", "is not valid UTF-8"),
        ("tokenizer_config.json", b'{"note": "hf_abcdefghij0123456789"}', "holds a token or key"),
        ("merges.txt", b"a plantedSecretOfMine b", "holds a token or key"),
    ],
)
def test_a_file_must_be_what_its_name_says(model, name, content, told, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "plantedSecretOfMine")
    (model / name).write_bytes(content)
    with pytest.raises(RequestError, match=told):
        collect(model, base=None)


def test_weights_that_are_only_a_pickle_are_refused(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(RequestError, match=r"no weights as safetensors .* pytorch_model\.bin"):
        collect(model, base=None)


def test_settings_lose_paths_and_keep_tokens(model):
    config = json.loads((model / "config.json").read_text())
    config |= {"_name_or_path": "runs/teacher", "cache": "/home/me/cache/x", "text_config": {"name_or_path": "a"}}
    (model / "config.json").write_text(json.dumps(config))
    tokenizer = {"bot_token": "<bot>", "chat_template": "/x {{ messages }}\n/y", "vocab_file": "C:\\me\\vocab.json"}
    tokenizer |= {"added_tokens_decoder": {"1": {"content": "/a/b/"}}}
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    bundle = collect(model, base=None)
    kept = json.loads(bundle.files["config.json"])
    assert not {"_name_or_path", "cache"} & kept.keys()
    assert kept["text_config"] == {}
    found = json.loads(bundle.files["tokenizer_config.json"])
    assert found == {key: value for key, value in tokenizer.items() if key != "vocab_file"}
    assert bundle.rewritten == [
        "config.json is uploaded without _name_or_path, cache, text_config.name_or_path.",
        "tokenizer_config.json is uploaded without vocab_file.",
    ]


def test_weights_that_name_a_folder_are_refused(model):
    save_file({"a": torch.zeros(1)}, model / "model.safetensors", {"from": "/home/me/runs/x"})
    with pytest.raises(RequestError, match=r"metadata of .* \(from\) name a folder"):
        collect(model, base=None)


def test_places_are_known():
    assert names_a_place("/data/models/x")
    assert names_a_place(f"see {Path.cwd()}/runs")
    assert not names_a_place("Qwen/Qwen2.5-0.5B")
    assert not names_a_place("</s>")


def test_the_base_is_found_along_the_records(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def record(folder: str, kind, **config: str) -> None:
        Path(folder).mkdir(parents=True)
        Results(kind=kind, config=config).write(Path(folder, "results.json"))

    record("runs/teacher", "sft", model="Qwen/Qwen2.5-1.5B")
    record("student", "prune", model="runs/teacher")
    record("runs/own", "sft", model="downloaded")
    record("runs/run", "distill", student="student", teacher="Qwen/Qwen2.5-7B")
    for folder in ("downloaded", "runs/teacher/model", "runs/run/student", "runs/run/teacher_lora", "runs/run/teacher"):
        Path(folder).mkdir()
    assert hub_origin("gpt2") == "gpt2"
    assert hub_origin("student") == hub_origin("runs/teacher/model") == "Qwen/Qwen2.5-1.5B"
    assert hub_origin("runs/run/student") == "Qwen/Qwen2.5-1.5B"
    assert hub_origin("runs/run/teacher_lora") == hub_origin("runs/run/teacher") == "Qwen/Qwen2.5-7B"
    assert hub_origin("runs/own") is hub_origin("runs/gone") is hub_origin("/none") is None


def test_a_card_names_no_folder_of_the_machine_that_a_run_came_from():
    """Paths that are not on this machine, so that nothing but their form tells."""
    sets = [f"/scratch/joe/{name}/test.jsonl" for name in "ab"]  # the labels of two files of one name
    values = {"student": 27.0, "teacher": 30.0}
    evaluations = [
        Evaluation(model=model, data=data, decoding={"temperature": 0}, metrics={"rouge_l": Metric(value=value)})
        for data in sets
        for model, value in values.items()
    ]
    kept = Difference(
        model="student", baseline="teacher", metric="rouge_l", better="higher", difference=Metric(value=-3, rows=40)
    )
    record = Results(kind="distill", evaluations=evaluations, command=[])
    record.differences = [kept.model_copy(update={"data": data}) for data in sets]
    record.config = {"deepspeed": {"config": "/scratch/joe/zero.json"}, "reports": ["/scratch/joe/x"], "seed": 3}
    record.notes = ["The teacher is /scratch/joe/base with the adapter /scratch/joe/lora merged into it.", "3 rows."]
    card = model_card(record, Published("me/small", "student", "mit", None, "chat"))
    assert "joe" not in card
    assert "seed: 3" in card
    assert "- 3 rows." in card
    assert "On test.jsonl, greedy" in card
    assert "ROUGE-L on test.jsonl" in card


@pytest.mark.parametrize(
    ("teacher", "told", "bases"),
    [
        ("self", " by promptkd's method", []),
        ("org/big", " from the teacher org/big by promptkd's method", ["org/big"]),
        (["org/big"], " from the teacher org/big by promptkd's method", ["org/big"]),
        ("runs/lr=1e-4/student", " from the teacher student (local) by", []),
        (["/w/a", "/w/b"], " from the teachers a (local) and b (local) by", []),
        (["code=org/a", "math=/w/b", "org/c"], " from the teachers org/a, b (local) and org/c by", ["org/a", "org/c"]),
    ],
)
def test_a_card_names_every_teacher(tmp_path, monkeypatch, teacher, told, bases):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs", "lr=1e-4").mkdir()
    record = Results(kind="distill", config={"student": "org/small", "teacher": teacher})
    card = model_card(record, Published("me/small", "student", "mit", None, "chat"))
    header, text = card_of({"README.md": card.encode()})
    assert markdown_text(told).replace("\\", "") in text.replace("\\", "")
    assert header["base_model"] == ["org/small", *bases]


@pytest.mark.parametrize(
    ("config", "student", "expected"),
    [
        ({"template": "auto"}, {"chat_template": "{{ messages }}"}, "chat"),
        ({"template": "auto"}, {}, "alpaca"),
        ({}, None, "jinja"),  # the student is gone, so nobody knows
        ({"template": "teacher"}, {}, "chat"),
        ({"template": "{{ prompt }}"}, {"chat_template": "{{ messages }}"}, "jinja"),
        ({"template": "alpaca"}, {"chat_template": "{{ messages }}", TRAINED_ON: "alpaca"}, "chat"),
        ({"template": "auto"}, {TRAINED_ON: "{{ prompt }}"}, "jinja"),
        ({"template": "auto"}, {TRAINED_ON: "alpaca"}, "alpaca"),
    ],
)
def test_a_card_writes_prompts_as_training_did(tmp_path, config, student, expected):
    if student is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(student))
    record = Results(kind="distill", config=config)
    assert _template(record, tmp_path, saved=True) == expected
    if config.get("template") == "alpaca":  # a prompt's card loads the base's tokenizer
        assert _template(record, tmp_path, saved=False) == "alpaca"


@pytest.mark.parametrize(
    ("given", "known"), [("org/base", "org/base"), ("runs/first", "org/base"), ("me/adapter", "org/base")]
)
def test_an_adapter_on_an_adapter_has_the_base_of_the_first(tmp_path, monkeypatch, given, known):
    monkeypatch.chdir(tmp_path)
    Path("runs/first/model").mkdir(parents=True)
    Results(kind="sft", config={"model": "org/base"}).write(Path("runs/first/results.json"))
    options = Options(run=Path("runs/second"), repository="me/second", license="mit")
    record = Results(kind="sft", config={"model": given})
    assert _base(options, record, Path("runs/second/model"), {"base_model_name_or_path": known}) == known


def test_a_card_names_the_recipe_and_what_was_given_and_no_chatter_of_the_run():
    record = Results(kind="distill", command=["promptkd", "distill", "--config", "gkd", "--seed", "3"])
    record.config = {"seed": 3, "measure": "all", "preflight": True, "student_lora_alpha": 32.0, "student_lora_rank": 4}
    told = ["ROUGE compares characters (--rouge_tokenizer).", "Kept step 2 of 3, by ROUGE-L 0.7, ties by loss."]
    chatter = [
        "Before training: tune it.",
        "Speed: 5 rounds, on 1 threads of a CPU.",
        "Peak memory of the process 1 GiB.",
    ]
    record.notes = told + chatter
    published = Published("me/small", "student", "mit", None, "chat", defaults=_defaults("distill"))
    card = model_card(record, published)
    assert all(markdown_text(note) in card for note in told)
    assert not any(markdown_text(note) in card for note in chatter)
    assert "| Recipe | gkd |" in card
    assert "seed: 3" in card
    assert "student_lora_rank: 4" in card
    assert not any(name in card for name in ("measure:", "preflight:", "student_lora_alpha:"))
    record.command = ["promptkd", "distill", "--config=/scratch/joe/mine.yaml"]
    assert "| Recipe | mine.yaml |" in model_card(record, published)


def test_a_card_says_first_what_the_student_keeps_of_its_teacher():
    def measured(model: str, value: float) -> Evaluation:
        metric = Metric(value=value, low=value - 1, high=value + 1, rows=50)
        return Evaluation(model=model, data="validation", metrics={"rouge_l": metric})

    difference = Difference(
        model="student",
        baseline="teacher",
        metric="rouge_l",
        data="validation",
        difference=Metric(value=-5, low=-6, high=-4, rows=50),
        ratio=Metric(value=0.8, low=0.7, high=0.9),
        better="higher",
    )
    record = Results(kind="distill", evaluations=[measured("student", 20), measured("teacher", 25)])
    published = Published("me/small", "student", "mit", None, "chat")
    assert " keeps " not in model_card(record, published)
    card = model_card(record.model_copy(update={"differences": [difference]}), published)
    told = card[card.index("## What was measured") :]
    assert told.index("keeps 80 % ") < told.index("| Metric |")
    assert "apply_chat_template" in card
