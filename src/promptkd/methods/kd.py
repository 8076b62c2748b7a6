"""Distillation on the data's responses, or on a mixture of them with the student's."""

from promptkd.methods.method import Method, NamedMethod
from promptkd.methods.token_method import MixedMethod, cross_entropy
from promptkd.responses import ResponseMix
from promptkd.settings import Reader


class KD(MixedMethod):
    """Forward KL on the data's responses (Hinton et al. 2015, Sanh et al. 2019)."""

    name = "kd"
    own_objective = "forward_kl"
    own_share = 0.0


class ImitKD(KD):
    """Forward KL on responses of which the student writes half (Lin et al. 2020)."""

    name = "imitkd"
    own_share = 0.5


class SeqKD(NamedMethod):
    """Cross-entropy on responses that the teacher wrote, by `promptkd generate` (Kim and Rush 2016)."""

    name = "seqkd"

    def build(self, take: Reader) -> Method:
        return Method(ResponseMix(0.0), loss=cross_entropy, reads_teacher=False)
