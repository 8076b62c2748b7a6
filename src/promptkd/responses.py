"""Where the responses of an optimizer step come from: the data, the student, a mixture, a replay buffer, or the student
corrected by the teacher."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from promptkd.data.encode import EncodedExample
from promptkd.errors import RequestError, check_all
from promptkd.settings import accept_old_name

Tokens = list[list[int]]
Answered = tuple[EncodedExample, list[int]]
"""A row and a response to it."""


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

    def answered(self, rows: Sequence[EncodedExample], sample: Sampler, progress: float) -> list[Answered]:
        """What a step trains on, as many as `rows`: each with its response, unless a source brings other rows."""
        return list(zip(rows, self(rows, sample, progress), strict=True))

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
    """DistiLLM's schedule (Ko et al. 2024, section 3.2, but each row draws for itself).

    A row takes a student's response with probability φ, else the data's. It is newly sampled, and buffered, with
    probability 1 - k / K or while the buffer is empty; else any buffered response takes the row's place in the step,
    with the row that it answers. φ begins at `start` and rises by `step`, up to 1, whenever the validation loss exceeds
    the lowest so far by `tolerance`.
    """

    start: float = 0.0
    step: float = 0.1
    tolerance: float = 0.0
    capacity: int = 1000
    share: float = field(init=False)
    best: float | None = field(init=False, default=None)
    buffer: deque[Answered] = field(init=False)
    """The newest samples of the student's, at most `capacity`."""
    replayed: float = field(init=False, default=0.0)
    """Share of the last step's rows that are from the buffer."""
    _is_used: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.best, self._is_used = None, False
        self.share = _share("The student's first share", self.start)
        self.buffer = deque(maxlen=self.capacity)

    def __call__(self, rows: Sequence[EncodedExample], sample: Sampler, progress: float) -> Tokens:
        raise TypeError("AdaptiveReplay also answers other rows than those of the step: call its `answered`.")

    def answered(self, rows: Sequence[EncodedExample], sample: Sampler, progress: float) -> list[Answered]:
        if progress == 0 and self._is_used:  # another training, which starts from scratch
            self.__post_init__()
        self._is_used = True
        own = _chosen(len(rows), self.share)
        renewed = _chosen(len(rows), 1 - progress)
        fresh = [mine and (new or not self.buffer) for mine, new in zip(own, renewed, strict=True)]
        step = list(zip(rows, _fill(rows, fresh, _by_student, sample), strict=True))
        new = [each for each, is_new in zip(step, fresh, strict=True) if is_new]
        for index, (mine, is_new) in enumerate(zip(own, fresh, strict=True)):
            if mine and not is_new:
                step[index] = self.buffer[int(torch.randint(len(self.buffer), ()))]
        self.replayed = (sum(own) - len(new)) / len(rows)
        self.buffer.extend(new)
        return step

    def on_validation(self, loss: float) -> None:
        if self.best is not None and loss > self.best + self.tolerance:
            self.share = min(1.0, self.share + self.step)
        self.best = loss if self.best is None else min(self.best, loss)

    def metrics(self) -> dict[str, float]:
        size = float(len(self.buffer))
        return {"student_share": self.share, "replay_size": size, "replayed_share": self.replayed}

    def state_dict(self) -> dict[str, Any]:
        buffer = [(asdict(row), response) for row, response in self.buffer]
        return {"share": self.share, "best": self.best, "buffer": buffer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if isinstance(state["buffer"], Mapping) and state["buffer"]:
            advice = "Resume it with the version that wrote it, or start a new run."
            raise RequestError(f"The checkpoint's replay buffer is of an older version, without requests. {advice}")
        self.share, self.best = state["share"], state["best"]
        self.buffer.clear()
        self.buffer.extend((EncodedExample(**row), response) for row, response in state["buffer"])


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
