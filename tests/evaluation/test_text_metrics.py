"""Repetition, length and ending of hand-made answers."""

import pytest

from promptkd.evaluation.text_metrics import answer_scores, distinct

STOP = 9


def scores(*answers, wanted, limit=4):
    texts = ["a b"] * len(answers)
    return answer_scores(texts, texts, answers, wanted, stop_ids=(STOP, 8), max_new_tokens=limit)


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
