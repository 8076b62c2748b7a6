"""Wrong requests: exit status 2, one message that says what is wrong, nothing written, and no model loaded for it.

W/h holds hostile data and configurations, W/r records and what is left of jobs, W/m models; see `hostile.py`.
"""

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

import promptkd.models
from helpers.commands import LIMITS, World, done, make_world, rows, run, write_rows
from helpers.hostile import make_files, make_models, make_records
from helpers.tiny import save_model, tiny_model
from promptkd.cli import inference_run, training_run

BROKEN = "\n".join([*map(json.dumps, rows(6)), '{"instruction": "the",']) + "\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The models and the data, and every broken thing beside them, by the names that the table below uses."""
    made = make_world(tmp_path_factory.mktemp("world"))
    folder = made.folder
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jsonl").write_text(BROKEN)
    write_rows(folder / "field.jsonl", [*rows(2), {"ask": "the"}])
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
    save_model(folder / "short", tiny_model("llama", layers=2, vocabulary=80, pad_token_id=0))  # its tokenizer has 97
    save_model(folder / "longer", tiny_model("llama", layers=2, max_position_embeddings=1024))
    shutil.copytree(made.student, folder / "damaged")
    (folder / "damaged" / "model.safetensors").write_bytes(b"none")
    shutil.copytree(made.student, folder / "weightless")
    (folder / "weightless" / "model.safetensors").unlink()
    for name in ("h", "m", "r"):
        (folder / name).mkdir()
    make_files(folder / "h")
    make_records(folder / "r")
    make_models(folder / "m", Path(made.student), folder / "planted")
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


def prune(*arguments, model="W/teacher", out="OUT"):
    return ("prune", "--model", model, "--out", out, *arguments)


def generate(*arguments, model="W/student", out="OUT"):
    return ("generate", "--model", model, "--data", "W/test.jsonl", "--out", out, *arguments)


def evaluate(*arguments, model="W/student", data=("--data", "W/test.jsonl"), out="OUT"):
    return ("evaluate", "--model", model, *data, "--out", out, *arguments)


def data(name, *arguments):
    return ("generate", "--model", "W/student", "--data", f"W/h/{name}", "--out", "OUT", *arguments)


def exposure(*arguments, student="W/student", teacher="W/teacher"):
    return ("exposure-bias", "--student", student, "--teacher", teacher, *DATA, "--out", "OUT", *arguments)


def judge(*arguments, responses="W/h/answers.jsonl", endpoint="http://127.0.0.1:9/v1", out="OUT"):
    asked = ("--endpoint", endpoint, "--judge-model", "J", "--retries", 0)
    return ("judge", "--responses", responses, *asked, "--out", out, *arguments)


def report(record):
    return ("report", record, "--out", "OUT", "--format", "html")


def export(model="W/student", *arguments, to="safetensors", out="OUT"):
    return ("export", model, "--to", to, "--out", out, *arguments)


BEYOND = "call model.resize_token_embeddings(len(tokenizer))"
CASES = {
    # data
    "sft with tokens beyond the embedding": Case(
        ("sft", "--model", "W/short", *DATA, "--out", "OUT", *TRAINING), BEYOND, loads=True
    ),
    "generate with tokens beyond the embedding": Case(generate(model="W/short"), BEYOND, loads=True),
    "evaluate with tokens beyond the embedding": Case(evaluate(model="W/short"), BEYOND, loads=True),
    "prune with tokens beyond the embedding": Case(prune("--layers", 1, *DATA, model="W/short"), BEYOND, loads=True),
    "exposure-bias with tokens beyond the embedding": Case(exposure(student="W/short"), BEYOND, loads=True),
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
    "tempered samples of minillm": Case(
        distill("--method", "minillm", "--temperature", 0.5), "minillm weighs the responses as samples at temperature 1"
    ),
    "cut samples of opd": Case(distill("--method", "opd", "--min_p", 0.1), "opd weighs the responses as samples"),
    "limit 0": Case(distill("--limit", 0), "must be at least 1. Got 0"),
    "negative limit": Case(evaluate("--limit=-3"), "must be at least 1. Got -3"),
    "validation limit 0": Case(sft(*VALID, "--eval-limit", 0), "must be at least 1. Got 0"),
    # models
    "another vocabulary": Case(
        distill(pair=("--student", "W/student", "--teacher", "W/other")),
        "share 97 tokens but split text differently",
    ),
    "another vocabulary in evaluate": Case(evaluate("--teacher", "W/other"), "split text differently"),
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
    "folder that is not empty": Case(distill(out="W/notes"), "W/notes is not empty. Resume the run in it"),
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
    "zero layers": Case(prune("--layers", 0, "--choose", "even"), "--layers must be at least 1. Got 0"),
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
    "repeated layers": Case(prune("--keep", 1, 1), "once each, in ascending order. Got [1, 1]", loads=True),
    "no rows to measure on": Case(prune("--layers", 2, *DATA, "--rows", 0), "--rows must be at least 1. Got 0"),
    # settings
    "unknown method": Case(distill("--method", "promptk"), "Got 'promptk'"),
    "negative learning rate": Case(distill("--learning-rate=-1"), "--learning-rate must be 0 or more. Got -1"),
    "a temperature of 0": Case(distill("--temperature", 0), "temperature must be above 0"),
    "too short for the template": Case(
        evaluate("--max_prompt_length", 9), "The shortest prompt has 139 tokens, template included, and the limit is 9"
    ),
    "limit 0 on the prompt": Case(evaluate("--max_prompt_length", 0), "must be at least 1 token. Got 0"),
    "unknown template": Case(evaluate("--template", "alpca"), "Got 'alpca'"),
    "broken template": Case(evaluate("--template", "{{ instruction"), "The Jinja template does not compile"),
    "template with another name": Case(generate("--template", "{{ question }}"), "Got question"),
    "no chat template": Case(generate("--template", "chat"), "The tokenizer has no chat template"),
    "negative temperature": Case(evaluate("--temperature=-1"), "--temperature must be 0 or more. Got -1."),
    "negative temperature in generate": Case(generate("--temperature=-0.5"), "--temperature must be 0 or more"),
    "no mass to sample from": Case(generate("--top-p", 0), "--top-p must lie above 0 and at most at 1. Got 0."),
    "a negative number of tokens": Case(generate("--top-k=-1"), "--top-k must be 0 or more. Got -1."),
    "no rows at a time": Case(generate("--batch-size", 0), "--batch-size must be at least 1. Got 0."),
    "a negative seed": Case(evaluate("--seeds", 1, -1), "--seeds must be 0 or more. Got 1 -1."),
    "a seed twice": Case(evaluate("--seeds", 1, 2, 1), "Each seed must be given once. Got --seeds 1 2 1."),
    "KL of no teacher": Case(evaluate("--kl-seeds", 1), "--kl-seeds is of a --teacher. Give one, or leave it out."),
    "KL of more seeds": Case(
        evaluate("--teacher", "W/teacher", "--kl-seeds", 2),
        "--kl-seeds must be at most the number of --seeds, 1. Got 2.",
    ),
    "validation without rows": Case(distill("--eval_strategy", "epoch"), "Validation needs rows: give --eval-data"),
    "steps of validation without rows": Case(sft("--eval_steps", 2), "Validation needs rows: give --eval-data"),
    "validation by unsaid steps": Case(distill(*VALID, "--eval_strategy", "steps"), "needs --eval_steps"),
    "checkpoints that would miss the best": Case(
        distill(*VALID, "--eval_steps", 1, "--save_steps", 2), "one is written at each validation. Got --save_steps 2"
    ),
    "no checkpoints to choose from": Case(sft(*VALID, "--save_strategy", "no"), "Got --save_strategy no"),
    "too few rows for a step": Case(
        distill("--gradient_accumulation_steps", 4), "One optimizer step takes 16 rows", loads=True
    ),
    "too few rows for a step of small batches": Case(
        distill("--gradient_accumulation_steps", 5),
        "Got 12. Lower --gradient_accumulation_steps or give more rows",
        loads=True,
    ),
    "too many positions": Case(distill("--prompt_length", 500), "The teacher has 512 positions", loads=True),
    "too many positions to generate": Case(
        generate("--max-completion-length", 600), "The model has 512 positions, and", loads=True
    ),
    "too many positions to evaluate": Case(
        evaluate("--max-completion-length", 600), "The model has 512 positions, and", loads=True
    ),
    "too many positions of a teacher to evaluate": Case(
        evaluate("--max-completion-length", 600, "--teacher", "W/teacher", model="W/longer"),
        "The teacher has 512 positions, and",
        loads=True,
    ),
    "too many positions of a student in exposure-bias": Case(
        exposure("--max-completion-length", 600, teacher="W/longer"),
        "student has 512 positions, and",
        loads=True,
    ),
    "too many positions in exposure-bias": Case(
        exposure("--max-completion-length", 600), "The teacher has 512 positions, and", loads=True
    ),
    "too many positions to validate in sft": Case(
        ("sft", "--model", "W/student", *DATA, *VALID, "--out", "OUT", "--max_completion_length", 600, "--use_cpu"),
        "The model has 512 positions, and",
        loads=True,
    ),
    "LoRA of rank 0": Case(distill("--student-lora-rank", 0), "--student-lora-rank must be at least 1. Got 0"),
    "nothing to merge": Case(distill("--merge"), "give --student-lora-rank with it"),
    "layers of the demo": Case(("demo", "--layers", 31, "--out", "OUT"), "--layers must lie in [1, 30]"),
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
    "negative learning rate in sft": Case(sft("--learning-rate=-1"), "--learning-rate must be 0 or more"),
    "unknown schedule of the prompt": Case(distill("--prompt_lr_scheduler_type", "cosin"), "prompt_lr_scheduler_type"),
    "a schedule that needs settings": Case(
        distill("--prompt_lr_scheduler_type", "warmup_stable_decay"), "prompt_lr_scheduler_type must be one of linear"
    ),
    "a schedule that follows a metric": Case(
        distill("--prompt_lr_scheduler_type", "reduce_lr_on_plateau"), "prompt_lr_scheduler_type must be one of linear"
    ),
    "a prompt that would climb": Case(distill("--prompt_max_grad_norm=-1"), "prompt_max_grad_norm must be 0 or more"),
    "a prompt that would grow": Case(distill("--prompt_weight_decay=-1"), "prompt_weight_decay must be 0 or more"),
    "negative warm-up of the prompt": Case(
        distill("--prompt_warmup_steps=-3"), "prompt_warmup_steps must be 0 or more"
    ),
    "negative weight of texts": Case(distill("--language_weight=-1"), "language_weight must be 0 or more"),
    "batches of all processes": Case(
        distill("--accelerator_config", '{"split_batches": true}'), "split_batches and dispatch_batches of"
    ),
    "rows by length": Case(
        distill("--train_sampling_strategy", "group_by_length"), "train_sampling_strategy has no effect here"
    ),
    "a temperature of no samples": Case(
        distill("--method", "kd", "--temperature", 2, "--top_k", 50),
        "kd samples no responses, and reads no --temperature, --top_k. Leave it out. --distillation_temperature is",
    ),
    "generation settings of no samples": Case(
        distill("--method", "seqkd", "--generation_kwargs", '{"num_beams": 2}'),
        "seqkd samples no responses, and reads no --generation_kwargs",
    ),
    "vLLM without responses to sample": Case(distill("--method", "kd", "--use_vllm"), "kd samples no responses"),
    "no accumulation": Case(distill("--gradient_accumulation_steps", 0), "gradient_accumulation_steps"),
    "no rows to decode at a time": Case(distill("--generation_batch_size", 0), "generation_batch_size"),
    "negative seed": Case(distill("--seed=-1"), "seed"),
}

# Hostile data. Each is read by the same reader for every command; some come by another one than generate.
CASES |= {
    "UTF-16": Case(data("utf16.jsonl"), "W/h/utf16.jsonl, line 1: is UTF-16. Save the file as UTF-8"),
    "Latin-1": Case(data("latin1.jsonl"), "W/h/latin1.jsonl, line 1: not valid UTF-8 (byte 0xe9 at 19)"),
    "byte order mark before an empty row": Case(data("marked.jsonl"), "W/h/marked.jsonl, line 1: expected {"),
    "NUL bytes": Case(sft(data=("--data", "W/h/nul.jsonl")), "W/h/nul.jsonl, line 2: holds a NUL byte"),
    "half a surrogate pair": Case(data("half.jsonl"), "'instruction' holds half of a surrogate pair ('\\ud83d')"),
    "half a pair beside a message": Case(data("half-role.jsonl"), "'messages[0]' holds half of a surrogate pair"),
    "JSON nested 100,000 deep": Case(data("deep.jsonl"), "W/h/deep.jsonl, line 1: not valid JSON: nested too deeply"),
    "a key twice": Case(data("twice.jsonl"), "duplicate key 'instruction' in one object"),
    "NaN for a text": Case(data("nan.jsonl"), "'output' must be a string or a list of strings, got a value of type"),
    "1e999 for a text": Case(data("infinite.jsonl"), "'output[0]' must be a string, got a value of type float"),
    "a number of 5,000 digits": Case(data("digits.jsonl"), "not valid JSON: Exceeds the limit (4300 digits)"),
    "a list for a row": Case(data("list.jsonl"), "expected an object, got a list"),
    "a number for a row": Case(data("number.jsonl"), "expected an object with the fields of a row"),
    "a number for a row of text": Case(distill("--language-data", "W/h/number.jsonl"), "Got a int", loads=True),
    "a list for a role": Case(data("role.jsonl"), "the role of 'messages[0]' must be one of"),
    "an object for the list": Case(data("object.json"), "W/h/object.json: expected a list of objects"),
    "escape codes for a key": Case(data("escape.jsonl"), "Got '\\x1b]52;c;cm0gLXJm\\x07\\u202e'"),
    "a line of 100 MB": Case(data("long.jsonl"), "W/h/long.jsonl, line 1: is longer than 16 MiB"),
    "a line of 100 MB to train on": Case(sft(data=("--data", "W/h/long.jsonl")), "line 1: is longer than 16 MiB"),
    "10 GiB of holes": Case(data("holes.jsonl"), "W/h/holes.jsonl, line 1: is longer than 16 MiB"),
    "300 MiB of holes as JSON": Case(data("large.json"), "W/h/large.json cannot be read: it holds more than 256 MiB"),
    "a gz bomb": Case(data("bomb.jsonl.gz"), "64 MiB and a hundred times its size are allowed"),
    "a gz file that breaks off": Case(data("torn.jsonl.gz"), "W/h/torn.jsonl.gz is not a complete gzip file"),
    "text named gz": Case(data("plain.jsonl.gz"), "W/h/plain.jsonl.gz is not a complete gzip file"),
    "zip named gz": Case(evaluate(data=("--data", "W/h/zip.jsonl.gz")), "W/h/zip.jsonl.gz is not a complete gzip file"),
    "zip named JSONL": Case(data("zip.jsonl"), "W/h/zip.jsonl, line 1: "),
    "zip named Parquet": Case(data("zip.parquet"), "W/h/zip.parquet is not a readable Parquet file"),
    "a Parquet file that breaks off": Case(data("torn.parquet"), "is not a readable Parquet file (after 0 rows)"),
    "text named Parquet": Case(prune("--layers", 2, "--data", "W/h/text.parquet"), "is not a readable Parquet file"),
    "an open quote in CSV": Case(data("quotes.csv"), "W/h/quotes.csv, line 2: not valid CSV"),
    "a cell too many in CSV": Case(data("cells.csv"), "expected 2 cells as in the header, got 3"),
    "a column twice in CSV": Case(data("twice.csv"), "the header names a column twice"),
    "a named pipe": Case(data("pipe.jsonl"), "W/h/pipe.jsonl is a named pipe. Expected a regular file"),
    "a named pipe to validate on": Case(sft("--eval-data", "W/h/pipe.jsonl"), "W/h/pipe.jsonl is a named pipe"),
    "a device without end": Case(data("zero.jsonl"), "W/h/zero.jsonl is a device. Expected a regular file"),
    "a symlink to itself": Case(data("loop.jsonl"), "No such file or folder: W/h/loop.jsonl"),
    "an empty folder for a file": Case(data("folder.jsonl"), "The folder W/h/folder.jsonl must be a data set"),
    "a saved data set that lies elsewhere": Case(data("saved"), "state.json must list files of its own folder"),
    "a saved data set whose split lies elsewhere": Case(data("splits"), "dataset_dict.json must list splits by name"),
}

# Configurations and absurd or contradictory flags.
CASES |= {
    "a YAML tag that would run code": Case(data("answers.jsonl", "--config", "W/h/tag.yaml"), "not readable as YAML: "),
    "ten lines of YAML that mean billions": Case(sft("--config", "W/h/billion.yaml"), "holds more than 10000 values"),
    "YAML inside of itself": Case(evaluate("--config", "W/h/itself.yaml"), "an alias contains itself"),
    "a YAML key twice": Case(prune("--config", "W/h/twice.yaml"), "duplicate key 'limit'"),
    "YAML in UTF-16": Case(exposure("--config", "W/h/utf16.yaml"), "--config expects a YAML file in UTF-8"),
    "a YAML list": Case(judge("--config", "W/h/list.yaml"), "expected a mapping such as"),
    "YAML nested 5,000 deep": Case(distill("--config", "W/h/deep.yaml"), "W/h/deep.yaml: not readable as YAML"),
    "YAML that breaks off": Case(generate("--config", "W/h/text.yaml"), "W/h/text.yaml, line 2: not readable as YAML"),
    "half a surrogate pair in YAML": Case(generate("--config", "W/h/half.yaml"), "is not valid UTF-8"),
    "a NUL byte in a path": Case(("compare", "a", "--config", "W/h/nul.yaml"), "out expects a path"),
    "YAML of 1.6 MB": Case(("chat", "a", "--config", "W/h/large.yaml"), "it holds more than 1 MiB"),
    "a named pipe of YAML": Case(export("a", "--config", "W/h/pipe.yaml"), "it is a named pipe"),
    "a device of YAML": Case(("demo", "--config", "/dev/zero", "--out", "OUT"), "it is a device"),
    "a limit of 10^30": Case(generate("--limit", 10**30), "--limit expects a whole number or none. Got '10000000000"),
    "a seed of 10^30": Case(evaluate("--seeds", 10**30), "--seeds expects one or more values, each a whole number"),
    "a seed of 10^30 for the demo": Case(
        ("demo", "--seed", 10**30, "--out", "OUT"), "It may be at most 92233720368547"
    ),
    "a seed beyond NumPy's": Case(distill("--seed", 2**40), "--seed must lie in [0, 4294967295]. Got 1099511627776"),
    "temperature NaN": Case(generate("--temperature", "nan"), "--temperature expects a finite number. Got 'nan'"),
    "a seed of 1e999": Case(exposure("--seed", "1e999"), "--seed expects a whole number. Got '1e999'"),
    "temperature Infinity": Case(evaluate("--temperature", "Infinity"), "--temperature expects a finite number"),
    "learning rate NaN": Case(sft("--learning-rate", "NaN"), "--learning-rate expects a finite number"),
    "a mass of 1e999": Case(("chat", "W/student", "--top-p", "1e999"), "--top-p expects a finite number"),
    "no steps of the demo": Case(("demo", "--steps", 0, "--out", "OUT"), "--steps must be at least 1. Got 0"),
    "a negative layer of the demo": Case(("demo", "--layers=-1", "--out", "OUT"), "--layers must lie in [1, 30]"),
    "a demo over somebody's files": Case(("demo", "--overwrite", "--out", "W/notes"), "holds notes.txt, which no run"),
    "a flag twice": Case(sft("--limit", 1, "--limit", 2), "--limit is given twice"),
    "a switch on and off": Case(evaluate("--greedy", "--no-greedy"), "--no-greedy is given twice, first as --greedy"),
    "text that is no UTF-8": Case(generate("--template", "{{ instruction }}\udcff"), "is not valid UTF-8"),
    "a path that is no UTF-8": Case(generate(out="\udcff"), "--out is not valid UTF-8"),
    "a template of 5,000 digits": Case(
        generate("--template", f"{{{{ instruction * {'9' * 5000} }}}}"), "does not compile"
    ),
    "a response of 10^15 tokens": Case(
        generate("--max-completion-length", 10**15), "--max-completion-length must lie in [1, 1000000]"
    ),
    "a name of 300 letters": Case(generate(out="a" * 300), "--out expects a path"),
}

# Models.
CASES |= {
    "pickled weights": Case(generate(model="W/m/pickled"), "holds its weights as pickle (pytorch_model.bin)"),
    "a pickled teacher": Case(
        distill(pair=("--student", "W/student", "--teacher", "W/m/pickled")), "unpickling can run code"
    ),
    "an index that leads outside": Case(generate(model="W/m/sharded"), "must name safetensors files of its own folder"),
    "an index of a number": Case(
        evaluate(model="W/m/index"), "must hold a weight_map, the file of each weight. Got int"
    ),
    "a broken safetensors header": Case(generate(model="W/m/header"), "model from W/m/header", loads=True),
    "a safetensors header of 2^60 bytes": Case(prune("--keep", 0, model="W/m/lying"), "from W/m/lying", loads=True),
    "safetensors that break off": Case(("chat", "W/m/torn", "--prompt", "the"), "model from W/m/torn", loads=True),
    "a configuration that is a list": Case(generate(model="W/m/no-object"), "must hold a JSON object. Got a list"),
    "a configuration that breaks off": Case(export("W/m/no-json"), "W/m/no-json/config.json is not valid JSON"),
    "10^9 layers": Case(generate(model="W/m/layers"), "asks for 1000000000 layers (num_hidden_layers), and the folder"),
    "10^6 dimensions": Case(
        generate(model="W/m/wide"), "its weights have other sizes than its config.json", loads=True
    ),
    "10^30 dimensions": Case(generate(model="W/m/wider"), "model from W/m/wider", loads=True),
    "10^9 tokens": Case(generate(model="W/m/words"), "its weights have other sizes than its config.json", loads=True),
    "no heads": Case(exposure(teacher="W/m/headless"), "W/m/headless"),
    "code from the hub for attention": Case(generate(model="W/m/kernel"), "asks for code from the hub"),
    "a quantization of 4": Case(evaluate(model="W/m/quantized"), "model from W/m/quantized"),
    "text for a size": Case(export("W/m/typed"), "model from W/m/typed"),
    "a model with code of its own": Case(generate(model="W/m/code"), "model from W/m/code", loads=True),
    "a tokenizer that breaks off": Case(generate(model="W/m/tokenizer"), "W/m/tokenizer"),
    "a tokenizer of an unknown type": Case(prune("--keep", 0, model="W/m/tokenizer-type"), "W/m/tokenizer-type"),
    "a tokenizer's settings as a list": Case(
        generate(model="W/m/tokenizer-list"), "must hold a JSON object. Got a list"
    ),
    "a named pipe for the configuration": Case(
        generate(model="W/m/pipe"), "W/m/pipe is no model: expected config.json"
    ),
    "a pickled adapter": Case(export("W/m/adapter-bin"), "as pickle (adapter_model.bin)"),
    "an adapter of nothing": Case(export("W/m/adapter-none"), "must name the model it belongs to"),
    "an adapter of a model that is gone": Case(export("W/m/adapter-lost"), "belongs to the model W/m/nowhere: No such"),
    "an adapter of itself": Case(export("W/m/adapter-self"), "belong to each other, and to no model"),
    "a damaged adapter": Case(export("W/m/adapter-torn"), "W/m/adapter-torn"),
    "an adapter of rank 10^12": Case(export("W/m/adapter-rank"), "asks for a rank or length of 1000000000000"),
    "an adapter of an unknown type": Case(export("W/m/adapter-type"), "W/m/adapter-type"),
    "text named GGUF": Case(generate(model="W/m/text.gguf"), "not a complete GGUF file: it does not begin with GGUF"),
    "GGUF of version 77": Case(export("W/m/version.gguf"), "it is of version 77, and 2 and 3 are known"),
    "GGUF of 2^60 tensors": Case(("chat", "W/m/counts.gguf"), "it states 1152921504606846976 tensors and"),
    "GGUF with an array of 2^60": Case(generate(model="W/m/array.gguf"), "is not a complete GGUF file: at byte "),
    "GGUF with a tensor of 4 TiB": Case(
        evaluate(model="W/m/tensor.gguf"), "it states 4398046511104 bytes, and it ends at byte"
    ),
    "GGUF without anything": Case(prune("--keep", 0, model="W/m/empty.gguf"), "W/m/empty.gguf"),
    "a named pipe of GGUF": Case(generate(model="W/m/pipe.gguf"), "W/m/pipe.gguf is a named pipe"),
    "a device for a model": Case(generate(model="/dev/zero"), "/dev/zero is a device"),
    "a NUL byte in a model's name": Case(generate(model="a\0b"), "No such model"),
    "a model's name of 5,000 letters": Case(generate(model="/" + "a" * 5000), "No such model"),
    "the teacher's own place": Case(
        export("W/student", out="W/student"), "--out must be another place than the model's"
    ),
    "GGUF by another name": Case(export("W/student", to="gguf", out="OUT"), "--out must be a file that ends in .gguf"),
    "an export over somebody's files": Case(export("W/student", "--overwrite", out="W/notes"), "holds notes.txt. Move"),
    "one model twice": Case(("chat", "W/student", "W/student"), "W/student is given more than once"),
    "a student twice": Case(
        ("exposure-bias", "--student", "W/student", "W/student", *exposure()[3:]), "must be given once"
    ),
    "no samples": Case(exposure("--samples-per-row", 0), "--samples-per-row must be at least 1. Got 0"),
    "a soft prompt that is none": Case(exposure("--prompt", "W/m/adapter-torn"), "Expected a prompt-tuning adapter"),
    "no soft prompt": Case(exposure("--prompt", "W/notes"), "Expected a PEFT adapter"),
    "no checkpoints": Case(exposure("--every-checkpoint"), "--every-checkpoint needs run folders"),
}

# Records, answers, and what is left of jobs.
CASES |= {
    "a record of the future": Case(report("W/r/future.json"), "schema version 1: schema_version"),
    "a record of an unknown kind": Case(report("W/r/kind.json"), "W/r/kind.json is not a results record"),
    "a record with a surplus key": Case(("compare", "W/r/surplus.json"), "accuracy: Extra inputs are not permitted"),
    "a record of wrong types": Case(report("W/r/types.json"), "evaluations: Input should be a valid array"),
    "a record without figures": Case(("compare", "W/r/empty.json"), "holds no evaluation to compare"),
    "a record in UTF-16": Case(report("W/r/utf16.json"), "W/r/utf16.json: it is not valid UTF-8"),
    "a record nested 100,000 deep": Case(report("W/r/deep.json"), "W/r/deep.json is not a results record"),
    "a record that breaks off": Case(("compare", "W/r/torn.json"), "W/r/torn.json is not a results record"),
    "a record of 2 GiB": Case(report("W/r/endless.json"), "it holds more than 1024 MiB"),
    "a named pipe for a record": Case(report("W/r/pipe.json"), "W/r/pipe.json: it is a named pipe"),
    "a device for a record": Case(("compare", "W/r/zero.json"), "W/r/zero.json: it is a device"),
    "answers of a job elsewhere": Case(
        evaluate("--overwrite", out="W/r/began.json"), "W/r/began-settings.json does not hold the settings", loads=True
    ),
    "answers of another job": Case(
        evaluate("--overwrite", out="W/r/other.json"), "W/r/other-settings.json does not hold the settings", loads=True
    ),
    "settings that are a list": Case(evaluate(out="W/r/list.json"), "does not hold the settings of a job", loads=True),
    "no answers": Case(judge(responses="W/none.jsonl"), "Expected a file of answers at W/none.jsonl"),
    "a named pipe of answers": Case(judge(responses="W/h/pipe.jsonl"), "Expected a file of answers"),
    "a row answered twice": Case(judge(responses="W/h/answers-twice.jsonl"), "row 0 is there twice"),
    "text for a row's number": Case(judge(responses="W/h/answers-row.jsonl"), "row: Input should be a valid integer"),
    "half a surrogate pair in an answer": Case(
        judge(responses="W/h/answers-half.jsonl"), "'text' holds half of a surrogate pair"
    ),
    "answers without references": Case(judge(responses="W/h/answers-bare.jsonl"), "1 of 1 rows hold no reference"),
    "a question without answers": Case(judge("--prompt-file", "W/h/unfilled.txt"), "lacks {{ request }}"),
    "a named pipe of a question": Case(judge("--prompt-file", "W/h/pipe.txt"), "it is a named pipe"),
    "verdicts of nothing": Case(
        judge(out="W/r/judged.json"), "W/r/judged-verdicts.jsonl, line 1: expected the settings"
    ),
    "verdicts nested 100,000 deep": Case(judge(out="W/r/deeply.json"), "deeply-verdicts.jsonl, line 1: expected the"),
    "no address": Case(judge(endpoint="localhost:9"), "--endpoint must be an address"),
    "an address of a file": Case(judge(endpoint="file:///etc/passwd"), "--endpoint must be an address"),
    "a time-out of NaN": Case(judge("--timeout", "nan"), "--timeout expects a finite number"),
    "fields that the judge sets": Case(judge("--extra-body", '{"model": "x"}'), "--extra-body must not hold model"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_wrong_input(world, tmp_path, capsys, monkeypatch, case):
    loaded = []
    load_model = promptkd.models.load_model
    for user in (inference_run, training_run):
        monkeypatch.setattr(user, "load_model", lambda *a, **k: loaded.append(a) or load_model(*a, **k))
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
    """When each file was last written; a folder's time changes with the lock that comes into it and goes."""
    return {str(path): 0 if path.is_dir() else path.lstat().st_mtime_ns for path in folder.rglob("*")}


def test_several_wrong_flags_are_told_together(world, tmp_path, capsys):
    ran = run(capsys, "sft", "--modell", world.student, "--limit", "x", "--config", world.folder / "typo.yaml")
    assert ran.status == 2
    told = ("--modell is unknown", "--limit expects", "learning_rat is unknown", "--data is missing")
    assert all(part in ran.err for part in told)
    assert ran.err.count("promptkd sft: ") == 1


@pytest.mark.slow
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


@pytest.mark.parametrize(
    "request_of",
    [
        lambda out: evaluate(out=out),
        lambda out: generate(out=out),
        lambda out: generate("--keep-logits", 4, out=out),
        lambda out: generate("--keep-logits", 4, "--score", out=out),
        lambda out: (*exposure()[:-1], out),
        lambda out: prune("--keep", 0, out=out),
        lambda out: export(out=out),
        lambda out: export(to="gguf", out=out),
        lambda out: judge(out=out),
        lambda out: (*report("W/r")[:2], "--out", out, "--format", "html"),
    ],
)
@pytest.mark.parametrize("out", [".", ".."])
def test_the_working_folder_is_no_place_for_a_result(world, tmp_path, capsys, monkeypatch, request_of, out):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    ran = run(capsys, *(placed(each, world, tmp_path) for each in request_of(out)))
    assert ran.status == 2
    assert "--out must " in ran.err or (out == ".." and ".. is not empty" in ran.err)
    assert [each.name for each in tmp_path.iterdir()] == ["empty"]
    assert not list(Path.cwd().iterdir())


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
