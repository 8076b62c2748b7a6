"""Modelfiles for Ollama: a template stands there only if it writes what the tokenizer's own writes."""

import re
from pathlib import Path

import pytest

from helpers.byte_level import byte_level, byte_model
from helpers.commands import done, run
from helpers.tiny import save_model, tiny_model, tiny_tokenizer
from promptkd.data.rows import Example, Instruction
from promptkd.data.templates import resolve_template
from promptkd.models.modelfile import modelfile

ASKS = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
LOOP = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}" + ASKS
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
TRANSLATED = {
    "ChatML": LOOP,
    "a default system message": "{% if messages[0].role != 'system' %}<|system|>\nBe kind.<|end|>\n{% endif %}" + LOOP,
    "begun with BOS": "{{ bos_token }}" + LOOP,
    "trimmed, another name for the assistant": "{{ bos_token }}{% for m in messages %}<{{ 'model' if m.role == "
    "'assistant' else m.role }}>{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<model>{% endif %}",
    "no system message": NO_SYSTEM + LOOP,
    "no generation prompt": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "an empty thought": LOOP.replace("<|assistant|>\n{% endif %}", "<|assistant|>\n<think>\n\n</think>\n{% endif %}"),
}
NOT_TRANSLATED = {
    "the system message within the request": "{% for m in messages %}{% if m.role != 'system' %}<|{{ m.role }}|>"
    "{{ messages[0].content if loop.index == 2 and messages[0].role == 'system' }}{{ m.content }}{% endif %}"
    "{% endfor %}",
    "the last message alone": "{{ messages[-1].content }}" + ASKS,
    "the first request marked": LOOP.replace("{{ m.content }}", "{{ 'First: ' if loop.first }}{{ m.content }}"),
    "a date": "{{ strftime_now('%d %b') }}" + LOOP,
    "braces of Ollama's language": "{% raw %}{{{% endraw %}" + LOOP,
    "upper case": LOOP.replace("m.content", "m.content | upper"),
}


def written(template: str, tokenizer=None) -> str:
    tokenizer = tokenizer or tiny_tokenizer(bos=True)
    tokenizer.chat_template = template
    return modelfile("tiny.gguf", tiny_model("llama"), tokenizer)


def as_ollama(text: str, messages: list[dict[str, str]], *, bos: str) -> str:
    """What Ollama renders, for the few words of its language that are used here."""
    (template,) = re.findall(r'^TEMPLATE """(.*?)"""$', text, re.DOTALL | re.MULTILINE)
    default = re.findall(r'^SYSTEM """(.*?)"""$', text, re.DOTALL | re.MULTILINE)
    if default and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": default[0]}, *messages]
    start, body, generation = re.fullmatch(
        r"(.*?)\{\{ range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)", template, re.DOTALL
    ).groups()
    parts = dict(re.findall(r'if eq \.Role "(\w+)" \}\}(.*?)(?=\{\{ else|\Z)', body, re.DOTALL))
    return (
        bos + start + "".join(parts[m["role"]].replace("{{ .Content }}", m["content"]) for m in messages) + generation
    )


@pytest.mark.parametrize("name", TRANSLATED)
def test_a_translated_template_writes_the_same_prompts(name):
    tokenizer = tiny_tokenizer(bos=True)
    text = written(TRANSLATED[name], tokenizer)
    assert text.startswith("# ollama create NAME -f THIS_FILE\nFROM ./tiny.gguf\n")
    for roles in (["user"], ["user", "assistant", "user"], ["system", "user"], ["system", "user", "assistant", "user"]):
        if roles[0] == "system" and "raise_exception" in TRANSLATED[name]:
            continue
        messages = [{"role": role, "content": f"the {place}"} for place, role in enumerate(roles)]
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        starts = "bos_token" in TRANSLATED[name]  # llama.cpp writes it, as this tokenizer does
        assert as_ollama(text, messages, bos="<s>" if starts else "") == expected


@pytest.mark.parametrize("name", NOT_TRANSLATED)
def test_what_is_not_certain_is_shown_and_not_translated(name):
    text = written(NOT_TRANSLATED[name])
    assert "\nTEMPLATE" not in text
    assert "# No TEMPLATE: " in text
    assert f"#   {NOT_TRANSLATED[name].splitlines()[0]}" in text
    assert all(line.startswith(("#", "FROM", "PARAMETER")) or not line for line in text.splitlines())


@pytest.mark.parametrize(
    "template",
    [
        "{% if tools %}<|tools|>{% for t in tools %}{{ t | tojson }}{% endfor %}\n{% endif %}" + LOOP,
        LOOP.replace("{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c }}{% endfor %}"),
    ],
)
def test_tools_that_are_not_translated_are_said(template):
    with_tools, plain = written(template), written(LOOP)
    comment = [line for line in with_tools.splitlines() if line not in plain.splitlines()]
    assert [line[0] for line in comment] == ["#", "#"]
    assert "renders tools" in comment[0]
    assert "TEMPLATE" in plain
    assert as_ollama(with_tools, [{"role": "user", "content": "Hi"}], bos="") == "<|user|>\nHi<|end|>\n<|assistant|>\n"


def test_a_bos_that_the_tokenizer_does_not_write_stays_in_the_template():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<s>"
    assert 'TEMPLATE """<s>{{ range' in written(TRANSLATED["begun with BOS"], tokenizer)
    assert 'TEMPLATE """{{ range' in written(TRANSLATED["begun with BOS"])


@pytest.mark.parametrize("template", ["alpaca", "Q: {{ instruction }}\nA: "])
def test_a_template_of_single_requests(template):
    tokenizer = tiny_tokenizer()
    text = modelfile("tiny.gguf", tiny_model("llama"), tokenizer, template)
    (found,) = re.findall(r'^TEMPLATE """(.*?)"""$', text, re.DOTALL | re.MULTILINE)
    expected = resolve_template(template, tokenizer).render(Example(Instruction("the ant", ""), (), "row 0", 0))
    assert found.replace("{{ .Prompt }}", "the ant") == expected
    assert modelfile("tiny.gguf", tiny_model("llama"), tokenizer, "auto") == modelfile(
        "tiny.gguf", tiny_model("llama"), tokenizer, "alpaca"
    )


def test_ends_and_temperature():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    assert modelfile("t.gguf", model, tokenizer).endswith('\n\nPARAMETER stop "<|end|>"\nPARAMETER temperature 0\n')
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(each) for each in ("<|end|>", "<|user|>")]
    model.generation_config.do_sample, model.generation_config.temperature = True, 0.7
    assert modelfile("t.gguf", model, tokenizer).endswith("PARAMETER temperature 0.7\n")
    model.generation_config.temperature = None  # as transformers reads a file that names none
    text = modelfile("t.gguf", model, tokenizer)
    assert re.findall(r'^PARAMETER stop "(.*)"$', text, re.MULTILINE) == ["<|end|>", "<|user|>"]
    assert text.endswith("PARAMETER temperature 1.0\n")


def test_the_variables_of_the_runs_chat_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = LOOP + "{% if enable_thinking is defined and not enable_thinking %}<none>{% endif %}"
    texts = [
        modelfile("t.gguf", tiny_model("llama"), tokenizer, "auto", given)
        for given in (None, {"enable_thinking": False})
    ]
    assert ["<none>" in text for text in texts] == [False, True]


@pytest.mark.slow
def test_export_writes_it_beside_the_file_by_the_runs_template(tmp_path, capsys):
    save_model(tmp_path / "run" / "student", byte_model("llama"), byte_level(chat=False))
    (tmp_path / "run" / "config.yaml").write_text(
        'template: "Ask {{ instruction }}!"\ndata: d.jsonl\nout: run\nkeep: 2\n'
    )
    request = ("export", tmp_path / "run", "--to", "gguf", "--out", tmp_path / "my.gguf")
    said = done(capsys, *request).err
    text = Path(tmp_path / "my.Modelfile").read_text()
    assert 'FROM ./my.gguf\n\nTEMPLATE """Ask {{ .Prompt }}!"""' in text
    assert f"with the prompt's template: ollama create my -f {tmp_path / 'my.Modelfile'}" in said
    (tmp_path / "my.gguf").unlink()
    again = run(capsys, *request)
    assert again.status == 2
    assert "my.Modelfile exists" in again.err
    done(capsys, *request, "--overwrite")
