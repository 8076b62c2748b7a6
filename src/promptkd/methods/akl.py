"""Adaptive KL (Wu et al. 2024, arXiv 2404.02657)."""

from promptkd.methods.token_method import MixedMethod


class AKL(MixedMethod):
    """Forward and reverse KL on the data's responses, weighted by where the two models differ."""

    name = "akl"
    own_objective = "adaptive_kl"
    own_share = 0.0
