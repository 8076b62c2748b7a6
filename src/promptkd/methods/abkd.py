"""ABKD (Wang et al. 2025, arXiv 2505.04560)."""

from promptkd.methods.token_method import MixedMethod


class ABKD(MixedMethod):
    """The alpha-beta divergence on the data's responses."""

    name = "abkd"
    own_objective = "alpha_beta"
    own_share = 0.0
