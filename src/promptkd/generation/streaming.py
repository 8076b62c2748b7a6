"""One response as it is written: a token at a time, and the text that each token adds."""

from collections.abc import Generator, Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from promptkd.engine import evaluating, unwrap_peft
from promptkd.engine.base import DynamicCacheSession
from promptkd.generation.decode_loop import check_request
from promptkd.generation.sampling import SamplingParams, next_tokens, uniforms


def stream(
    model: nn.Module, prompt: Sequence[int], params: SamplingParams, *, seed: int | None = None
) -> Generator[int]:
    """The tokens that `generate` writes behind `prompt` with the same settings and seed, each as soon as it is known.

    The stop id is the last one where the response ends by itself. The model stays in evaluation mode until the
    generator is exhausted or closed. Streams of several models may be read in turns.

    Args: see `generate`; `seed` is needed unless decoding is greedy.
    """
    check_request([prompt], params, None if seed is None else [seed])
    return _tokens(DynamicCacheSession(unwrap_peft(model), params.vocabulary), prompt, params, seed)


@torch.no_grad()  # as a decorator it holds while the generator runs, and not between two of its tokens
def _tokens(
    session: DynamicCacheSession, prompt: Sequence[int], params: SamplingParams, seed: int | None
) -> Generator[int]:
    (limit,) = params.limits(1)
    drawn = None if params.is_greedy or seed is None else uniforms([seed], limit)
    with evaluating(session.model):
        logits = session.prefill([prompt])
        for step in range(limit):
            token = next_tokens([(logits, 1.0)], params, None if drawn is None else drawn[:, step].to(logits.device))
            yield int(token)
            if int(token) in params.stop_ids or step + 1 == limit:
                return
            logits = session.decode(token)


class TextStream:
    """The text of a response, piece by piece; the pieces together are what the tokenizer makes of all tokens at once.

    A character whose bytes are spread over several tokens comes with the last of them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self._shown = 0  # tokens whose text has been returned
        self._context = 0  # the token from which on the tokenizer is asked: a word's first token depends on it

    def add(self, token: int) -> str:
        """What `token` adds to the text; "" while it may still be part of a character."""
        self.ids.append(token)
        return self._new(last=False)

    def end(self) -> str:
        """What was held back as part of a character that was never completed."""
        return self._new(last=True)

    def _new(self, *, last: bool) -> str:
        before = self._decode(self.ids[self._context : self._shown])
        text = self._decode(self.ids[self._context :])
        if not last and text.endswith("\ufffd"):
            return ""
        self._context, self._shown = self._shown, len(self.ids)
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)
