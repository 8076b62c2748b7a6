"""What tests ask of a model."""

from promptkd.engine import head_logits, response_hidden


def response_logits(model, batch, prompt=None, *, vocabulary=None):
    """Logits (N, V) that predict the response tokens; the first `vocabulary` columns if given."""
    return head_logits(model, response_hidden(model, batch, prompt), vocabulary=vocabulary)
