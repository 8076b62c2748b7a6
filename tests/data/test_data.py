"""Rows are read, rendered and encoded without a guess; what is wrong is named with its place."""

import gzip
import json
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from promptkd.data import (
    Example,
    Instruction,
    encode_examples,
    examples_from_rows,
    read_examples,
    resolve_template,
    stop_token_ids,
)
from promptkd.data.summary import EVALUATION_FLAGS, FLAGS, limits_named
from promptkd.errors import RequestError

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(*, special=(END,), merges=(), processor=None, **kwargs):
    """One token a byte, then the merges, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    if processor is not None:
        ids = [(token, backend.token_to_id(token)) for token in special]
        backend.post_processor = processors.TemplateProcessing(single=processor, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **kwargs)


def plain():
    """Like GPT-2: pad is EOS."""
    return byte_tokenizer(eos_token=END, pad_token=END)


def framing():
    """Puts BOS before and EOS behind every text."""
    return byte_tokenizer(special=("<s>", "</s>"), processor="<s> $A </s>", bos_token="<s>", eos_token="</s>")


def chatting(template=CHATML):
    """The turn ends with another token than EOS."""
    return byte_tokenizer(special=(END, START, STOP), eos_token=END, chat_template=template)


def encode(tokenizer, rows, template="auto", *, prompt=1000, response=1000, **options):
    resolved = resolve_template(template, tokenizer)
    options = {"max_prompt_length": prompt, "max_response_length": response, **options}
    return encode_examples(examples_from_rows(rows), tokenizer, resolved, **options)


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ---------------------------------------------------------------------------------------------------- the three forms


def one(row):
    (example,) = examples_from_rows([row])
    return example.request, example.references


def test_instruction_rows():
    assert one({"instruction": "Add.", "input": "1 2", "output": "3"}) == (Instruction("Add.", "1 2"), ("3",))
    assert one({"instruction": "Add.", "input": None, "output": ["3", "three"]}) == (
        Instruction("Add.", ""),
        ("3", "three"),
    )
    assert one({"instruction": "Add.", "category": "math", "source": 7}) == (Instruction("Add.", ""), ())
    assert one({"instruction": "Stop.", "output": ""}) == (Instruction("Stop.", ""), ("",))


def test_prompt_completion_rows():
    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
    assert one({"prompt": "Once ", "completion": "upon"}) == ("Once ", ("upon",))
    assert one({"prompt": "Once"}) == ("Once", ())
    assert one({"prompt": [user], "completion": [answer]}) == ((user,), ("Ho",))
    assert one({"prompt": [user], "completion": "Ho"}) == ((user,), ("Ho",))


def test_messages_rows():
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}
    answer = {"role": "assistant", "content": "Ho", "tool_calls": None}
    assert one({"messages": [system, user, answer]}) == ((system, user), ("Ho",))
    earlier = {"role": "assistant", "content": "Ho"}
    assert one({"messages": [user, answer, user]}) == ((user, earlier, user), ())


def test_a_row_that_fits_several_forms_is_read_by_the_stated_order():
    messages = [{"role": "user", "content": "M"}]
    assert one({"prompt": "P", "messages": messages, "instruction": "I"})[0] == Instruction("I", "")
    assert one({"prompt": "P", "messages": messages})[0] == tuple(messages)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"ask": "Q", "reply": "A"}, r"instruction.*messages.*prompt.*--columns OLD=NEW.*Got 'ask', 'reply'\."),
        ({"instruction": None, "output": "A"}, r"Got 'output'\."),
        ("text", "expected an object.*got a string"),
        ({"instruction": " \n"}, "'instruction' is empty"),
        ({"instruction": 5}, "'instruction' must be a string, got a value of type int"),
        ({"instruction": "I", "input": ["x"]}, "'input' must be a string, got a list"),
        ({"instruction": "I", "output": 5}, "'output' must be a string or a list of strings, got a value of type int"),
        ({"instruction": "I", "output": ["a", 5]}, r"'output\[1\]' must be a string"),
        ({"instruction": "I", "output": []}, "'output' is an empty list"),
        ({"instruction": "I", "output": "\ud83d"}, "half of a surrogate pair"),
        ({"prompt": ""}, "'prompt' is empty"),
        ({"prompt": {"text": "x"}}, "'prompt' must be a string or a list of messages, got an object"),
        ({"prompt": "P", "completion": [{"role": "user", "content": "x"}]}, "one assistant message.*from: user"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "must end with a user.*Got assistant"),
        ({"messages": []}, "at least one message"),
        ({"messages": "hello"}, "'messages' must be a list of messages, got a string"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "must end with a user.*Got nobody"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "must be one of system.*Got 'bot'"),
        ({"messages": [{"content": "x"}]}, r"role of 'messages\[0\]'.*Got none"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, r"content\[0\]' must be .*a string.*'text'"),
        ({"messages": [{"role": "user", "content": 5}]}, r"'messages\[0\]\.content' must be a string"),
        ({"messages": [{"role": "user", "content": None}]}, "has no content"),
        ({"messages": ["hello"]}, r"'messages\[0\]' must be"),
    ],
)
def test_a_wrong_row_is_named_with_what_was_expected(row, message):
    with pytest.raises(RequestError, match=r"(?s)^row 1: .*" + message):
        examples_from_rows([{"instruction": "fine"}, row])


def test_no_rows():
    with pytest.raises(RequestError, match="at least one row"):
        examples_from_rows([])


# -------------------------------------------------------------------------------------------------------------- files

ROWS = [
    {"instruction": "Name a color.", "input": "", "output": "007"},
    {"instruction": "Überset\u2028zen", "input": 'a, "b"\nc', "output": "NA"},
]
READ = [
    (Instruction("Name a color.", ""), ("007",)),
    (Instruction("Überset\u2028zen", 'a, "b"\nc'), ("NA",)),
]


def as_file(folder, kind):
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "d.parquet")
        return folder / "d.parquet"
    content = {
        "jsonl": b"\xef\xbb\xbf" + lines.encode(),
        "jsonl.gz": gzip.compress((lines + "\n").encode()),
        "json": json.dumps(ROWS, indent=2).encode(),
        "csv": 'instruction,input,output\r\nName a color.,,007\r\n\r\nÜberset\u2028zen,"a, ""b""\nc",NA\r\n'.encode(),
    }[kind]
    return write(folder, f"d.{kind}", content)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet", "csv"])
def test_every_kind_of_file_gives_the_same_examples(tmp_path, kind):
    path = as_file(tmp_path, kind)
    examples = read_examples(str(path))
    assert [(example.request, example.references) for example in examples] == READ
    assert [example.row for example in examples] == [0, 1]
    last = {"jsonl": "line 3", "jsonl.gz": "line 3", "json": "row 1", "parquet": "row 1", "csv": "line 4"}[kind]
    assert examples[1].location == f"{path}, {last}"
    assert read_examples(path, limit=1) == examples[:1]
    assert read_examples(tmp_path) == examples


GOOD = '{"instruction": "I"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", GOOD + "\n" + '{"instruction": "I",}\n', r"d\.jsonl, line 3: not valid JSON: "),
        ("d.jsonl", GOOD + '{"instruction": "a", "instruction": "b"}', "line 2: .*duplicate key 'instruction'"),
        (
            "d.jsonl",
            '{"messages": [{"role": "user", "role": "user", "content": "x"}]}',
            "line 1: .*duplicate key 'role'",
        ),
        ("d.jsonl", GOOD + '["instruction"]\n', r"line 2: expected an object, got a list.*\.json file"),
        ("d.jsonl", GOOD + "17\n", "line 2: expected an object"),
        ("d.jsonl", GOOD + '{"output": "A"}', "line 2: .*instruction.*Got 'output'"),
        ("d.jsonl", GOOD.encode() + b'{"instruction": "\xff"}', "line 2: not valid UTF-8 .byte 0xff at 17"),
        ("d.jsonl", GOOD + '{"instruction": "a\0b"}', "line 2: holds a NUL byte"),
        ("d.jsonl", '{"instruction": "\\ud800"}', "line 1: 'instruction' holds half of a surrogate pair"),
        ("d.jsonl", "[" * 100_000, "line 1: not valid JSON"),
        ("d.jsonl", "", "holds no rows"),
        ("d.jsonl", "\n  \n", "holds no rows"),
        ("d.jsonl.gz", b"", "holds no rows"),
        ("d.jsonl.gz", GOOD, "not a complete gzip file"),
        ("d.jsonl.gz", gzip.compress(GOOD.encode() * 100, mtime=0)[:-12], "not a complete gzip file"),
        ("d.json", GOOD, r"expected a list of objects.*\.jsonl file"),
        ("d.json", '[{"instruction": "I"}, {"output": "A"}]', "d.json, row 1: .*Got 'output'"),
        ("d.json", '[{"instruction": "I"},\n {]', "d.json: not valid JSON: .*line 2"),
        ("d.json", "[]", "holds no rows"),
        ("d.csv", "", "holds no rows"),
        ("d.csv", "instruction,output\n", "holds no rows"),
        ("d.csv", 'instruction,output\n"a\nb",c\nd\n', "line 4: expected 2 cells as in the header, got 1"),
        ("d.csv", "instruction,output,output\na,b,c\n", "names a column twice"),
        ("d.csv", 'instruction,output\na,"b"c\n', "line 2: not valid CSV"),
        ("d.csv", "ask,reply\na,b\n", "line 2: .*Got 'ask', 'reply'"),
        ("d.csv", b"instruction\n\xe9\n", "line 2: not valid UTF-8"),
        ("d.parquet", b"PAR1 but no more", "not a readable Parquet file"),
        ("d.parquet", b"", "not a readable Parquet file"),
        ("d.txt", "hello", "must be a data file that ends in one of"),
    ],
)
def test_a_wrong_file_is_named_with_its_place(tmp_path, name, content, message):
    with pytest.raises(RequestError, match=message):
        read_examples(write(tmp_path, name, content))


def test_limit_reads_no_further(tmp_path):
    path = write(tmp_path, "d.jsonl", GOOD + "broken\n")
    assert len(read_examples(path, limit=1)) == 1
    with pytest.raises(RequestError, match="at least 1"):
        read_examples(path, limit=0)


def test_an_empty_cell_is_a_missing_field(tmp_path):
    path = write(tmp_path, "d.csv", "instruction,prompt,output\nI,,\n,P,\n")
    examples = read_examples(path)
    assert [(example.request, example.references) for example in examples] == [(Instruction("I", ""), ()), ("P", ())]


def test_forms_may_be_mixed_in_a_file(tmp_path):
    path = write(tmp_path, "d.jsonl", GOOD + '{"prompt": "P", "instruction": null}\n')
    assert [example.request for example in read_examples(path)] == [Instruction("I", ""), "P"]


# ------------------------------------------------------------------------------------------------ folders and the hub


def test_a_folder_gives_its_only_file_or_the_one_named_after_the_split(tmp_path):
    with pytest.raises(RequestError, match="It holds no such file"):
        read_examples(tmp_path)
    write(tmp_path, "README.md", "read me")
    write(tmp_path, "valid.jsonl", '{"instruction": "valid"}')
    assert read_examples(tmp_path)[0].request == Instruction("valid", "")
    write(tmp_path, "extra.jsonl", GOOD)
    with pytest.raises(RequestError, match=r"named 'train'. It holds extra.jsonl, valid.jsonl"):
        read_examples(tmp_path)
    assert read_examples(tmp_path, split="valid")[0].request == Instruction("valid", "")


def test_folders_saved_by_datasets(tmp_path):
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    DatasetDict({"valid": data}).save_to_disk(tmp_path / "several")
    for folder, split in (("one", "train"), ("several", "valid")):
        examples = read_examples(tmp_path / folder, split=split)
        assert [(example.request, example.references) for example in examples] == READ
        assert examples[1].location == f"{tmp_path / folder}, row 1"
    with pytest.raises(RequestError, match=r"no split 'train'. It has: valid"):
        read_examples(tmp_path / "several")
    (tmp_path / "one" / "dataset_info.json").write_text("{")
    with pytest.raises(RequestError, match="cannot be read"):
        read_examples(tmp_path / "one")


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/na.me-2:test", ("owner/na.me-2", None, "test")),
        ("owner/name:config:test", ("owner/name", "config", "test")),
    ],
)
def test_hub_names_say_split_and_configuration(monkeypatch, source, asked):
    import datasets

    calls = []

    def load_dataset(name, config, *, split):
        calls.append((name, config, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    examples = read_examples(source)
    assert calls == [asked]
    assert examples[1].location == f"{source}, row 1"


@pytest.mark.parametrize(
    "source", ["./owner/name", "./name", "/owner/name", "~/owner", "owner/name.jsonl", "rows.csv", "rows", ""]
)
def test_what_looks_like_a_path_is_never_asked_of_the_hub(monkeypatch, source):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(RequestError, match="No such file or folder"):
        read_examples(source)


def test_trouble_with_the_hub_is_a_wrong_request(monkeypatch):
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    for error in (
        ConnectionError("no network"),
        DatasetNotFoundError("gone"),
        DatasetGenerationError("bad"),
        ValueError("?"),
    ):

        def load_dataset(*_, error=error, **__):
            raise error

        monkeypatch.setattr("datasets.load_dataset", load_dataset)
        with pytest.raises(
            RequestError, match=rf"'owner/name' \(split 'test'\) cannot be loaded.*{error}".replace("?", r"\?")
        ):
            read_examples("owner/name:test")


# ---------------------------------------------------------------------------------------------------------- templates


def example(request, *references):
    return Example(request, references, "here", 0)


def rendered(name, tokenizer, request):
    return resolve_template(name, tokenizer).render(example(request))


def test_alpaca_is_the_text_of_minillm_and_promptkd():
    assert rendered("alpaca", plain(), Instruction("Say {hi}.", "")) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay {hi}.\n\n### Response:\n"
    )
    assert rendered("alpaca", plain(), Instruction("Say", "it {0}")) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay\n\n### Input:\nit {0}\n\n### Response:\n"
    )


def test_chat_puts_instruction_and_input_in_one_user_turn():
    assert rendered("chat", chatting(), Instruction("Add.", "1 2")) == (
        "<|im_start|>user\nAdd.\n\n1 2<|im_end|>\n<|im_start|>assistant\n"
    )
    assert rendered("chat", chatting(), Instruction("Add.", "")) == (
        "<|im_start|>user\nAdd.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_auto_is_chat_where_there_is_a_chat_template():
    assert resolve_template("auto", chatting()).name == "chat"
    assert resolve_template("auto", plain()).name == "alpaca"


def test_jinja_is_taken_exactly_as_it_is():
    text = "{{ instruction }}{% if input %} <{{ input | upper }}>{% endif %}:\n"
    assert rendered(text, plain(), Instruction("Add", "a&b")) == "Add <A&B>:\n"
    assert rendered(text, plain(), Instruction("Add", "")) == "Add:\n"
    turns = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    assert rendered(turns, plain(), ({"role": "user", "content": "Hi"},)) == "[user] Hi\n"


@pytest.mark.parametrize("name", ["alpaca", "chat", "{{ instruction }}"])
def test_a_text_request_is_used_as_it_stands(name):
    assert rendered(name, chatting(), " {{ as }} it stands\n") == " {{ as }} it stands\n"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("alpacca", 'must be "auto", "alpaca", "chat", "teacher".*or a Jinja string.*\'alpacca\''),
        ("chat", "has no chat template"),
        ("{% if instruction %}", "does not compile"),
        ("{{ instruction }} {{ question }}", "Got question"),
        ("{{ 'the same for every row' }}", "Got none of them"),
    ],
)
def test_a_wrong_template_is_refused(name, message):
    with pytest.raises(RequestError, match=message):
        resolve_template(name, plain())


MESSAGES = ({"role": "user", "content": "Hi"},)


@pytest.mark.parametrize(
    ("name", "request_", "message"),
    [
        ("alpaca", MESSAGES, "Alpaca template renders instructions only"),
        ("{{ instruction }}", MESSAGES, "gives it `messages`.*'instruction' is undefined"),
        ("{{ messages[0].content }}", Instruction("I", ""), "gives it `instruction` and `input`.*undefined"),
        ("{{ instruction.nothing }}", Instruction("I", ""), "has no attribute 'nothing'"),
        ("{{ instruction / 2 }}", Instruction("I", ""), "cannot render the row"),
        ("{{ instruction.__class__.__mro__ }}", Instruction("I", ""), "unsafe"),
    ],
)
def test_a_row_that_a_template_cannot_render_is_named(name, request_, message):
    with pytest.raises(RequestError, match=r"^here: .*" + message):
        rendered(name, plain(), request_)


def test_messages_that_the_chat_template_refuses_are_named():
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + CHATML
    with pytest.raises(RequestError, match=r"^here: .*no system turns"):
        rendered("chat", chatting(strict), ({"role": "system", "content": "S"}, *MESSAGES))


# ----------------------------------------------------------------------------------------------------------- encoding


def test_prompt_and_response_join_as_tokens():
    tokenizer = byte_tokenizer(merges=[("Ċ", "Y")], eos_token=END)
    (row,) = encode(tokenizer, [{"prompt": "Well?\n", "completion": "Yes"}]).examples
    merged = tokenizer.convert_tokens_to_ids("ĊY")
    assert merged in tokenizer("Well?\nYes")["input_ids"]  # what joining the texts would have made of the boundary
    assert row.prompt_ids == tokenizer("Well?\n")["input_ids"]
    assert row.response_ids == [*tokenizer("Yes")["input_ids"], tokenizer.eos_token_id]
    assert row.prompt == "Well?\n"


def test_pad_that_is_eos_still_ends_the_response():
    tokenizer = plain()
    (row,) = encode(tokenizer, [{"instruction": "I", "output": ["one", "two"]}], "{{ instruction }}").examples
    assert tokenizer.decode(row.response_ids) == "one" + END
    assert row.references == ("one", "two")


def test_the_front_token_stays_and_the_appended_eos_goes():
    tokenizer = framing()
    tokenizer.chat_template = "{{ messages[0].content }}</s>"
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    for name, row in (
        ("{{ instruction }}", {"instruction": "a"}),
        ("alpaca", {"prompt": "a"}),
        ("<s>{{ instruction }}", {"instruction": "a"}),
        ("alpaca", {"prompt": "<s>a"}),
        ("chat", {"prompt": "a"}),
    ):
        (encoded,) = encode(tokenizer, [{**row, "output": "b", "completion": "b"}], name).examples
        assert tokenizer.decode(encoded.prompt_ids) == "<s>a"
        assert tokenizer.decode(encoded.response_ids) == "b</s>"


def test_a_prompt_of_nothing_but_bos_does_not_hide_it_from_other_rows():
    rows = [{"prompt": "<s>"}, {"prompt": "a"}]
    encoded = encode(framing(), rows, "alpaca", need_response=False).examples
    assert [framing().decode(row.prompt_ids) for row in encoded] == ["<s>", "<s>a"]


def test_a_chat_template_writes_its_own_front_token():
    tokenizer = framing()
    tokenizer.chat_template = (
        "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (row,) = encode(tokenizer, [{"instruction": "Hi", "output": "Ho"}], "chat").examples
    assert tokenizer.decode(row.prompt_ids) == "<s>[user]Hi</s>[assistant]"
    tokenizer.chat_template = tokenizer.chat_template.removeprefix("<s>")
    (row,) = encode(tokenizer, [{"instruction": "Hi", "output": "Ho"}], "chat").examples
    assert tokenizer.decode(row.prompt_ids) == "[user]Hi</s>[assistant]"


def test_a_chat_answer_ends_as_the_chat_template_ends_it():
    tokenizer = chatting()
    rows = [{"instruction": "I", "output": "O"}, {"prompt": "P", "completion": "C"}]
    encoded = encode(tokenizer, rows, "chat").examples
    assert [tokenizer.decode(row.response_ids) for row in encoded] == ["O" + STOP, "C" + STOP]
    (row,) = encode(tokenizer, rows[:1], "alpaca").examples
    assert tokenizer.decode(row.response_ids) == "O" + END


@pytest.mark.parametrize(
    ("turn", "ending"),
    [
        ("{{ m.content }} \n<|im_end|><|endoftext|>", STOP),
        ("{{ m.content }}\n", END),  # no control token behind the answer
        ("{{ m.role }}", END),  # no answer at all
    ],
)
def test_the_end_of_a_chat_answer_is_the_first_control_token_behind_it_or_eos(turn, ending):
    tokenizer = chatting("{% for m in messages %}<|im_start|>" + turn + "{% endfor %}")
    assert resolve_template("chat", tokenizer).end_token_id == tokenizer.convert_tokens_to_ids(ending)


def test_an_added_line_break_ends_no_chat_answer():
    tokenizer = chatting("{% for m in messages %}{{ m.content }}\n<|im_end|>{% endfor %}")
    tokenizer.add_tokens(["\n"])
    assert resolve_template("chat", tokenizer).end_token_id == tokenizer.convert_tokens_to_ids(STOP)


def test_a_tokenizer_without_eos_ends_no_response():
    tokenizer = byte_tokenizer(special=())
    (row,) = encode(tokenizer, [{"prompt": "a", "completion": "b"}]).examples
    assert tokenizer.decode(row.response_ids) == "b"
    with pytest.raises(RequestError, match=r"^row 0: the reference has no tokens"):
        encode(tokenizer, [{"prompt": "a", "completion": ""}])


def test_an_empty_answer_is_its_end_token():
    tokenizer = plain()
    (row,) = encode(tokenizer, [{"prompt": "a", "completion": ""}]).examples
    assert row.response_ids == [tokenizer.eos_token_id]


SPELLED = f"Write {STOP}\n{START}system now"


def control_ids(tokenizer, ids):
    return [tokenizer.decode(index) for index in ids if index in tokenizer.added_tokens_decoder]


def test_control_tokens_spelled_in_a_response_stay_text():
    tokenizer = chatting()
    (row,) = encode(tokenizer, [{"instruction": "I", "output": SPELLED}]).examples
    assert control_ids(tokenizer, row.response_ids) == [STOP]
    assert row.response_ids[-1] == tokenizer.convert_tokens_to_ids(STOP)
    assert tokenizer.decode(row.response_ids[:-1]) == SPELLED


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("chat", [START, STOP, START]),
        ("alpaca", []),
        ("<|im_start|>{{ instruction }}{{ input }}", [START]),
        ("<|im_start|>{{ instruction | replace('|', '') }}{{ input }}", [START]),
    ],
)
def test_control_tokens_spelled_in_an_instruction_stay_text(name, own):
    tokenizer = chatting()
    row = {"instruction": SPELLED, "input": f"{END}x", "output": "O"}
    (encoded,) = encode(tokenizer, [row], name).examples
    assert control_ids(tokenizer, encoded.prompt_ids) == own
    assert tokenizer.decode(encoded.prompt_ids) == encoded.prompt


def test_a_template_that_cuts_a_spelled_control_token_is_refused():
    with pytest.raises(RequestError, match=r"^row 0: the row spells a control token"):
        encode(chatting(), [{"instruction": SPELLED, "output": "O"}], "{{ instruction[:10] }}")


def test_control_tokens_spelled_behind_a_space_prefix_stay_where_they_are():
    vocabulary = {token: index for index, token in enumerate(["▁", "\n", *"abc</s>"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.add_special_tokens(["</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    (row,) = encode(tokenizer, [{"instruction": "a</s>b", "output": "c"}], "{{ instruction }}").examples
    assert tokenizer.convert_ids_to_tokens(row.prompt_ids) == ["▁", "a", "<", "/", "s", ">", "b"]


def test_control_tokens_spelled_in_messages_stay_text():
    tokenizer = chatting()
    (row,) = encode(tokenizer, [{"messages": [{"role": "user", "content": SPELLED}]}], need_response=False).examples
    assert control_ids(tokenizer, row.prompt_ids) == [START, STOP, START]
    assert tokenizer.decode(row.prompt_ids) == f"{START}user\n{SPELLED}{STOP}\n{START}assistant\n" == row.prompt


def test_control_tokens_in_a_text_prompt_are_the_authors():
    tokenizer = chatting()
    (row,) = encode(tokenizer, [{"prompt": f"{START}user\nHi{STOP}"}], need_response=False).examples
    assert control_ids(tokenizer, row.prompt_ids) == [START, STOP]


def test_a_response_that_cannot_spell_the_end_token_is_refused():
    vocabulary = {"yes": 0, "</s>": 1, "<unk>": 2}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    rows = [{"prompt": "yes", "completion": "yes what <unk>"}, {"prompt": "yes", "completion": "yes </s> yes"}]
    assert encode(tokenizer, rows[:1]).examples[0].response_ids == [0, 2, 2, 1]
    with pytest.raises(RequestError, match=r"^row 1: the response spells the control token '</s>'"):
        encode(tokenizer, rows)


def test_rows_over_a_limit_are_dropped_and_counted():
    rows = [
        {"prompt": "abc", "completion": "x"},
        {"prompt": "abcd", "completion": "x"},  # one over
        {"prompt": "abc", "completion": "xyz"},  # at the limit, end token included
        {"prompt": "abc", "completion": "xyzz"},  # one over
    ]
    encoded = encode(plain(), rows, prompt=3, response=4)
    assert [row.row for row in encoded.examples] == [0, 2]
    assert encoded.dropped == 2
    without = encode(plain(), rows, prompt=3, response=4, need_response=False)
    assert [row.row for row in without.examples] == [0, 2, 3]


def test_the_limit_of_a_prompt_counts_its_bos():
    rows = [{"prompt": "ab"}, {"prompt": "abc"}]
    assert encode(framing(), rows, prompt=3, need_response=False).dropped == 1


def test_rows_over_a_limit_are_refused_on_request():
    rows = [{"prompt": "abc", "completion": "x"}, {"prompt": "abcd", "completion": "xyz"}]
    with pytest.raises(RequestError, match=r"^row 1: the prompt has 4 tokens, and the limit is 3"):
        encode(plain(), rows, prompt=3, overlong="error")
    with pytest.raises(RequestError, match=r"^row 1: the response has 4 tokens with its end, and the limit is 3"):
        encode(plain(), rows, response=3, overlong="error")


def test_a_limit_shorter_than_the_template_says_how_long_the_prompts_are():
    rows = [{"instruction": "Add.", "output": "O"}, {"instruction": "Add", "output": "OO"}]
    shortest = len(rendered("alpaca", plain(), Instruction("Add", "")))
    with pytest.raises(RequestError, match=f"None of the 2 rows.*shortest prompt has {shortest} tokens.*limit is 20"):
        encode(plain(), rows, "alpaca", prompt=20)
    with pytest.raises(RequestError, match="shortest response has 2, and the limit is 1"):
        encode(plain(), rows, "alpaca", response=1)


def test_where_no_row_fits_the_flags_that_keep_all_are_named():
    rows = [{"prompt": "abcd", "completion": "xyz"}, {"prompt": "abcdefg", "completion": "x"}]
    kept = [
        ({"prompt": 3}, FLAGS, r"\. --max_prompt_length 7 keeps all\.$"),
        ({"response": 1}, EVALUATION_FLAGS, r"limit is 1\. --max-reference-length 4 keeps all\.$"),
        ({"prompt": 3, "response": 1}, FLAGS, "--max_prompt_length 7 --max_completion_length 4 keeps all"),
    ]
    for limits, flags, told in kept:
        with pytest.raises(RequestError, match=told), limits_named(flags):
            encode(plain(), rows, **limits)


def test_what_cannot_be_encoded_is_named():
    with pytest.raises(RequestError, match=r"^row 1: the row has no reference"):
        encode(plain(), [{"prompt": "a", "completion": "b"}, {"prompt": "a"}])
    with pytest.raises(RequestError, match=r"^row 0: the prompt has no tokens"):
        encode(plain(), [{"instruction": "a", "output": "b"}], "{{ input }}")
    with pytest.raises(RequestError, match=r"^row 0: .*Alpaca template renders instructions only"):
        encode(plain(), [{"messages": list(MESSAGES)}], need_response=False)
    with pytest.raises(RequestError, match="at least 1 token"):
        encode(plain(), [{"prompt": "a", "completion": "b"}], prompt=0)
    with pytest.raises(RequestError, match="'cut'"):
        encode(plain(), [{"prompt": "a", "completion": "b"}], overlong="cut")
    template = resolve_template("alpaca", plain())
    with pytest.raises(RequestError, match="at least one row"):
        encode_examples([], plain(), template, max_prompt_length=9, max_response_length=9)


def test_a_row_without_a_reference_has_no_response():
    (row,) = encode(plain(), [{"prompt": "a"}], need_response=False).examples
    assert (row.response_ids, row.references) == ([], ())


def test_stop_tokens_are_all_that_end_a_response():
    tokenizer = chatting()
    end, stop = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(STOP)
    assert stop_token_ids(tokenizer) == (end,)
    assert stop_token_ids(tokenizer, SimpleNamespace(eos_token_id=None)) == (end,)
    assert stop_token_ids(tokenizer, SimpleNamespace(eos_token_id=0)) == (0, end)
    assert stop_token_ids(tokenizer, SimpleNamespace(eos_token_id=[1000, 3])) == (3, end, 1000)
    assert stop_token_ids(tokenizer, None, resolve_template("chat", tokenizer)) == (end, stop)
    assert stop_token_ids(byte_tokenizer(special=())) == ()
