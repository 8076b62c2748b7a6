"""Scores of an answer that need no model: overlap with the references, length, repetition, how it ends."""

from collections.abc import Hashable, Sequence

from promptkd.evaluation.rouge import References, exact_match_scores, rouge_scores

__all__ = ["answer_scores", "distinct"]


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
        references: a string, or a list of strings, an answer.
        token_ids: the answers as they were decoded, the stop id at the end where one was written; none is empty.
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
    """Different n-grams of `tokens` over all its n-grams: 1 if none comes twice (Li et al. 2016, distinct-n).

    1 as well where `tokens` is shorter than n: nothing is repeated.
    """
    grams = [tuple(tokens[first : first + n]) for first in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0
