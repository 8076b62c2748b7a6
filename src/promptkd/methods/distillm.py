"""DistiLLM (Ko et al. 2024, arXiv 2402.03898)."""

from dataclasses import dataclass

from promptkd.methods.token_method import MixedMethod
from promptkd.responses import AdaptiveReplay, Responses
from promptkd.settings import option


@dataclass(frozen=True, kw_only=True)
class DistiLLM(MixedMethod):
    """Skew reverse KL on a mixture of the data, the student's responses and a replay buffer of them."""

    name = "distillm"
    own_objective = "skew_reverse_kl"
    own_share = 0.0  # where it starts
    replay_capacity: int = option(1000, at_least=1)
    """Responses that the replay buffer holds."""
    replay_step: float = option(0.1, at_least=0)
    """By how much the student's share rises when validation gets worse."""

    def responses(self) -> Responses:
        return AdaptiveReplay(start=self.share, step=self.replay_step, capacity=self.replay_capacity)
