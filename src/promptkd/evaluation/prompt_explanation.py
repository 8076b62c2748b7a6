"""What a trained soft prompt is made of: tokens near its vectors, and what it changes in the teacher by position."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from promptkd.engine import unwrap_peft
from promptkd.evaluation.exposure_bias import Scoring, token_errors
from promptkd.evaluation.measure import TokenIds
from promptkd.evaluation.statistics import Floats, token_mean_interval
from promptkd.record_parts import PositionCurve, PositionMean, PromptExplanation, PromptVector, TokenCosine

_SINGLE = 32  # positions that have a mean of their own; the buckets behind them double: 33 to 64, 65 to 128 …
_EMBEDDED_AT_A_TIME = 8192  # tokens
_RANDOM_DIRECTIONS, _BELOW, _SEED = 256, 0.95, 62129


@dataclass(frozen=True)
class Start:
    """Where a prompt began."""

    vectors: Tensor  # (n, E), on the CPU
    ids: Sequence[int] = ()  # the token of each; () of a random start


def nearest_tokens(vectors: Tensor, model: nn.Module, tokens: int, count: int) -> tuple[Tensor, Tensor]:
    """Largest cosines of `vectors` (n, E) with the embeddings of the first `tokens` ids, and the ids; (n, count) each.

    The embeddings are what the model's first layer reads, after any scaling. One that is 0 has the cosine 0. Ids that
    the model has no embedding of are left out.
    """
    embedding = unwrap_peft(model).get_input_embeddings()
    tokens = min(tokens, embedding.weight.shape[0])
    device = embedding.weight.device
    directions = nn.functional.normalize(vectors.detach().to(device).float(), dim=-1)
    with torch.no_grad():
        cosines = torch.cat(
            [
                directions @ nn.functional.normalize(embedding(ids).float(), dim=-1).T
                for ids in torch.arange(tokens, device=device).split(_EMBEDDED_AT_A_TIME)
            ],
            dim=1,
        )  # (n, tokens)
    found = cosines.topk(min(count, tokens), dim=-1)
    return found.values.cpu(), found.indices.cpu()


def random_cosine(model: nn.Module, width: int, tokens: int) -> float:
    """The cosine with their nearest token that 95 % of random directions of this width stay below."""
    directions = torch.randn(_RANDOM_DIRECTIONS, width, generator=torch.Generator().manual_seed(_SEED))
    return float(nearest_tokens(directions, model, tokens, 1)[0].quantile(_BELOW))


def token_text(tokenizer: PreTrainedTokenizerBase, index: int) -> str:
    """A token's text with its space; the tokenizer's own name of one that is no text by itself, as part of a letter."""
    name, text = str(tokenizer.convert_ids_to_tokens(index)), tokenizer.decode([index])
    if name.startswith("▁"):  # SentencePiece, whose space `decode` takes off the front
        return name.replace("▁", " ")
    return name if not text or "\ufffd" in text else text


def explained_vectors(
    vectors: Tensor,
    teacher: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    *,
    folder: str,
    start: Start | None = None,
    count: int = 5,
) -> PromptExplanation:
    """Norm and nearest tokens of each of the `vectors` (n, E), and its way from the `start` where that is known.

    `tokens` is how many ids stand for a token, `folder` that of the prompt in its run.
    """
    vectors, found = vectors.detach().cpu(), nearest_tokens(vectors, teacher, tokens, count)
    explained = []
    for vector, *near in zip(vectors, *(each.tolist() for each in found), strict=True):
        nearest = [
            TokenCosine(id=index, token=token_text(tokenizer, index), cosine=cosine)
            for cosine, index in zip(*near, strict=True)
        ]
        explained.append(PromptVector(norm=float(vector.norm()), nearest=nearest))
    own = PromptExplanation(
        folder=folder,
        vectors=explained,
        norm=float(vectors.norm()),
        tokens=tokens,
        random_cosine=random_cosine(teacher, vectors.shape[1], tokens),
    )
    if start is not None:
        own.distance = float((vectors - start.vectors).norm())
        for at, (vector, began) in enumerate(zip(vectors, start.vectors, strict=True)):
            explained[at].distance = float((vector - began).norm())
            explained[at].cosine_with_start = float(nn.functional.cosine_similarity(vector, began, dim=0))
            explained[at].start = token_text(tokenizer, start.ids[at]) if start.ids else None
    return own


def kl_by_position(
    student: nn.Module,
    teacher: nn.Module,
    prompts: Sequence[TokenIds],
    samples: Sequence[TokenIds],
    scoring: Scoring,
) -> dict[str, PositionCurve]:
    """KL(p_P || p), KL(p_P || q) and KL(p || q) by position in `samples`, one per request; P is `scoring.prompt`.

    p_P and p read `scoring.contexts` in place of the requests, where there are any.
    """
    drawn = [[sample] for sample in samples]
    plain, contexts = replace(scoring, prompt=None), scoring.contexts or [None] * len(prompts)
    read = [prompt if context is None else context for prompt, context in zip(prompts, contexts, strict=True)]
    pairs = {
        "prompted_to_plain": (teacher, read, replace(scoring, contexts=None)),
        "prompted_to_student": (student, prompts, scoring),
        "plain_to_student": (student, prompts, plain),
    }
    return {
        name: position_curve([row[0] for row in token_errors(learner, teacher, asked, drawn, how)])
        for name, (learner, asked, how) in pairs.items()
    }


def position_curve(values: Sequence[Floats]) -> PositionCurve:
    """The values of each row's tokens, by position: alone up to the 32nd token, then in buckets that double."""
    longest = max(map(len, values))
    ends = [position for position in range(1, longest + 1) if position <= _SINGLE]
    while ends[-1] < longest:
        ends.append(min(2 * ends[-1], longest))
    starts = [1, *(end + 1 for end in ends[:-1])]
    spans = zip(starts, ends, strict=True)
    return PositionCurve(whole=_mean(values, 1, longest), positions=[_mean(values, *span) for span in spans])


def _mean(values: Sequence[Floats], first: int, last: int) -> PositionMean:
    parts = [own for each in values if len(own := each[first - 1 : last])]
    mean = token_mean_interval([float(np.sum(each)) for each in parts], [len(each) for each in parts])
    return PositionMean(first=first, last=last, value=mean.value, low=mean.low, high=mean.high, rows=len(parts))
