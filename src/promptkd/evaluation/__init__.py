"""What a model can do: answers, scores, intervals and tests."""

from promptkd.evaluation.comparison import Candidate, Comparison, compare
from promptkd.evaluation.dataset_evaluation import measure_rows
from promptkd.evaluation.exposure_bias import ExposureBias, Scoring, exposure_bias, sample_continuations
from promptkd.evaluation.measure import evaluation_of, summarize
from promptkd.evaluation.statistics import (
    Bootstrap,
    effect_size,
    holm,
    mean_interval,
    paired_difference,
    paired_token_difference,
    sign_flip_test,
    token_mean_interval,
)
from promptkd.evaluation.text_metrics import (
    distinct,
    exact_match,
    exact_match_scores,
    rouge_1,
    rouge_1_scores,
    rouge_l,
    rouge_l_scores,
)
from promptkd.generation import Decoding

__all__ = [
    "Bootstrap",
    "Candidate",
    "Comparison",
    "Decoding",
    "ExposureBias",
    "Scoring",
    "compare",
    "distinct",
    "effect_size",
    "evaluation_of",
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
