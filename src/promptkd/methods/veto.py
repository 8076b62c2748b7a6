"""Veto (Jang et al. 2026, arXiv 2601.07155)."""

from promptkd.methods.token_method import MixedMethod


class Veto(MixedMethod):
    """Forward KL on the student's responses from a target to which both models must agree."""

    name = "veto"
    own_objective = "veto"
    own_share = 1.0
