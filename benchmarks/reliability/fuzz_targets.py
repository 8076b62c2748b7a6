"""The fuzz targets: readers of untrusted bytes, each with a few valid inputs to start from.

A target may accept an input or refuse it with `RequestError`. Any other exception is a finding.
"""

import gzip
import io
import json
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import save

from promptkd.cli.parsing.config_file import read_config, write_config
from promptkd.cli.parsing.parser import merged_config, parse_options
from promptkd.data.encode import encode_texts
from promptkd.data.sources import read_examples
from promptkd.data.templates import resolve_template
from promptkd.errors import RequestError
from promptkd.io.jsonl import ResumableLines, settle_settings
from promptkd.judge.questions import load_prompt, questions_about, read_answers
from promptkd.judge.verdicts import read_preference, read_scores, verdict_log
from promptkd.models.folder import adapter_base, check_model_folder
from promptkd.models.gguf_format import open_gguf
from promptkd.report import render_report, terminal_table
from promptkd.results import Evaluation, Metric, ModelRecord, Results, RowResult, Series

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from helpers.tiny import tiny_tokenizer

__all__ = ["TARGETS", "Target", "findings_of"]

TOKENIZER = tiny_tokenizer(chat=True)
ROWS = [
    {"instruction": "the", "input": "an", "output": ["ab", "a"]},
    {"prompt": "the", "completion": "an"},
    {"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "an"}]},
]
ANSWERS = [{"row": row, "prompt": "the", "completion": "an", "references": ["ab"], "ended": True} for row in range(3)]
VERDICT = {"row": 0, "model_first": True, "model": 7.0, "other": 9.0, "text": "7 9"}


class Target(NamedTuple):
    run: Callable[[bytes], object]
    seeds: list[bytes]


def findings_of(target: Target, data: bytes) -> Exception | None:
    """The exception that is a finding for `data`; None if there is none."""
    try:
        target.run(data)
    except RequestError:
        return None
    except Exception as error:
        return error
    return None


def _in_file(name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """Read `data` as the content of a file with this name, in a folder that contains nothing else."""

    def run(data: bytes) -> None:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            (Path(folder) / name).write_bytes(data)
            read(Path(folder) / name)

    return run


def _encode(path: Path) -> None:
    for example in read_examples(path):
        TOKENIZER(resolve_template("auto", TOKENIZER).render(example))


def _report(path: Path) -> None:
    record = Results.read(path)
    render_report([record]).encode()
    terminal_table([record]).encode()


def _config(path: Path) -> None:
    values = read_config(path)
    write_config(path.with_name("again.yaml"), values)
    again = read_config(path.with_name("again.yaml"))
    assert repr(again) == repr(values), f"{values} was read back as {again}"


def _options(data: bytes) -> None:
    name, *arguments = data.decode("utf-8", "surrogateescape").split("\n")
    if name in ("demo", "prune", "generate", "evaluate", "exposure-bias", "judge", "compare", "report", "chat"):
        import importlib

        parsed = parse_options(
            name, importlib.import_module(f"promptkd.cli.options.{name.replace('-', '_')}"), arguments
        )
        json.dumps(merged_config(parsed.options, {}), ensure_ascii=False).encode()


def _gguf(path: Path) -> None:
    open_gguf(path)


def _adapter(path: Path) -> None:
    (path.parent / "adapter_model.safetensors").write_bytes(save({"lora_A": torch.zeros(2, 4)}))
    check_model_folder(path.parent)
    adapter_base(path.parent)


def _template(data: bytes) -> None:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2]))  # the ones that every template renders
        template = resolve_template(data.decode("utf-8", "replace"), TOKENIZER)
        for example in read_examples(rows):
            template.render(example)


def _answers(path: Path) -> None:
    questions_about([read_answers(path)], load_prompt("score"))


def _resumable(path: Path) -> None:
    lines = ResumableLines(path)
    lines.append([{"row": 7}])
    assert ResumableLines(path).lines == lines.lines


def _verdicts(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    for said in (read_scores(text), read_preference(text)):
        assert said is None or all(0 <= number <= 10 for number in said)


def _lines(*rows: object) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _parquet() -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[:1] * 3), buffer)
    return buffer.getvalue()


def _record() -> bytes:
    answer = RowResult(row=0, seed=10, prompt="the", references=["an"], response="ab", scores={"rouge_l": 0.5})
    evaluation = Evaluation(model="kd", data="test", metrics={"rouge_l": Metric(value=0.5)}, samples=[answer])
    history = [Series(name="distill", points=[{"step": 1, "loss": 2.0}])]
    models = {"kd": ModelRecord(path="kd", parameters=9, sha256="")}
    return Results(kind="evaluate", evaluations=[evaluation], models=models, history=history).model_dump_json().encode()


def _small_gguf() -> bytes:
    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    fields = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
    fields += text(b"tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text(b"a") + text(b"b")
    tensor = text(b"token_embd.weight") + struct.pack("<IQQIQ", 2, 4, 2, 0, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 2) + fields + tensor
    return head + bytes(-len(head) % 32) + bytes(32)


CONFIG = b'{"model_type": "llama", "num_hidden_layers": 2, "text_config": {"attn_implementation": "sdpa"}}'
YAML = b"a: &x {b: 2e-5, c: [1, no]}\nd: {<<: *x, e: 'f'}\n"
SETTINGS = b'{"settings": {"--limit": 3}, "files": ["r-a.jsonl"]}'
ARGUMENTS = [
    b"generate\n--model\nM\n--data\nD\n--out\nO\n--top-k=3",
    b"evaluate\n--model\nM\n--data\nA\nB\n--seeds\n1\n2\n--no-greedy\n--out\nO",
    b'judge\n--responses\nR\n--endpoint\nE\n--judge-model\nJ\n--out\nO\n--extra-body\n{"a": [1]}\n--seed\nnone',
    b"report\nA\nB\n--out\nO\n--format\nhtml",
]

TARGETS = {
    "jsonl": Target(_in_file("rows.jsonl", _encode), [_lines(*ROWS)]),
    "gz": Target(_in_file("rows.jsonl.gz", read_examples), [gzip.compress(_lines(*ROWS))]),
    "json": Target(_in_file("rows.json", read_examples), [json.dumps(ROWS).encode()]),
    "csv": Target(_in_file("rows.csv", read_examples), [b'instruction,input,output\r\nthe,"a ""b""",an\r\n']),
    "parquet": Target(_in_file("rows.parquet", read_examples), [_parquet()]),
    "texts": Target(
        _in_file("t.jsonl", lambda path: encode_texts(path, TOKENIZER, length=4)), [_lines({"text": "the an"})]
    ),
    "results": Target(_in_file("results.json", _report), [_record()]),
    "config": Target(_in_file("config.yaml", _config), [YAML, b"learning_rate: 2e-5\nseeds: [1, 2]\n"]),
    "options": Target(_options, ARGUMENTS),
    "template": Target(_template, [b"Q: {{ instruction }} {% if input %}{{ input | upper }}{% endif %}", b"alpaca"]),
    "gguf": Target(_in_file("m.gguf", _gguf), [_small_gguf()]),
    "model": Target(_in_file("config.json", lambda path: check_model_folder(path.parent)), [CONFIG]),
    "adapter": Target(
        _in_file("adapter_config.json", _adapter),
        [b'{"base_model_name_or_path": "owner/name", "peft_type": "LORA"}'],
    ),
    "answers": Target(_in_file("answers.jsonl", _answers), [_lines(*ANSWERS)]),
    "resumable": Target(_in_file("lines.jsonl", _resumable), [_lines(*ANSWERS)]),
    "settings": Target(
        _in_file("r-settings.json", lambda path: settle_settings(path, {"--limit": 3}, [], overwrite=True)), [SETTINGS]
    ),
    "verdict-log": Target(
        _in_file("v.jsonl", lambda path: verdict_log(path, {"judge": "j"})),
        [_lines({"settings": {"judge": "j"}}, VERDICT, VERDICT)],
    ),
    "verdicts": Target(
        _verdicts, [b"7 9\nbecause", b"<think>no</think>Answer 1: 7, Answer 2: 9/10", b"Verdict: [[B]]"]
    ),
}
