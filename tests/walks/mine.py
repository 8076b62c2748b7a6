"""A method and a metric of one's own: what docs/extending.md explains, in one file."""

from functools import partial

from promptkd.methods import Method
from promptkd.models.adapters import SoftPromptFactory
from promptkd.objectives.divergences import shared_log_probs
from promptkd.responses import ResponseMix


def squared_hellinger(student_logits, teacher_logits, *, sharpness):
    log_q, log_p = shared_log_probs(sharpness * student_logits, sharpness * teacher_logits)
    return 1 - (0.5 * (log_q + log_p)).exp().sum(-1)


def hellinger(sharpness: float = 1.0) -> Method:
    return Method(ResponseMix(0.5), partial(squared_hellinger, sharpness=sharpness), SoftPromptFactory)


def answers_briefly(prediction, references):
    return 100.0 * (len(prediction.split()) <= 2 * max(len(each.split()) for each in references))
