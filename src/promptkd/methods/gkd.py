"""Generalized knowledge distillation (Agarwal et al. 2024, arXiv 2306.13649)."""

from promptkd.methods.token_method import MixedMethod


class GKD(MixedMethod):
    """The generalized Jensen-Shannon divergence on the student's responses."""

    name = "gkd"
    own_objective = "jensen_shannon"
    own_share = 1.0
