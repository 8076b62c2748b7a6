"""Entropy-aware on-policy distillation (Jin et al. 2026, arXiv 2603.07079)."""

from promptkd.methods.token_method import MixedMethod


class EOPD(MixedMethod):
    """Reverse KL on the student's responses, with a forward KL where the teacher is uncertain."""

    name = "eopd"
    own_objective = "entropy_aware_kl"
    own_share = 1.0
