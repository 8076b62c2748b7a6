"""Scores of an answer that need no model: ROUGE and exact match against references, length, repetition, how it ends.

ROUGE-L, ROUGE-1 and exact match are those that MiniLLM and PromptKD report: the best score over a row's references, on
a scale of 0 to 100. Unlike in MiniLLM's script nothing is rounded, and unequal lengths are an error.
"""

import string
import warnings
from collections.abc import Hashable, Sequence
from functools import cache
from statistics import fmean
from types import SimpleNamespace
from typing import Literal

from rouge_score.rouge_scorer import RougeScorer

from promptkd.errors import RequestError
from promptkd.evaluation.rouge_tokenizer import Tokenize, rouge_tokens

Kind = Literal["rougeL", "rouge1"]
Texts = Sequence[str]
References = Sequence[str | Sequence[str]]  # per prediction a reference, or a list or tuple of them
_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)


def form_scores(
    token_ids: Sequence[int], reference_tokens: int, *, stop_ids: Sequence[int], max_new_tokens: int
) -> dict[str, float]:
    """How an answer ends, its length and its repetition; see `docs/evaluation.md` for the formulas.

    `token_ids` end in the stop id where one was generated; `reference_tokens` counts the first reference with its end,
    0 for a row without, which has no `length_ratio`.
    """
    ended = token_ids[-1] in stop_ids
    content = token_ids[:-1] if ended else token_ids
    ratio = {"length_ratio": len(token_ids) / reference_tokens} if reference_tokens else {}
    return {
        "eos_share": float(ended),
        "cut_share": float(not ended and len(token_ids) >= max_new_tokens),
        "response_length": float(len(token_ids)),
        **ratio,
        "distinct_1": distinct(content, 1),
        "distinct_2": distinct(content, 2),
    }


def distinct(tokens: Sequence[Hashable], n: int) -> float:
    """Distinct n-grams of `tokens` over all its n-grams (Li et al. 2016): 1 if none is repeated, or there is none."""
    grams = [tuple(tokens[first : first + n]) for first in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def rouge_l(predictions: Texts, references: References, *, tokenize: Tokenize | None = None) -> float:
    """Mean of `rouge_l_scores`."""
    return fmean(rouge_l_scores(predictions, references, tokenize=tokenize))


def rouge_l_scores(predictions: Texts, references: References, *, tokenize: Tokenize | None = None) -> list[float]:
    """ROUGE-L of each prediction: 100 F of the longest common subsequence of tokens (see `rouge_scores`)."""
    return rouge_scores(predictions, references, kinds=("rougeL",), tokenize=tokenize)["rougeL"]


def rouge_1(predictions: Texts, references: References, *, tokenize: Tokenize | None = None) -> float:
    """Mean of `rouge_1_scores`."""
    return fmean(rouge_1_scores(predictions, references, tokenize=tokenize))


def rouge_1_scores(predictions: Texts, references: References, *, tokenize: Tokenize | None = None) -> list[float]:
    """ROUGE-1 of each prediction: 100 F of the tokens in common, each as often as in both (see `rouge_scores`)."""
    return rouge_scores(predictions, references, kinds=("rouge1",), tokenize=tokenize)["rouge1"]


def rouge_scores(
    predictions: Texts, references: References, *, kinds: Sequence[Kind], tokenize: Tokenize | None = None
) -> dict[str, list[float]]:
    """By kind, the score of each prediction; each kind takes the best over a prediction's references by itself.

    F = 2 P R / (P + R), with P the length of what is in common over the tokens of the prediction and R over those of
    the reference (Lin 2004, β = 1); 0 where either has no token.

    The default tokens are those of `RougeScorer(kinds, use_stemmer=True)` of `rouge-score`, which MiniLLM and PromptKD
    use: lower case, runs of a-z and 0-9, the Porter stem of tokens longer than three characters. Other scripts leave
    nothing: a row whose references keep no token scores 0, as in MiniLLM, and one warning counts such rows. `tokenize`
    replaces the default (and its stemming): `list` compares characters, `str.split` words.

    Raises `RequestError` for no rows, unequal lengths, a row without references, or something that is not a string.
    """
    rows = _reference_lists(predictions, references)
    tokens = cache(tokenize or rouge_tokens().tokenize)  # stemming is most of the work
    if mute := sum(not any(map(tokens, row)) for row in rows):
        told = f"{mute} of {len(rows)} rows have no reference with a token that ROUGE can compare, so they score 0 "
        told += "whatever the answer. The default tokens are the letters a-z and digits; for other scripts give "
        told += "rouge_tokenizer=unicode (a setting, or --rouge_tokenizer), or pass `tokenize`, for example "
        warnings.warn(told + "`tokenize=list` to compare characters.", stacklevel=3)
    scorer = RougeScorer(list(kinds), tokenizer=SimpleNamespace(tokenize=tokens))
    found = [scorer.score_multi(row, prediction) for prediction, row in zip(predictions, rows, strict=True)]
    return {kind: [100.0 * each[kind].fmeasure for each in found] for kind in kinds}


def exact_match(predictions: Texts, references: References) -> float:
    """Mean of `exact_match_scores`."""
    return fmean(exact_match_scores(predictions, references))


def exact_match_scores(predictions: Texts, references: References) -> list[float]:
    """100 for a prediction that equals one of its references after `normalize_answer`, else 0."""
    rows = zip(predictions, _reference_lists(predictions, references), strict=True)
    return [100.0 * (normalize_answer(prediction) in map(normalize_answer, row)) for prediction, row in rows]


def normalize_answer(text: str) -> str:
    """SQuAD's normalization but for its removal of articles, as MiniLLM has it: lower case, single spaces.

    ASCII punctuation is deleted, not replaced ("well-known" becomes "wellknown"); punctuation outside ASCII stays.
    """
    return " ".join(text.lower().translate(_DELETE_PUNCTUATION).split())


def _reference_lists(predictions: Texts, references: References) -> list[Sequence[str]]:
    for name, values in (("predictions", predictions), ("references", references)):
        if isinstance(values, str):
            raise RequestError(f"`{name}` must hold one entry per row. Got a single string; put it into a list.")
    if len(predictions) != len(references):
        got = f"Got {len(predictions)} predictions and {len(references)} rows of references; check that both come"
        raise RequestError(f"Every prediction needs its references. {got} from the same rows of the data.")
    if len(predictions) == 0:
        raise RequestError("Expected at least one prediction to score. Got none.")
    rows = [[given] if isinstance(given, str) else given for given in references]
    for row, (prediction, given) in enumerate(zip(predictions, rows, strict=True)):
        if not isinstance(given, list | tuple):
            got = f"Got {type(given).__name__}."
            raise RequestError(f"The references of row {row} must be a string or a list of strings. {got}")
        if not given:
            raise RequestError(f"Row {row} has an empty list of references. Leave such rows out before scoring.")
        for name, text in [("The prediction", prediction), *(("A reference", each) for each in given)]:
            if not isinstance(text, str):
                raise RequestError(f"{name} of row {row} must be a string. Got {type(text).__name__}.")
    return rows
