"""Degenerate learning, seen in the metrics that training logs: each kind is reported once, when it begins.

The trainers add `Watching`, which reads the log as it is written; `findings` reads a whole history.
"""

import logging
import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean, median_high, median_low
from typing import Any

from transformers import TrainerCallback

_LOGGER = logging.getLogger("promptkd")
_END_TOKEN = (
    "The end token is not learned: see that the template's end is a stop token of the tokenizer, and that teacher and "
    "data write it."
)
_NEVER_ENDED = "Raise --max_completion_length, or tune the models first on data whose responses end (promptkd sft)."
_UNLEARNS_TO_END = (
    "The student unlearns to end. See that the teacher ends its own answers within --max_completion_length and with a "
    "token that ends the rows (the lines before training say both), lower --learning_rate, or let the data's "
    "responses take a share (--method gkd --student_share 0.5)."
)
_LOOPS = (
    "A loop is easy to predict for both models, so the loss may fall meanwhile. Lower --learning_rate, let the data's "
    "responses take a share (--method gkd --student_share 0.5), or lower --max_completion_length."
)
_MOVES_AWAY = (
    "Lower --learning_rate (and --prompt_learning_rate), or begin with a student that was tuned on the data or on the "
    "teacher's answers (promptkd sft, --method seqkd)."
)
_DRIFTS = (
    "See that responses still end (cut_share). Lower --prompt_learning_rate, or hold it to the plain teacher "
    "(--regularizer_schedule constant)."
)


@dataclass(frozen=True)
class Limits:
    """From where on a metric is called degenerate. docs/warnings.md gives the reasons."""

    steps: int = 5  # optimizer steps for which it must stay so
    lines: int = 10  # logged lines over which response lengths are averaged, at the start and now
    length_share: float = 0.2  # of the mean response length at the start
    empty_length: float = 1.5  # mean length in tokens at which half of the responses are a bare end token
    entropy: float = 0.05  # nats per token
    endless_steps: int = 50  # optimizer steps without any response that ends by itself
    prompt_growth: float = 10.0  # norm of the soft prompt over its norm in the first logged line
    prompt_kl: float = 2.0  # nats per token between the adapted and the plain teacher
    drift: tuple[float, float, float] = (0.1, 1 / 3, 2.0)  # that KL, its share of that to the student, times its start
    length_growth: float = 5.0  # times the mean response length at the start
    cut_growth: float = 0.5  # by how much the mean share of cut responses may rise since the start
    repetition: float = 0.5  # mean share of 4-grams that are repeated, whatever it was at the start
    repetition_rise: tuple[float, float] = (0.2, 3.0)  # or that mean, if it is so many times that at the start
    overlap_fall: float = 0.1  # of the mean top-token overlap, since the start


@dataclass(frozen=True)
class Finding:
    """Something degenerate that begins."""

    kind: str
    step: int  # optimizer step at which it was found
    text: str


class _Means:
    """The means of a metric over the first logged lines and over the last ones, None before there are enough."""

    def __init__(self, lines: int):
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=lines)
        self._lines = lines

    def see(self, value: float, *, counts_as_start: bool = True) -> None:
        self._last.append(value)
        if counts_as_start and len(self._first) < self._lines:
            self._first.append(value)

    @property
    def start(self) -> float | None:
        return fmean(self._first) if len(self._first) == self._lines else None

    @property
    def now(self) -> float | None:
        return fmean(self._last) if len(self._last) == self._lines else None


class Watch:
    """Folds over the logged lines of one run."""

    def __init__(self, limits: Limits | None = None):
        self.limits = limits or Limits()
        self._since: dict[str, int] = {}  # by kind, the last step before it began
        self._told: set[str] = set()
        self._last_step = 0
        lines = self.limits.lines
        self._lengths, self._cuts, self._repetitions, self._overlaps = (_Means(lines) for _ in range(4))
        self._from_plain, self._from_student = deque[float](maxlen=lines), deque[float](maxlen=lines)
        self._endless_validations: set[int] = set()  # steps of those, one after the other, in which no response ended
        self._start_norm: float | None = None
        self._start_regularizer: float | None = None

    def see(self, line: Mapping[str, Any]) -> list[Finding]:
        """What begins with this logged line. A kind is told again only after a line without it."""
        metrics = {name: value for name, value in line.items() if isinstance(value, int | float)}
        step = int(metrics.get("step", self._last_step))
        found = []
        for kind, holds, steps, text in self._signs(metrics):
            if not holds:
                self._since.pop(kind, None)
                self._told.discard(kind)
                continue
            began = self._since.setdefault(kind, self._last_step)
            if kind not in self._told and step - began >= steps:
                self._told.add(kind)
                found.append(Finding(kind, step, text))
        self._last_step = step
        return found

    def _signs(self, metrics: Mapping[str, float]) -> Iterator[tuple[str, bool, int, str]]:
        """Kind, whether the line shows it, optimizer steps for which it must last before it is told, and the words."""
        limits = self.limits
        if "response_length" in metrics:
            length, cut = metrics["response_length"], metrics.get("cut_share", 0.0)
            self._lengths.see(length, counts_as_start=cut <= 0.5)  # a cut response does not tell its length
            self._cuts.see(cut)
            mean, start = self._lengths.now or math.inf, self._lengths.start or 0.0
            cuts, start_cuts = self._cuts.now or 0.0, self._cuts.start or 0.0
            shrunk = f", from {start:.1f} in the first steps" if mean < limits.length_share * start else ""
            yield (
                "length",
                bool(shrunk) or (mean <= limits.empty_length and cut <= 0.5),
                limits.steps,
                f"responses have collapsed to {mean:.1f} tokens{shrunk}. Go back to an earlier checkpoint with lower "
                "learning rates.",
            )
            more_cut = cuts - start_cuts >= limits.cut_growth
            yield (
                "growth",
                more_cut or (start > 0 and limits.length_growth * start <= mean < math.inf),
                limits.steps,
                f"responses have grown to {mean:.0f} tokens, {cuts:.0%} of them cut at the limit, from "
                f"{f'{start:.0f} tokens and ' if start else ''}{start_cuts:.0%} in the first steps. {_UNLEARNS_TO_END}",
            )
            yield (
                "cut",
                cut >= 1,
                limits.steps,
                f"every response of {limits.steps} steps was cut at the length limit. "
                f"{_UNLEARNS_TO_END if start > 0 else _NEVER_ENDED}",
            )
            yield (
                "endless",
                cut >= 1,
                limits.endless_steps,
                f"no response ended by itself in {limits.endless_steps} steps. {_END_TOKEN}",
            )
        if "repetition" in metrics:
            self._repetitions.see(metrics["repetition"])
            now, start = self._repetitions.now or 0.0, self._repetitions.start or 0.0
            least, times = limits.repetition_rise
            yield (
                "repetition",
                now >= limits.repetition or (now >= least and now >= times * start),
                limits.steps,
                f"responses repeat themselves: {now:.0%} of their 4-grams are repeated, {start:.0%} in the first "
                f"steps. {_LOOPS}",
            )
        if "top_overlap" in metrics:
            self._overlaps.see(metrics["top_overlap"])
            now, start = self._overlaps.now or 0.0, self._overlaps.start or 0.0
            yield (
                "overlap",
                self._overlaps.now is not None and now <= start - limits.overlap_fall,
                limits.steps,
                f"student and teacher have the same most probable token at {now:.0%} of the response tokens, "
                f"{start:.0%} in the first steps: the student moves away from the teacher. {_MOVES_AWAY}",
            )
        ended = [value for name, value in metrics.items() if name.startswith("eval_") and name.endswith("eos_share")]
        if ended:
            step = int(metrics.get("step", self._last_step))
            self._endless_validations = set() if any(ended) else {*self._endless_validations, step}
            text = f"no response ended by itself in two validations. {_END_TOKEN}"
            yield "endless validation", len(self._endless_validations) > 1, 0, text
        if "entropy" in metrics:
            yield (
                "entropy",
                metrics["entropy"] < limits.entropy,
                limits.steps,
                f"the entropy has fallen to {metrics['entropy']:.3f} nats per token: the model has one thing to say. "
                "Lower the learning rate, stop earlier, or take an objective that keeps to the data.",
            )
        if "prompt_norm" in metrics:
            norm = metrics["prompt_norm"]
            self._start_norm = norm if self._start_norm is None else self._start_norm
            yield (
                "prompt norm",
                norm > limits.prompt_growth * self._start_norm,
                limits.steps,
                f"the soft prompt is running away: its norm is {norm:.3g}, from {self._start_norm:.3g} in the first "
                "step. Lower --prompt_learning_rate.",
            )
        if "prompt_regularizer" in metrics:
            kl = metrics["prompt_regularizer"]
            self._start_regularizer = kl if self._start_regularizer is None else self._start_regularizer
            yield (
                "prompt KL",
                kl > limits.prompt_kl,
                limits.steps,
                f"the adapted teacher is {kl:.2f} nats per token from the plain one: the student learns "
                "from another model than the one that was chosen. Raise --regularizer_coefficient, or lower "
                "--prompt_learning_rate.",
            )
            if "prompt_kl" in metrics:
                self._from_plain.append(kl)
                self._from_student.append(metrics["prompt_kl"])
                from_plain, from_student = median_low(self._from_plain), median_high(self._from_student)
                least, share, times = limits.drift
                moved = from_plain >= max(least, share * from_student, times * self._start_regularizer)
                yield (
                    "teacher drift",
                    moved and len(self._from_plain) == limits.lines and from_plain <= limits.prompt_kl,
                    1,
                    f"the adapted teacher has drifted to the student: it is {from_plain:.2f} nats per token from the "
                    f"plain one and {from_student:.2f} from the student, and teaches what it already says. {_DRIFTS}",
                )


def findings(history: Iterable[Mapping[str, Any]], limits: Limits | None = None) -> list[Finding]:
    """Everything degenerate that begins in the logged lines of a run, in order."""
    watch = Watch(limits)
    return [found for line in history for found in watch.see(line)]


def findings_as_notes(history: Iterable[Mapping[str, Any]]) -> list[str]:
    """For a record: a sentence a kind, with the step at which it was first found and how often it came."""
    found = findings(history)
    times = Counter(each.kind for each in found)
    first = {each.kind: each for each in reversed(found)}
    return [
        f"Warning at step {each.step}{f', the first of {times[kind]}' if times[kind] > 1 else ''}: {each.text}"
        for kind, each in sorted(first.items(), key=lambda item: item[1].step)
    ]


class Watching(TrainerCallback):
    """Warns by Python's logger "promptkd" when something degenerate begins."""

    def __init__(self) -> None:
        self._watch = Watch()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._watch = Watch()
        for line in state.log_history:  # of a resumed run, which has told of these
            self._watch.see(line)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for found in self._watch.see(state.log_history[-1]):
            if state.is_world_process_zero:
                _LOGGER.warning("Step %d: %s", found.step, found.text)
