"""The flat example runs as it is written. That its steps are the trainer's is held by training/test_trainer.py."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import minimal_loop
from helpers.tiny import END_ID, save_model, tiny_model, tiny_tokenizer


@pytest.mark.slow
def test_it_trains_a_student_from_the_command_line(tmp_path, monkeypatch, capsys):
    save_model(tmp_path / "teacher", tiny_model("llama", hidden=24, seed=1))
    save_model(tmp_path / "small", tiny_model("llama", layers=2, seed=2))
    (tmp_path / "requests.txt").write_text("the cat\n\nan ant\n")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    minimal_loop.main("teacher", "small", "requests.txt", steps=3, batch_size=2, limit=5)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 1/3", "step 2/3", "step 3/3"]
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("small", "student"))
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert any(moved)


@pytest.mark.slow
def test_a_sample_ends_with_its_eos_or_at_the_limit():
    model = tiny_model("llama")
    torch.manual_seed(0)
    for _ in range(20):
        response = minimal_loop.sample(model, [5, 6], END_ID, 7)
        assert END_ID not in response[:-1]
        assert len(response) == 7 or response[-1] == END_ID


def test_the_prompt_starts_from_the_text_without_special_tokens():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(bos=True)
    ids = tokenizer(minimal_loop.PROMPT_TEXT, add_special_tokens=False)["input_ids"]
    expected = model.get_input_embeddings().weight[ids[: minimal_loop.PROMPT_LENGTH]]
    assert torch.equal(minimal_loop.start_prompt(model, tokenizer), expected)
