"""A prompt that is text keeps its tokens where the text alone would be read as others."""

import pytest
from tests.data.test_data import END, SPELLED, byte_tokenizer, chatting, encode, framing

from promptkd.data import encode_examples, examples_from_rows, tokens
from promptkd.data.prompt_tokens import tokens_as_read
from promptkd.data.teacher_prompt import TeacherPrompts
from promptkd.data.templates import resolve_template
from promptkd.data.tokens import Spelling
from promptkd.errors import RequestError


def asked(tokenizer, text, template="chat"):
    (row,) = encode(tokenizer, [{"instruction": text, "output": "O"}], template).examples
    return row


def headless():
    """A tokenizer that puts BOS before a text, and a chat template that does not."""
    tokenizer = framing()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "text", "template"),
    [(chatting(), SPELLED, "chat"), (chatting(), SPELLED, "alpaca"), (headless(), "Hi", "chat")],
)
def test_kept_tokens_are_the_prompt(tokenizer, text, template):
    row = asked(tokenizer, text, template)
    assert tokens_as_read([row.prompt], tokenizer) != [row.prompt_ids]
    line = {"prompt": row.prompt, "completion": "O", "prompt_token_ids": row.prompt_ids}
    data = encode(tokenizer, [line, {"prompt": "Hi", "completion": "O"}])
    assert data.examples[0].prompt_ids == row.prompt_ids
    assert not data.unread


def test_tokens_of_another_vocabulary_or_text_are_not_used():
    row, other = asked(chatting(), SPELLED), byte_tokenizer(special=("<s>", END), eos_token=END)
    line = {"prompt": row.prompt, "completion": "O", "prompt_token_ids": row.prompt_ids}
    (read,) = encode(other, [line]).examples
    assert [read.prompt_ids] == tokens_as_read([row.prompt], other)
    (read,) = encode(chatting(), [{**line, "prompt": "another"}]).examples
    assert [read.prompt_ids] == tokens_as_read(["another"], chatting())


def test_a_context_stands_before_the_kept_tokens():
    tokenizer = chatting()
    row = asked(tokenizer, SPELLED)
    line = {"prompt": row.prompt, "completion": "O", "prompt_token_ids": row.prompt_ids, "teacher_prompt": f"C{END}"}
    template = resolve_template("auto", tokenizer, teacher=TeacherPrompts())
    (read,) = encode_examples(examples_from_rows([line]), tokenizer, template).examples
    assert read.teacher_prompt_ids == [
        *tokenizer(f"C{END}\n\n", split_special_tokens=True)["input_ids"],
        *row.prompt_ids,
    ]


@pytest.mark.parametrize("held", ["x", [1, -1], [1.0], {"a": 1}])
def test_what_is_no_list_of_ids_is_refused(held):
    with pytest.raises(RequestError, match="row 0: 'prompt_token_ids' must be a list of token ids"):
        encode(chatting(), [{"prompt": "Hi", "completion": "O", "prompt_token_ids": held}])


def test_many_texts_have_the_tokens_of_each_and_share_what_holds_them(monkeypatch):
    tokenizer = byte_tokenizer(merges=(("t", "h"), ("th", "e"), ("a", "n")))
    texts = [f"{index} the an {index % 7}" for index in range(23)]
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    monkeypatch.setattr(tokens, "_AT_ONCE", 5)
    spelling = Spelling(tokenizer)
    found = spelling.tokens(texts, spell=True)
    assert found == expected
    assert spelling.tokens([], spell=True) == []
    large = [index for ids in found for index in ids if index > 256]  # Python itself shares smaller ones
    assert set(large) == {257, 258}
    assert len({id(index) for index in large}) == 2
