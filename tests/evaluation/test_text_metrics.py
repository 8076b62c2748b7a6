"""ROUGE and exact match against a second, recursive implementation; repetition, length and ending by hand."""

import re
import warnings
from collections import Counter
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer

from promptkd.errors import RequestError
from promptkd.evaluation.text_metrics import (
    distinct,
    exact_match,
    exact_match_scores,
    form_scores,
    normalize_answer,
    rouge_1,
    rouge_1_scores,
    rouge_l,
    rouge_l_scores,
    rouge_scores,
)

WORDS = ["run", "running", "runs", "the", "cat", "cats", "relational", "7", "U.S.", "well-known", "naïve", "猫", "!"]
texts = st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)


def tokens_by_hand(text: str) -> tuple[str, ...]:
    stem = PorterStemmer().stem
    return tuple(stem(word) if len(word) > 3 else word for word in re.findall("[a-z0-9]+", text.lower()))


def longest_common_subsequence(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    @cache
    def length(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return 0
        either = max(length(i + 1, j), length(i, j + 1))
        return max(either, 1 + length(i + 1, j + 1)) if a[i] == b[j] else either

    return length(0, 0)


def words_in_common(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    return (Counter(a) & Counter(b)).total()


def rouge_by_hand(prediction: str, references: list[str], *, overlap=longest_common_subsequence) -> float:
    best = 0.0
    for reference in references:
        ours, theirs = tokens_by_hand(prediction), tokens_by_hand(reference)
        if ours and theirs:  # 2 P R / (P + R) with P = L / |ours|, R = L / |theirs|
            best = max(best, 200 * overlap(ours, theirs) / (len(ours) + len(theirs)))
    return best


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*ROUGE can compare")
@given(rows=st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_rouge_equals_a_second_implementation(rows: list[tuple[str, list[str]]]) -> None:
    predictions, references = [row[0] for row in rows], [row[1] for row in rows]
    for mean, scores, overlap in (
        (rouge_l, rouge_l_scores, longest_common_subsequence),
        (rouge_1, rouge_1_scores, words_in_common),
    ):
        expected = [rouge_by_hand(prediction, row, overlap=overlap) for prediction, row in rows]
        assert scores(predictions, references) == pytest.approx(expected)
        assert mean(predictions, references) == pytest.approx(sum(expected) / len(expected))
    both = rouge_scores(predictions, references, kinds=("rougeL", "rouge1"))
    assert both == {
        "rougeL": rouge_l_scores(predictions, references),
        "rouge1": rouge_1_scores(predictions, references),
    }


def test_rouge_1_of_hand_computed_rows() -> None:
    predictions = ["the cat the cat", "d c b a", "", "running jumps"]
    references = ["the cat sat", "a b c d", "yes", "jumping runs"]
    # "the" and "cat" count once each, as the reference has them: 2*2/7; order does not count; nothing; stems.
    assert rouge_1_scores(predictions, references) == pytest.approx([400 / 7, 100, 0, 100])
    assert rouge_1(predictions, references) == pytest.approx((400 / 7 + 200) / 4)


def test_each_kind_takes_its_own_best_reference() -> None:
    references = [["one two x y", "three two one"]]
    scores = rouge_scores(["one two three"], references, kinds=("rougeL", "rouge1"))
    assert scores == {"rougeL": [pytest.approx(400 / 7)], "rouge1": [pytest.approx(100)]}


def test_rouge_of_hand_computed_rows() -> None:
    predictions = ["the cat sat", "a b c d", "one two three four five six"]
    references = ["the cat sat on the mat", "d c b a", "two four six"]
    # L = 3 of 3 and 6: 2*3/9; a reversed text shares one token: 2*1/8; L = 3 of 6 and 3: 2*3/9.
    expected = [200 / 3, 25.0, 200 / 3]
    assert rouge_l_scores(predictions, references) == pytest.approx(expected)
    assert rouge_l(predictions, references) == pytest.approx((200 / 3 + 25 + 200 / 3) / 3)


def test_rouge_is_the_f_measure_of_the_scorer_that_the_papers_use() -> None:
    prediction, reference = "Relational databases, well-known since 1970!", "A relation database is known since 1970."
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    assert rouge_l([prediction], [reference]) == 100 * scorer.score(reference, prediction)["rougeL"].fmeasure


def test_stemming_joins_forms_of_a_word_longer_than_three_letters() -> None:
    assert rouge_l(["running jumps"], ["runs jumping"]) == pytest.approx(100)
    assert rouge_l(["was"], ["wa"]) == 0  # three letters are not stemmed


def test_the_best_of_several_references_counts() -> None:
    assert rouge_l_scores(["blue sky"], [["red earth", "the blue sky", "blue"]]) == pytest.approx([80])
    assert rouge_l_scores(["blue sky"], [("red earth", "blue")]) == pytest.approx([200 / 3])  # tuples are lists too


def test_case_and_punctuation_do_not_count_but_split_words() -> None:
    assert rouge_l(["Hello, WORLD!!"], ["hello world"]) == 100
    assert rouge_l(["U.S."], ["US"]) == 0  # "u", "s" against "us"


@pytest.mark.parametrize("prediction", ["", "   ", "?!"])
def test_an_answer_without_tokens_scores_zero(prediction: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the reference is sound, so there is nothing to warn of
        assert rouge_l_scores([prediction, "yes"], ["yes", "yes"]) == [0, 100]


def test_references_in_other_scripts_are_named_in_one_warning() -> None:
    predictions = ["Привет, мир", "日本語", "plain", "5 рублей"]
    references = [["Привет, мир"], ["日本語", ""], ["plain"], ["5 рублей"]]
    with pytest.warns(UserWarning, match="2 of 4 rows .*tokenize=list") as caught:
        scores = rouge_scores(predictions, references, kinds=("rougeL", "rouge1"))
    assert scores == {"rougeL": [0, 0, 100, 100], "rouge1": [0, 0, 100, 100]}
    assert len(caught) == 1


def test_accented_letters_split_words() -> None:
    assert rouge_l(["na ve caf"], ["naïve café"]) == pytest.approx(100)


def test_another_tokenizer_compares_other_scripts() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rouge_l(["日本人"], ["日本語"], tokenize=list) == pytest.approx(200 / 3)
        assert rouge_l(["Привет, мир"], ["Привет, мир"], tokenize=str.split) == 100
        assert rouge_l(["running"], ["runs"], tokenize=str.split) == 0  # and no stemming
        assert rouge_1(["本日人"], ["日本語"], tokenize=list) == pytest.approx(200 / 3)


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The  Cat,\n sat.\t", "the cat sat"),
        ("well-known U.S.", "wellknown us"),  # deleted, not replaced by a space
        ("an apple a day", "an apple a day"),  # articles stay, unlike SQuAD
        ("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", ""),
        ("«Écoute» – 日本。", "«écoute» – 日本。"),  # punctuation outside ASCII stays
    ],
)
def test_the_normalization_before_an_exact_match(text: str, normalized: str) -> None:
    assert normalize_answer(text) == normalized


def test_exact_match_takes_any_reference_and_averages_over_rows() -> None:
    predictions = ["Paris.", "in Paris", "", "YES"]
    references = [["Lyon", "paris"], "Paris", ["", "x"], ("no", "yes!")]
    assert exact_match_scores(predictions, references) == [100, 0, 100, 100]
    assert exact_match(predictions, references) == 75


@pytest.mark.parametrize("score", [rouge_l, rouge_1_scores, exact_match, exact_match_scores])
@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (["a", "b"], [["a"]], "2 predictions and 1 rows"),
        (["a"], ["a", "b"], "1 predictions and 2 rows"),
        ([], [], "at least one"),
        (["a", "b"], ["a", []], "Row 1 has an empty list"),
        (["a", None], ["a", "b"], "prediction of row 1 must be a string. Got NoneType"),
        (["a"], [None], "references of row 0 .*NoneType"),
        (["a"], [["a", 3]], "reference of row 0 must be a string. Got int"),
        (["a"], [{"a": 1}], "references of row 0 .*dict"),
        ("a", ["a"], "`predictions` .*single string"),
        (["a"], "a", "`references` .*single string"),
    ],
)
def test_unsound_rows_are_refused(score, predictions, references, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        score(predictions, references)


# ---- repetition, length, ending ----

STOP = 9


def scores(*answers, wanted, limit=4):
    lengths = zip(answers, wanted, strict=True)
    return [form_scores(ids, length, stop_ids=(STOP, 8), max_new_tokens=limit) for ids, length in lengths]


@pytest.mark.parametrize(
    ("tokens", "one", "two"),
    [
        ([1, 2, 3], 1, 1),
        ([1, 1, 1, 1], 1 / 4, 1 / 3),
        ([1, 2, 1, 2], 2 / 4, 2 / 3),
        ([1, 2, 2, 1], 2 / 4, 1),
        ([1], 1, 1),  # no pair, so none is repeated
        ([], 1, 1),
    ],
)
def test_distinct_n(tokens, one, two):
    assert distinct(tokens, 1) == one
    assert distinct(tokens, 2) == two
    assert distinct([str(token) for token in tokens], 2) == two


def test_how_answers_end_and_how_long_they_are():
    ended, cut, at_the_limit, empty = scores([1, 1, STOP], [1, 2, 3, 4], [1, 2, 1, 8], [STOP], wanted=[6, 2, 4, 4])
    assert (ended["eos_share"], ended["cut_share"], ended["response_length"], ended["length_ratio"]) == (1, 0, 3, 0.5)
    assert (cut["eos_share"], cut["cut_share"], cut["length_ratio"]) == (0, 1, 2)
    assert (at_the_limit["eos_share"], at_the_limit["cut_share"]) == (1, 0)
    assert (empty["response_length"], empty["length_ratio"], empty["distinct_1"]) == (1, 0.25, 1)
    assert ended["distinct_1"] == 1 / 2  # the end is no token of the text


def test_an_id_that_ends_answers_elsewhere_in_the_text_is_a_token():
    (answer,) = scores([STOP, 1, STOP], wanted=[3], limit=3)
    assert (answer["eos_share"], answer["distinct_1"], answer["distinct_2"]) == (1, 1, 1)
