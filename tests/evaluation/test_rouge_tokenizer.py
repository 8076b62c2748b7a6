"""ROUGE's tokens in many scripts, and which rows they leave unread."""

import pytest

from helpers.tiny import tiny_tokenizer
from promptkd.errors import RequestError
from promptkd.evaluation import rouge_l
from promptkd.evaluation.rouge_tokenizer import rouge_tokens

SCRIPTS = {
    "请回答第5个问题": "请 回 答 第 5 个 问 题",
    "用Python3写": "用 python3 写",
    "日本語のテスト。": "日 本 語 の テ ス ト",
    "Привет, МИР!": "привет мир",
    "नमस्ते दुनिया": "नमस्ते दुनिया",  # vowel signs are marks, which no word is cut at
    "مرحبا بالعالم": "مرحبا بالعالم",
    "한국어 텍스트": "한국어 텍스트",
    "ＡＢＣ１２": "abc12",  # full width
    "Cafe\u0301 naïve": "café naïve",
    "ดีมาก": "ดี ม า ก",
    "3.5+4=7.5": "3 5 4 7 5",
}


@pytest.mark.parametrize(("text", "tokens"), SCRIPTS.items())
def test_words_of_any_script(text, tokens):
    assert list(rouge_tokens("unicode").tokenize(text)) == tokens.split()


def test_characters_are_all_but_white_space():
    assert rouge_tokens("characters").tokenize("日本 A!\n") == ["日", "本", "a", "!"]


def test_words_are_those_of_the_papers():
    assert list(rouge_tokens().tokenize("Running U.S. naïve")) == ["run", "u", "s", "na", "ve"]


def test_the_model_s_own_tokens_are_named_by_their_vocabulary():
    tokenizer, other = tiny_tokenizer(), tiny_tokenizer()
    other.add_tokens(["<new>"])
    tokens = rouge_tokens("model", tokenizer)
    assert tokens.tokenize("the an") == ["the", " ", "an"]
    assert tokens.name.startswith("model ")
    assert tokens.name == rouge_tokens("model", tiny_tokenizer()).name
    assert tokens.name != rouge_tokens("model", other).name


def test_other_names_are_refused():
    with pytest.raises(RequestError, match="words, unicode, characters, model"):
        rouge_tokens("jieba")
    with pytest.raises(RequestError, match="need its tokenizer"):
        rouge_tokens("model")


@pytest.mark.parametrize(
    ("text", "is_read"),
    [
        ("The answer is 4.", True),
        ("naïve café", True),  # some letters are lost, most are not
        ("Tiếng Việt có nhiều dấu", True),
        ("42", True),
        ("这是第1个答案", False),  # a digit is not what the answer says
        ("使用Python的requests库来下载", False),
        ("Ответ: 42", True),  # half of it
        ("Ответ такой: 42", False),
        ("ＡＢＣ", False),
        ("👍", False),
        ("", False),
    ],
)
def test_what_the_papers_words_read(text, is_read):
    assert rouge_tokens().reads(text) is is_read


def test_rows_that_cannot_be_scored_are_counted_with_the_flag_that_scores_them():
    chinese, english = [["这是答案"], ["第二个答案", "也可以"]], [["an answer"]] * 18
    assert rouge_tokens().told_unread(chinese + english) == ""  # a tenth of them
    told = rouge_tokens().told_unread(chinese + english[:4])
    assert told.startswith("ROUGE cannot score 2 of 6 rows by words: ")
    assert told.endswith("give --rouge_tokenizer unicode, characters or model.")
    for name in ("unicode", "characters"):
        assert rouge_tokens(name).told_unread(chinese) == ""
    assert "characters or model" in rouge_tokens("unicode").told_unread([["👍"]])
    assert rouge_tokens().told_unread([["这是答案", "an answer"]]) == ""  # one reference is enough


@pytest.mark.parametrize("name", ["unicode", "characters"])
@pytest.mark.parametrize("text", [text for text in SCRIPTS if text != "ＡＢＣ１２"])
def test_a_right_answer_in_any_script_scores_100_and_another_less(name, text):
    tokenize = rouge_tokens(name).tokenize
    assert rouge_l([text], [text], tokenize=tokenize) == pytest.approx(100)
    assert rouge_l(["другое ответ別"], [text], tokenize=tokenize) < 50
