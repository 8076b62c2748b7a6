"""One response as it is written: a token at a time, and the text that each token adds."""

from collections.abc import Generator, Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from promptkd.engine import evaluating, unwrap_peft
from promptkd.engine.reference import CacheSession
from promptkd.generation.decode_loop import check_request
from promptkd.generation.sampling import Sampler, uniforms

__all__ = ["TextStream", "stream"]


def stream(
    model: nn.Module,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    vocabulary: int | None = None,
) -> Generator[int]:
    """The tokens that `generate` writes behind `prompt` with the same settings and seed, each as soon as it is known.

    The stop id is the last one where the response ends by itself. The model stays in evaluation mode until the
    generator is exhausted or closed. Streams of several models may be read in turns.

    Args: see `generate`; `seed` is needed unless `temperature` is 0.
    """
    seeds = None if seed is None else [seed]
    check_request([prompt], [max_new_tokens], temperature, top_p, top_k, seeds, batch_size=1)
    pick = Sampler(temperature, top_p, top_k)
    session = CacheSession(unwrap_peft(model), vocabulary)
    return _tokens(session, prompt, max_new_tokens, frozenset(stop_ids), pick, seed)


@torch.no_grad()  # as a decorator it holds while the generator runs, and not between two of its tokens
def _tokens(
    session: CacheSession,
    prompt: Sequence[int],
    max_new_tokens: int,
    stops: frozenset[int],
    pick: Sampler,
    seed: int | None,
) -> Generator[int]:
    drawn = None if seed is None or pick.temperature == 0 else uniforms([seed], max_new_tokens)
    with evaluating(session.model):
        logits = session.prefill([prompt])
        for step in range(max_new_tokens):
            token = pick([(logits, 1.0)], None if drawn is None else drawn[:, step].to(logits.device))
            yield int(token)
            if int(token) in stops or step + 1 == max_new_tokens:
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
        return self._new(whole=False)

    def end(self) -> str:
        """What was held back as part of a character that never came whole."""
        return self._new(whole=True)

    def _new(self, *, whole: bool) -> str:
        before = self._decode(self.ids[self._context : self._shown])
        text = self._decode(self.ids[self._context :])
        if not whole and text.endswith("\ufffd"):
            return ""
        self._context, self._shown = self._shown, len(self.ids)
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)
