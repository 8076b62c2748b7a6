"""The chat template that is saved with a model writes what the model was trained on."""

import pytest
from tests.data.test_data import CHATML, END, STOP, byte_tokenizer, chatting, framing, plain
from transformers import AutoTokenizer

from promptkd.data import Example, Instruction, encode_examples, examples_from_rows, resolve_template
from promptkd.data.chat_form import chat_form, tokenizer_as_trained
from promptkd.data.summary import template_note
from promptkd.data.templates import ALPACA, TRAINED_ON

HISTORY = "{{ system }}{% for asked, answered in history %}{{ asked }}={{ answered }};{% endfor %}{{ instruction }}="
TEXTS = {
    "alpaca": "alpaca",
    "plain": "Q: {{ instruction }}\nA:",
    "an input": "<|im_start|>user\n{{ instruction }}{% if input %}\n\n{{ input }}{% endif %}<|im_end|>\n",
    "white space": "  {% if system %}\n {{ system }}\n {%- endif %}\n{{ instruction }}\n{% if 1 %}\n{% endif %}\n",
    "comment and raw": "{# not\nwritten -#}  Q '\"\\ é😀 {% raw %}{{ x }}\n{% endraw %}\n{{ instruction | upper }}\n",
    "history": HISTORY,
    "tools": "{{ tools | length }} {{ instruction }}",
    "macro": "{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}{{ twice(instruction) }}",
}
SAID = "{% for m in messages %}\n[{{ m.role }}] {{ m.content }}\n{% endfor %}\n[assistant] "


def reloaded(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def saved(tokenizer, text, folder):
    """The tokenizer as it comes back from the files of a model that was trained on the template `text`."""
    return reloaded(tokenizer_as_trained(tokenizer, resolve_template(text, tokenizer)), folder)


def rendered(tokenizer, *said, answer=None):
    """Messages by the tokenizer's chat template, as others render them: (role, text)."""
    messages = [{"role": role, "content": text} for role, text in said]
    if answer is None:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    messages.append({"role": "assistant", "content": answer})
    return tokenizer.apply_chat_template(messages, tokenize=False)


def asked(text, tokenizer, instruction, **more):
    example = Example(Instruction(instruction, "", **more), (), "row 0", 0)
    return resolve_template(text, tokenizer).render(example)


@pytest.mark.parametrize("tokenizer", [plain, chatting], ids=["no chat template", "another chat template"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_saved_chat_template_writes_what_was_trained(tmp_path, tokenizer, text):
    found = saved(tokenizer(), text, tmp_path)
    for instruction in ("Hi", " <b>{{ x }}</b>\n", "'\"\\n"):
        prompt = asked(text, tokenizer(), instruction)
        assert rendered(found, ("user", instruction)) == prompt
        assert rendered(found, ("user", instruction), answer="Ho\n") == f"{prompt}Ho\n{END}"
        with_system = asked(text, tokenizer(), instruction, system="Be {brief}.")
        assert rendered(found, ("system", "Be {brief}."), ("user", instruction)) == with_system


def test_earlier_turns_are_history_where_the_template_has_one_and_else_one_prompt_after_the_other(tmp_path):
    turns = (("user", "Hi"), ("assistant", "Ho"), ("user", "He"))
    for number, text in enumerate(("alpaca", HISTORY)):
        found = saved(plain(), text, tmp_path / str(number))
        assert rendered(found, *turns) == asked(text, plain(), "He", history=(("Hi", "Ho"),))
    found = saved(plain(), "Q{{ instruction }}A", tmp_path / "single")
    assert rendered(found, *turns) == f"QHiAHo{END}QHeA"
    assert rendered(found, *turns, answer="Hu") == f"QHiAHo{END}QHeAHu{END}"


def test_a_jinja_text_of_messages(tmp_path):
    found, turns = (
        saved(chatting(), SAID, tmp_path),
        (("system", "S"), ("user", "Hi"), ("assistant", "Ho"), ("user", "He")),
    )
    messages = tuple({"role": role, "content": text} for role, text in turns)
    prompt = resolve_template(SAID, chatting()).render(Example(messages, (), "row 0", 0))
    assert rendered(found, *turns) == prompt
    assert rendered(found, *turns, answer="Hu") == f"{prompt}Hu{END}"


def test_tokens_of_text_parts_and_of_a_bos_are_those_of_training(tmp_path):
    row = {"instruction": "Hi", "output": "Ho"}
    trained = encode_examples(examples_from_rows([row]), framing(), "Q: {{ instruction }}\n")
    found = saved(framing(), "Q: {{ instruction }}\n", tmp_path)
    (ids,) = [each.prompt_ids + each.response_ids for each in trained.examples]
    parts = [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]
    messages = [*parts, {"role": "assistant", "content": "Ho"}]
    assert found.apply_chat_template(messages, return_dict=False) == ids
    again = encode_examples(examples_from_rows([row]), found, "chat")
    assert [each.prompt_ids + each.response_ids for each in again.examples] == [ids]


def test_auto_is_what_the_model_was_trained_on_with_its_input(tmp_path):
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    for name in ("alpaca", "{{ instruction }}|{{ input }}|"):
        found = saved(chatting(), name, tmp_path)
        (prompt,) = [each.prompt for each in encode_examples(examples_from_rows([row]), found).examples]
        (trained,) = [each.prompt for each in encode_examples(examples_from_rows([row]), chatting(), name).examples]
        assert prompt == trained
        again = saved(found, "auto", tmp_path / "again")  # trained on, without a word of templates
        assert (again.chat_template, again.init_kwargs[TRAINED_ON]) == (found.chat_template, name)
    assert template_note(resolve_template("auto", found), "M").startswith("Template: the Jinja text, on which M was")
    assert template_note(resolve_template("chat", found), "M") == "Template: the chat template of M."


def test_training_on_a_chat_template_leaves_nothing_of_an_earlier_one(tmp_path):
    found = saved(chatting(), "alpaca", tmp_path / "first")
    found.chat_template = CHATML
    second = saved(found, "chat", tmp_path / "second")
    assert (second.chat_template, second.init_kwargs.get(TRAINED_ON)) == (CHATML, None)
    assert resolve_template("auto", second).name == "chat"
    same = chatting()
    assert tokenizer_as_trained(same, resolve_template("chat", same)) is same


def test_variables_of_the_chat_template_become_its_defaults(tmp_path):
    text = CHATML + "{% if not (thinks is defined and thinks) %}<none>{% endif %}{{ who }}{{ list | join }}"
    given = {"thinks": True, "who": "it's \n é", "list": [1, None, False]}
    tokenizer = chatting(text)
    found = tokenizer_as_trained(tokenizer, resolve_template("auto", tokenizer, given), given)
    expected = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, **given)
    assert rendered(reloaded(found, tmp_path), ("user", "Hi")).removesuffix("<|im_start|>assistant\n") != ""
    assert found.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == expected
    other = found.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, thinks=False, who="")
    assert other.endswith("<none>1NoneFalse")
    again = tokenizer_as_trained(found, resolve_template("auto", found, given), given)
    assert again.chat_template == found.chat_template


def test_a_chat_template_that_writes_the_same_stays(tmp_path):
    tokenizer = byte_tokenizer(special=(END, "<|im_start|>", STOP), eos_token=STOP, chat_template=CHATML)
    head, tail = "<|im_start|>user\n{{ instruction }}", "<|im_end|>\n<|im_start|>assistant\n"
    for text in (head + "{% if input %}\n\n{{ input }}{% endif %}" + tail, CHATML.partition("{% if")[0] + tail[11:]):
        found = saved(tokenizer, text, tmp_path)
        assert (found.chat_template, found.init_kwargs.get(TRAINED_ON)) == (CHATML, None)
    apart = saved(tokenizer, f"{head} {{{{ input }}}}{tail}", tmp_path)
    assert apart.chat_template != CHATML
    assert rendered(apart, ("user", "Hi")) == "<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\n"


def test_where_none_can_be_written_there_is_none_and_it_is_told(tmp_path):
    fails, other = (
        "{{ messages[0].nothing.more }}",
        "{{ instruction | tojson }}",
    )  # which chat templates escape otherwise
    for text in (fails, other):
        assert chat_form(resolve_template(text, plain()), plain()) is None
        found = saved(chatting(), text, tmp_path)
        assert (found.chat_template, found.init_kwargs[TRAINED_ON]) == (None, text)
        note = template_note(resolve_template(text, plain()), "M", "last", plain())
        assert note.endswith("who serves the model must render its prompts so.")
    assert "serves" not in template_note(resolve_template("alpaca", plain()), "M", "last", plain())


def test_alpaca_in_jinja_is_the_alpaca_of_rows():
    for system in ("", "Be."):
        for history in ((), (("a", "b"), ("c", "d"))):
            written = asked(ALPACA, plain(), "Hi", system=system, history=history)
            assert written == asked("alpaca", plain(), "Hi", system=system, history=history)
