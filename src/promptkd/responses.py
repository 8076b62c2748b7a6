"""Where the responses of an optimizer step come from: the data, the student, a mixture, a replay buffer, or the student
corrected by the teacher."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from promptkd.data.encode import EncodedExample
from promptkd.errors import check_all
from promptkd.settings import accept_old_name

Tokens = list[list[int]]


@dataclass(frozen=True)
class Speculation:
    """How the plain teacher corrects what the student proposes. Raises `RequestError` with all that is wrong."""

    top_k: int = 25  # a proposed token stays if it is among so many most probable ones of the teacher
    block: int = 5  # tokens that the student proposes per pass of the teacher: a matter of speed alone
    temperature: float = 1.0  # of the teacher, from whose whole distribution a rejected token is drawn anew; 0: greedy
    top_p: float = 1.0  # share of that distribution's mass to draw from

    def __post_init__(self) -> None:
        checks = [
            (self.top_k < 1, f"top_k must be at least 1, got {self.top_k}"),
            (self.block < 1, f"block must be at least 1, got {self.block}"),
            (self.temperature < 0, f"temperature must be 0 (greedy) or more, got {self.temperature}"),
            (not 0 < self.top_p <= 1, f"top_p must lie in (0, 1], got {self.top_p}"),
        ]
        check_all("Cannot correct the student's tokens", checks)


@dataclass(frozen=True)
class Sampler:
    """Samples responses to prompts, both as token ids."""

    student: Callable[[Tokens], Tokens]
    mixed: Callable[..., Tokens]
    """(prompts, s): from (1 - s) q + s p, of student q and plain teacher p; (prompts, s, prompts of the teacher) where
    it reads others."""
    speculative: Callable[[Tokens, Tokens, Speculation], Tokens]
    """(prompts, prompts of the teacher, how): the student's tokens but for those that the plain teacher replaces."""
    together: bool = False  # whether every process must sample whenever one does (sharded weights, vLLM)


class Responses:
    """A source of responses. This one gives the data's; others override what they need."""

    needs_data = True  # whether every row must have a response of its own
    needs_exact_samples = False  # whether the loss takes the responses for samples of the models' own distributions

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        accept_old_name(cls, "figures", "metrics")

    def __call__(self, rows: Sequence[EncodedExample], sample: Sampler, progress: float) -> Tokens:
        """A response per row; `progress` is k / K. Draw from torch's global generator, which checkpoints hold."""
        return [row.response_ids for row in rows]

    def on_validation(self, loss: float) -> None:
        """Called with the loss after each validation."""

    def metrics(self) -> dict[str, float]:
        """What to log of the source's state."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state`."""


class ResponseMix(Responses):
    """A row's response is the student's with probability `student_share`, else the data's (Agarwal et al. 2024's λ)."""

    def __init__(self, student_share: float):
        self.student_share = _share("The student's share of the responses", student_share)
        self.needs_data = student_share < 1

    def __call__(self, rows: Sequence[EncodedExample], sample: Sampler, progress: float) -> Tokens:
        return _fill(rows, _chosen(len(rows), self.student_share), self.write, sample)

    def write(self, rows: Sequence[EncodedExample], sample: Sampler) -> Tokens:
        return _by_student(rows, sample)


class Speculative(ResponseMix):
    """The same, but the teacher corrects the student token by token (speculative KD, Xu et al. 2025)."""

    def __init__(self, student_share: float, speculation: Speculation):
        super().__init__(student_share)
        self.speculation = speculation

    def write(self, rows: Sequence[EncodedExample], sample: Sampler) -> Tokens:
        prompts, read = ([row.prompt_ids for row in each] for each in (rows, [row.for_teacher() for row in rows]))
        return sample.speculative(prompts, read, self.speculation)


class TeacherMixed(Responses):
    """Sampled token by token from (1 - α) q + α p, of student q and teacher p (MiniLLM, Gu et al. 2024)."""

    needs_data = False
    needs_exact_samples = True

    def __init__(self, teacher_share: float):
        self.teacher_share = _share("The teacher's share of the sampler", teacher_share)

    def __call__(self, rows: Sequence[EncodedExample], sample: Sampler, progress: float) -> Tokens:
        prompts, read = ([row.prompt_ids for row in each] for each in (rows, [row.for_teacher() for row in rows]))
        if self.teacher_share == 0:
            return sample.student(prompts)
        return sample.mixed(prompts, self.teacher_share, *([] if read == prompts else [read]))


@dataclass
class AdaptiveReplay(Responses):
    """DistiLLM's schedule (Ko et al. 2024, section 3.2, but a buffered response answers its own row).

    A row takes a student's response with probability φ, else the data's. It is newly sampled with probability
    1 - k / K, or if the buffer has none for this row; else it is the student's last one for the row. φ begins at
    `start` and rises by `step`, up to 1, whenever the validation loss exceeds the lowest so far by `tolerance`.
    """

    start: float = 0.0
    step: float = 0.1
    tolerance: float = 0.0
    capacity: int = 1000
    share: float = field(init=False)
    best: float | None = field(init=False, default=None)
    buffer: dict[int, list[int]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.share = _share("The student's first share", self.start)

    def __call__(self, rows: Sequence[EncodedExample], sample: Sampler, progress: float) -> Tokens:
        own = _chosen(len(rows), self.share)
        renewed = _chosen(len(rows), 1 - progress)
        draws = zip(rows, own, renewed, strict=True)
        fresh = [mine and (new or row.row not in self.buffer) for row, mine, new in draws]
        responses = _fill(rows, fresh, _by_student, sample)
        for index, row in enumerate(rows):
            if fresh[index]:
                self.buffer.pop(row.row, None)  # now the newest
                self.buffer[row.row] = responses[index]
                if len(self.buffer) > self.capacity:
                    del self.buffer[next(iter(self.buffer))]  # the oldest
            elif own[index]:
                responses[index] = self.buffer[row.row]
        return responses

    def on_validation(self, loss: float) -> None:
        if self.best is not None and loss > self.best + self.tolerance:
            self.share = min(1.0, self.share + self.step)
        self.best = loss if self.best is None else min(self.best, loss)

    def metrics(self) -> dict[str, float]:
        return {"student_share": self.share, "replay_size": float(len(self.buffer))}

    def state_dict(self) -> dict[str, Any]:
        return {"share": self.share, "best": self.best, "buffer": dict(self.buffer)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.share, self.best, self.buffer = state["share"], state["best"], dict(state["buffer"])


def writes_responses(source: Responses) -> bool:
    """Whether a model may write responses while the student trains, as for any source of your own."""
    return type(source) is not Responses and not (isinstance(source, ResponseMix) and source.student_share == 0)


def _share(of: str, share: float) -> float:
    if not 0 <= share <= 1:
        raise ValueError(f"{of} must lie in [0, 1]. Got {share}.")
    return share


def _chosen(rows: int, share: float) -> list[bool]:
    """Which of `rows` rows a share falls on. Nothing is drawn where the share leaves no choice."""
    return [share == 1] * rows if share in (0, 1) else (torch.rand(rows) < share).tolist()


def _by_student(rows: Sequence[EncodedExample], sample: Sampler) -> Tokens:
    return sample.student([row.prompt_ids for row in rows])


def _fill(
    rows: Sequence[EncodedExample],
    chosen: Sequence[bool],
    write: Callable[[Sequence[EncodedExample], Sampler], Tokens],
    sample: Sampler,
) -> Tokens:
    """A written response for each chosen row, the data's for the others."""
    written = [row for row, own in zip(rows, chosen, strict=True) if own]
    if not written and sample.together:
        write(rows[:1], sample)  # thrown away: another process may have rows to sample
    sampled = iter(write(written, sample) if written else [])
    return [next(sampled) if own else row.response_ids for row, own in zip(rows, chosen, strict=True)]
