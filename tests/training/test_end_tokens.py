"""What ends a run's responses is saved with the model; no padding or end token is needed."""

import json

import pytest
import torch
from peft import LoraConfig

from helpers.tiny import END_ID, PAD_ID, tiny_model, tiny_tokenizer
from helpers.trainers import config, pair, rows
from promptkd.models import load_model
from promptkd.training import DistillTrainer, FinetuneConfig, FinetuneTrainer

TURN = (  # ends an answer with another token than EOS
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<pad>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CPU = {"max_steps": 1, "per_device_train_batch_size": 4, "report_to": "none", "disable_tqdm": True, "use_cpu": True}


def chat_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TURN
    return tokenizer


def ends_in(folder):
    return json.loads((folder / "generation_config.json").read_text())["eos_token_id"]


def finetuner(folder, model, tokenizer, **settings):
    args = FinetuneConfig(output_dir=str(folder), **{**CPU, **settings})
    return FinetuneTrainer(model, args, rows(), None, tokenizer)


@pytest.mark.slow
def test_sft_saves_what_ends_a_response(tmp_path):
    made = finetuner(tmp_path, tiny_model(layers=1), chat_tokenizer(), save_strategy="steps", save_steps=1)
    made.train()
    made.save_student(tmp_path / "model")
    assert ends_in(tmp_path / "model") == ends_in(tmp_path / "checkpoint-1") == [END_ID, PAD_ID]


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_distill_saves_what_ends_a_response(tmp_path, lora):
    adapter = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    student, teacher = pair()
    student.save_pretrained(tmp_path / "base")
    args = config(tmp_path, method="kd", max_steps=1, prompt_learning_rate=1e-3, save_strategy="steps", save_steps=1)
    base = load_model(tmp_path / "base")
    made = DistillTrainer(base, teacher, args, rows(), None, chat_tokenizer(), peft_config=adapter)
    made.train()
    made.save_student(tmp_path / "student")
    folders = tmp_path / "student", tmp_path / "checkpoint-1"
    for folder in folders:
        assert ends_in(folder) == [END_ID, PAD_ID]
        assert load_model(folder).generation_config.eos_token_id == [END_ID, PAD_ID]
    assert load_model(tmp_path / "base").generation_config.eos_token_id == END_ID


@pytest.mark.slow
def test_neither_a_padding_nor_an_end_token_is_needed(tmp_path):
    tokenizer = tiny_tokenizer(eos=False, pad=None)
    model = tiny_model(layers=1, eos_token_id=None, pad_token_id=None)
    tuned = finetuner(tmp_path / "sft", model, tokenizer)
    tuned.train()
    student, teacher = (tiny_model(layers=1, seed=seed, eos_token_id=None, pad_token_id=None) for seed in (1, 2))
    args = config(tmp_path / "kd", method="gkd", max_steps=1, prompt_learning_rate=1e-3)
    distilled = DistillTrainer(student, teacher, args, rows(), None, tokenizer)
    distilled.train()
    own = {"student_share": 1.0, "repetition_penalty": 1.1, "prompt_learning_rate": 1e-3}
    generated = config(tmp_path / "own", method="gkd", max_steps=1, **own)
    distilled = DistillTrainer(student, teacher, generated, rows(), None, tokenizer)
    distilled.train()
    assert tokenizer.pad_token is None
    assert student.generation_config.eos_token_id is None
    said = "Neither tokenizer, model nor template knows an end token: every response runs to the limit of "
    assert all(sum(note.startswith(said) for note in made.notes) == 1 for made in (tuned, distilled))


@pytest.mark.slow
def test_the_id_that_pads_decides_nothing(tmp_path):
    """A padding token that the model has no column for, or that is the end token, changes no weight."""
    beyond = tiny_tokenizer()
    beyond.add_special_tokens({"pad_token": "[PAD]"})
    found = []
    for index, tokenizer in enumerate((tiny_tokenizer(), tiny_tokenizer(pad="own"), beyond)):
        model = tiny_model(layers=1, seed=3)
        finetuner(tmp_path / str(index), model, tokenizer, learning_rate=1e-2).train()
        found.append(torch.cat([weight.flatten() for weight in model.state_dict().values()]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
