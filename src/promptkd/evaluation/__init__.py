"""What a model can do: answers, scores and intervals."""

from promptkd.evaluation.bootstrap import mean_interval, paired_difference, paired_token_difference, token_mean_interval
from promptkd.evaluation.comparison import Candidate, Comparison, compare
from promptkd.evaluation.generation import generate
from promptkd.evaluation.measure import Decoding, evaluate_model, measure_rows, summarize
from promptkd.evaluation.rouge import exact_match, exact_match_scores, rouge_l, rouge_l_scores
from promptkd.evaluation.significance import effect_size, holm, sign_flip_test

__all__ = [
    "Candidate",
    "Comparison",
    "Decoding",
    "compare",
    "effect_size",
    "evaluate_model",
    "exact_match",
    "exact_match_scores",
    "generate",
    "holm",
    "mean_interval",
    "measure_rows",
    "paired_difference",
    "paired_token_difference",
    "rouge_l",
    "rouge_l_scores",
    "sign_flip_test",
    "summarize",
    "token_mean_interval",
]
