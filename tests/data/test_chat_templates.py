"""Rows by the chat templates of published models, of which TRL ships copies."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import trl
from tests.data.test_data import byte_tokenizer
from transformers.utils import chat_template_utils

from promptkd.data import encode_examples, examples_from_rows, resolve_template
from promptkd.data.chat import DAY, ChatTemplate
from promptkd.data.chat_form import tokenizer_as_trained
from promptkd.errors import RequestError

FOLDER = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(file.stem for file in FOLDER.glob("*.jinja") if not file.stem.endswith("_training"))
OF_PARTS = {"idefics3", "llava_next", "smolvlm"}  # take text in parts alone
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}
CALL = {"id": "abcDEF123", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
OPEN_ALWAYS = {"deepseek_r1_distill", "deepseekv3", "qwen3_5_nothink"}  # whatever the answer says of its reasoning
USER = {"role": "user", "content": "Question?"}
ROWS = {
    "plain": [USER, {"role": "assistant", "content": "Answer"}],
    "two turns": [USER, {"role": "assistant", "content": "No"}, USER, {"role": "assistant", "content": "Answer"}],
    "reasoning": [USER, {"role": "assistant", "content": "Answer", "reasoning_content": "Thought"}],
    "call": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
}


def tokenizer_of(name):
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    tokens = set(re.findall(r"<[|｜][^|｜<>\s'\"{}]+[|｜]>|</?[a-zA-Z_]+>|<\|?\w+\|?>|\[/?[A-Z_]+\]", source))
    special = [*sorted(token for token in tokens if len(token) > 3), "<bos>", "<eos>"]
    return byte_tokenizer(special=dict.fromkeys(special), bos_token="<bos>", eos_token="<eos>", chat_template=source)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_prompt_and_target_are_the_templates_text_or_the_row_is_refused_for_that(name, monkeypatch):
    tokenizer = tokenizer_of(name)
    template, refused = resolve_template("chat", tokenizer), {}
    for kind, messages in ROWS.items():
        tools = [TOOL] if kind == "call" else None
        examples = examples_from_rows([{"messages": messages, "tools": tools}])
        try:
            (encoded,) = encode_examples(examples, tokenizer, template, max_prompt_length=9999).examples
        except RequestError as error:
            refused[kind] = str(error)
            continue
        target = tokenizer.decode(encoded.response_ids)
        assert kind == "call" or "Answer" in target
        if name in OF_PARTS:
            continue
        monkeypatch.setattr(chat_template_utils, "datetime", SimpleNamespace(now=lambda: DAY))
        whole = tokenizer.apply_chat_template(messages, tools, tokenize=False)
        bare = target.removesuffix("<eos>")  # written by us where the template ends no turn
        assert whole.startswith(encoded.prompt + bare) or (kind == "reasoning" and "Thought" not in whole)
        assert whole.count("Answer") == target.count("Answer")
    assert all("does not write" in each or "is not how the chat template begins" in each for each in refused.values())
    if name not in OPEN_ALWAYS:
        assert "reasoning" not in refused
    assert "plain" not in refused or name.startswith(("deepseek", "nemotron"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_5_think", "qwen3_6", "qwen3_8", "nemotron_3_nano", "qwen3", "glm4moe"])
def test_reasoning_in_the_content_stands_once_behind_the_prompt(name):
    tokenizer = tokenizer_of(name)
    row = {"messages": [USER, {"role": "assistant", "content": "<think>\nThought\n</think>\n\nAnswer"}]}
    (encoded,) = encode_examples(examples_from_rows([row]), tokenizer).examples
    text = encoded.prompt + tokenizer.decode(encoded.response_ids)
    assert text.count("<think>") == text.count("</think>") == text.count("Thought") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_variables_become_the_defaults_of_published_templates(name):
    """Of those that a template names; and each tokenizer can be saved with what writes Alpaca in its place."""
    tokenizer, rendered = tokenizer_of(name), 0
    said = [message for message in ROWS["two turns"][:3] if name not in OF_PARTS]
    for given in ({"enable_thinking": False}, {"thinking": True}, {"date_string": "01 Mar 2026"}):
        if not ChatTemplate(tokenizer).names(*given):
            continue
        template = resolve_template("chat", tokenizer, given)
        saved = tokenizer_as_trained(tokenizer, template)
        assert saved.chat_template != tokenizer.chat_template
        if said:
            expected = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True, **given)
            assert saved.apply_chat_template(said, tokenize=False, add_generation_prompt=True) == expected
            rendered += 1
    assert rendered > 0 or not re.search(r"\b(enable_thinking|thinking|date_string)\b", tokenizer.chat_template)
    alpaca = tokenizer_as_trained(tokenizer, resolve_template("alpaca", tokenizer))
    asked = alpaca.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert asked.endswith("### Instruction:\nQuestion?\n\n### Response:\n")
