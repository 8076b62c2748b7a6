"""What a model can do: answers, scores and intervals."""

from promptkd.evaluation.bootstrap import mean_interval, paired_difference, paired_token_difference, token_mean_interval
from promptkd.evaluation.comparison import Candidate, Comparison, compare
from promptkd.evaluation.exposure_bias import ExposureBias, exposure_bias, sample_continuations
from promptkd.evaluation.measure import evaluate_model, measure_rows, summarize
from promptkd.evaluation.rouge import (
    exact_match,
    exact_match_scores,
    rouge_1,
    rouge_1_scores,
    rouge_l,
    rouge_l_scores,
)
from promptkd.evaluation.significance import effect_size, holm, sign_flip_test
from promptkd.evaluation.text_metrics import distinct
from promptkd.generation import Decoding

__all__ = [
    "Candidate",
    "Comparison",
    "Decoding",
    "ExposureBias",
    "compare",
    "distinct",
    "effect_size",
    "evaluate_model",
    "exact_match",
    "exact_match_scores",
    "exposure_bias",
    "holm",
    "mean_interval",
    "measure_rows",
    "paired_difference",
    "paired_token_difference",
    "rouge_1",
    "rouge_1_scores",
    "rouge_l",
    "rouge_l_scores",
    "sample_continuations",
    "sign_flip_test",
    "summarize",
    "token_mean_interval",
]
