"""TAID (Shing et al. 2025, arXiv 2501.16937)."""

from promptkd.methods.token_method import MixedMethod


class TAID(MixedMethod):
    """Forward KL on the data's responses from a target that goes from the student to the teacher."""

    name = "taid"
    own_objective = "taid"
    own_share = 0.0
