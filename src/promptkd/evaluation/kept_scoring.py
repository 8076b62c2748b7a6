"""What a teacher's kept logits are made of: its top log-probabilities of fixed responses, and what is lost by them."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from promptkd.data.encode import EncodedExample
from promptkd.data.kept_logits import KeptSettings
from promptkd.data.kept_writing import KeptWriter, TopLogProbs, rounded
from promptkd.engine import Vocabulary, evaluating, head_logits, response_hidden
from promptkd.evaluation.measure import batches_by_length
from promptkd.objectives import adaptive_kl, forward_kl
from promptkd.objectives.coarse import coarse_log_probs

_TOKENS_AT_A_TIME = 256
SAMPLE = 32  # rows that the error is measured on

Chunk = tuple[list[int], tuple[Tensor, ...]]  # the row of each token, on the host; logits of each model


def write_logits(
    teacher: nn.Module, writer: KeptWriter, *, batch_size: int, progress: Callable[[str, int], None]
) -> None:
    """Score the rows that `writer` still wants, shard by shard; `progress` hears how many rows are done."""
    done = len(writer.rows) - sum(map(len, writer.left))
    for part in writer.left:
        writer.add(top_log_probs(teacher, part, writer.index.settings, batch_size=batch_size))
        done += len(part)
        progress("rows", done)


def top_log_probs(
    teacher: nn.Module, rows: Sequence[EncodedExample], settings: KeptSettings, *, batch_size: int
) -> TopLogProbs:
    """The teacher's top K log-probabilities at each response token of the rows, in their order."""
    found: list[list[Tensor]] = [[] for _ in rows]
    for of_token, (logits,) in _chunks([teacher], rows, settings, batch_size):
        ids, log_probs, rest = _top(logits, settings.kept)
        bits = torch.cat([log_probs, rest[:, None]], -1).float().view(torch.int32)
        chunk = torch.cat([ids.int(), bits], -1).cpu()  # one wait for the device
        lengths = {row: of_token.count(row) for row in dict.fromkeys(of_token)}
        for row, part in zip(lengths, chunk.split(list(lengths.values())), strict=True):
            found[row].append(part)
    whole = torch.cat([each for of_row in found for each in of_row])
    values = whole[:, settings.kept :].contiguous().view(torch.float32)
    return TopLogProbs(whole[:, : settings.kept], values[:, :-1], values[:, -1])


def measured_error(
    teacher: nn.Module,
    rows: Sequence[EncodedExample],
    settings: KeptSettings,
    *,
    batch_size: int,
    student: nn.Module | None = None,
) -> dict[str, float]:
    """What is lost by K of V tokens in 16 bits, on up to `SAMPLE` rows from all over the data; means over
    tokens, in nats.

    "rest_mass_…" is the teacher's probability of all tokens that are not kept, "entropy_lost" how much less entropy
    the K + 1 outcomes have, "rounding_kl" KL(exact || rounded) on these. With a student, "forward_kl" and
    "adaptive_kl" are those of the whole vocabulary, "…_kept" on the outcomes as kept, "…_gap" the mean |difference|.
    """
    count = min(SAMPLE, len(rows))
    sample = [rows[index * len(rows) // count] for index in range(count)]
    values: dict[str, list[Tensor]] = {}

    def add(name: str, value: Tensor) -> None:
        values.setdefault(name, []).append(value.double().cpu())

    models = [teacher] if student is None else [teacher, student]
    for _, (logits, *others) in _chunks(models, sample, settings, batch_size):
        ids, log_probs, rest = _top(logits, settings.kept)
        exact = torch.cat([log_probs, rest[:, None]], -1)
        kept = rounded(exact, settings.dtype).float()
        add("rest_mass", rest.exp())
        add("entropy", _entropy(logits.log_softmax(-1)))
        add("entropy_lost", values["entropy"][-1] - _entropy(exact).double().cpu())
        add("rounding_kl", forward_kl(kept, exact))
        for other in others:
            coarse = coarse_log_probs(other, ids)
            for objective in (forward_kl, adaptive_kl):
                name = objective.__name__
                full, ours = objective(other, logits), objective(coarse, kept)
                add(name, full)
                add(f"{name}_kept", ours)
                add(f"{name}_gap", (full - ours).abs())
    joined = {name: torch.cat(parts) for name, parts in values.items()}
    mass = joined.pop("rest_mass")
    error = {"rows": float(len(sample)), "tokens": float(len(mass)), "rest_mass_mean": float(mass.mean())}
    error |= {"rest_mass_p95": float(mass.quantile(0.95)), "rest_mass_max": float(mass.max())}
    return error | {name: float(each.mean()) for name, each in joined.items()}


def _chunks(
    models: Sequence[nn.Module], rows: Sequence[EncodedExample], settings: KeptSettings, batch_size: int
) -> Iterator[Chunk]:
    """The logits (n, V) of the models at the rows' response tokens, some tokens at a time."""
    vocabulary = Vocabulary(settings.vocabulary, tuple(settings.masked))
    prompts, responses = [row.prompt_ids for row in rows], [row.response_ids for row in rows]
    with torch.no_grad(), evaluating(models[0]), evaluating(models[-1]):
        for indices, batch in batches_by_length(prompts, responses, batch_size, models[0]):
            states = [response_hidden(model, batch).split(_TOKENS_AT_A_TIME) for model in models]
            of_token = [indices[place] for place in batch.scored_places[0]]
            for part, hidden in enumerate(zip(*states, strict=True)):
                pairs, first = zip(models, hidden, strict=True), part * _TOKENS_AT_A_TIME
                logits = tuple(head_logits(model, each, vocabulary=vocabulary) for model, each in pairs)
                yield of_token[first : first + _TOKENS_AT_A_TIME], logits


def _top(logits: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (n, K), their log-probabilities (n, K) and the log-mass (n,) of all others."""
    ids = logits.topk(kept, dim=-1).indices
    log_probs = coarse_log_probs(logits, ids)
    return ids, log_probs[:, :-1], log_probs[:, -1]


def _entropy(log_p: Tensor) -> Tensor:
    return -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(-1)
