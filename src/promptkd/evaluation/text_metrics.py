"""Scores of an answer that need no model: ROUGE and exact match against references, length, repetition, how it ends.

ROUGE-L, ROUGE-1 and exact match are those that MiniLLM and PromptKD report: the best score over a row's references, on
a scale of 0 to 100. MiniLLM's own script (`minillm/rouge_metric.py` in microsoft/LMOps) also rounds to four decimals
and cuts predictions and references to the shorter of the two; here nothing is rounded, and unequal lengths are an
error.
"""

import string
import warnings
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from statistics import fmean
from typing import Literal

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

from promptkd.errors import RequestError

Kind = Literal["rougeL", "rouge1"]
Tokenize = Callable[[str], Sequence[str]]
References = Sequence[str | Sequence[str]]
"""Per prediction a reference, or a list or tuple of them."""

_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)


def answer_scores(
    texts: Sequence[str],
    references: References,
    token_ids: Sequence[Sequence[int]],
    reference_tokens: Sequence[int],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
) -> list[dict[str, float]]:
    """Every score of each answer by name; see `docs/evaluation.md` for the formulas.

    Args:
        texts: the answers without special tokens.
        references: a string, or a list of strings, per answer.
        token_ids: the answers as they were decoded, with the stop id at the end where one was generated; none is empty.
        reference_tokens: tokens of each first reference, its end included, above 0.
        max_new_tokens: the limit at which an answer was cut.
    """
    rouge = rouge_scores(texts, references, kinds=("rougeL", "rouge1"))
    exact = exact_match_scores(texts, references)
    scores = []
    for index, (ids, wanted) in enumerate(zip(token_ids, reference_tokens, strict=True)):
        ended = ids[-1] in stop_ids
        content = ids[:-1] if ended else ids
        scores.append(
            {
                "rouge_l": rouge["rougeL"][index],
                "rouge_1": rouge["rouge1"][index],
                "exact_match": exact[index],
                "eos_share": float(ended),
                "cut_share": float(not ended and len(ids) >= max_new_tokens),
                "response_length": float(len(ids)),
                "length_ratio": len(ids) / wanted,
                "distinct_1": distinct(content, 1),
                "distinct_2": distinct(content, 2),
            }
        )
    return scores


def distinct(tokens: Sequence[Hashable], n: int) -> float:
    """Distinct n-grams of `tokens` over all its n-grams: 1 if none is repeated (Li et al. 2016, distinct-n).

    1 as well where `tokens` is shorter than n: nothing is repeated.
    """
    grams = [tuple(tokens[first : first + n]) for first in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def rouge_l(predictions: Sequence[str], references: References, *, tokenize: Tokenize | None = None) -> float:
    """Mean of `rouge_l_scores`."""
    return fmean(rouge_l_scores(predictions, references, tokenize=tokenize))


def rouge_l_scores(
    predictions: Sequence[str], references: References, *, tokenize: Tokenize | None = None
) -> list[float]:
    """ROUGE-L of each prediction: 100 F of the longest common subsequence of tokens (see `rouge_scores`)."""
    return rouge_scores(predictions, references, kinds=("rougeL",), tokenize=tokenize)["rougeL"]


def rouge_1(predictions: Sequence[str], references: References, *, tokenize: Tokenize | None = None) -> float:
    """Mean of `rouge_1_scores`."""
    return fmean(rouge_1_scores(predictions, references, tokenize=tokenize))


def rouge_1_scores(
    predictions: Sequence[str], references: References, *, tokenize: Tokenize | None = None
) -> list[float]:
    """ROUGE-1 of each prediction: 100 F of the tokens in common, each as often as in both (see `rouge_scores`)."""
    return rouge_scores(predictions, references, kinds=("rouge1",), tokenize=tokenize)["rouge1"]


def rouge_scores(
    predictions: Sequence[str], references: References, *, kinds: Sequence[Kind], tokenize: Tokenize | None = None
) -> dict[str, list[float]]:
    """By kind, the score of each prediction; each kind takes the best over a prediction's references by itself.

    F = 2 P R / (P + R), with P the length of what is in common over the tokens of the prediction and R over those of
    the reference (Lin 2004, β = 1); 0 where either has no token.

    The default tokens are those of `RougeScorer(kinds, use_stemmer=True)` of the package `rouge-score`, which MiniLLM
    and PromptKD use: lower case, runs of a-z and 0-9, the Porter stem of tokens longer than three characters. It knows
    English alone. Every other character separates tokens and is dropped: "naïve café" becomes "na", "ve", "caf", and
    text in Cyrillic, Greek, Arabic, Devanagari, Chinese, Japanese or Korean leaves nothing but its Latin letters and
    digits. A row whose references keep no token scores 0 whatever the answer; such rows are kept, as MiniLLM keeps
    them, and one warning counts them. MiniLLM has no remedy: its `xlingual` argument is accepted and not used. Here
    `tokenize` replaces the default (and its stemming): `list` compares characters, `str.split` words.

    Args:
        predictions: one response per row.
        references: a string, or a list or tuple of strings, per row.
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


class _CallableTokenizer(Tokenizer):
    def __init__(self, tokenize: Tokenize) -> None:
        self._tokenize = tokenize

    def tokenize(self, text: str) -> Sequence[str]:
        return self._tokenize(text)


def exact_match(predictions: Sequence[str], references: References) -> float:
    """Mean of `exact_match_scores`."""
    return fmean(exact_match_scores(predictions, references))


def exact_match_scores(predictions: Sequence[str], references: References) -> list[float]:
    """100 for a prediction that equals one of its references after `normalize_answer`, else 0.

    Raises:
        RequestError: as `rouge_scores`.
    """
    rows = _reference_lists(predictions, references)
    return [
        100.0 * (normalize_answer(prediction) in map(normalize_answer, row))
        for prediction, row in zip(predictions, rows, strict=True)
    ]


def normalize_answer(text: str) -> str:
    """Lower case, without the 32 ASCII punctuation characters, each run of white space one space, none at the ends.

    This is SQuAD's normalization without its removal of articles, as MiniLLM has it. Punctuation is deleted, not
    replaced ("well-known" becomes "wellknown"), and punctuation outside ASCII stays.
    """
    return " ".join(text.lower().translate(_DELETE_PUNCTUATION).split())


def _reference_lists(predictions: Sequence[str], references: References) -> list[Sequence[str]]:
    """The references of each row as a list, after both arguments are checked."""
    for name, values in (("predictions", predictions), ("references", references)):
        if isinstance(values, str):
            raise RequestError(f"`{name}` must hold one entry per row. Got a single string; put it into a list.")
    if len(predictions) != len(references):
        raise RequestError(
            f"Every prediction needs its references. Got {len(predictions)} predictions and {len(references)} rows of "
            "references; check that both come from the same rows of the data."
        )
    if len(predictions) == 0:
        raise RequestError("Expected at least one prediction to score. Got none.")
    rows = [[given] if isinstance(given, str) else given for given in references]
    for row, (prediction, given) in enumerate(zip(predictions, rows, strict=True)):
        if not isinstance(given, list | tuple):
            raise RequestError(
                f"The references of row {row} must be a string or a list of strings. Got {type(given).__name__}."
            )
        if not given:
            raise RequestError(f"Row {row} has an empty list of references. Leave such rows out before scoring.")
        for name, text in [("The prediction", prediction), *(("A reference", each) for each in given)]:
            if not isinstance(text, str):
                raise RequestError(f"{name} of row {row} must be a string. Got {type(text).__name__}.")
    return rows
