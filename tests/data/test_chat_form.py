"""The chat template that is saved with a model writes what the model was trained on."""

from datetime import date

import jinja2
import pytest
from tests.data.test_data import CHATML, END, STOP, byte_tokenizer, chatting, framing, plain
from transformers import AutoTokenizer

from promptkd.data import Example, Instruction, encode_examples, examples_from_rows, resolve_template
from promptkd.data.chat_form import prompt_end, saved_chat_template, template_of_training, tokenizer_as_trained
from promptkd.data.summary import template_note
from promptkd.data.templates import TRAINED_ON
from promptkd.errors import RequestError

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
    expected = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, **given)
    found = reloaded(tokenizer_as_trained(tokenizer, resolve_template("auto", tokenizer, given)), tmp_path)
    assert found.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == expected
    other = found.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, thinks=False, who="")
    assert other.endswith("<none>1NoneFalse")
    again = tokenizer_as_trained(found, resolve_template("auto", found, given))
    assert again.chat_template == found.chat_template
    tokenizer.chat_template = {"default": text, "tool_use": CHATML}
    named = tokenizer_as_trained(tokenizer, resolve_template("auto", tokenizer, given)).chat_template
    assert named == {"default": found.chat_template, "tool_use": named["tool_use"]}
    assert named["tool_use"].endswith(CHATML)


@pytest.mark.parametrize("value", [float("inf"), date(2026, 1, 2)])
def test_variables_that_no_chat_template_can_hold_leave_it_as_it_is(value):
    tokenizer = chatting("{{ who }}" + CHATML)
    found = tokenizer_as_trained(tokenizer, resolve_template("auto", tokenizer, {"who": value}))
    assert found is tokenizer


def test_white_space_before_a_chat_template_stays(tmp_path):
    text = "\n  {{ who }}" + CHATML
    tokenizer, given = chatting(text), {"who": "x"}
    expected = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, **given)
    found = reloaded(tokenizer_as_trained(tokenizer, resolve_template("auto", tokenizer, given)), tmp_path)
    assert found.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == expected


HEAD, TAIL = "<|im_start|>user\n{{ instruction }}", "<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "text", [f"{HEAD}{{% if input %}} {{{{ input }}}}{{% endif %}}{TAIL}", CHATML.partition("{% if")[0] + TAIL[11:]]
)
def test_a_chat_template_that_writes_the_same_stays(tmp_path, text):
    tokenizer = byte_tokenizer(special=(END, "<|im_start|>", STOP), eos_token=STOP, chat_template=CHATML)
    found = saved(tokenizer, text, tmp_path)
    assert (found.chat_template, found.init_kwargs[TRAINED_ON]) == (CHATML, text)


@pytest.mark.parametrize(
    "text",
    [
        HEAD + " " + TAIL,
        "{{ system }}" + HEAD + TAIL,
        "{% for asked, answered in history %}{{ asked }}={{ answered }};{% endfor %}" + HEAD + TAIL,
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}<|im_start|>assistant\n",
    ],
)
def test_one_that_writes_systems_or_earlier_turns_otherwise_does_not(tmp_path, text):
    tokenizer = byte_tokenizer(special=(END, "<|im_start|>", STOP), eos_token=STOP, chat_template=CHATML)
    assert saved(tokenizer, text, tmp_path).chat_template != CHATML


def test_one_without_the_bos_that_training_had_gets_it(tmp_path):
    tokenizer, row = framing(), {"instruction": "Hi", "output": "Ho"}
    tokenizer.chat_template = "{% for m in messages %}Q{{ m.content }}{% endfor %}"
    (trained,) = encode_examples(examples_from_rows([row]), tokenizer, "Q{{ instruction }}").examples
    found = saved(tokenizer, "Q{{ instruction }}", tmp_path)
    asked = [{"role": "user", "content": "Hi"}]
    assert found.apply_chat_template(asked, add_generation_prompt=True, return_dict=False) == trained.prompt_ids
    assert trained.prompt_ids[0] == tokenizer.bos_token_id


def test_a_developer_is_a_system_and_other_roles_are_refused(tmp_path):
    found = saved(plain(), "{{ system }}|{{ instruction }}", tmp_path)
    assert rendered(found, ("developer", "S"), ("user", "Hi")) == rendered(found, ("system", "S"), ("user", "Hi"))
    with pytest.raises(jinja2.TemplateError, match="knows no message of the role tool"):
        rendered(found, ("user", "Hi"), ("tool", "42"))


def test_text_parts_of_an_answer_are_its_text(tmp_path):
    found = saved(chatting(), SAID, tmp_path)
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "u"}]
    assert rendered(found, ("user", "Hi"), answer=parts) == rendered(found, ("user", "Hi"), answer="Hu")


def test_rows_of_messages_are_rendered_by_the_saved_chat_template(tmp_path):
    said = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "He"},
    ]
    row = {"messages": [*said, {"role": "assistant", "content": "Hu"}]}
    for number, text in enumerate(("alpaca", "Q{{ instruction }}A")):
        found = saved(plain(), text, tmp_path / str(number))
        by_auto, by_chat = (
            encode_examples(examples_from_rows([row]), found, name).examples for name in ("auto", "chat")
        )
        assert [each.prompt_ids + each.response_ids for each in by_auto] == [
            each.prompt_ids + each.response_ids for each in by_chat
        ]
        with pytest.raises(RequestError):
            encode_examples(examples_from_rows([row]), plain(), text)


def test_the_template_of_a_training():
    rendered_rows = encode_examples(examples_from_rows([{"instruction": "Hi", "output": "Ho"}]), plain(), "alpaca")
    assert template_of_training(rendered_rows, "auto", chatting()).name == "alpaca"  # as they were encoded
    written = examples_from_rows([{"prompt": each.prompt, "completion": "Ho"} for each in rendered_rows.examples])
    texts = encode_examples(written, chatting())
    assert template_of_training(texts, "alpaca", chatting()).name == "alpaca"  # the texts end as it does
    assert template_of_training(texts, "chat", chatting()) is None
    other = encode_examples(examples_from_rows([{"prompt": "Hi", "completion": "Ho"}]), chatting())
    for name in ("alpaca", "auto", "Q{{ instruction }}"):
        assert template_of_training(other, name, chatting()) is None
    assert tokenizer_as_trained(tokenizer := plain(), None) is tokenizer


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("alpaca", "\n\n### Response:\n"),
        ("chat", "<|im_end|>\n<|im_start|>assistant\n"),
        ("{{ messages[-1].content }}]", "]"),
        ("{{ instruction }}", ""),
        ("{{ messages[7].content }}", ""),
    ],
)
def test_what_a_template_writes_after_a_request(text, end):
    assert prompt_end(resolve_template(text, chatting())) == end


@pytest.mark.parametrize("held", ["foo", "chat", 3, ""])
def test_what_is_no_template_in_the_tokenizers_files_is_refused_by_its_key(held):
    tokenizer = plain()
    tokenizer.init_kwargs[TRAINED_ON] = held
    with pytest.raises(RequestError, match="promptkd_template must be alpaca or a Jinja text in "):
        resolve_template("auto", tokenizer)
    assert resolve_template("alpaca", tokenizer).name == "alpaca"


def test_where_none_can_be_written_there_is_none_and_it_is_told(tmp_path):
    fails, other = (
        "{{ messages[0].nothing.more }}",
        "{{ instruction | tojson }}",
    )  # which chat templates escape otherwise
    for text in (fails, other):
        assert saved_chat_template(plain(), resolve_template(text, plain())) is None
        found = saved(chatting(), text, tmp_path)
        assert (found.chat_template, found.init_kwargs[TRAINED_ON]) == (None, text)
        note = template_note(resolve_template(text, plain()), "M", "last", plain())
        assert note.endswith("who serves the model must render its prompts so.")
    assert "serves" not in template_note(resolve_template("alpaca", plain()), "M", "last", plain())
