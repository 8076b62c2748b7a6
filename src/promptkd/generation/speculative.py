"""Responses that a student proposes and a teacher corrects (speculative knowledge distillation, arXiv 2410.11325).

A row's next token is drawn from the student; if it is not among the teacher's `top_k` most probable ones there, it is
drawn anew from the teacher. The student proposes a block of tokens, the teacher reads them in one pass, and both drop
what follows a rejected one. Each token of a row has uniform numbers of its own, one for each of the two models, so that
a response depends neither on the block nor on which rows share a batch.
"""

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from promptkd.data.batch import on_device
from promptkd.engine import DecodeSession, can_roll_back, decoding, evaluating
from promptkd.errors import check_all
from promptkd.generation.decode_loop import Prompts, Seeds, check_request, masked_columns, moved_up
from promptkd.generation.sampling import SamplingParams, next_tokens, row_seeds, uniforms
from promptkd.models import position_limit
from promptkd.responses import Speculation


@dataclass(frozen=True)
class Corrected:
    """A response, a stop id included, and how many of its tokens the teacher has put in the place of the student's."""

    token_ids: list[int]
    replaced: int


def generate_corrected(
    student: nn.Module,
    teacher: nn.Module,
    prompts: Prompts,
    params: SamplingParams,
    speculation: Speculation,
    *,
    seeds: Seeds = None,
    teacher_prompts: Prompts | None = None,
    batch_size: int = 32,
) -> list[Corrected]:
    """Continue each prompt until a stop id or the length limit, with the student's tokens where the teacher lets them.

    With z ~ q of the student, under `params`, and z' ~ p of the teacher, under `speculation`, the next token is z if
    fewer than `top_k` tokens have a larger p than z, else z'. Tokens that either model lacks are never drawn.

    Args:
        student, teacher: causal models of transformers or PeftModels of one, over the same vocabulary.
        prompts, params, seeds: as of `generate`, whose tokens these are as long as the teacher rejects none.
        teacher_prompts: what the teacher reads in place of each prompt; by default the same.
        batch_size: rows that are decoded together.

    A block has one token where a model's rows cannot be rolled back (`promptkd.engine.can_roll_back`). Raises
    `RequestError`, naming everything that is wrong with the request.
    """
    limits, judged = params.limits(len(prompts)), prompts if teacher_prompts is None else teacher_prompts
    check_request(
        prompts, replace(params, temperature=max(params.temperature, speculation.temperature)), seeds, batch_size
    )
    apart = f"teacher_prompts must hold one per prompt ({len(prompts)}), got {len(judged)}"
    empty = any(len(prompt) == 0 for prompt in judged)
    checks = [(len(judged) != len(prompts), apart), (empty, "every teacher's prompt needs at least one token")]
    check_all("Cannot generate", checks)
    order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row))
    corrected = [Corrected([], 0)] * len(prompts)
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for model in (student, teacher):
            stack.enter_context(evaluating(model))
        block = speculation.block if can_roll_back(student) and can_roll_back(teacher) else 1
        size, vocabulary = min(batch_size, len(prompts)), params.vocabulary
        open_student = stack.enter_context(decoding(student, size, vocabulary=vocabulary))
        open_teacher = stack.enter_context(decoding(teacher, size * block, vocabulary=vocabulary))
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            ends = [limits[row] for row in rows]
            room = [min(_room(student, prompts[row]), _room(teacher, judged[row])) for row in rows]
            with open_student(max(ends) + block) as proposing, open_teacher(max(ends) + block) as judging:
                batch = _Batch(proposing, judging, params, speculation, block)
                first_logits = proposing.prefill([prompts[row] for row in rows])
                verdicts = judging.prefill([judged[row] for row in rows])[:, None]
                drawn = None if seeds is None else _draws([seeds[row] for row in rows], max(ends) + block)
                found = batch.responses(first_logits, verdicts, _Ends(ends, room), drawn)
            for row, each in zip(rows, found, strict=True):
                corrected[row] = each
    return corrected


@dataclass(frozen=True)
class _Ends:
    """Where rows end, in tokens of their responses."""

    limits: Sequence[int]
    room: Sequence[int]  # up to where both models have positions

    def block(self, rows: Sequence[int], counts: Sequence[int], most: int) -> int:
        """How many tokens may be proposed: those beyond a row's limit are dropped, but must have positions."""
        # read are the row's last token and all proposed ones but the last
        return max(1, min([most, *(self.room[row] - count + 1 for row, count in zip(rows, counts, strict=True))]))


class _Batch:
    """Rows that both models decode together."""

    def __init__(
        self,
        student: DecodeSession,
        teacher: DecodeSession,
        params: SamplingParams,
        speculation: Speculation,
        block: int,
    ):
        self.student, self.teacher, self.params, self.block = student, teacher, params, block
        self.most_probable = speculation.top_k
        self.of_teacher = SamplingParams(speculation.temperature, speculation.top_p)

    def responses(self, logits: Tensor, verdicts: Tensor, ends: _Ends, drawn: Tensor | None) -> list[Corrected]:
        """The rows' responses, from what both prefills gave: (R, V) of the student, (R, 1, V) of the teacher.

        `drawn` are the uniform numbers (2, R, tokens) of student and teacher.
        """
        device, limits = logits.device, ends.limits
        self.absent = _absent(self.params, logits[0], verdicts[0, 0])
        stops, size = on_device(list(self.params.stop_ids), device), (len(limits), max(limits) + self.block)
        written, replaced = torch.zeros(2, *size, dtype=torch.long, device=device)
        drawn = None if drawn is None else drawn.to(device)
        rows, counts = list(range(len(limits))), [0] * len(limits)  # still decoded, with tokens written so far
        last: Tensor | None = None  # (R,) the tokens that neither model has read
        while True:
            index, place, most = on_device([rows, counts, [limits[row] for row in rows]], device)
            length = 1 if last is None else ends.block(rows, counts, self.block)
            steps = torch.arange(length, device=device)
            places = index[:, None], place[:, None] + steps  # (R, length) in `written`
            of_student, of_teacher = (None, None) if drawn is None else drawn[:, *places]
            if last is None:
                proposed = self._chosen(logits, self.params, of_student, 0)[:, None]
            else:
                proposed = self._proposed(last, of_student, length)
                verdicts = self._read(self.teacher, torch.cat([last[:, None], proposed[:, :-1]], 1))
            tokens, kept = self._corrected(proposed, verdicts, of_teacher)
            taken = (kept + 1).clamp(max=length)  # (R,)
            written[places], replaced[places] = tokens, (steps == kept[:, None]).long()
            last = tokens.gather(1, taken[:, None] - 1)[:, 0]
            ended = (torch.isin(tokens, stops) & (steps < taken[:, None])).any(-1) | (place + taken >= most)
            new, going = torch.stack([taken, (~ended).long()]).tolist()
            if length > 1:
                self.student.rollback([length - each for each in new])
                self.teacher.rollback([length - each for each in new])
            slots = moved_up(going)
            if not slots:
                break
            if len(slots) < len(rows):
                self.student.select(slots)
                self.teacher.select(slots)
                last = last[on_device(slots, device)]
            rows, counts = [rows[slot] for slot in slots], [counts[slot] + new[slot] for slot in slots]
        both = zip(written.tolist(), replaced.tolist(), limits, strict=True)
        return [_cut(tokens, flags, limit, self.params.stop_ids) for tokens, flags, limit in both]

    def _read(self, session: DecodeSession, tokens: Tensor) -> Tensor:
        """(R, g, V) behind tokens (R, g); rows of which nothing is ever removed are decoded as they always are."""
        return session.decode(tokens[:, 0])[:, None] if self.block == 1 else session.extend(tokens)

    def _proposed(self, last: Tensor, drawn: Tensor | None, length: int) -> Tensor:
        """(R, length) tokens of the student behind the `last` ones."""
        tokens = [last]
        for step in range(length):
            logits = self._read(self.student, tokens[-1][:, None])[:, 0]
            tokens.append(self._chosen(logits, self.params, drawn, step))
        return torch.stack(tokens[1:], 1)

    def _corrected(self, proposed: Tensor, verdicts: Tensor, drawn: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens (R, g) with the teacher's in the place of the first rejected one, which is the second result (R,).

        What stands behind it has no meaning. It is g for a row without one.
        """
        if self.absent is not None:
            verdicts = verdicts.index_fill_(-1, self.absent, -torch.inf)
        own = verdicts.gather(-1, proposed[..., None])
        accepted = (verdicts > own).sum(-1) < self.most_probable  # (R, g)
        kept = accepted.long().cumprod(-1).sum(-1)
        rows, places = torch.arange(len(kept), device=kept.device), kept.clamp(max=proposed.shape[1] - 1)
        drawn = None if drawn is None else drawn[rows, places]
        others = next_tokens([(verdicts[rows, places], 1.0)], self.of_teacher, _unless_greedy(self.of_teacher, drawn))
        rejected = torch.arange(proposed.shape[1], device=kept.device) == kept[:, None]
        return torch.where(rejected, others[:, None], proposed), kept

    def _chosen(self, logits: Tensor, params: SamplingParams, drawn: Tensor | None, step: int) -> Tensor:
        if self.absent is not None:
            logits = logits.index_fill_(-1, self.absent, -torch.inf)
        return next_tokens([(logits, 1.0)], params, _unless_greedy(params, None if drawn is None else drawn[:, step]))


def _unless_greedy(params: SamplingParams, drawn: Tensor | None) -> Tensor | None:
    return None if params.is_greedy else drawn


def _draws(seeds: Sequence[int], length: int) -> Tensor:
    """(2, R, length) uniform numbers: those that `generate` takes, and as many apart from them."""
    return torch.stack([uniforms(seeds, length), uniforms([row_seeds(seed, 1)[0] for seed in seeds], length)])


def _absent(params: SamplingParams, student: Tensor, teacher: Tensor) -> Tensor | None:
    """The tokens that are never chosen: masked ones, and those whose logit (V,) is -inf in a model; None for none."""
    absent = torch.isneginf(student) | torch.isneginf(teacher)
    masked = masked_columns(params, student)
    if masked is not None:
        absent[masked] = True
    return absent.nonzero()[:, 0] if bool(absent.any()) else None


def _room(model: nn.Module, prompt: Sequence[int]) -> int:
    """How many tokens may stand behind a prompt."""
    limit = position_limit(model)
    return sys.maxsize if limit is None else limit - len(prompt)


def _cut(tokens: list[int], replaced: list[int], limit: int, stop_ids: Sequence[int]) -> Corrected:
    """A response up to its first stop id or its limit."""
    end = min([limit, *(tokens.index(stop) + 1 for stop in stop_ids if stop in tokens[:limit])])
    return Corrected(tokens[:end], sum(replaced[:end]))
