"""Training objectives of the student and of the soft prompt: functions of tensors; moving coefficients."""

from promptkd.objectives.clipped import clipped_forward_kl
from promptkd.objectives.divergences import (
    adaptive_kl,
    forward_kl,
    jensen_shannon,
    prompt_loss,
    prompt_loss_terms,
    regularizer_weight,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)
from promptkd.objectives.moving import Moving, MovingTarget, Taid, Veto
from promptkd.objectives.targets import taid, veto
from promptkd.objectives.tempered import AtTemperature
from promptkd.objectives.weighted import alpha_beta, concrete_score, entropy_aware_kl, todi

__all__ = ["adaptive_kl", "forward_kl", "jensen_shannon", "prompt_loss", "prompt_loss_terms", "regularizer_weight"]
__all__ += ["reverse_kl", "skew_forward_kl", "skew_reverse_kl", "total_variation"]
__all__ += ["AtTemperature", "Moving", "MovingTarget", "Taid", "Veto"]
__all__ += ["alpha_beta", "clipped_forward_kl", "concrete_score", "entropy_aware_kl", "taid", "todi", "veto"]
