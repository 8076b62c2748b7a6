"""Rows of a session that grow by several tokens and shrink again, held to transformers' own pass over each alone."""

import torch

from promptkd.engine import head_logits

PROMPTS = ([5, 9, 11, 2, 40, 7, 7, 30, 12, 1], [3], [5, 9, 4, 60])
# what is appended to each row, how many of these tokens stay, and which rows stay
ROUNDS = (
    ([[10, 20, 30, 40], [31, 21, 11, 1], [12, 22, 32, 42]], [4, 0, 2], [0, 1, 2]),
    ([[13, 23, 33], [14, 24, 34], [15, 25, 35]], [1, 3, 2], [2, 1]),
    ([[16], [17]], [1, 1], [0, 1]),
    ([[50, 51, 52, 53, 54], [60, 61, 62, 63, 64]], [3, 4], [1]),
    ([[70, 71]], [2], [0]),
)
MOST = 13  # tokens that a row has at a time, behind its prompt


def alone(model, ids, embedded=None):
    """The logits behind every token of `ids`, after embeddings."""
    inputs = model.get_input_embeddings()(torch.tensor([ids], device=model.device))
    before = 0 if embedded is None else len(embedded)
    if before:
        inputs = torch.cat([embedded[None], inputs], 1)
    hidden = model.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    return head_logits(model, hidden[0, before:])


@torch.no_grad()
def assert_rows_as_each_alone(way, model, *, length=0, tolerance=1e-4):
    """By the sessions of a decoder, after a soft prompt of so many vectors."""
    embedded = model.get_input_embeddings()(torch.arange(40, 40 + length, device=model.device)) if length else None
    rows = [list(prompt) for prompt in PROMPTS]
    with way.open(model, len(rows), None) as sessions, sessions(MOST) as session:
        session.prefill(rows, embedded)
        for further, kept, going in ROUNDS:
            got = session.extend(torch.tensor(further, device=model.device)).clone()
            for row, (ids, new) in enumerate(zip(rows, further, strict=True)):
                expected = alone(model, [*ids, *new], embedded)[-len(new) :]
                torch.testing.assert_close(got[row], expected, rtol=tolerance, atol=tolerance)
            session.rollback([len(new) - stay for new, stay in zip(further, kept, strict=True)])
            rows = [[*ids, *new[:stay]] for ids, new, stay in zip(rows, further, kept, strict=True)]
            if len(going) < len(rows):
                session.select(going)
            rows = [rows[row] for row in going]
