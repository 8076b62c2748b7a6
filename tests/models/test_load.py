"""Models and tokenizers from folders, runs and GGUF files; and what is refused, in one clear message."""

import errno
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.gguf_file import write_gguf
from helpers.models import response_logits
from helpers.tiny import (
    CHAT_TEMPLATE,
    END,
    END_ID,
    PAD,
    VOCABULARY,
    save_model,
    tiny_model,
    tiny_tokenizer,
)
from promptkd.data.batch import right_pad
from promptkd.errors import RequestError
from promptkd.models import (
    cache_folder,
    count_parameters,
    load_model,
    load_tokenizer,
    model_record,
    resolve_model,
    shared_vocabulary_size,
)
from promptkd.models.folder import check_model_folder, save_tokenizer

IDS = torch.arange(VOCABULARY)[None]
TEXT = "Suppose you are the\n student, then 12 + 30!<|end|>"


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTKD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    return save_model(tmp_path / "model", tiny_model("llama", tied=False))


def refused(name, message, load=load_model):
    with pytest.raises(RequestError, match=message) as caught:
        load(name)
    assert "\n" not in str(caught.value)  # one message, one line


# ------------------------------------------------------------------------------------------------------------- folders


def test_a_model_folder(folder):
    model = load_model(folder)
    assert torch.equal(logits(model), logits(tiny_model("llama", tied=False)))
    assert not model.training
    assert load_model(folder, attn_implementation="eager").config._attn_implementation == "eager"  # passed through
    assert load_tokenizer(str(folder))(TEXT)["input_ids"] == tiny_tokenizer()(TEXT)["input_ids"]


@pytest.mark.parametrize("inside", ["student", "model"])
def test_a_runs_folder_stands_for_its_model(folder, inside):
    run = folder.with_name("run")
    shutil.copytree(folder, run / inside)
    (run / "results.json").write_text("{}")
    assert resolve_model(run) == str(run / inside)
    assert torch.equal(logits(load_model(run)), logits(load_model(folder)))
    assert load_tokenizer(run).get_vocab() == tiny_tokenizer().get_vocab()


def test_the_home_folder_is_understood(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve_model("~/model") == str(folder)


@pytest.mark.slow
def test_a_lora_folder_is_its_base_model_with_the_adapter(folder, tmp_path):
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, base_model_name_or_path=str(folder))
    wrapper = get_peft_model(load_model(folder), lora).eval()
    wrapper.save_pretrained(tmp_path / "lora")
    loaded, batch = load_model(tmp_path / "lora"), right_pad([[4, 5]], [[6, 7, 8]])
    with torch.no_grad():
        got = response_logits(loaded, batch)
        torch.testing.assert_close(got, response_logits(wrapper, batch))
        assert (got - response_logits(load_model(folder), batch)).abs().max() > 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(folder, dtype):
    assert load_model(folder, dtype=dtype).dtype == getattr(torch, dtype)


def test_another_dtype_is_refused(folder):
    with pytest.raises(RequestError, match=r"float32, bfloat16, float16, auto. Got 'int8'"):
        load_model(folder, dtype="int8")


# ------------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_path_that_does_not_exist(tmp_path, load):
    refused(tmp_path / "nowhere", "nowhere does not exist. Give a folder, a GGUF file or a hub name", load)
    for name in ("./nowhere", "~/nowhere-at-all", "nowhere.gguf", "owner/name/more", "two words"):
        refused(name, f"{name} does not exist", load)


def test_a_hub_name_that_cannot_be_reached():
    refused("nobody-at-all/nothing", "Could not load .* from nobody-at-all/nothing: .* Check the name, or the network")


def test_a_misspelt_folder_is_named_with_the_nearest_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "runs/kd/student", "runs/kd2", "runs/other"):
        (tmp_path / name).mkdir(parents=True)
    for load in (load_model, load_tokenizer):
        refused("bsae", r"no folder bsae here \(similar: base\), and as a hub name: .* Check the name", load)
        refused("runs/kdd", r"no folder runs/kdd here \(similar: runs/kd, runs/kd2\), and as a hub name", load)
    refused("runs/kdd/student", r"runs/kdd/student does not exist \(similar: runs/kd/student\)\. Give a folder")
    refused("./bsae", r"./bsae does not exist \(similar: base\)")
    refused("qqq", "no folder qqq here, and as a hub name")
    with pytest.raises(RequestError) as caught:
        load_model("nobody-at-all/base")  # can only be the hub's
    assert "no folder" not in str(caught.value)


def test_a_folder_that_is_no_model(tmp_path):
    refused(tmp_path, "is no model: expected config.json .* It holds nothing")
    (tmp_path / "notes.txt").write_text("")
    refused(tmp_path, "It holds notes.txt")


def test_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "model.txt").write_text("hello")
    refused(tmp_path / "model.txt", "Got the file .*model.txt")
    for name, content in (("text.gguf", b"hello, I am a text" * 9), ("empty.gguf", b"")):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, f"{name} is not a complete GGUF file")


def test_a_gguf_that_breaks_off(tmp_path):
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\1\0\0\0\0\0\0\0" * 2)
    refused(tmp_path / "cut.gguf", "cut.gguf is not a complete GGUF file: at byte 24 it states 1 tensors and 1 fields")


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        pytest.param("{oops", id="broken"),
        pytest.param("{}", id="no type"),
        pytest.param('{"model_type": "nonesuch"}', id="unknown type"),
        pytest.param('{"model_type": "t5"}', id="no causal model"),
    ],
)
def test_a_configuration_that_is_none(folder, config):
    (folder / "config.json").write_text(config)
    told = {"{oops": "is not valid JSON", '{"model_type": "t5"}': "T5 is an encoder-decoder model"}
    refused(folder, told.get(config, "Could not load a causal language model from"))


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, "Could not load .* no file named model.safetensors")


@pytest.mark.parametrize("cut", [0, 5, -9])
def test_damaged_weights(folder, cut):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:cut])
    refused(folder, "Could not load")


def test_weights_of_another_size(folder):
    change_config(folder, intermediate_size=64)
    refused(folder, "Could not load")


def test_weights_that_lack_a_layer(folder):
    change_config(folder, num_hidden_layers=4)
    refused(folder, "layers.3")


def change_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))


def test_a_folder_without_a_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    refused(folder, f"Could not load .* from {folder}", load_tokenizer)


# ---------------------------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize(
    ("options", "pad"),
    [({"pad": None}, END), ({"pad": "own"}, PAD), ({"pad": "eos"}, END), ({"pad": None, "eos": False}, None)],
)
def test_a_missing_padding_token_becomes_eos(tmp_path, options, pad):
    save_model(tmp_path, tiny_model("gpt2"), tiny_tokenizer(**options))
    assert load_tokenizer(tmp_path).pad_token == pad


# ---------------------------------------------------------------------------------------------------------------- GGUF


@pytest.fixture
def unreadable(monkeypatch):
    """From the call on, transformers cannot read GGUF any more."""

    def forbid():
        def forbidden(load):
            def wrapper(*args, gguf_file=None, **kwargs):
                assert gguf_file is None, "it was converted again"
                return load(*args, **kwargs)

            return wrapper

        for kind in (AutoModelForCausalLM, AutoTokenizer):
            monkeypatch.setattr(kind, "from_pretrained", forbidden(kind.from_pretrained))

    return forbid


def entries(cache: Path) -> list[Path]:
    return sorted((cache / "gguf").iterdir()) if (cache / "gguf").is_dir() else []


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_is_the_model_it_was_written_from(tmp_path, tied):
    model = tiny_model("llama", tied=tied)
    file = write_gguf(tmp_path / "tiny.gguf", model)
    loaded, tokenizer = load_model(file), load_tokenizer(file)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-6, atol=1e-6)
    assert loaded.config.tie_word_embeddings == tied
    assert loaded.config.eos_token_id == END_ID
    assert tokenizer(TEXT)["input_ids"] == tiny_tokenizer()(TEXT)["input_ids"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == (END, END)
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_a_gguf_is_converted_once(tmp_path, cache, unreadable):
    file = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    first = logits(load_model(file))
    (entry,) = entries(cache)
    assert entry.name.startswith("tiny-")
    assert (entry / "model.safetensors").is_file()
    written = (entry / "model.safetensors").stat().st_mtime_ns
    unreadable()
    assert torch.equal(logits(load_model(file)), first)
    load_tokenizer(file)
    (tmp_path / "elsewhere").mkdir()
    copy = shutil.copy(file, tmp_path / "elsewhere")  # the same content counts, not its folder or its age
    assert resolve_model(copy) == str(entry)
    assert entries(cache) == [entry]
    assert (entry / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.slow
def test_a_changed_gguf_is_converted_anew(tmp_path, cache):
    file = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    load_model(file)
    write_gguf(file, tiny_model("llama", seed=1))
    assert torch.equal(logits(load_model(file)), logits(tiny_model("llama", seed=1)))
    assert len(entries(cache)) == 2


@pytest.mark.slow
def test_the_converted_model_can_be_saved(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    model = load_model(file, dtype="bfloat16")
    model.save_pretrained(tmp_path / "again")
    assert model.dtype == torch.bfloat16
    assert torch.equal(logits(load_model(tmp_path / "again", dtype="bfloat16")), logits(model))


@pytest.mark.slow
@pytest.mark.parametrize("fails", ["tokenizer", "saving", "interrupt"])
def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path, cache, monkeypatch, fails):
    file = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    error = {"tokenizer": OSError("no tokenizer"), "saving": OSError("disk full"), "interrupt": KeyboardInterrupt()}
    target = type(tiny_model("llama")) if fails == "saving" else AutoTokenizer

    def fail(*args, **kwargs):
        raise error[fails]

    with monkeypatch.context() as broken:
        broken.setattr(target, "save_pretrained" if fails == "saving" else "from_pretrained", fail)
        with pytest.raises((RequestError, OSError, KeyboardInterrupt)):
            load_model(file)
    assert entries(cache) == []
    assert torch.equal(logits(load_model(file)), logits(tiny_model("llama")))  # and the next try works


@pytest.mark.slow
def test_two_processes_may_convert_at_once(tmp_path, cache, monkeypatch):
    file = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    load_model(file)
    (entry,) = entries(cache)
    other = entry.rename(tmp_path / "other")
    load = AutoTokenizer.from_pretrained

    def meanwhile(*args, **kwargs):  # the other process is done while this one still converts
        if other.is_dir():
            other.rename(entry)
        return load(*args, **kwargs)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", meanwhile)
    assert torch.equal(logits(load_model(file)), logits(tiny_model("llama")))
    assert entries(cache) == [entry]


def test_the_message_of_a_failed_conversion(tmp_path, cache):
    file = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    file.write_bytes(file.read_bytes().replace(b"general.architecture", b"general.architectura"))
    refused(file, "Could not load a causal language model from .*tiny.gguf: .* no network is needed")
    assert entries(cache) == []


@pytest.mark.slow
def test_a_ggufs_tokenizer_has_no_token_that_the_model_lacks(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    model, tokenizer = load_model(file), load_tokenizer(file)
    assert len(tokenizer) == VOCABULARY
    assert shared_vocabulary_size(model, model, tokenizer) == VOCABULARY


@pytest.mark.slow
def test_the_suffix_may_be_written_large(tmp_path):
    file = write_gguf(tmp_path / "TINY.GGUF", tiny_model("llama"))
    assert torch.equal(logits(load_model(file)), logits(tiny_model("llama")))


def test_where_the_cache_is(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.setenv("PROMPTKD_CACHE", "~/kept")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "kept"
    monkeypatch.delenv("PROMPTKD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "promptkd"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / ".cache" / "promptkd"


# ---------------------------------------------------------------------------------------------------------- provenance


def test_tied_weights_count_once():
    tied, untied = tiny_model("llama"), tiny_model("llama", tied=False)
    assert count_parameters(untied) - count_parameters(tied) == VOCABULARY * 16
    tied.requires_grad_(False)
    tied.model.norm.weight.requires_grad_(True)
    assert count_parameters(tied, trainable=True) == 16


def over(folder):
    content = b"".join((folder / name).read_bytes() for name in ("config.json", "model.safetensors"))
    return hashlib.sha256(content).hexdigest()


def test_the_record_changes_with_weights_and_configuration(folder):
    model = load_model(folder)
    record = model_record(folder, model)
    assert record.path == str(folder)
    assert record.parameters == count_parameters(model)
    assert record.sha256 == over(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    assert model_record(folder, model) == record
    other = save_model(folder.with_name("other"), tiny_model("llama", tied=False, seed=1))
    assert model_record(other, model).sha256 == over(other)
    change_config(folder, eos_token_id=3)
    assert model_record(folder, model).sha256 == over(folder) != record.sha256
    assert model_record("owner/name", model).sha256 == ""


@pytest.mark.parametrize("cut", [b"", b"x"], ids=["short", "long"])
def test_an_adapters_rank_is_held_to_weights_whose_file_is_cut(tmp_path, cut):
    """PEFT would allocate the rank before it misses the weights."""
    settings = {"peft_type": "LORA", "r": 10**12, "base_model_name_or_path": "base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    weights = tmp_path / "adapter_model.safetensors"
    save_file({"a": torch.zeros(4, 4)}, weights)
    weights.write_bytes(weights.read_bytes()[:-1] + cut * 2)
    with pytest.raises(RequestError, match="no weight beside it is larger than 4"):
        check_model_folder(tmp_path)


def test_a_full_disk_is_told_by_the_system_s_error_where_a_tokenizer_is_written(tmp_path):
    class Full:
        def save_pretrained(self, folder):
            tiny_tokenizer().backend_tokenizer.save("/dev/full")

    with pytest.raises(OSError, match="No space left") as found:
        save_tokenizer(Full(), tmp_path)
    assert (found.value.errno, found.value.filename) == (errno.ENOSPC, str(tmp_path))

    class Broken:
        def save_pretrained(self, folder):
            raise Exception("another fault")

    with pytest.raises(Exception, match="another fault") as found:
        save_tokenizer(Broken(), tmp_path)
    assert type(found.value) is Exception
