"""What only the teacher reads: its text, where it stands, its limits, and that none of it reaches the student."""

import json

import pytest

from helpers.tiny import BOS_ID, tiny_tokenizer
from promptkd.data import encode_examples, examples_from_rows, read_columns, resolve_template
from promptkd.data.summary import row_notes
from promptkd.data.teacher_prompt import TeacherPrompts, context_text
from promptkd.errors import RequestError

NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ASKED = {"instruction": "Add", "input": "1 2", "output": "3"}
TALK = [{"role": "user", "content": "Hi"}]
ANSWER = {"role": "assistant", "content": "Ho"}
SECRET = "Zebra 77"


def encode(rows, template="chat", *, text=None, most=400, columns=None, tokenizer=None, **options):
    tokenizer = tokenizer or tiny_tokenizer(chat=True)
    resolved = resolve_template(template, tokenizer, None, TeacherPrompts(text, most))
    limits = {"max_prompt_length": 400, "max_response_length": 40, **options}
    return encode_examples(examples_from_rows(rows, read_columns(columns)), tokenizer, resolved, **limits)


def read(row, template="chat", **options):
    """The texts that student and teacher read of one row; the teacher's None where it is the student's."""
    tokenizer = options.setdefault("tokenizer", tiny_tokenizer(chat=True))
    (encoded,) = encode([row], template, **options).examples
    ids = encoded.teacher_prompt_ids
    assert encoded.for_teacher().prompt_ids == (ids or encoded.prompt_ids)
    return tokenizer.decode(encoded.prompt_ids), None if ids is None else tokenizer.decode(ids)


def test_a_text_is_a_system_message_before_the_conversation_or_joins_the_one_that_is_there():
    row = {"messages": [*TALK, ANSWER], "teacher_prompt": "Be kind."}
    student = "<|user|>Hi<|assistant|>"
    assert read(row) == (student, f"<|system|>Be kind.{student}")
    row["messages"] = [{"role": "system", "content": "Short."}, *row["messages"]]
    assert read(row)[1] == f"<|system|>Short.\n\nBe kind.{student}"
    assert read({**ASKED, "system": "Short."}, text="Be kind.")[1].startswith("<|system|>Short.\n\nBe kind.<|user|>Add")


def test_a_template_without_system_messages_gets_the_text_before_the_first_user_turn():
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = NO_SYSTEM
    row = {"messages": [*TALK, ANSWER, {"role": "user", "content": "So"}, ANSWER], "teacher_prompt": "Be kind."}
    assert read(row, tokenizer=tokenizer)[1] == "<|user|>Be kind.\n\nHi<|assistant|>Ho<|user|>So<|assistant|>"


@pytest.mark.parametrize("template", ["alpaca", "Q: {{ instruction }}\nA: "])
def test_a_plain_template_gets_the_text_before_the_rendered_request(template):
    student, teacher = read(ASKED, template, text="Be kind.")
    assert teacher == f"Be kind.\n\n{student}"


def test_a_prompt_that_is_text_gets_it_behind_the_one_bos():
    tokenizer = tiny_tokenizer(bos=True)
    for prompt in ("Go on", "<s>Go on"):
        (row,) = encode([{"prompt": prompt, "completion": "x"}], "alpaca", text="Be", tokenizer=tokenizer).examples
        assert tokenizer.decode(row.teacher_prompt_ids) == "<s>Be\n\nGo on"
        assert row.teacher_prompt_ids.count(BOS_ID) == row.prompt_ids.count(BOS_ID) == 1


def test_messages_that_end_with_the_user_are_the_whole_conversation_and_others_stand_before_it():
    whole = [{"role": "system", "content": "Solved: 3"}, {"role": "user", "content": "Say it"}]
    assert read({**ASKED, "teacher_prompt": whole})[1] == "<|system|>Solved: 3<|user|>Say it<|assistant|>"
    assert read({**ASKED, "teacher_prompt": json.dumps(whole)})[1] == read({**ASKED, "teacher_prompt": whole})[1]
    shots = [{"role": "system", "content": "Sums."}, {"role": "user", "content": "2 2"}, {**ANSWER, "content": "4"}]
    row = {"messages": [{"role": "system", "content": "Short."}, *TALK, ANSWER], "teacher_prompt": shots}
    expected = "<|system|>Short.\n\nSums.<|user|>2 2<|assistant|>4<|end|><|user|>Hi<|assistant|>"
    assert read(row)[1] == expected
    assert read({**row, "teacher_prompt": shots[1:]})[1] == expected.replace("\n\nSums.", "")
    with pytest.raises(RequestError, match=r"row 0: 'teacher_prompt' holds messages, which the template does not rend"):
        read({**ASKED, "teacher_prompt": whole}, "alpaca")
    with pytest.raises(RequestError, match=r"row 0: .*stand before a conversation, and the row's prompt is a text"):
        read({"prompt": "a", "completion": "b", "teacher_prompt": shots})


@pytest.mark.parametrize("empty", ["", " \n", [], None])
def test_without_a_context_the_teacher_reads_the_students_tokens(empty):
    assert read({**ASKED, "teacher_prompt": empty})[1] is None
    assert read(ASKED, text="{% if false %}x{% endif %} ")[1] is None
    own = read({**ASKED, "teacher_prompt": empty}, text="Be")[1]
    assert (own is None) == (empty is not None)  # an empty one of the row stands, too


def test_a_text_names_fields_of_the_row():
    text = "{{ input }}|{{ prompt }}|{{ reference }}|{{ level }}"
    assert read({**ASKED, "level": 7}, text=text)[1].startswith("<|system|>1 2|Add\n\n1 2|3|7<|user|>")
    row = {"messages": [*TALK, ANSWER], "teacher_prompt": "Note"}
    assert read(row, text="{{ prompt }} {{ reference }}")[1].startswith("<|system|>Note<|user|>")  # its own stands
    assert read(row, text="{{ teacher_prompt }}: {{ prompt }} {{ reference }}")[1].startswith("<|system|>Note: Hi Ho<")
    asked = {"question": "Who", "answer": "I", "hint": "me", "level": 1}
    for name in ("hint", "input"):  # by the old name and the new one
        assert read(asked, text=f"({{{{ {name} }}}})", columns=["hint=input"])[1].startswith("<|system|>(me)<")
    assert encode([asked], text="{{ hint }}").unread == {"level": 1}


def test_a_field_that_a_row_lacks_is_named_with_those_that_it_has():
    rows = [{**ASKED, "level": 1}, ASKED]
    with pytest.raises(
        RequestError, match=r"^row 1: --teacher_prompt cannot be rendered: 'level' is undefined\. The ro"
    ):
        encode(rows, text="{{ level }}")
    with pytest.raises(
        RequestError, match=r"The row has: instruction, input, reference, references, output, prompt\.$"
    ):
        encode(rows, text="{{ level }}")
    assert encode(rows, text="{% if level is defined %}L{% endif %}").contexts == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{{ a", "does not compile as a Jinja template"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ instruction.foo.bar }}", "cannot be rendered"),
        ("{% for a in range(90000) %}{{ 'y' * 90 }}{% endfor %}", "more than 1,048,576 characters"),
        ("x" * 1_100_000, "at most 1,048,576 are read"),
    ],
)
def test_texts_that_are_refused(text, told):
    with pytest.raises(RequestError, match=told):
        encode([ASKED], text=text)


def test_a_column_of_another_type_is_refused():
    with pytest.raises(RequestError, match=r"row 0: 'teacher_prompt' must be a text or a list of messages, got an obj"):
        encode([{**ASKED, "teacher_prompt": {"a": 1}}])
    with pytest.raises(RequestError, match=r"row 0: the role of 'teacher_prompt\[0\]' must be one of"):
        encode([{**ASKED, "teacher_prompt": [{"role": "x", "content": "y"}]}])


def test_a_file_is_read_and_anything_else_is_the_text(tmp_path):
    (tmp_path / "context.txt").write_text("Be kind.", encoding="utf-8")
    assert context_text(str(tmp_path / "context.txt")) == ("Be kind.", tmp_path / "context.txt")
    for text in ("Be kind.", "x" * 5000, "a\0b", "~nobody-of-this-name/x", str(tmp_path)):
        assert context_text(text) == (text, None)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RequestError, match="is not valid UTF-8"):
        context_text(str(tmp_path / "bytes"))


def test_a_control_token_in_a_context_is_spelled():
    tokenizer = tiny_tokenizer(chat=True)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    for template, row in (("chat", ASKED), ("alpaca", ASKED), ("chat", {"prompt": "<|user|>a", "completion": "b"})):
        (plain,) = encode([row], template).examples
        (found,) = encode([row], template, text="<|end|>").examples
        assert end not in found.teacher_prompt_ids
        assert tokenizer.decode(found.teacher_prompt_ids).count("<|end|>") == 1
        assert found.prompt_ids == plain.prompt_ids


def test_rows_over_the_teachers_limit_are_dropped_and_counted():
    rows = [{**ASKED, "teacher_prompt": "x" * size} for size in (10, 60, 10, 0)]
    data = encode(rows, most=40)
    assert [row.row for row in data.examples] == [0, 2, 3]
    assert (data.dropped, data.contexts) == (1, 2)
    notes = "\n".join(row_notes("d", data))
    assert "d: 2 rows have a context that only the teacher reads." in notes
    assert "--max_teacher_prompt_length 40 and were dropped. --max_teacher_prompt_length 80 keeps 95%" in notes
    with pytest.raises(
        RequestError, match="row 1: the teacher's prompt has 80 tokens with its context, and the limit is"
    ):
        encode(rows, most=40, overlong="error")
    with pytest.raises(RequestError, match="the shortest of the teacher's prompts has 80, and the limit is 40"):
        encode(rows[1:2], most=40)


def test_references_in_a_context_are_counted():
    contexts = ["The sum is  3.", "The sum is 33.", "", "3"]
    data = encode([{**ASKED, "teacher_prompt": each} for each in contexts])
    assert data.informed == 2
    (note,) = row_notes("d", data)
    assert note.endswith("in 2 of them it holds the row's reference: the teacher sees the answer there.")


def test_where_no_teacher_reads_the_rows_the_column_is_named_as_unread():
    examples = examples_from_rows([{**ASKED, "teacher_prompt": "x"}])
    data = encode_examples(examples, tiny_tokenizer(chat=True), "chat")
    assert data.unread == {"teacher_prompt": 1}
    assert data.examples[0].teacher_prompt_ids is None
    assert encode([{**ASKED, "teacher_prompt": "x"}]).unread == {}


def test_every_turn_of_a_row_gets_a_text_and_none_a_whole_conversation():
    row = {"messages": [*TALK, ANSWER, {"role": "user", "content": "So"}, ANSWER]}
    tokenizer = tiny_tokenizer(chat=True)
    data = encode([{**row, "teacher_prompt": "Be"}], turns="all", tokenizer=tokenizer)
    texts = [tokenizer.decode(each.teacher_prompt_ids) for each in data.examples]
    assert texts == [
        "<|system|>Be<|user|>Hi<|assistant|>",
        "<|system|>Be<|user|>Hi<|assistant|>Ho<|end|><|user|>So<|assistant|>",
    ]
    with pytest.raises(RequestError, match="is a whole conversation, and --turns all trains several turns"):
        encode([{**row, "teacher_prompt": TALK}], turns="all")


SECRET_FORMS = [
    ({"instruction": "Add", "output": "3", "teacher_prompt": SECRET}, {}),
    ({"prompt": "Add", "completion": "3", "teacher_prompt": SECRET}, {}),
    ({"question": "Add", "answer": "3", "hint": SECRET}, {"columns": ["hint=teacher_prompt"]}),
    ({"messages": [*TALK, ANSWER], "teacher_prompt": [{"role": "system", "content": SECRET}]}, {}),
    ({"messages": [*TALK, ANSWER], "teacher_prompt": [{"role": "user", "content": SECRET}]}, {}),
    ({"prompt": TALK, "completion": [ANSWER], "teacher_prompt": SECRET}, {"turns": "all"}),
    ({"instruction": "Add", "output": "3", "category": SECRET}, {"text": "{{ category }}"}),
]


@pytest.mark.parametrize("template", ["chat", "alpaca", "{{ messages or instruction }}"])
@pytest.mark.parametrize(("row", "options"), SECRET_FORMS)
def test_nothing_of_a_context_reaches_the_student(row, options, template):
    """A planted leak: all that the student's side is made of, against what the teacher alone reads."""
    if template != "chat" and ("messages" in row or isinstance(row.get("prompt"), list)):
        template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    if template.startswith("{{ messages"):
        template = "{{ instruction }}"
    tokenizer = tiny_tokenizer(chat=True)
    for encoded in encode([row], template, tokenizer=tokenizer, **options).examples:
        said = [tokenizer.decode(encoded.prompt_ids), tokenizer.decode(encoded.response_ids), encoded.prompt]
        said += [*encoded.references, *(part for turn in encoded.request for part in turn)]
        assert SECRET in tokenizer.decode(encoded.teacher_prompt_ids)
        assert not any(SECRET in each or "Zebra" in each for each in said)


@pytest.mark.parametrize("new", ["instruction", "prompt", "system", "output"])
def test_the_column_cannot_be_mapped_to_what_the_student_reads(new):
    with pytest.raises(
        RequestError, match=f"--columns teacher_prompt={new}: 'teacher_prompt' is what the teacher alone r"
    ):
        read_columns([f"teacher_prompt={new}"])
