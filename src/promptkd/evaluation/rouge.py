"""ROUGE-L, ROUGE-1 and exact match of responses against references, as MiniLLM and PromptKD report them.

All are means over rows of the best score over a row's references, on a scale of 0 to 100. MiniLLM's own script
(`minillm/rouge_metric.py` in microsoft/LMOps) also rounds to four decimals and cuts predictions and references to
the shorter of the two; here nothing is rounded, and unequal lengths are an error.
"""

import string
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from statistics import fmean
from typing import Literal

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

from promptkd.errors import RequestError

__all__ = [
    "exact_match",
    "exact_match_scores",
    "normalize_answer",
    "rouge_1",
    "rouge_1_scores",
    "rouge_l",
    "rouge_l_scores",
    "rouge_scores",
]

Kind = Literal["rougeL", "rouge1"]

References = Sequence[str | Sequence[str]]
"""One entry a prediction: a reference, or a list or tuple of them."""

_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)


def rouge_l(
    predictions: Sequence[str], references: References, *, tokenize: Callable[[str], Sequence[str]] | None = None
) -> float:
    """Mean of `rouge_l_scores`, 0 to 100."""
    return fmean(rouge_l_scores(predictions, references, tokenize=tokenize))


def rouge_l_scores(
    predictions: Sequence[str], references: References, *, tokenize: Callable[[str], Sequence[str]] | None = None
) -> list[float]:
    """ROUGE-L of each prediction, 0 to 100: 100 x F of the longest common subsequence, best over its references.

    F = 2 P R / (P + R), with P the length of the longest common subsequence over the tokens of the prediction and R
    over those of the reference (Lin 2004, β = 1); 0 where either has no token. Tokens are those of `rouge_scores`.
    """
    return rouge_scores(predictions, references, kinds=("rougeL",), tokenize=tokenize)["rougeL"]


def rouge_1(
    predictions: Sequence[str], references: References, *, tokenize: Callable[[str], Sequence[str]] | None = None
) -> float:
    """Mean of `rouge_1_scores`, 0 to 100."""
    return fmean(rouge_1_scores(predictions, references, tokenize=tokenize))


def rouge_1_scores(
    predictions: Sequence[str], references: References, *, tokenize: Callable[[str], Sequence[str]] | None = None
) -> list[float]:
    """ROUGE-1 of each prediction, 0 to 100: 100 x F of the tokens in common, best over its references.

    F = 2 P R / (P + R), with P the number of tokens in common over the tokens of the prediction and R over those of
    the reference (Lin 2004, β = 1). A token is in common as often as it is in both. 0 where either has no token.
    Tokens are those of `rouge_scores`.
    """
    return rouge_scores(predictions, references, kinds=("rouge1",), tokenize=tokenize)["rouge1"]


def rouge_scores(
    predictions: Sequence[str],
    references: References,
    *,
    kinds: Sequence[Kind],
    tokenize: Callable[[str], Sequence[str]] | None = None,
) -> dict[str, list[float]]:
    """By kind, the score of each prediction; each kind takes the best over a prediction's references by itself.

    The default is `RougeScorer(kinds, use_stemmer=True)` of the package `rouge-score`, which MiniLLM and PromptKD use:
    lower case, runs of a-z and 0-9, the Porter stem of tokens longer than three characters. It knows English
    alone. Every other character separates tokens and is dropped: "naïve café" becomes "na", "ve", "caf", and text
    in Cyrillic, Greek, Arabic, Devanagari, Chinese, Japanese or Korean leaves nothing but its Latin letters and
    digits. A row whose references keep no token scores 0 whatever the answer; such rows are kept, as MiniLLM keeps
    them, and one warning counts them. MiniLLM has no remedy: its `xlingual` argument is accepted and not used. Here
    `tokenize` replaces the default (and its stemming): `list` compares characters, `str.split` words.

    Args:
        predictions: one response a row.
        references: a string, or a list or tuple of strings, a row.
        kinds: "rougeL", "rouge1" or both.
        tokenize: from a text to its tokens; None for the default above.

    Raises:
        RequestError: no rows, unequal lengths, a row without references, or something that is not a string.
    """
    rows = _reference_lists(predictions, references)
    tokens = cache(tokenize or DefaultTokenizer(use_stemmer=True).tokenize)  # stemming is most of the work
    mute = sum(not any(tokens(reference) for reference in row) for row in rows)
    if mute:
        warnings.warn(
            f"{mute} of {len(rows)} rows have no reference with a token that ROUGE can compare, so they score 0 "
            "whatever the answer. The default tokens are the letters a-z and digits; for other scripts pass "
            "`tokenize`, for example `tokenize=list` to compare characters.",
            stacklevel=3,
        )
    scorer = RougeScorer(list(kinds), tokenizer=_CallableTokenizer(tokens))
    found = [scorer.score_multi(row, prediction) for prediction, row in zip(predictions, rows, strict=True)]
    return {kind: [100.0 * each[kind].fmeasure for each in found] for kind in kinds}


def exact_match(predictions: Sequence[str], references: References) -> float:
    """Mean of `exact_match_scores`, 0 to 100."""
    return fmean(exact_match_scores(predictions, references))


def exact_match_scores(predictions: Sequence[str], references: References) -> list[float]:
    """100 for a prediction that equals one of its references after `normalize_answer`, else 0.

    Raises:
        RequestError: no rows, unequal lengths, a row without references, or something that is not a string.
    """
    rows = _reference_lists(predictions, references)
    return [
        100.0 * (normalize_answer(prediction) in map(normalize_answer, row))
        for prediction, row in zip(predictions, rows, strict=True)
    ]


def normalize_answer(text: str) -> str:
    """Lower case, without the 32 ASCII punctuation characters, each run of white space one space, none at the ends.

    This is the normalisation of SQuAD less its removal of articles, as MiniLLM has it. Punctuation is deleted, not
    replaced ("well-known" becomes "wellknown"), and punctuation outside ASCII stays.
    """
    return " ".join(text.lower().translate(_DELETE_PUNCTUATION).split())


class _CallableTokenizer(Tokenizer):
    def __init__(self, tokenize: Callable[[str], Sequence[str]]) -> None:
        self._tokenize = tokenize

    def tokenize(self, text: str) -> Sequence[str]:
        return self._tokenize(text)


def _reference_lists(predictions: Sequence[str], references: References) -> list[Sequence[str]]:
    """The references of each row as a list, once both arguments are known to be sound."""
    for name, values in (("predictions", predictions), ("references", references)):
        if isinstance(values, str):
            raise RequestError(f"`{name}` must hold one entry a row. Got a single string; put it into a list.")
    if len(predictions) != len(references):
        raise RequestError(
            f"Every prediction needs its references. Got {len(predictions)} predictions and {len(references)} rows of "
            "references; check that both come from the same rows of the data."
        )
    if len(predictions) == 0:
        raise RequestError("Expected at least one prediction to score. Got none.")
    rows: list[Sequence[str]] = []
    for row, (prediction, given) in enumerate(zip(predictions, references, strict=True)):
        if not isinstance(prediction, str):
            raise RequestError(f"The prediction of row {row} must be a string. Got {type(prediction).__name__}.")
        rows.append(_references_of_row(row, given))
    return rows


def _references_of_row(row: int, given: str | Sequence[str]) -> Sequence[str]:
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list | tuple):
        raise RequestError(
            f"The references of row {row} must be a string or a list of strings. Got {type(given).__name__}."
        )
    if not given:
        raise RequestError(f"Row {row} has an empty list of references. Leave such rows out before scoring.")
    for reference in given:
        if not isinstance(reference, str):
            raise RequestError(f"A reference of row {row} must be a string. Got {type(reference).__name__}.")
    return given
