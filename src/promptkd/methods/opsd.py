"""On-policy self-distillation (Zhao et al. 2026, arXiv 2601.18734)."""

from promptkd.methods.token_method import MixedMethod


class OPSD(MixedMethod):
    """Clipped forward KL on the student's responses, to the student's start (`--teacher self`) with a context."""

    name = "opsd"
    own_objective = "clipped_forward_kl"
    own_share = 1.0
