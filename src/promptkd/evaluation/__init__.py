"""What a model can do: answers, scores and intervals."""

from promptkd.evaluation.bootstrap import mean_interval, paired_difference, paired_token_difference, token_mean_interval
from promptkd.evaluation.generation import generate
from promptkd.evaluation.measure import Decoding, evaluate_model, measure_rows, summarize
from promptkd.evaluation.rouge import (
    exact_match,
    exact_match_scores,
    rouge_1,
    rouge_1_scores,
    rouge_l,
    rouge_l_scores,
)
from promptkd.evaluation.text_metrics import distinct

__all__ = [
    "Decoding",
    "distinct",
    "evaluate_model",
    "exact_match",
    "exact_match_scores",
    "generate",
    "mean_interval",
    "measure_rows",
    "paired_difference",
    "paired_token_difference",
    "rouge_1",
    "rouge_1_scores",
    "rouge_l",
    "rouge_l_scores",
    "summarize",
    "token_mean_interval",
]
