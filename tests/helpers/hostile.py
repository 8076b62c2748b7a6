"""Files that nobody should be able to hurt a run with: broken, lying, endless, or after something outside."""

import codecs
import gzip
import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

ROW = b'{"instruction": "the", "output": "an"}\n'
BILLION = "a: &a [x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n" for before, after in pairwise("abcdefghi")
)
ESCAPE, OVERRIDE = "\x1b]52;c;cm0gLXJm\x07", "\u202e"
"""What a terminal would put into the clipboard, and what would turn a line around."""


def make_files(folder: Path) -> None:
    """Data, configurations and other single files."""
    put = _putter(folder)
    put("utf16.jsonl", ROW.decode().encode("utf-16"))
    put("latin1.jsonl", '{"instruction": "thé", "output": "an"}\n'.encode("latin-1"))
    put("marked.jsonl", codecs.BOM_UTF8 + b"{}\n")
    put("nul.jsonl", ROW + b"\0" * 99)
    put("half.jsonl", b'{"instruction": "the \\ud83d", "output": "an"}\n')
    put("half-role.jsonl", b'{"messages": [{"role": "user", "content": "a", "name": "\\udc00"}]}\n')
    put("deep.jsonl", b"[" * 100_000 + b"\n")
    put("twice.jsonl", b'{"instruction": "the", "instruction": "an", "output": "an"}\n')
    put("nan.jsonl", b'{"instruction": "the", "output": NaN}\n')
    put("infinite.jsonl", b'{"instruction": "the", "output": [1e999]}\n')
    put("digits.jsonl", b'{"instruction": "the", "n": ' + b"9" * 5000 + b"}\n")
    put("list.jsonl", b'[{"instruction": "the"}]\n')
    put("number.jsonl", b"5\n")
    put("role.jsonl", b'{"messages": [{"role": ["user"], "content": "a"}]}\n')
    put("object.json", b'{"instruction": "the"}')
    put("escape.jsonl", json.dumps({f"{ESCAPE}{OVERRIDE}": 1}).encode() + b"\n")
    put("long.jsonl", b'{"instruction": "' + b"a" * 100_000_000 + b'"}\n')
    put("bomb.jsonl.gz", gzip.compress(b'{"instruction": "' + b"a" * 1_000_000 + b'"}\n', 9) * 400)
    put("torn.jsonl.gz", gzip.compress(ROW * 99, mtime=0)[:-9])
    put("plain.jsonl.gz", ROW)
    put("zip.jsonl.gz", _zip())
    put("zip.jsonl", _zip())
    put("zip.parquet", _zip())
    put("torn.parquet", _parquet()[:-40])
    put("text.parquet", ROW)
    put("quotes.csv", b'instruction,output\nthe,"an\n')
    put("cells.csv", b"instruction,output\nthe,an,ab\n")
    put("twice.csv", b"instruction,instruction\nthe,an\n")
    with (folder / "large.json").open("wb") as file:
        file.truncate(300 << 20)
    with (folder / "holes.jsonl").open("wb") as file:
        file.truncate(10 << 30)
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "zero.jsonl").symlink_to("/dev/zero")
    (folder / "loop.jsonl").symlink_to(folder / "loop.jsonl")
    (folder / "folder.jsonl").mkdir()
    saved = folder / "saved"
    saved.mkdir()
    (saved / "state.json").write_text('{"_data_files": [{"filename": "../../train.arrow"}]}')
    (folder / "splits").mkdir()
    (folder / "splits" / "dataset_dict.json").write_text('{"splits": ["../saved"]}')
    put("tag.yaml", f"limit: !!python/object/apply:os.mknod ['{folder / 'made'}']\n".encode())
    put("billion.yaml", BILLION.encode())
    put("itself.yaml", b"seeds: &a [*a]\n")
    put("twice.yaml", b"limit: 3\nlimit: 4\n")
    put("utf16.yaml", "limit: 3\n".encode("utf-16"))
    put("list.yaml", b"- limit: 3\n")
    put("deep.yaml", b"[" * 5000)
    put("text.yaml", b"limit: [1, 2\n")
    put("half.yaml", b'template: "\\ud800"\n')
    put("nul.yaml", b'out: "a\\0b"\n')
    put("large.yaml", b"# a\n" * 400_000)
    os.mkfifo(folder / "pipe.yaml")
    put("answers.jsonl", _lines({"row": 0, "prompt": "the", "completion": "an", "references": ["ab"]}))
    put("answers-twice.jsonl", _lines(*[{"row": 0, "prompt": "the", "completion": "an"}] * 2))
    put("answers-row.jsonl", _lines({"row": "0", "prompt": "the", "completion": "an"}))
    put("answers-half.jsonl", b'{"row": 0, "prompt": "the", "completion": "\\ud83d"}\n')
    put("answers-bare.jsonl", _lines({"row": 0, "prompt": "the", "completion": "an"}))
    put("unfilled.txt", b"Which is better?")
    os.mkfifo(folder / "pipe.txt")


def make_records(folder: Path) -> None:
    """Results that are none, and what is left of jobs that nobody began."""
    put = _putter(folder)
    record: dict[str, Any] = {"schema_version": 1, "kind": "evaluate"}
    put("future.json", json.dumps(record | {"schema_version": 2}).encode())
    put("kind.json", json.dumps(record | {"kind": "harvest"}).encode())
    put("surplus.json", json.dumps(record | {"accuracy": 1}).encode())
    put("types.json", json.dumps(record | {"evaluations": {"kd": 1}}).encode())
    put("empty.json", json.dumps(record).encode())
    put("utf16.json", json.dumps(record).encode("utf-16"))
    put("deep.json", b'{"config": ' + b"[" * 100_000)
    put("torn.json", json.dumps(record).encode()[:-3])
    with (folder / "endless.json").open("wb") as file:
        file.truncate(2 << 30)
    os.mkfifo(folder / "pipe.json")
    (folder / "zero.json").symlink_to("/dev/zero")
    put("began-settings.json", json.dumps({"settings": {}, "files": ["../train.jsonl"]}).encode())
    put("other-settings.json", json.dumps({"settings": {}, "files": ["train.jsonl"]}).encode())
    put("list-settings.json", json.dumps({"settings": [], "files": []}).encode())
    put("judged-verdicts.jsonl", b'{"settings": 5}\n')
    put("deeply-verdicts.jsonl", b"[" * 100_000 + b"\n")


def make_models(folder: Path, student: Path, planted: Path) -> None:
    """Copies of `student`, each broken in its own way; unpickling one would write `planted`."""
    config = json.loads((student / "config.json").read_text())
    weights = (student / "model.safetensors").read_bytes()

    def copy(name: str, **changes: object) -> Path:
        shutil.copytree(student, folder / name)
        if changes:
            (folder / name / "config.json").write_text(json.dumps(config | changes))
        return folder / name

    pickled = copy("pickled")
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(pickle_that_writes(planted))
    sharded = copy("sharded")
    (sharded / "model.safetensors").unlink()
    (sharded / "model-1.safetensors").write_bytes(weights)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../student/m.safetensors"}}))
    copy("index").joinpath("model.safetensors.index.json").write_text('{"weight_map": 5}')
    copy("header").joinpath("model.safetensors").write_bytes(struct.pack("<Q", 40) + b"{" * 40 + weights[48:])
    copy("lying").joinpath("model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + weights[8:])
    copy("torn").joinpath("model.safetensors").write_bytes(weights[:-99])
    copy("no-object").joinpath("config.json").write_text("[1]")
    copy("no-json").joinpath("config.json").write_text('{"model_type": "llama",')
    copy("layers", num_hidden_layers=10**9)
    copy("wide", hidden_size=10**6, intermediate_size=10**6)
    copy("wider", hidden_size=10**30)
    copy("words", vocab_size=10**9)
    copy("headless", num_attention_heads=0)
    copy("kernel", attn_implementation="evil/kernel")
    copy("quantized", quantization_config=4)
    copy("typed", hidden_size="16")
    code = copy("code", model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    (code / "evil.py").write_text(f"open({str(planted)!r}, 'w').close()\n")
    copy("tokenizer").joinpath("tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"')
    copy("tokenizer-type").joinpath("tokenizer.json").write_text('{"model": {"type": "Evil"}}')
    copy("tokenizer-list").joinpath("tokenizer_config.json").write_text("[]")
    pipe = copy("pipe")
    (pipe / "config.json").unlink()
    os.mkfifo(pipe / "config.json")
    lies = save({"lora_A": torch.zeros(2, 16)})
    for name, settings, file in (
        ("adapter-bin", {"base_model_name_or_path": str(student)}, "adapter_model.bin"),
        ("adapter-none", {}, "adapter_model.safetensors"),
        ("adapter-lost", {"base_model_name_or_path": f"{folder}/nowhere"}, "adapter_model.safetensors"),
        ("adapter-self", {"base_model_name_or_path": str(folder / "adapter-self")}, "adapter_model.safetensors"),
        ("adapter-torn", {"base_model_name_or_path": str(student)}, "adapter_model.safetensors"),
        ("adapter-rank", {"base_model_name_or_path": str(student), "r": 10**12}, "adapter_model.safetensors"),
        ("adapter-type", {"peft_type": "../x", "base_model_name_or_path": str(student)}, "adapter_model.safetensors"),
    ):
        shutil.copytree(student, folder / name, ignore=shutil.ignore_patterns("model.*", "*config.json"))
        lora = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]}
        (folder / name / "adapter_config.json").write_text(json.dumps(lora | settings))
        content = pickle_that_writes(planted) if file.endswith(".bin") else lies if "rank" in name else b"none"
        (folder / name / file).write_bytes(content)
    (folder / "text.gguf").write_bytes(b"hello, I am a text" * 9)
    (folder / "version.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 77, 0, 0))
    (folder / "counts.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 1 << 60, 1 << 60))
    array = struct.pack("<Q1sIIQ", 1, b"a", 9, 0, 1 << 60)
    (folder / "array.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + array + bytes(64))
    tensor = struct.pack("<Q1sIQIQ", 1, b"t", 1, 1 << 40, 0, 0)
    (folder / "tensor.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 1, 0) + tensor + bytes(64))
    (folder / "empty.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 0) + bytes(64))
    os.mkfifo(folder / "pipe.gguf")


def pickle_that_writes(path: Path) -> bytes:
    """Unpickled, it makes a file at `path`."""

    class Planted:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mknod, (str(path),)

    return pickle.dumps(Planted(), protocol=2)  # as torch.save writes


def _putter(folder: Path) -> Any:
    return lambda name, content: (folder / name).write_bytes(content)


def _lines(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("../../rows.jsonl", ROW)
    return buffer.getvalue()


def _parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"instruction": ["the"] * 9, "output": ["an"] * 9}), buffer)
    return buffer.getvalue()
