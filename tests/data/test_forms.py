"""Every form of row, as the text of its prompt and of its target."""

import json

import pytest
from tests.data.test_data import CHATML, END, START, STOP, byte_tokenizer, chatting, plain, write

from promptkd.data import encode_examples, examples_from_rows, read_columns, read_examples, resolve_template
from promptkd.data.summary import prompt_notes, row_counts, row_notes, template_note
from promptkd.data.tokens import Spelling
from promptkd.errors import RequestError

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n"
)
USER = {"role": "user", "content": "Hi"}
HI = ("user", "Hi")
HO = {"role": "assistant", "content": "Ho"}


def chatml(*turns):
    """The prompt of turns (role, text)."""
    said = "".join(f"{START}{role}\n{text}{STOP}\n" for role, text in turns)
    return f"{said}{START}assistant\n"


def texts(row, tokenizer, *, template="auto", columns=None, kwargs=None, **options):
    """The decoded prompt and target of every example of a row, and the columns that nothing reads."""
    options = {"max_prompt_length": 5000, "max_response_length": 5000, **options}
    resolved = resolve_template(template, tokenizer, kwargs)
    data = encode_examples(examples_from_rows([row], read_columns(columns)), tokenizer, resolved, **options)
    pairs = [(tokenizer.decode(each.prompt_ids), tokenizer.decode(each.response_ids)) for each in data.examples]
    return pairs, list(data.unread)


INSTRUCTIONS = [
    ({"instruction": "Add.", "input": "", "output": "3", "text": "all"}, ALPACA.format("Add."), "3", ["text"]),
    ({"instruction": "Add.", "input": "1 2", "output": ["3", "three"]}, WITH_INPUT.format("Add.", "1 2"), "3", []),
    (
        {"instruction": "When?", "context": "In 1910.", "response": "1910", "category": "closed_qa"},
        WITH_INPUT.format("When?", "In 1910."),
        "1910",
        ["category"],
    ),
    ({"instruction": "When?", "context": None, "response": "1910"}, ALPACA.format("When?"), "1910", []),
    ({"question": "When?", "answer": "1910"}, ALPACA.format("When?"), "1910", []),
    ({"question": "When?", "context": "C", "answer": "1910", "id": 3}, WITH_INPUT.format("When?", "C"), "1910", ["id"]),
    (
        {
            "title": "T",
            "context": "C",
            "question": "When?",
            "answers": {"text": ["1910", "ten"], "answer_start": [0, 1]},
        },
        WITH_INPUT.format("When?", "C"),
        "1910",
        ["title"],
    ),
    ({"query": "When?", "response": "1910", "type": "x"}, ALPACA.format("When?"), "1910", ["type"]),
    ({"input": "When?", "output": "1910"}, ALPACA.format("When?"), "1910", []),
    (
        {"system_prompt": "Be brief.", "question": "When?", "response": "1910"},
        "Be brief.\n\n### Instruction:\nWhen?\n\n### Response:\n",
        "1910",
        [],
    ),
    (
        {"instruction": "And now?", "output": "c", "system": "S", "history": [["What?", "a"], ["Why?", "b"]]},
        "S\n\n### Instruction:\nWhat?\n\n### Response:\na\n\n### Instruction:\nWhy?\n\n### Response:\nb\n\n"
        "### Instruction:\nAnd now?\n\n### Response:\n",
        "c",
        [],
    ),
    ({"prompt": "Once ", "completion": "upon"}, "Once ", "upon", []),
    ({"prompt": "Once ", "response": "upon"}, "Once ", "upon", []),
    ({"prompt": "Once ", "chosen": "upon", "rejected": "down"}, "Once ", "upon", ["rejected"]),
]


@pytest.mark.parametrize(("row", "prompt", "target", "unread"), INSTRUCTIONS)
def test_instructions_and_texts_by_the_alpaca_template(row, prompt, target, unread):
    assert texts(row, plain()) == ([(prompt, target + END)], unread)


CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
ASKS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
FLAT = {"name": "weather", "arguments": '{"city": "Oslo"}'}
SAID = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CONVERSATIONS = [
    ({"messages": [USER, HO]}, [HI], "Ho", []),
    ({"messages": json.dumps([USER, HO])}, [HI], "Ho", []),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, HO]},
        [HI],
        "Ho",
        [],
    ),
    (
        {"messages": [{**USER, "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, HO]},
        [("user", "a\nb")],
        "Ho",
        [],
    ),
    (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], "source": "x"},
        [HI],
        "Ho",
        ["source"],
    ),
    (
        {"system": "S", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        [("system", "S"), HI],
        "Ho",
        [],
    ),
    (
        {"conversations": [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}, HO], "system": "T"},
        [("system", "S"), HI],
        "Ho",
        ["system"],
    ),
    (
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "function_call", "value": json.dumps(FLAT)},
                {"from": "observation", "value": "5 degrees"},
                {"from": "gpt", "value": "Cold."},
            ],
            "tools": json.dumps([TOOL["function"]]),
        },
        [("tools", json.dumps([TOOL])), HI, ("assistant", SAID), ("tool", "5 degrees")],
        "Cold.",
        [],
    ),
    ({"messages": [USER, ASKS]}, [HI], SAID, []),
    ({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [FLAT]}]}, [HI], SAID, []),
    ({"messages": [USER, {"role": "assistant", "tool_calls": json.dumps([CALL])}]}, [HI], SAID, []),
    ({"messages": [USER, {"role": "assistant", "content": None, "function_call": FLAT}]}, [HI], SAID, []),
    ({"messages": [USER, {"role": "assistant", "content": "I ask.", "tool_calls": [CALL]}]}, [HI], "I ask." + SAID, []),
    ({"messages": [USER, {"role": "assistant", "content": "Ho", "tool_calls": None}], "tools": None}, [HI], "Ho", []),
    ({"messages": [USER, HO], "tools": [TOOL]}, [("tools", json.dumps([TOOL])), HI], "Ho", []),
    ({"prompt": [USER], "completion": [HO]}, [HI], "Ho", []),
    ({"prompt": [USER], "completion": "Ho"}, [HI], "Ho", []),
    (
        {
            "prompt": [USER],
            "completion": [
                {"role": "assistant", "tool_calls": [CALL]},
                {"role": "tool", "content": "5"},
                {"role": "assistant", "content": "Cold."},
            ],
        },
        [HI, ("assistant", SAID), ("tool", "5")],
        "Cold.",
        [],
    ),
    ({"prompt": [USER], "chosen": [HO], "rejected": []}, [HI], "Ho", ["rejected"]),
    ({"prompt": "Hi", "chosen": [USER, HO], "rejected": []}, [HI], "Ho", ["rejected"]),
    ({"prompt": "Another", "chosen": [USER, HO]}, [HI], "Ho", ["prompt"]),
    ({"chosen": [USER, HO], "rejected": []}, [HI], "Ho", ["rejected"]),
    (
        {"instruction": "Hi", "output": "Ho", "system": "S", "history": [["a", "b"]]},
        [("system", "S"), ("user", "a"), ("assistant", "b"), HI],
        "Ho",
        [],
    ),
    (
        {"question": "Hi", "context": "C", "answer": "Ho", "tools": [TOOL]},
        [("tools", json.dumps([TOOL])), ("user", "Hi\n\nC")],
        "Ho",
        [],
    ),
]

CALLS = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% for c in m.tool_calls or [] %}<tool_call>"
    "{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(("row", "turns", "target", "unread"), CONVERSATIONS)
def test_conversations_by_a_chat_template(row, turns, target, unread):
    assert texts(row, chatting(CALLS)) == ([(chatml(*turns), target + STOP)], unread)


@pytest.mark.parametrize(("row", "turns", "target", "unread"), CONVERSATIONS)
def test_prompt_and_target_are_the_templates_own_tokens_of_the_whole_conversation(row, turns, target, unread):
    tokenizer, (example,) = chatting(CALLS), examples_from_rows([row])
    (encoded,) = encode_examples([example], tokenizer, max_prompt_length=999).examples
    messages = [{"role": role, "content": text} for role, text in turns if role != "tools"]
    whole = [*messages, {"role": "assistant", "content": target}]
    ids = tokenizer.apply_chat_template(whole, tools=list(example.tools) or None, return_dict=False)
    line_break = tokenizer("\n")["input_ids"]
    assert encoded.prompt_ids + encoded.response_ids + line_break == ids


def test_a_tool_call_is_scored_against_what_the_template_writes():
    row = {"messages": [USER, ASKS]}
    (encoded,) = encode_examples(examples_from_rows([row]), chatting(CALLS)).examples
    assert encoded.references == (SAID,)


@pytest.mark.parametrize(
    "written",
    [
        "{{ c.function.name }}({{ c.function.arguments }})",  # takes JSON text
        "{{ c.function.name + '(' + c.function.arguments + ')' }}",  # fails on an object
    ],
)
def test_arguments_come_in_the_form_that_the_template_writes_as_json(written):
    tokenizer = chatting(CALLS.replace("{{ c.function | tojson }}", written))
    row = {"messages": [USER, ASKS]}
    assert texts(row, tokenizer)[0][0][1] == '<tool_call>weather({"city": "Oslo"})</tool_call>' + STOP


def test_a_null_content_is_never_the_word_none():
    strict = CALLS.replace("{{ m.content or '' }}", "{{ '' + m.content }}")
    for template in (CALLS.replace(" or ''", ""), strict):
        row = {"messages": [USER, ASKS]}
        assert texts(row, chatting(template))[0][0][1] == SAID + STOP


def test_a_tool_call_that_the_template_does_not_write_is_refused():
    row = {"messages": [USER, ASKS]}
    for tokenizer, problem in ((chatting(), "does not write"), (plain(), "renders instructions only")):
        with pytest.raises(RequestError, match=f"^row 0: .*{problem}"):
            texts(row, tokenizer)
    with pytest.raises(RequestError, match=r"^row 0: the answer is a tool call, which a chat template alone"):
        texts(row, plain(), template="{{ messages[0].content }}")


def test_tools_that_the_template_does_not_read_are_named():
    row = {"messages": [USER, HO], "tools": [TOOL]}
    assert texts(row, chatting())[1] == ["tools"]
    assert texts({"instruction": "I", "output": "O", "tools": [TOOL]}, plain())[1] == ["tools"]
    assert texts({"instruction": "I", "output": "O", "system": "S"}, plain(), template="{{ instruction }}")[1] == [
        "system"
    ]


def test_a_schema_loses_the_nulls_that_a_table_adds():
    row = {"messages": [USER, HO], "tools": [{**TOOL, "strict": None}]}
    assert json.dumps([TOOL]) in texts(row, chatting(CALLS))[0][0][0]


def test_a_parquet_file_gives_the_same_texts_as_its_json(tmp_path):
    import pyarrow
    import pyarrow.parquet

    other = {"type": "function", "function": {"name": "mail", "arguments": {"to": "a"}}}
    calls = [{"role": "assistant", "content": None, "tool_calls": [each]} for each in (CALL, other)]
    rows = [{"messages": [USER, each]} for each in calls]
    path = write(tmp_path, "d.jsonl", "\n".join(map(json.dumps, rows)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    tokenizer = chatting(CALLS)
    files = path, tmp_path / "d.parquet"
    one, two = (encode_examples(read_examples(file), tokenizer).examples for file in files)
    assert [each.response_ids for each in one] == [each.response_ids for each in two]


# ---------------------------------------------------------------------------------------------------------- reasoning

OPENS = (  # as DeepSeek's and Qwen3.5's: the prompt opens the reasoning, and finished turns lose it
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and '</think>' in m.content and not "
    "loop.last %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
SWITCHED = (  # as Qwen3's
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and (loop.last or m.reasoning_content) %}"
    "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
THOUGHT = "<think>\nhm\n</think>\n\nHo"


def thinking(template):
    """ "<think>" is a special token, as are the ends of turns."""
    specials = (END, START, STOP, "<think>", "</think>")
    return byte_tokenizer(special=specials, eos_token=END, chat_template=template)


@pytest.mark.parametrize("name", ["content", "reasoning_content", "reasoning", "thinking"])
def test_reasoning_that_the_prompt_opens_stands_once(name):
    tokenizer = thinking(OPENS)
    answer = {"content": THOUGHT} if name == "content" else {"content": "Ho", name: "hm"}
    row = {"messages": [USER, {"role": "assistant", **answer}]}
    (pair,), unread = texts(row, tokenizer)
    assert pair == (f"{START}user\nHi{STOP}\n{START}assistant\n<think>\n", f"hm\n</think>\n\nHo{STOP}")
    assert unread == []


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_goes_to_the_field_that_the_template_reads(name):
    row = {"messages": [USER, {"role": "assistant", "content": "Ho", name: "hm"}]}
    assert texts(row, thinking(SWITCHED)) == ([(chatml(HI), THOUGHT + STOP)], [])


def test_reasoning_that_no_template_writes_is_named():
    row = {"messages": [USER, {"role": "assistant", "content": "Ho", "reasoning": "hm"}]}
    assert texts(row, chatting()) == ([(chatml(HI), "Ho" + STOP)], ["reasoning"])


def test_an_empty_reasoning_is_none():
    row = {"messages": [USER, {"role": "assistant", "content": "Ho", "reasoning_content": ""}]}
    assert texts(row, chatting()) == ([(chatml(HI), "Ho" + STOP)], [])


def test_the_reference_stays_the_plain_answer():
    row = {"messages": [USER, {"role": "assistant", "content": "Ho", "reasoning": "hm"}]}
    (encoded,) = encode_examples(examples_from_rows([row]), thinking(SWITCHED)).examples
    assert encoded.references == ("Ho",)


def test_chat_template_kwargs_by_flag_and_by_a_column_that_overrides_it():
    row = {"messages": [USER, HO]}
    opened, closed = chatml(HI), chatml(HI) + "<think>\n\n</think>\n\n"
    tokenizer, off = thinking(SWITCHED), {"enable_thinking": False}
    empty = "<think>\n\n</think>\n\n"
    assert texts(row, tokenizer)[0] == [(opened, empty + "Ho" + STOP)]
    assert texts(row, tokenizer, kwargs=off)[0] == [(closed, "Ho" + STOP)]
    assert texts({**row, "chat_template_kwargs": json.dumps(off)}, tokenizer)[0] == [(closed, "Ho" + STOP)]
    on = {**row, "chat_template_kwargs": {"enable_thinking": True}}
    assert texts(on, tokenizer, kwargs=off)[0] == [(opened, empty + "Ho" + STOP)]


def test_kwargs_that_nothing_reads_are_refused_as_a_flag_and_named_as_a_column():
    row = {"messages": [USER, HO]}
    with pytest.raises(RequestError, match="sets enable_thinkin, which the template does not read"):
        texts(row, thinking(SWITCHED), kwargs={"enable_thinkin": False})
    with pytest.raises(RequestError, match="may not set tools"):
        texts({**row, "chat_template_kwargs": {"tools": []}}, chatting(CALLS))
    given = {**row, "chat_template_kwargs": {"enable_thinking": False}}
    assert texts(given, chatting())[1] == ["chat_template_kwargs.enable_thinking"]


def test_a_prompt_that_does_not_begin_the_conversation_is_refused_with_both_texts():
    row = {"messages": [USER, HO]}
    with pytest.raises(RequestError) as caught:
        texts(row, thinking(OPENS))
    message = str(caught.value)
    assert message.startswith("row 0: the prompt is not how the chat template begins the whole conversation: ")
    assert repr("<think>\n") in message
    assert repr(f"Ho{STOP}\n") in message
    assert texts(row, thinking(OPENS), need_response=False)[0][0][0].endswith("<think>\n")  # no answer is needed


def test_marks_of_reasoning_in_an_answer_are_tokens_and_ends_of_turns_are_not():
    tokenizer = thinking(CHATML)
    answer = f"<think>\nit ends with {STOP}\n</think>\n\n{START}"
    row = {"messages": [{"role": "user", "content": "What is <think>?"}, {"role": "assistant", "content": answer}]}
    (encoded,) = encode_examples(examples_from_rows([row]), tokenizer).examples
    assert tokenizer.decode(encoded.response_ids) == answer + STOP
    control = [tokenizer.decode(index) for index in encoded.response_ids if index in tokenizer.added_tokens_decoder]
    assert control == ["<think>", "</think>", STOP]
    asked = [tokenizer.decode(index) for index in encoded.prompt_ids if index in tokenizer.added_tokens_decoder]
    assert asked == [START, STOP, START]


# --------------------------------------------------------------------------------------- turns, columns, what is left

SEVERAL = {
    "messages": [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "<think>\nso\n</think>\n\nd"},
    ]
}


def test_every_assistant_turn_with_the_conversation_up_to_it():
    first = [("system", "S"), ("user", "a")]
    opened = "<think>\n"
    one = chatml(*first) + opened, f"hm\n</think>\n\nb{STOP}"
    two = chatml(*first, ("assistant", "\n\nb"), ("user", "c")) + opened, f"so\n</think>\n\nd{STOP}"
    assert texts(SEVERAL, thinking(OPENS), turns="all")[0] == [one, two]
    assert texts(SEVERAL, thinking(OPENS))[0] == [two]
    row = {"instruction": "c", "output": "d", "history": [["a", "b"]]}
    assert [target for _, target in texts(row, chatting(), turns="all")[0]] == ["b" + STOP, "d" + STOP]
    ends_with_user = {"messages": SEVERAL["messages"][:-1]}
    assert texts(ends_with_user, thinking(OPENS), turns="all")[0] == [one]


def test_rows_and_examples_are_counted_apart():
    data = encode_examples(examples_from_rows([SEVERAL] * 3), thinking(OPENS), turns="all")
    assert row_counts(data) == "3 rows, 6 examples (one per assistant turn)"
    note = template_note(resolve_template("auto", thinking(OPENS)), "STUDENT", "all")
    assert (
        note
        == "Template: the chat template of STUDENT. Assistant turns that are trained: all of each row (--turns all)."
    )


def test_columns_map_names():
    row = {"problem": "Add.", "solution": "3", "instruction": "not this"}
    mapped = texts(row, plain(), columns=["problem=instruction", "solution=output"])
    assert mapped == ([(ALPACA.format("Add."), "3" + END)], [])
    swapped = {"input": "Add.", "instruction": "1 2", "output": "3"}
    both = {"input": "instruction", "instruction": "input"}
    assert texts(swapped, plain(), columns=both)[0] == [(WITH_INPUT.format("Add.", "1 2"), "3" + END)]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["problem"], "takes OLD=NEW.*Got 'problem='"),
        (["problem=question_text"], "NEW is one of .*instruction.*Got 'problem=question_text'"),
        (["problem=instruction", "task=instruction"], "each column once"),
        (["nothing=instruction"], r"no column 'nothing'.*The first row has: 'problem'\."),
    ],
)
def test_a_wrong_mapping_is_refused(columns, message):
    with pytest.raises(RequestError, match=message):
        texts({"problem": "Add."}, plain(), columns=columns, need_response=False)


def test_rows_that_end_with_the_user_are_used_or_dropped_with_a_count():
    rows = [{"messages": [USER]}, {"messages": [USER, HO]}]
    data = encode_examples(examples_from_rows(rows), chatting())
    assert (len(data.examples), data.unanswered, data.dropped) == (1, 1, 0)
    assert row_counts(data) == "1 rows"
    assert row_notes("d", data) == ["d: 1 row ends with the user and was dropped, since a response is needed."]
    assert len(encode_examples(examples_from_rows(rows), chatting(), need_response=False).examples) == 2
    with pytest.raises(RequestError, match="None of the 1 rows has a response"):
        encode_examples(examples_from_rows(rows[:1]), chatting())


def test_many_dropped_rows_name_the_limits_that_keep_them():
    rows = [{"prompt": "a" * length, "completion": "b"} for length in range(1, 101)]
    rows.append({"prompt": "a", "completion": "b" * 50})
    data = encode_examples(examples_from_rows(rows), plain(), max_prompt_length=90, max_response_length=20)
    *_, note = row_notes("rows.jsonl", data)
    assert note == (
        "Warning: rows.jsonl: 11 of 101 rows (11%) are over --max_prompt_length 90 or --max_completion_length 20 and "
        "were dropped. --max_prompt_length 96 keeps 95%, --max_prompt_length 100 --max_completion_length 51 keeps all."
    )
    kept = encode_examples(examples_from_rows(rows), plain(), max_prompt_length=96, max_response_length=20)
    assert len(kept.examples) >= 0.95 * len(rows)
    assert kept.keeps_most is None


def test_unread_columns_are_named_once():
    rows = [{"instruction": "I", "output": "O", "category": "x"}] * 3
    (note,) = row_notes("d", encode_examples(examples_from_rows(rows), plain()))
    assert note == "d: not used: 'category' (3 rows). --columns OLD=NEW maps a column to one that is."


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "an image_url.*text alone",
        ),
        (
            {"prompt": "What?", "images": [{"bytes": None, "path": "x"}]},
            "holds 'images', and models are trained on text",
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "x"}]}]},
            "a tool call of 'messages.1.' must be",
        ),
        ({"messages": [USER, {"role": "assistant", "reasoning": 5, "content": "x"}]}, "reasoning' must be a string"),
        ({"messages": [USER], "tools": ["x"]}, r"tools\[0\]' must be"),
        ({"messages": [USER], "tools": "x"}, "'tools' must be a list of JSON schemas"),
        ({"messages": [USER], "chat_template_kwargs": "x"}, "'chat_template_kwargs' must be an object"),
        ({"instruction": "I", "history": [["a"]]}, "'history' must be a list of"),
        ({"instruction": "I", "history": 5}, "'history' must be a list of"),
        ({"instruction": "I", "history": "ab"}, "'history' must be a list of"),
        ({"prompt": "P", "completion": [{"role": "assistant", "tool_calls": [CALL]}]}, "need a prompt of messages"),
    ],
)
def test_what_no_form_takes_is_named(row, message):
    with pytest.raises(RequestError, match=f"^row 0: .*{message}"):
        examples_from_rows([row])


# ------------------------------------------------------------------------------------------------------ other endings


def test_what_follows_the_end_token_is_no_target_and_a_call_may_end_otherwise():
    ending = CALLS.replace("{% endfor %}<|im_end|>", "{% endfor %}{{ '<|call|>' if m.tool_calls else '<|im_end|>' }}")
    tokenizer = byte_tokenizer(special=(END, START, STOP, "<|call|>"), eos_token=END, chat_template=ending)
    row = {"messages": [USER, ASKS]}
    assert texts(row, tokenizer)[0][0][1] == SAID + "<|call|>"


def test_a_template_without_end_tokens_ends_an_answer_with_eos():
    bare = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    bare += "{% if add_generation_prompt %}assistant:{% endif %}"
    row = {"messages": [USER, {"role": "assistant", "content": "Ho\n"}]}
    assert texts(row, chatting(bare))[0] == [("user: Hi\nassistant:", " Ho\n" + END)]


def test_a_prompt_that_is_text_is_said_to_have_no_template():
    data = encode_examples(examples_from_rows([{"prompt": "Hi", "response": "Ho"}] * 2), chatting())
    (note,) = row_notes("d", data)
    assert note.startswith("d: 2 prompts are texts, used as they stand, with no template.")
    mapped = texts({"prompt": "Hi", "response": "Ho"}, chatting(), columns=["prompt=instruction"])
    assert mapped == ([(chatml(HI), "Ho" + STOP)], [])


def test_a_written_answer_keeps_its_marks_of_reasoning():
    tokenizer = thinking(CHATML)
    ids = tokenizer(f"<think>hm</think>Ho{STOP}{END}")["input_ids"]
    assert Spelling(tokenizer).answer_text(ids) == "<think>hm</think>Ho"
    assert Spelling(plain()).answer_text(plain()(f"Ho{END}")["input_ids"]) == "Ho"


def csv_file(folder, row):
    import csv

    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow({key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()})
    return folder / "rows.csv"


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": [USER], "completion": [HO]}, {}),
        ({"asked": [USER], "said": [HO]}, {"asked": "prompt", "said": "completion"}),
        ({"prompt": [USER], "completion": "Ho"}, {}),
        ({"prompt": "Hi", "chosen": [USER, HO]}, {}),
        ({"chosen": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}, {}),
        ({"messages": [USER, HO]}, {}),
        ({"question": "Hi", "answers": {"text": ["Ho", "Hu"], "answer_start": [0, 1]}}, {}),
        ({"question": "Hi", "answers": ["Ho", "Hu"]}, {}),
        ({"question": "Hi", "said": {"text": ["Ho"]}}, {"said": "output"}),
        ({"prompt": "[1, 2] {", "completion": '["a"]'}, {}),
        ({"instruction": "Hi", "output": '{"role": "x", "text": "y"}'}, {}),
        ({"instruction": '[{"role": "user"}]', "output": '["a", "b"]'}, {}),
    ],
)
def test_a_csv_file_gives_the_same_rows_as_the_data(tmp_path, row, columns):
    (found,), (expected,) = read_examples(csv_file(tmp_path, row), columns=columns), examples_from_rows([row], columns)
    assert (found.request, found.references, found.answer) == (
        expected.request,
        expected.references,
        expected.answer,
    )


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": str([USER]), "completion": "Ho"},
        {"prompt": "Hi", "completion": str([HO])},
        {"question": "Hi", "answers": "{'text': array(['Ho'], dtype=object)}"},
    ],
)
def test_what_python_writes_for_a_list_in_a_csv_cell_is_refused(tmp_path, row):
    with pytest.raises(RequestError, match=r"line 2: '\w+' holds a list or an object that is not valid JSON.*JSONL"):
        read_examples(csv_file(tmp_path, row))


def test_texts_of_another_template_than_that_of_the_validation_rows_are_told():
    asked = [{"instruction": f"{word}.", "output": "Ho"} for word in ("Who", "What", "When", "Where")]
    ended = [{"prompt": f"Q: {word}{end}", "completion": "Ho"} for word in ("Who", "What") for end in ("", ".")]
    rendered, texts = (encode_examples(examples_from_rows(rows), chatting()) for rows in (asked, ended))
    (note,) = prompt_notes(texts, rendered)
    assert r"'<|im_end|>\n<|im_start|>assistant\n': the first ends with 'Q: Who'" in note
    written = [{"prompt": example.prompt, "completion": "Ho"} for example in rendered.examples]
    same = encode_examples(examples_from_rows([*ended, *written]), chatting())
    for train, validation in ((same, rendered), (rendered, texts), (texts, texts), (texts, None), (None, rendered)):
        assert prompt_notes(train, validation) == []
    questions = [{"prompt": example.prompt.replace(".<", "?<"), "completion": "Ho"} for example in rendered.examples]
    assert prompt_notes(encode_examples(examples_from_rows(questions), chatting()), rendered) == []  # the same template
    open_ended = encode_examples(examples_from_rows(asked), chatting(), "Q: {{ instruction }}")
    assert prompt_notes(texts, open_ended) == []


CUT = {"prompt": "Hi", "completion": "Ho", "ended": False}


def test_responses_that_were_cut_are_dropped_and_counted(tmp_path):
    (of_a_table,) = read_examples(csv_file(tmp_path, CUT))
    assert of_a_table.is_cut
    rows = [CUT, {**CUT, "ended": True}, {**CUT, "ended": None}, CUT]
    data = encode_examples(examples_from_rows(rows), plain())
    assert ([example.row for example in data.examples], data.cut, data.dropped, data.unread) == ([1, 2], 2, 0, {})
    told = (
        "D: 2 responses that were cut at the length limit when written ('ended' is false) were dropped with their rows."
    )
    assert told in row_notes("D", data)
    one = row_notes("D", encode_examples(examples_from_rows(rows[:2]), plain()))
    assert any("1 response that was cut" in note and note.endswith("was dropped with its row.") for note in one)
    asked = encode_examples(examples_from_rows(rows), plain(), need_response=False)
    assert (len(asked.examples), asked.cut) == (4, 0)


def test_cut_responses_alone_are_no_data_and_an_error_where_nothing_may_be_dropped():
    with pytest.raises(RequestError, match=r"each of the 2 rows was cut.*higher --max-completion-length"):
        encode_examples(examples_from_rows([CUT, CUT]), plain())
    with pytest.raises(RequestError, match=r"row 1: the response was cut.*drop such rows"):
        encode_examples(examples_from_rows([{**CUT, "ended": True}, CUT]), plain(), overlong="error")


DATED = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{% for m in messages %}[{{ date_string }}]{{ m.content }}{% endfor %}"
)


def test_a_template_that_writes_the_date_writes_the_same_on_every_day():
    tokenizer, row = chatting(DATED), [{"messages": [USER, HO]}]
    template = resolve_template("auto", tokenizer)
    (encoded,) = encode_examples(examples_from_rows(row), tokenizer, template).examples
    assert encoded.prompt == "[26 Jul 2024]Hi"
    told = template_note(template, "S", "last")
    assert "which writes the date; that is 26 Jul 2024 on every day" in told
    assert '--chat_template_kwargs \'{"date_string": "..."}\'' in told


def test_a_date_that_is_given_is_written_and_nothing_is_said():
    tokenizer = chatting(DATED)
    template = resolve_template("auto", tokenizer, {"date_string": "today"})
    assert template.render(*examples_from_rows([{"messages": [USER]}])) == "[today]Hi"
    assert "date" not in template_note(template, "S")
    assert "date" not in template_note(resolve_template("auto", chatting()), "S")
