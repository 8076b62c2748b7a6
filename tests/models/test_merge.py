"""Adapter folders of PEFT as models: merged exactly, named from anywhere, and refused where they are none."""

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.tiny import VOCABULARY, save_model, tiny_model, tiny_tokenizer
from promptkd.errors import RequestError
from promptkd.models import load_adapted, load_model, load_tokenizer, merged_parts, model_record, resolve_model
from promptkd.models.adapter_files import can_join, join_saved, name_base, note_base
from promptkd.models.merge import has_adapter, merge_given

pytestmark = pytest.mark.slow
IDS = torch.arange(VOCABULARY)[None]
LINEAR = {"target_modules": "all-linear"}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def lora(**settings):
    return LoraConfig(task_type="CAUSAL_LM", **{"r": 2, "init_lora_weights": False, **LINEAR, **settings})


def adapted(base: Path, config, *, seed=0, dtype=torch.float32, rows=None) -> PeftModel:
    """The model in `base` with random weights in an adapter, as PEFT makes it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    torch.manual_seed(seed)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    wrapped = get_peft_model(model, copy.deepcopy(config))
    with torch.no_grad():
        for weight in wrapped.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))
    return wrapped.eval()


@pytest.fixture
def base(tmp_path):
    return save_model(tmp_path / "base", tiny_model("llama", tied=False))


@pytest.fixture
def folder(base):
    """A LoRA folder as PEFT saves it: without a tokenizer, its base named absolutely."""
    adapted(base, lora()).save_pretrained(base.with_name("lora"))
    return base.with_name("lora")


KINDS = {
    "plain": lora(),
    "alpha": lora(lora_alpha=5, use_rslora=True),
    "patterns": lora(target_modules=["q_proj", "up_proj"], rank_pattern={"q_proj": 3}, alpha_pattern={"up_proj": 7}),
    "dora": lora(use_dora=True),
    "biases": lora(bias="all"),
    "a head of its own": lora(modules_to_save=["lm_head"]),
    "embeddings": lora(target_modules=["embed_tokens", "q_proj"]),
    "head": lora(target_modules=["lm_head", "q_proj"]),
    "some layers": lora(target_modules=["q_proj"], layers_to_transform=[1]),
    "some tokens": lora(trainable_token_indices={"embed_tokens": [3, 5]}),
    "pissa": lora(init_lora_weights="pissa"),
    "lokr": LoKrConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_weights=False),
}


TIED = ("a head of its own", "embeddings", "head", "some tokens")  # which a tied head makes harder


@pytest.mark.parametrize(("kind", "tied"), [*((kind, False) for kind in KINDS), *((kind, True) for kind in TIED)])
def test_an_adapter_folder_is_its_base_with_the_adapter(tmp_path, kind, tied):
    base = save_model(tmp_path / "base", tiny_model("llama", layers=2, tied=tied))
    wrapped = adapted(base, KINDS[kind])
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = logits(wrapped)
    loaded = load_model(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits(load_model(base))).abs().max() > 0.05
    assert not has_adapter(loaded)
    assert all(weight.requires_grad for weight in loaded.parameters())
    loaded.save_pretrained(tmp_path / "whole")  # a plain model, whatever ties the adapter cut
    torch.testing.assert_close(logits(load_model(tmp_path / "whole")), logits(loaded), rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_adapters_of_other_architectures(tmp_path, architecture):
    base = save_model(tmp_path / "base", tiny_model(architecture, layers=2))
    wrapped = adapted(base, lora(fan_in_fan_out=architecture == "gpt2"))
    wrapped.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(load_model(tmp_path / "adapter")), logits(wrapped), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_tokens_that_were_added_before_the_adapter_was_trained(tmp_path, tied):
    base = save_model(tmp_path / "base", tiny_model("llama", layers=2, tied=tied))
    wrapped = adapted(base, lora(), rows=VOCABULARY + 3)
    wrapped.save_pretrained(tmp_path / "adapter")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    loaded = load_model(tmp_path / "adapter")
    assert loaded.config.vocab_size == VOCABULARY + 3
    torch.testing.assert_close(logits(loaded), logits(wrapped), rtol=1e-4, atol=1e-4)
    assert load_tokenizer(tmp_path / "adapter").convert_tokens_to_ids("<more>") == VOCABULARY


def by_hand(base, folder, dtype=torch.float32):
    """The merged model as PEFT makes it, in float32 and then rounded as transformers does when it reads the result."""
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
    merged.merge_and_unload().save_pretrained(folder.with_name("by-hand"))
    return AutoModelForCausalLM.from_pretrained(folder.with_name("by-hand"), dtype=dtype)


@pytest.mark.parametrize("files", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_it_is_rounded_once_whatever_the_precision_of_the_files(tmp_path, dtype, files):
    base = save_model(tmp_path / "base", tiny_model("llama", dtype=files))
    adapted(base, lora()).save_pretrained(tmp_path / "adapter")
    loaded = load_model(tmp_path / "adapter", dtype=dtype)
    target = files if dtype == "auto" else getattr(torch, dtype)
    expected = by_hand(base, tmp_path / "adapter", target)
    assert loaded.dtype == target
    assert all(map(torch.equal, loaded.state_dict().values(), expected.state_dict().values()))
    rotary = loaded.model.rotary_emb.inv_freq
    assert torch.equal(rotary, expected.model.rotary_emb.inv_freq)


def test_what_transformers_does_while_it_reads_is_done_to_the_merged_model(base, folder):
    placed = load_model(folder, device_map={"": "cpu"})
    assert torch.equal(logits(placed), logits(load_model(folder)))
    assert merged_parts(placed) is not None
    assert placed.name_or_path == str(base)


def test_loading_leaves_the_random_numbers_alone(folder):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load_model(folder)
    assert torch.equal(torch.rand(3), expected)


# ---- what is told ----


def test_the_record_names_base_and_adapter_with_their_hashes(base, folder):
    model = load_model(folder)
    told = merged_parts(model).told
    assert told == f"{base} with {folder} (LoRA of rank 2) merged into its weights"
    record = model_record(folder, model)
    assert record.path == str(folder)
    assert record.base.path == str(base)
    assert record.base.sha256 == model_record(base, load_model(base)).sha256
    assert [each.path for each in record.adapters] == [str(folder)]
    change(folder, lora_alpha=9)
    assert model_record(folder, model).adapters[0].sha256 != record.adapters[0].sha256 != ""
    assert model_record(folder, model).sha256 != record.sha256
    assert merged_parts(load_model(base)) is None
    assert model_record(base, model).adapters == []


def change(folder, **fields):
    config = json.loads((folder / "adapter_config.json").read_text()) | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))


# ---- where the base lies ----


@pytest.mark.parametrize("named", ["base", "./base", "../{}/base"])
def test_a_base_that_is_named_relatively_is_found_from_any_folder(base, folder, tmp_path, monkeypatch, named):
    change(folder, base_model_name_or_path=named.format(tmp_path.name))
    expected = logits(load_model_from(tmp_path, folder, monkeypatch))
    (tmp_path / "else" / "where").mkdir(parents=True)
    assert torch.equal(logits(load_model_from(tmp_path / "else" / "where", folder, monkeypatch)), expected)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits(load_model("lora")), expected)
    assert load_tokenizer("lora").get_vocab() == tiny_tokenizer().get_vocab()


def load_model_from(cwd, folder, monkeypatch):
    monkeypatch.chdir(cwd)
    return load_model(folder)


def test_two_models_of_the_relative_name_are_not_chosen_from(base, folder, tmp_path, monkeypatch):
    change(folder, base_model_name_or_path="base")
    save_model(tmp_path / "other" / "base", tiny_model("llama", seed=5))
    monkeypatch.chdir(tmp_path / "other")
    with pytest.raises(RequestError, match=r"belongs to the model base: .*may be .* or .*absolute path"):
        load_model(folder)


def test_the_adapters_own_tokenizer_comes_first(base, folder):
    assert load_tokenizer(folder).chat_template is None
    tiny_tokenizer(chat=True).save_pretrained(folder)
    assert load_tokenizer(folder).chat_template is not None


def test_an_adapter_of_an_adapter_is_merged_into_that(base, folder, tmp_path):
    second = get_peft_model(load_model(folder), lora(r=3))
    expected = logits(second)
    second.save_pretrained(tmp_path / "second")
    change(tmp_path / "second", base_model_name_or_path=str(folder))
    loaded = load_model(tmp_path / "second")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    assert [each.path for each in model_record(tmp_path / "second", loaded).adapters] == [
        str(folder),
        str(tmp_path / "second"),
    ]
    assert "(LoRA of rank 2), then" in merged_parts(loaded).told


def test_a_hub_adapter_is_merged_into_its_base(base, folder, tmp_path, monkeypatch):
    """Without a network: the hub's own cache holds it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cached(tmp_path / "hub", "owner/tuned", folder)
    cached(tmp_path / "hub", "owner/base", base)
    change(folder, base_model_name_or_path="owner/base")
    cached(tmp_path / "hub", "owner/remote", folder)
    for name, root in (("owner/tuned", str(base)), ("owner/remote", "owner/base")):
        loaded = load_model(name, cache_dir=str(tmp_path / "hub"))
        assert merged_parts(loaded).source.base == root
        assert model_record(name, loaded).adapters[0].path == name
        assert load_tokenizer(name).get_vocab() == tiny_tokenizer().get_vocab()


def cached(hub, name, folder):
    place = hub / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / "abc")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")


# ---- what is no such model ----


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=["prompt tuning", "prefix tuning"],
)
def test_a_soft_prompt_is_no_model(base, tmp_path, config):
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "prompt")
    for load in (load_model, load_tokenizer, load_adapted, resolve_model):
        with pytest.raises(RequestError, match=f"is a soft prompt, .* model that it belongs to: {base}"):
            load(tmp_path / "prompt")


REFUSED = {
    "another task": ({"task_type": "SEQ_CLS"}, "makes no causal language model: it is for SEQ_CLS"),
    "a part of each text": ({"alora_invocation_tokens": [1, 2]}, "acts on parts of a text alone"),
    "layers that repeat": ({"layer_replication": [[0, 2], [1, 3]]}, "repeats layers"),
    "no base": ({"base_model_name_or_path": None}, "must name the model it belongs to"),
    "a base that is gone": (
        {"base_model_name_or_path": "/nowhere/base"},
        "belongs to the model /nowhere/base: No such",
    ),
    "itself": ({"base_model_name_or_path": "./lora"}, "belong to each other"),
    "other modules": ({"target_modules": ["q_proj"]}, "do not match.*adapter of another model"),
    "an unknown type": ({"peft_type": "NONE"}, "Could not load"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_cannot_be_merged(folder, monkeypatch, case):
    monkeypatch.chdir(folder.parent)
    fields, message = REFUSED[case]
    change(folder, **fields)
    with pytest.raises(RequestError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_weights_that_are_no_numbers(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(RequestError, match="NaN or infinite"):
        load_model(folder)


def test_an_adapter_of_a_wider_model(folder, tmp_path):
    save_model(tmp_path / "wide", tiny_model("llama", hidden=24))
    change(folder, base_model_name_or_path=str(tmp_path / "wide"))
    with pytest.raises(RequestError, match=r"from .*lora: .*size"):
        load_model(folder)


def test_a_folder_with_a_whole_model_and_an_adapter(base, folder):
    shutil.copy(base / "model.safetensors", folder)
    with pytest.raises(RequestError, match="holds a whole model and an adapter"):
        load_model(folder)


def test_a_quantized_base_is_made_whole_or_refused(folder, monkeypatch):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "is_quantized", True, raising=False)  # asked of the instance alone
    assert merged_parts(load_model(folder)).told.count("dequantized") == 0
    load = AutoModelForCausalLM.from_pretrained

    def quantized(*args, **kwargs):
        model, report = load(*args, **kwargs)
        model.is_quantized = True
        return model, report

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", quantized)
    monkeypatch.setattr(LlamaForCausalLM, "dequantize", lambda model, dtype: model)
    assert "base, dequantized, with" in merged_parts(load_model(folder)).told

    def cannot(model, dtype):
        raise NotImplementedError("gptq has no way back")

    monkeypatch.setattr(LlamaForCausalLM, "dequantize", cannot)
    with pytest.raises(RequestError, match=r"is quantized, and its adapter .* gptq has no way back.*before its quant"):
        load_model(folder)


# ---- loaded models ----


@pytest.mark.parametrize("how", ["PeftModel", "transformers"])
def test_a_loaded_model_with_an_adapter_is_merged_in_place(base, folder, how):
    if how == "PeftModel":
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    expected = logits(model)
    plain = merge_given(model)
    assert not has_adapter(plain)
    assert list(plain.state_dict()) == list(load_model(base).state_dict())
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)
    assert merged_parts(plain).told == f"{base} with LoRA of rank 2 merged into its weights"
    plain.save_pretrained(folder.with_name("plain"))
    assert torch.equal(logits(load_model(folder.with_name("plain"))), logits(plain))
    assert merge_given(plain) is plain


# ---- adapters trained on merged models ----


def trained_on(folder, config):
    """A new adapter on the merged model of `folder`, saved as a run saves it."""
    model = get_peft_model(load_model(folder), copy.deepcopy(config)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))
    name_base(model)
    return model


def saved(model, place):
    model.save_pretrained(place)
    join_saved(place, model)
    note_base(place, model)
    return place


JOINED = {
    "the same modules": (lora(), lora(r=3, lora_alpha=7)),
    "other modules": (lora(target_modules=["q_proj"]), lora(r=3, target_modules=["up_proj", "v_proj"])),
    "patterns": (KINDS["patterns"], KINDS["alpha"]),
    "embeddings": (KINDS["embeddings"], lora()),
    "some layers": (KINDS["some layers"], lora(target_modules=["k_proj"], layers_to_transform=[0, 2])),
}


@pytest.mark.parametrize("case", JOINED)
def test_an_adapter_on_a_merged_model_is_saved_as_one_of_the_common_base(base, tmp_path, monkeypatch, case):
    first, second = JOINED[case]
    adapted(base, first).save_pretrained(tmp_path / "first")
    model = trained_on(tmp_path / "first", second)
    assert can_join(model)
    place = saved(model, tmp_path / "second")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "first")
    for loaded in (AutoPeftModelForCausalLM.from_pretrained(place), load_model(place)):
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    config = json.loads((place / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert config["r"] == config["lora_alpha"] == {"the same modules": 5, "some layers": 2}.get(case, config["r"])
    assert "trained on a merged model" in json.loads((place / "base_model.json").read_text())["note"]


def test_an_adapter_on_gpt2_is_joined_too(tmp_path):
    base = save_model(tmp_path / "base", tiny_model("gpt2", layers=2))
    adapted(base, lora(fan_in_fan_out=True)).save_pretrained(tmp_path / "first")
    model = trained_on(tmp_path / "first", lora(fan_in_fan_out=True))
    loaded = AutoPeftModelForCausalLM.from_pretrained(saved(model, tmp_path / "second"))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dora", "biases", "a head of its own", "some tokens", "pissa", "lokr"])
def test_what_is_more_than_lora_weights_cannot_be_joined(base, tmp_path, kind):
    adapted(base, KINDS[kind]).save_pretrained(tmp_path / "first")
    model = trained_on(tmp_path / "first", lora())
    assert not can_join(model)
    loaded = load_model(saved(model, tmp_path / "second"))  # it names the adapter that it was trained on
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


def test_adapter_and_base_may_be_moved_together(base, folder, tmp_path):
    expected = logits(load_model(saved(trained_on(base, lora()), tmp_path / "runs" / "student")))
    (tmp_path / "moved").mkdir()
    base.rename(tmp_path / "moved" / "base")
    (tmp_path / "runs").rename(tmp_path / "moved" / "runs")
    assert torch.equal(logits(load_model(tmp_path / "moved" / "runs" / "student")), expected)
    os.remove(tmp_path / "moved" / "runs" / "student" / "base_model.json")
    with pytest.raises(RequestError, match=f"belongs to the model {base}: No such model"):
        load_model(tmp_path / "moved" / "runs" / "student")


def test_a_folders_own_adapter_is_trained_on(base, folder):
    model = load_adapted(folder)
    torch.testing.assert_close(logits(model), logits(load_model(folder)), rtol=1e-4, atol=1e-4)
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert {name.split(".")[-3] for name in trained} == {"lora_A", "lora_B"}
    with pytest.raises(RequestError, match="is no LoRA folder"):
        load_adapted(base)


@pytest.mark.parametrize("added", [0, 3])
def test_embeddings_saved_beside_an_adapter_are_not_lost_by_joining(base, tmp_path, added):
    first = adapted(base, lora(), rows=VOCABULARY + added)
    with torch.no_grad():
        first.get_input_embeddings().weight.add_(1.0)  # trained whole
    first.save_pretrained(tmp_path / "first", save_embedding_layers=True)
    model = trained_on(tmp_path / "first", lora())
    assert not can_join(model)
    loaded = load_model(saved(model, tmp_path / "second"))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
