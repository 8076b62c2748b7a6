"""Soft prompts: where they start, what PEFT and promptkd read of each other's files, and teachers of any kind."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, PromptTuningInit, get_peft_model
from transformers import MambaConfig, MambaForCausalLM

from helpers.models import response_logits
from helpers.tiny import ARCHITECTURES, END_ID, PAD_ID, VOCABULARY, save_model, tiny_model, tiny_tokenizer
from promptkd.data.batch import right_pad
from promptkd.engine import response_hidden
from promptkd.errors import RequestError
from promptkd.models import SoftPrompt
from promptkd.models.adapters import SoftPromptAdapter
from promptkd.models.soft_prompt import DEFAULT_TEXT

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)

PROMPTS = [[5, 9, 17, 30], [50], [END_ID, 4, 2, 61, 8, 13, 70]]
RESPONSES = [[7, 21, END_ID], [11, 12], [3]]
BATCH = right_pad(PROMPTS, RESPONSES)


def logits(model, prompt=None):
    with torch.no_grad():
        return response_logits(model, BATCH, prompt)


def peft_logits(wrapper):
    """PEFT's own output, row by row without padding."""
    length = wrapper.active_peft_config.num_virtual_tokens
    rows = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        ids = torch.tensor([[*prompt, *response]])
        with torch.no_grad():
            whole = wrapper(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, length:]
        rows.append(whole[len(prompt) - 1 : -1])
    return torch.cat(rows)


def random_prompt(model, length=5):
    return SoftPrompt.create(model, tiny_tokenizer(), length=length, start="random", seed=3)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- starts


@every_architecture
def test_a_whole_text_as_prompt_acts_as_its_tokens(architecture):
    """Scaling, positions and order at once: the prompt made of a text's embeddings is that text put before each row."""
    model, tokenizer = tiny_model(architecture), tiny_tokenizer()
    ids = tokenizer(DEFAULT_TEXT, add_special_tokens=False)["input_ids"]
    prompt = SoftPrompt.create(model, tokenizer, length=len(ids))
    with_tokens = right_pad([ids + prompt_ids for prompt_ids in PROMPTS], RESPONSES)
    with torch.no_grad():
        expected = response_logits(model, with_tokens)
    close(logits(model, prompt()), expected)
    assert (expected - logits(model)).abs().max() > 0.1


def test_the_text_is_cut_or_repeated_to_the_length():
    model, tokenizer = tiny_model("gemma"), tiny_tokenizer()
    ids = tokenizer(DEFAULT_TEXT)["input_ids"]
    assert len(ids) > 7
    table = model.get_input_embeddings().weight.detach() * 4  # Gemma scales by the root of its width, 16
    assert torch.equal(SoftPrompt.create(model, tokenizer).embeddings, table[ids[:7]])
    assert torch.equal(
        SoftPrompt.create(model, tokenizer, length=2 * len(ids) + 3).embeddings, table[ids + ids + ids[:3]]
    )
    short = SoftPrompt.create(model, tokenizer, length=5, text="ab").embeddings
    assert torch.equal(short, table[tokenizer("ababa")["input_ids"]])


def test_no_special_token_enters_with_the_text():
    model, framing = tiny_model("llama"), tiny_tokenizer(bos=True)
    assert framing("ab")["input_ids"] != tiny_tokenizer()("ab")["input_ids"]  # it does put BOS before a text
    for length in (7, 100):  # at the front, and at each repetition
        ours = SoftPrompt.create(model, framing, length=length).embeddings
        assert torch.equal(ours, SoftPrompt.create(model, tiny_tokenizer(), length=length).embeddings)


@pytest.mark.parametrize(("pad", "token"), [("eos", END_ID), ("own", PAD_ID)])
def test_padding_start(pad, token):
    model = tiny_model("gemma")
    prompt = SoftPrompt.create(model, tiny_tokenizer(pad=pad), length=3, start="padding")
    assert torch.equal(prompt.embeddings, model.get_input_embeddings().weight.detach()[[token] * 3] * 4)


def test_random_start_has_the_statistics_of_the_embeddings():
    model = tiny_model("gemma")
    table = model.get_input_embeddings().weight.detach() * 4
    drawn = SoftPrompt.create(model, tiny_tokenizer(), length=20_000, start="random").embeddings.detach()
    error = table.std(0) / 20_000**0.5  # of a mean; a deviation's is about 0.7 times that
    assert ((drawn.mean(0) - table.mean(0)).abs() < 5 * error).all()
    assert ((drawn.std(0) - table.std(0)).abs() < 5 * error).all()
    correlation = torch.corrcoef(drawn.T) - torch.eye(16)
    assert correlation.abs().max() < 0.05  # dimensions are drawn apart


def test_random_start_follows_its_seed_and_no_other():
    model = tiny_model("gpt2")

    def drawn(seed):
        return SoftPrompt.create(model, tiny_tokenizer(), start="random", seed=seed).embeddings

    before = torch.random.get_rng_state()
    first = drawn(1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(drawn(1), first)
    assert (drawn(2) - first).abs().amin(-1).max() > 0.01


def test_length_zero_is_no_prompt(tmp_path):
    model = tiny_model("gpt2")
    for start in ("text", "padding", "random"):
        none = SoftPrompt.create(model, tiny_tokenizer(pad=None), length=0, start=start)
        assert none.length == 0
        assert none.norm() == none.distance() == 0
        assert torch.equal(logits(model, none()), logits(model))
    none.save(tmp_path / "none", model)
    assert SoftPrompt.load(tmp_path / "none").embeddings.shape == (0, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": -1}, "length must be 0 or more. Got -1"),
        ({"text": ""}, "at least one token. Got ''"),
        ({"start": "padding"}, "only if the tokenizer has a padding token"),
    ],
)
def test_impossible_starts_are_refused(options, message):
    with pytest.raises(RequestError, match=message):
        SoftPrompt.create(tiny_model("llama"), tiny_tokenizer(pad=None), **options)


def test_an_unknown_start_is_refused():
    with pytest.raises(RequestError, match="zeros"):
        SoftPrompt.create(tiny_model("llama"), tiny_tokenizer(), start="zeros")


# ----------------------------------------------------------------------------------------------- figures and precision


def test_norm_and_distance():
    prompt = SoftPrompt(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    assert prompt.norm() == 5
    assert prompt.distance() == 0
    with torch.no_grad():
        prompt.embeddings += torch.tensor([[1.0, 2.0], [2.0, 0.0]])
    assert prompt.distance() == 3
    restored = SoftPrompt(torch.zeros(2, 2))
    restored.load_state_dict(prompt.state_dict())  # what a checkpoint keeps
    assert restored.distance() == 3
    with pytest.raises(ValueError, match=r"shape \(length, width\). Got \(3,\)"):
        SoftPrompt(torch.zeros(3))


def test_a_bfloat16_teacher_gets_a_float32_prompt():
    teacher = tiny_model("llama", dtype=torch.bfloat16).requires_grad_(False)
    prompt = SoftPrompt.create(teacher, tiny_tokenizer())
    assert prompt.embeddings.dtype == prompt.start.dtype == torch.float32
    response_logits(teacher, BATCH, prompt()).float().logsumexp(-1).sum().backward()
    assert prompt.embeddings.grad.dtype == torch.float32
    assert (prompt.embeddings.grad.norm(dim=-1) > 0).all()
    with torch.no_grad():
        prompt.embeddings *= 1 + 1e-5  # bfloat16 would round it away
    assert prompt.distance() == pytest.approx(1e-5 * prompt.norm(), rel=0.05)


def test_the_prompt_is_a_copy_of_the_embeddings():
    model = tiny_model("llama")
    before = model.get_input_embeddings().weight.detach().clone()
    prompt = SoftPrompt.create(model, tiny_tokenizer())
    with torch.no_grad():
        prompt.embeddings.zero_()
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert prompt.start.abs().max() > 0
    assert [name for name, _ in prompt.named_parameters()] == ["embeddings"]  # the start is not trained


# ------------------------------------------------------------------------------------------------------------- on disk


@every_architecture
def test_peft_loads_ours_and_gives_the_same_logits(architecture, tmp_path):
    teacher = tiny_model(architecture)
    prompt = random_prompt(teacher)
    prompt.save(tmp_path / "prompt", teacher)
    names = {each.name for each in (tmp_path / "prompt").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    wrapper = PeftModel.from_pretrained(tiny_model(architecture), tmp_path / "prompt").eval()
    close(peft_logits(wrapper), logits(teacher, prompt()))
    assert torch.equal(SoftPrompt.load(tmp_path / "prompt").embeddings, prompt.embeddings)


@every_architecture
@pytest.mark.parametrize("text", [None, DEFAULT_TEXT])
def test_we_load_pefts_and_give_the_same_logits(architecture, text, tmp_path):
    folder = save_model(tmp_path / "model", tiny_model(architecture))
    start = {} if text is None else {"prompt_tuning_init": PromptTuningInit.TEXT, "prompt_tuning_init_text": text}
    config = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=6, tokenizer_name_or_path=str(folder), **start
    )
    torch.manual_seed(0)
    wrapper = get_peft_model(tiny_model(architecture), config).eval()
    wrapper.save_pretrained(tmp_path / "prompt")
    prompt = SoftPrompt.load(tmp_path / "prompt")
    close(logits(tiny_model(architecture), prompt()), peft_logits(wrapper))
    if text is not None:  # the same start on both sides
        close(prompt.embeddings, SoftPrompt.create(tiny_model(architecture), tiny_tokenizer(), length=6).embeddings)


def test_the_adapter_names_its_base_model_and_is_written_over(tmp_path):
    folder = save_model(tmp_path / "model", tiny_model("gpt2"))
    teacher = type(tiny_model("gpt2")).from_pretrained(folder)
    for length in (7, 3):
        random_prompt(teacher, length).save(tmp_path / "prompt", teacher)
    config = json.loads((tmp_path / "prompt" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder)
    assert config["task_type"] == "CAUSAL_LM"
    assert SoftPrompt.load(tmp_path / "prompt").length == 3


@pytest.fixture
def saved(tmp_path):
    teacher = tiny_model("llama")
    random_prompt(teacher).save(tmp_path / "prompt", teacher)
    return tmp_path / "prompt"


def changed(saved, *, config=None, weights=None, **fields):
    folder = shutil.copytree(saved, saved.with_name("changed"))
    if fields:
        config = json.dumps(json.loads((folder / "adapter_config.json").read_text()) | fields)
    if config is not None:
        (folder / "adapter_config.json").write_text(config)
    if weights is not None:
        (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_an_adapter_is_refused(saved, name):
    (saved / name).unlink()
    with pytest.raises(RequestError, match=r"Expected a PEFT adapter .* none is there"):
        SoftPrompt.load(saved)


def test_a_missing_folder_or_a_file_is_refused(saved):
    for path in (saved / "nowhere", saved / "adapter_config.json"):
        with pytest.raises(RequestError, match="none is there"):
            SoftPrompt.load(path)


def test_another_kind_of_adapter_is_refused(tmp_path):
    get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", r=2)).save_pretrained(tmp_path)
    with pytest.raises(RequestError, match=r"Expected a prompt-tuning adapter .* type .*LORA"):
        SoftPrompt.load(tmp_path)


@pytest.mark.parametrize("cut", [0, 7, -9])
def test_damaged_weights_are_refused(saved, cut):
    whole = (saved / "adapter_model.safetensors").read_bytes()
    with pytest.raises(RequestError, match=r"adapter_model\.safetensors is damaged"):
        SoftPrompt.load(changed(saved, weights=whole[:cut]))


@pytest.mark.parametrize("fields", [{"num_virtual_tokens": 4}, {"token_dim": 8}])
def test_weights_that_do_not_fit_the_configuration_are_refused(saved, fields):
    with pytest.raises(RequestError, match=r"of shape \(\d+, \d+\) .* Got .*\(5, 16\)"):
        SoftPrompt.load(changed(saved, **fields))


@pytest.mark.parametrize("config", ["{oops", "[]", '{"peft_type": "NONESUCH"}'])
def test_a_damaged_configuration_is_refused(saved, config):
    with pytest.raises(RequestError, match=r"adapter_config\.json"):
        SoftPrompt.load(changed(saved, config=config))


# ------------------------------------------------------------------------------------------------------ other teachers


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma"])
def test_a_lora_teacher_is_a_frozen_teacher_like_any_other(architecture, tmp_path):
    torch.manual_seed(0)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=2,
        init_lora_weights=False,
        target_modules="all-linear",
        fan_in_fan_out=architecture == "gpt2",
    )
    teacher = get_peft_model(tiny_model(architecture), lora).eval().requires_grad_(False)
    prompt = SoftPrompt.create(teacher, tiny_tokenizer())
    with_lora = logits(teacher, prompt())
    prompt.save(tmp_path, teacher)
    response_logits(teacher, BATCH, prompt()).logsumexp(-1).sum().backward()
    assert (prompt.embeddings.grad.norm(dim=-1) > 0).all()
    assert all(weight.grad is None for weight in teacher.parameters())

    merged = teacher.merge_and_unload()
    torch.testing.assert_close(with_lora, logits(merged, prompt()), rtol=1e-4, atol=1e-4)
    wrapper = PeftModel.from_pretrained(merged, tmp_path).eval()
    torch.testing.assert_close(peft_logits(wrapper), with_lora, rtol=1e-4, atol=1e-4)


def test_a_prompt_tuned_peft_model_as_teacher_is_refused_or_honored(saved):
    teacher = PeftModel.from_pretrained(tiny_model("llama"), saved).eval()
    try:
        got = logits(teacher)
    except RequestError:
        return
    close(got, peft_logits(teacher))


def test_the_adapter_reads_the_teacher_with_and_without(tmp_path):
    teacher = tiny_model("gemma2")
    adapter = SoftPromptAdapter(random_prompt(teacher))
    with torch.no_grad():
        adapted, plain = adapter.adapted_hidden(teacher, BATCH), adapter.plain_hidden(teacher, BATCH)
        assert torch.equal(adapted, response_hidden(teacher, BATCH, adapter.module()))
        assert torch.equal(plain, response_hidden(teacher, BATCH))
        adapter.module.embeddings += 1
    assert adapter.metrics() == {
        "prompt_norm": pytest.approx(adapter.module.norm()),
        "prompt_distance": pytest.approx((5 * 16) ** 0.5),
    }
    adapter.save(tmp_path, teacher)
    assert torch.equal(SoftPrompt.load(tmp_path).embeddings, adapter.module.embeddings)
    assert teacher.get_input_embeddings().weight.shape == (VOCABULARY, 16)


def test_a_prompt_of_a_teacher_without_attention_is_saved(tmp_path):
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=1)
    prompt = SoftPrompt.create(MambaForCausalLM(config), tiny_tokenizer(), length=3, start="random", seed=1)
    prompt.save(tmp_path / "prompt", MambaForCausalLM(config))
    assert torch.equal(SoftPrompt.load(tmp_path / "prompt")(), prompt())
