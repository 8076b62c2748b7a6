"""What a model can do: answers, scores, intervals and tests."""

from promptkd.evaluation.comparison import Comparison, compare
from promptkd.evaluation.dataset_evaluation import measure_rows
from promptkd.evaluation.exposure_bias import ExposureBias, Scoring, exposure_bias, sample_continuations
from promptkd.evaluation.pairing import Candidate
from promptkd.evaluation.statistics import Bootstrap
from promptkd.evaluation.text_metrics import distinct, exact_match, rouge_1, rouge_1_scores, rouge_l, rouge_l_scores
from promptkd.generation import Decoding

__all__ = ["Bootstrap", "Candidate", "Comparison", "Decoding", "ExposureBias", "Scoring", "compare", "distinct"]
__all__ += ["exact_match", "exposure_bias", "measure_rows", "rouge_1", "rouge_1_scores", "rouge_l", "rouge_l_scores"]
__all__ += ["sample_continuations"]
