"""What an optimizer step works on: rows with their responses, in micro-batches; and the metrics summed of them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from accelerate import Accelerator
from torch import Tensor

from promptkd.data.batch import TokenBatch, right_pad
from promptkd.data.encode import EncodedExample


@dataclass
class MicroBatch:
    """B rows and the responses that the student learns from, N tokens."""

    index: int  # its place in the window
    rows: Sequence[EncodedExample]
    batch: TokenBatch  # as the student reads it
    texts: Sequence[Sequence[int]]  # plain texts for the language-modeling loss, one per row; empty without one
    student_hidden: Tensor | None = None
    """(N, H) states of the student with their graph, where the teacher's tuner has computed them already."""
    teacher_hidden: Tensor | None = None
    """(N, H) states of the adapted teacher of before its last step, with `prompt_refresh` "stale"."""

    _parts: dict[str, "MicroBatch | None"] = field(default_factory=dict, repr=False)

    def row_numbers(self) -> list[int]:
        """The rows' places in the data, counted from 0."""
        return [row.row for row in self.rows]

    def of(self, teacher: str) -> "MicroBatch | None":
        """The rows of one of several teachers, None without any; all of them for the only one, whose name is ""."""
        if teacher == "":
            return self
        if teacher not in self._parts:
            rows = [index for index, row in enumerate(self.rows) if row.teacher == teacher]
            self._parts[teacher] = self._part(rows) if rows else None
        return self._parts[teacher]

    def _part(self, rows: Sequence[int]) -> "MicroBatch":
        ids, prompts = self.batch.token_ids, self.batch.prompt_lengths
        cut = [(ids[row][: prompts[row]], ids[row][prompts[row] :]) for row in rows]
        batch = right_pad(*zip(*cut, strict=True), device=self.batch.input_ids.device)
        return MicroBatch(self.index, [self.rows[row] for row in rows], batch, [])

    @cached_property
    def teacher_batch(self) -> TokenBatch:
        """`batch` as the teacher reads it: the same responses, after prompts with the context that only it sees."""
        return self.batch.with_prompts([row.teacher_prompt_ids for row in self.rows])

    def for_teacher(self, batch: TokenBatch) -> TokenBatch:
        """Another batch of the same rows, in their order, as the teacher reads it."""
        if batch is self.batch:
            return self.teacher_batch
        contexts = [row.teacher_prompt_ids for row in self.rows]
        if all(context is None for context in contexts):
            return batch
        prompts = [ids[:length] for ids, length in zip(batch.token_ids, batch.prompt_lengths, strict=True)]
        if prompts != [row.prompt_ids for row in self.rows]:
            raise ValueError("`teacher_hidden` takes one row for each of `Step.rows`, in their order, with its prompt.")
        return batch.with_prompts(contexts)


@dataclass
class Window:
    """The micro-batches of one optimizer step on this process; counts are those of all processes."""

    micro_batches: Sequence[MicroBatch]
    items: Tensor  # what the student's loss is a mean over: response tokens, or rows
    tokens: Tensor  # response tokens
    text_tokens: Tensor  # predicted tokens of the plain texts
    progress: float = 0.0  # k / K, of the k optimizer steps that are done and the K of the training
    taken: int = 0  # micro-batches that `next` has given
    tokens_by_teacher: Mapping[str, Tensor] = field(default_factory=dict)
    """Response tokens of each of several teachers, on the host: to look at them waits for no device."""

    def tokens_of(self, teacher: str) -> Tensor:
        """Response tokens of a teacher's rows; of all rows for the only one, whose name is ""."""
        return self.tokens_by_teacher[teacher] if teacher else self.tokens

    def next(self) -> MicroBatch:
        """The next micro-batch."""
        self.taken += 1
        return self.micro_batches[self.taken - 1]

    @property
    def is_done(self) -> bool:
        """Whether every micro-batch was taken."""
        return self.taken == len(self.micro_batches)


def labeled(metric: str, teacher: str) -> str:
    """The name of a metric of one of several teachers."""
    return f"{metric}[{teacher}]" if teacher else metric


def per_token(teacher: str) -> str:
    """What `StepMetrics.add` takes as `per` for a mean over the response tokens of a teacher's rows."""
    return labeled("token", teacher)


class StepMetrics:
    """Metrics of one optimizer step: sums on the device, so that nothing waits for it before the step is done."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin the next step."""
        self._sums: dict[str, dict[str, Tensor | float]] = {
            kind: defaultdict(float)
            for kind in ("token", "row", "text", "compared", "with_entropy", "written", "corrected")
        }  # and those per response token of a teacher's rows
        self._values: dict[str, float] = {}
        self.rows = 0  # rows of this process
        self.processed_tokens = 0  # tokens of this process, prompts and responses
        self.written = 0  # rows of this process whose responses a model may have written
        self.corrected = (
            0  # response tokens of this process that the student proposed and the teacher let be or replaced
        )
        self.compared = 0  # response tokens of this process at which student and teacher were compared
        self.with_entropy = 0  # response tokens of this process of which the loss told the entropy

    def add(self, name: str, value: Tensor | float, *, per: str = "token") -> None:
        """Add to a sum of this process, whose mean over tokens, rows … of all processes is logged, if there are any."""
        self._sums.setdefault(per, defaultdict(float))[name] += value

    def set(self, name: str, value: float) -> None:
        """Log a value as it is, the same on every process."""
        self._values[name] = value

    def means(self, window: Window, accelerator: Accelerator, spent: Mapping[str, float]) -> dict[str, float]:
        """What to log of the step; the next one begins. All processes must ask together."""
        names = [(per, name) for per, sums in self._sums.items() for name in sums]
        own = [float(self._sums[per][name]) for per, name in names]
        own += [self.rows, self.processed_tokens, self.compared, self.with_entropy, self.written, self.corrected]
        sums = accelerator.reduce(torch.tensor(own, dtype=torch.float64, device=accelerator.device), reduction="sum")
        *totals, rows, processed_tokens, compared, with_entropy, written, corrected = sums.tolist()
        tokens, text_tokens = max(int(window.tokens), 1), max(int(window.text_tokens), 1)
        counts = {"token": tokens, "row": rows, "text": text_tokens}
        counts |= {"compared": compared, "with_entropy": with_entropy, "written": written, "corrected": corrected}
        counts |= {per_token(name): int(count) for name, count in window.tokens_by_teacher.items()}
        means = {name: total / counts[per] for (per, name), total in zip(names, totals, strict=True) if counts[per]}
        seconds = {f"seconds_{name}": spent.get(name, 0.0) for name in ("rollout", "prompt", "student")}
        speed = processed_tokens / max(sum(seconds.values()), 1e-9)
        logged = means | self._values | {"tokens_per_second": speed} | seconds
        self.clear()
        return logged
