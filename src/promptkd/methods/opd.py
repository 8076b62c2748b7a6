"""On-policy distillation (Thinking Machines 2025), the form that reads the sampled tokens alone."""

from promptkd.engine import ChunkedLoss
from promptkd.methods.method import AdaptedMethod, Method, Step
from promptkd.responses import ResponseMix
from promptkd.settings import Reader


class OPD(AdaptedMethod):
    """The policy gradient of each token's reverse KL, by the token that the student sampled."""

    name = "opd"

    def build(self, take: Reader) -> Method:
        responses = ResponseMix(1.0)
        responses.needs_exact_samples = True
        return Method(responses, loss=on_policy_loss, adapter=self.adapter(take), own_metrics=("sampled_kl",))


def on_policy_loss(step: Step) -> ChunkedLoss:
    """-Σ A log q(y), A = sg[log p(y) - log q(y)], over the tokens y that the student sampled."""
    batch = step.batch
    return step.pair.on_policy_gradient(step.student_hidden, step.teacher_hidden(batch), batch.targets)
