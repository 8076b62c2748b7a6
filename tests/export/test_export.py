"""Models as serving tools load them: read back they are the model, and what cannot be written is refused."""

import json
from pathlib import Path

import gguf
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from helpers.byte_level import END, MERGES, SPLITS, START, TEMPLATE, TOKENS, byte_level, byte_model
from helpers.commands import TRAINED_FILES, done, held, run
from helpers.tiny import save_model, tiny_model, tiny_tokenizer
from promptkd.errors import PromptKDError, RequestError
from promptkd.models import load_model, load_tokenizer
from promptkd.models.export import can_write_gguf, export_gguf, export_safetensors
from promptkd.models.gguf_vocabulary import PRE_TOKENIZERS

LISTING = "\n\n1. the  12 than"  # cut differently by each of them


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(len(TOKENS))[None]).logits


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTKD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path):
    return save_model(tmp_path / "student", byte_model(), byte_level())


def fields_of(file: Path) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


# --------------------------------------------------------------------------------------------------------------- GGUF


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_is_the_model_it_was_written_from(tmp_path, architecture, tied):
    model = byte_model(architecture, tied=tied)
    tokenizer = byte_level("qwen2" if "qwen" in architecture else "gpt-2")
    expected = logits(model)
    found = export_gguf(tmp_path / "m.gguf", model, tokenizer, torch.float32, title="m")
    assert found.difference <= found.limit < 1e-4 * (1 + expected.abs().max())
    assert (found.rounding, found.same_choices) == (0.0, found.tokens)
    read = AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file="m.gguf", dtype=torch.float32)
    torch.testing.assert_close(logits(read), expected, rtol=1e-5, atol=1e-5)
    assert held(tmp_path) == {"m.gguf"}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(("dtype", "kind"), [(torch.float16, "F16"), (torch.bfloat16, "BF16")])
def test_matrices_are_rounded_and_vectors_are_not(tmp_path, architecture, dtype, kind):
    model = byte_model(architecture)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = export_gguf(tmp_path / "m.gguf", model, byte_level(), dtype, title="m")
    assert 0 < found.difference + found.rounding < 0.5
    tensors = {each.name: each for each in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    kinds = {name: each.tensor_type.name for name, each in tensors.items()}
    assert kinds["blk.0.ffn_up.weight"] == kinds["token_embd.weight"] == kinds["output.weight"] == kind
    assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"
    assert kinds.get("position_embd.weight", "F32") == "F32"
    read = load_model(tmp_path / "m.gguf").state_dict()
    for name, weight in weights.items():
        exact = weight.ndim == 1 or name.endswith("wpe.weight")
        torch.testing.assert_close(read[name], weight if exact else weight.to(dtype).float(), rtol=0, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_the_tokenizer_cuts_text_as_before(tmp_path, split):
    tokenizer = byte_level(split)
    export_gguf(tmp_path / "m.gguf", byte_model(), tokenizer, torch.float32, title="m")
    assert fields_of(tmp_path / "m.gguf")["tokenizer.ggml.pre"] == split
    read = load_tokenizer(tmp_path / "m.gguf")
    assert read(LISTING)["input_ids"] == tokenizer(LISTING)["input_ids"]
    others = [byte_level(other)(LISTING)["input_ids"] for other in SPLITS if other != split]
    assert tokenizer(LISTING)["input_ids"] not in others  # so the text would show a wrong split


def test_the_splits_are_what_the_models_ship():
    for name, split in SPLITS.items():
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = split
        assert json.loads(backend.to_str())["pre_tokenizer"] == PRE_TOKENIZERS[name] or name == "qwen2"


@pytest.mark.slow
def test_what_a_serving_tool_reads(tmp_path):
    export_gguf(tmp_path / "m.gguf", byte_model(extra=2), byte_level(bos=True), torch.float16, title="my student")
    fields = fields_of(tmp_path / "m.gguf")
    count = len(TOKENS)
    assert fields["general.architecture"] == "llama"
    assert fields["general.name"] == "my student"
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16
    assert fields["llama.block_count"] == 3
    assert fields["llama.vocab_size"] == count + 2
    assert fields["tokenizer.ggml.tokens"] == [*TOKENS, f"[PAD{count}]", f"[PAD{count + 1}]"]
    kind = gguf.TokenType
    normal = [kind.NORMAL] * (count - 3)
    types = [kind.CONTROL, kind.CONTROL, *normal, kind.USER_DEFINED, kind.UNUSED, kind.UNUSED]
    assert fields["tokenizer.ggml.token_type"] == types
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in MERGES]
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (1, 0)
    assert (fields["tokenizer.ggml.add_bos_token"], fields["tokenizer.ggml.add_eos_token"]) == (True, False)
    assert fields["tokenizer.chat_template"] == TEMPLATE
    assert "tokenizer.ggml.eot_token_id" not in fields


@pytest.mark.slow
def test_chat_templates_with_names_keep_them(tmp_path):
    tokenizer = byte_level()
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "{{ tools }}" + TEMPLATE}
    export_gguf(tmp_path / "m.gguf", byte_model(), tokenizer, torch.float16, title="m")
    fields = fields_of(tmp_path / "m.gguf")
    assert fields["tokenizer.chat_template"] == TEMPLATE
    assert fields["tokenizer.chat_template.tool_use"] == "{{ tools }}" + TEMPLATE


@pytest.mark.slow
def test_the_end_of_a_turn_is_named_where_it_is_not_eos(tmp_path):
    export_gguf(tmp_path / "m.gguf", byte_model(), byte_level(end=START), torch.float16, title="m")
    fields = fields_of(tmp_path / "m.gguf")
    assert (fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.eot_token_id"]) == (1, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "configured", "ends"),
    [
        (END, 0, {"eos": 0}),
        (END, [0, 5], {"eos": 0, "eom": 5}),
        (START, [0, 1, 5], {"eos": 1, "eot": 0, "eom": 5}),
        (None, 5, {"eos": 0, "eom": 5}),
    ],
)
def test_all_that_ends_an_answer_is_named_and_read_back(tmp_path, end, configured, ends):
    model = byte_model(eos_token_id=configured)
    export_gguf(tmp_path / "m.gguf", model, byte_level(end=end), torch.float32, title="m")
    fields = fields_of(tmp_path / "m.gguf")
    keys = {name: f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")}
    assert {name: fields[key] for name, key in keys.items() if key in fields} == ends
    read = load_model(tmp_path / "m.gguf").generation_config.eos_token_id
    assert {read} if isinstance(read, int) else set(read) == set(ends.values())


@pytest.mark.slow
def test_a_fourth_end_is_left_out_and_said(tmp_path, caplog):
    model = byte_model(eos_token_id=[0, 1, 5, 6])
    export_gguf(tmp_path / "m.gguf", model, byte_level(), torch.float32, title="m")
    assert "A GGUF file names three end tokens. These are left out: " in caplog.text


@pytest.mark.slow
def test_rows_without_a_token_get_no_name_when_read(tmp_path):
    export_gguf(tmp_path / "m.gguf", byte_model(extra=9), byte_level(), torch.float32, title="m")
    assert load_tokenizer(tmp_path / "m.gguf").get_vocab() == byte_level().get_vocab()


@pytest.mark.parametrize(
    ("model", "tokenizer", "reason"),
    [
        (
            lambda: byte_model(eos_token_id=None),
            lambda: byte_level(end=None, chat=False),
            "neither it nor its tokenizer knows an end token, and llama.cpp would end answers at token 11",
        ),
        (lambda: tiny_model("opt"), tiny_tokenizer, "opt is none of the architectures llama, qwen2, qwen3, gpt2"),
        (lambda: tiny_model("gemma2"), tiny_tokenizer, "gemma2 is none"),
        (lambda: tiny_model("llama"), tiny_tokenizer, "splits text in none of the known ways"),
        (lambda: byte_model(attention_bias=True), byte_level, "attention or MLP has biases"),
        (lambda: byte_model(hidden_act="gelu"), byte_level, "activation is gelu"),
        (
            lambda: byte_model(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
            byte_level,
            "rotary positions are scaled",
        ),
        (lambda: byte_model("gpt2", n_positions=512), byte_level, "it has 512 positions"),
        (lambda: byte_model("gpt2", n_inner=40), byte_level, "its MLP is 40 wide, not 4 x 16"),
    ],
)
def test_a_model_that_cannot_be_written_is_refused_with_the_other_way(tmp_path, model, tokenizer, reason):
    with pytest.raises(RequestError, match=f"{reason}.*export to safetensors, then run `python convert_hf_to_gguf.py"):
        export_gguf(tmp_path / "m.gguf", model(), tokenizer(), torch.float16, title="m")
    assert held(tmp_path) == set()
    assert not can_write_gguf(save_model(tmp_path / "m", model(), tokenizer()))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gpt2"])
def test_a_folder_that_can_be_written_is_known_without_its_weights(tmp_path, architecture):
    tokenizer = byte_level("qwen2" if "qwen" in architecture else "gpt-2")
    folder = save_model(tmp_path / "m", byte_model(architecture), tokenizer)
    (folder / "model.safetensors").unlink()
    assert can_write_gguf(folder)


def test_the_code_that_a_folder_ships_is_not_run_to_know_it(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *asked: "y")  # to "Do you wish to run the custom code?"
    folder, ran = save_model(tmp_path / "m", byte_model(), byte_level()), tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    own = {"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}, "model_type": "own"}
    (folder / "config.json").write_text(json.dumps(config | own))
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\nfrom transformers import LlamaConfig as Config\n")
    with pytest.raises(RequestError):
        can_write_gguf(folder)
    assert not ran.exists()


def test_a_tokenizer_without_merges_is_refused(tmp_path):
    tokenizer = byte_level()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["merges"] = []
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token=END)
    with pytest.raises(RequestError, match="the tokenizer has no merges"):
        export_gguf(tmp_path / "m.gguf", byte_model(), bare, torch.float16, title="m")
    assert held(tmp_path) == set()


def test_a_tokenizer_that_normalizes_is_refused(tmp_path):
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(RequestError, match="normalizes text"):
        export_gguf(tmp_path / "m.gguf", byte_model(), tokenizer, torch.float16, title="m")


def test_numbers_beyond_float16_are_refused(tmp_path):
    model = byte_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(RequestError, match=r"layers.1.mlp.up_proj.weight holds numbers that .*float16.* cannot hold"):
        export_gguf(tmp_path / "m.gguf", model, byte_level(), torch.float16, title="m")
    assert held(tmp_path) == set()


def test_a_small_head_is_refused(tmp_path):
    with pytest.raises(RequestError, match=r"a row for each of the tokenizer's ids, up to 266\. It has 266"):
        export_gguf(tmp_path / "m.gguf", byte_model(extra=-1), byte_level(), torch.float16, title="m")


# -------------------------------------------------------------------------------------------------- the comparison


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["rotation", "norm", "tokenizer"])
def test_a_file_that_is_not_the_model_is_an_error_and_goes(tmp_path, source, monkeypatch, capsys, wrong):
    if wrong == "rotation":
        monkeypatch.setattr("promptkd.models.gguf_format._interleaved", lambda weight, heads: weight)
    elif wrong == "norm":
        monkeypatch.setattr("promptkd.models.gguf_format.gguf.GGUFWriter.add_layer_norm_rms_eps", small_epsilon)
    else:
        monkeypatch.setattr("promptkd.models.gguf_vocabulary.pre_tokenizer_name", lambda state: "qwen2")
    ran = run(capsys, "export", source, "--to", "gguf", "--out", tmp_path / "out" / "m.gguf")
    assert ran.status == 1
    what = "tokenizer" if wrong == "tokenizer" else "model"
    assert f"promptkd export: What was written is not the {what}: read back" in ran.err
    assert held(tmp_path / "out") == set()


def test_a_file_that_cannot_be_read_is_an_error(tmp_path, source, monkeypatch, capsys):
    monkeypatch.setattr("promptkd.models.export.write_gguf", lambda file, *rest: file.write_bytes(b"GGUF"))
    ran = run(capsys, "export", source, "--to", "gguf", "--out", tmp_path / "out" / "m.gguf")
    assert (ran.status, "What was written" in ran.err) == (1, True)
    assert held(tmp_path / "out") == set()


def small_epsilon(writer, value):
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 0.5)


def test_a_folder_that_is_not_the_model_is_an_error(tmp_path, monkeypatch):
    other = byte_model(seed=7)
    monkeypatch.setattr("promptkd.models.export.load_model", lambda *args, **kwargs: other)
    with pytest.raises(PromptKDError, match="read back, its logits differ by up to"):
        export_safetensors(tmp_path / "out", byte_model(), byte_level(), torch.float32)


# ------------------------------------------------------------------------------------------------------- the command


@pytest.mark.slow
def test_gguf_from_a_run(tmp_path, capsys):
    save_model(tmp_path / "run" / "student", byte_model(), byte_level())
    (tmp_path / "run" / "config.yaml").write_text("{}")
    ran = done(capsys, "export", tmp_path / "run", "--to", "gguf", "--out", tmp_path / "out" / "m.gguf")
    assert held(tmp_path / "out") == {"m.gguf", "m.Modelfile"}
    assert not (tmp_path / "cache").exists()  # reading back leaves nothing there
    assert "parameters in f16" in ran.err
    assert "Read back, the logits of 128 tokens differ from the model's by at most" in ran.err
    assert "of 128 most probable next tokens as they were" in ran.err
    assert fields_of(tmp_path / "out" / "m.gguf")["general.name"] == "run"
    exact = logits(byte_model())
    assert (logits(load_model(tmp_path / "out" / "m.gguf")) - exact).abs().max() < 0.1


@pytest.mark.slow
def test_safetensors_is_a_plain_folder(tmp_path, source, capsys):
    config = json.loads((source / "config.json").read_text()) | {"use_cache": False}
    (source / "config.json").write_text(json.dumps(config))
    (source / "training_args.bin").write_text("left over")
    out = tmp_path / "out"
    done(capsys, "export", source, "--to", "safetensors", "--out", out, "--dtype", "bf16")
    assert held(out) == TRAINED_FILES
    written = json.loads((out / "config.json").read_text())
    assert (written["dtype"], written["use_cache"]) == ("bfloat16", True)
    read = AutoModelForCausalLM.from_pretrained(out)
    assert read.dtype == torch.bfloat16
    for name, weight in byte_model().state_dict().items():
        assert torch.equal(read.state_dict()[name], weight.to(torch.bfloat16))
    assert AutoTokenizer.from_pretrained(out)(LISTING)["input_ids"] == byte_level()(LISTING)["input_ids"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["gguf", "safetensors"])
def test_a_lora_student_is_merged(tmp_path, source, capsys, form):
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, base_model_name_or_path=str(source))
    wrapper = get_peft_model(load_model(source), lora).eval()
    folder = tmp_path / "run" / "student"
    wrapper.save_pretrained(folder)
    byte_level().save_pretrained(folder)
    with torch.no_grad():
        expected = logits(wrapper)
    out = tmp_path / "out" / ("m.gguf" if form == "gguf" else "m")
    done(capsys, "export", tmp_path / "run", "--to", form, "--out", out, "--dtype", "f32")
    torch.testing.assert_close(logits(load_model(out)), expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits(byte_model())).abs().max() > 0.1
    folder = {f"m/{name}" for name in TRAINED_FILES}
    assert held(tmp_path / "out") == ({"m.gguf", "m.Modelfile"} if form == "gguf" else folder)


def test_a_soft_prompt_is_no_student(tmp_path, source, capsys):
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, base_model_name_or_path=str(source))
    get_peft_model(load_model(source), settings).save_pretrained(tmp_path / "prompt")
    byte_level().save_pretrained(tmp_path / "prompt")
    ran = run(capsys, "export", tmp_path / "prompt", "--to", "safetensors", "--out", tmp_path / "out")
    assert (ran.status, "is a soft prompt" in ran.err) == (2, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_exists_is_replaced_on_request_alone(tmp_path, source, capsys):
    file, folder = tmp_path / "m.gguf", tmp_path / "out"
    file.write_text("old")
    folder.mkdir()
    (folder / "config.json").write_text("old")
    for form, out in (("gguf", file), ("safetensors", folder)):
        assert run(capsys, "export", source, "--to", form, "--out", out).status == 2
        done(capsys, "export", source, "--to", form, "--out", out, "--overwrite")
        assert load_model(out).config.model_type == "llama"
    (folder / "thesis.tex").write_text("precious")
    ran = run(capsys, "export", source, "--to", "safetensors", "--out", folder, "--overwrite")
    assert ran.status == 2
    assert "holds thesis.tex" in ran.err
    assert (folder / "thesis.tex").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--to", "gguf", "--out", "m.bin"), "--out must be a file that ends in .gguf"),
        (("--to", "gguf", "--out", "student"), "--out must be another place"),
        (("--to", "safetensors", "--out", "student", "--overwrite"), "--out must be another place"),
        (("--to", "safetensors", "--out", "student/config.json"), "--out must be a folder"),
        (("--to", "onnx", "--out", "m"), "one of gguf, safetensors"),
        (("--to", "gguf", "--out", "m.gguf", "--dtype", "q4"), "one of f32, f16, bf16"),
        (
            (
                "--to",
                "gguf",
            ),
            "--out is missing",
        ),
    ],
)
def test_a_wrong_request(tmp_path, source, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    before = held(tmp_path)
    ran = run(capsys, "export", "student", *flags)
    assert (ran.status, message in ran.err) == (2, True), ran.err
    assert held(tmp_path) == before
