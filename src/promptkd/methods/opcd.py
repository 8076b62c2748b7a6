"""On-policy context distillation (Ye et al. 2026, arXiv 2602.12275)."""

from promptkd.methods.token_method import MixedMethod


class OPCD(MixedMethod):
    """Reverse KL on the student's responses, with a teacher that reads a context which the student does not see."""

    name = "opcd"
    own_objective = "reverse_kl"
    own_share = 1.0
