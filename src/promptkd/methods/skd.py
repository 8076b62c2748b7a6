"""Speculative knowledge distillation (Xu et al. 2025, arXiv 2410.11325)."""

from dataclasses import dataclass, replace

from promptkd.methods.method import Method
from promptkd.methods.token_method import MixedMethod
from promptkd.responses import Responses, Speculation, Speculative
from promptkd.settings import Reader, option


@dataclass(frozen=True, kw_only=True)
class SKD(MixedMethod):
    """Forward KL on the student's responses, in which the plain teacher replaces the tokens that it finds unlikely."""

    name = "skd"
    own_objective = "forward_kl"
    own_share = 1.0
    skd_top_k: int = option(25, at_least=1)
    """A token of the student stays if it is among so many most probable ones of the teacher: 1 leaves the teacher's
    best token alone, the size of the vocabulary all of the student's."""
    skd_block: int = option(5, at_least=1)
    """Tokens that the student proposes per pass of the teacher. The responses do not depend on it, the speed does."""
    skd_temperature: float = option(1.0, at_least=0)
    """Temperature at which the teacher draws another token; 0 takes its most probable one."""
    skd_top_p: float = option(1.0, above=0, at_most=1)
    """Share of the teacher's probability mass from which it draws another token."""

    def build(self, take: Reader) -> Method:
        method = super().build(take)
        # the teacher is read while sampling, whatever the loss reads
        return replace(method, reads_teacher=method.reads_teacher or self.share > 0)

    def responses(self) -> Responses:
        how = Speculation(self.skd_top_k, self.skd_block, self.skd_temperature, self.skd_top_p)
        return Speculative(self.share, how)
