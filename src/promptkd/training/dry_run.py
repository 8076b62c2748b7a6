"""Real optimizer steps on the longest rows that leave nothing behind, to tell what a run will cost at most."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from promptkd.data.encode import EncodedData, EncodedExample
from promptkd.methods import Method
from promptkd.responses import AdaptiveReplay, ResponseMix, Speculative, writes_responses
from promptkd.training.callbacks import quiet


@dataclass(frozen=True)
class Trial:
    """What the steps of a trial cost."""

    steps: int  # optimizer steps that the whole run would take
    seconds: float  # of its second step, if there is one, else of its first
    seconds_by_phase: Mapping[str, float]  # of the same step
    seconds_between: float | None  # of a step in which the teacher's adapter rests; None where it moves in each
    prompt_every: int
    warm: bool  # whether a step came before it, which takes longer than all others
    longest_row: int  # tokens of the trial's longest row, its response included; of both, where a loss reads two
    peak_memory_bytes: int  # since the process began, loading included
    peak_memory_by_phase: Mapping[str, int]
    sampled: bool  # whether the peaks by phase are what was held at the ends of phases

    @property
    def expected_seconds(self) -> float:
        """Of the whole run, if all of its rows were as long."""
        moves = -(-self.steps // self.prompt_every)
        between = self.seconds if self.seconds_between is None else self.seconds_between
        return moves * self.seconds + (self.steps - moves) * between


def leave_nothing(args: Any, folder: str | Path) -> None:
    """Change training arguments, before a trainer is made of them, so that it writes at most into `folder`."""
    args.output_dir = str(folder)
    args.save_strategy, args.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
    args.load_best_model_at_end = args.push_to_hub = args.log_completions = False
    args.report_to, args.eval_on_start = [], False


def at_its_most(method: Method) -> Method:
    """The method with the responses that cost most: where student and data share in writing them, all the student's."""
    source = method.responses
    if isinstance(source, AdaptiveReplay):
        return replace(method, responses=ResponseMix(1.0))
    if not isinstance(source, ResponseMix) or source.student_share in (0, 1):
        return method
    if isinstance(source, Speculative):
        return replace(method, responses=Speculative(1.0, source.speculation))
    return replace(method, responses=ResponseMix(1.0))


def longest_rows_first(data: EncodedData, args: Any, method: Method) -> EncodedData:
    """As many rows as before, with the longest in each step of the trial; `args` no longer shuffle.

    The second step counts: it is warm, and holds the optimizer's states beside the longest rows. Of several teachers,
    each has its longest row in it. `method` is that of the trial, as `at_its_most` gives it.
    """
    args.shuffle_dataset = False
    ranked = sorted(data.examples, key=lambda row: _tokens(row, args, method), reverse=True)
    first = {row.teacher: row for row in reversed(ranked)}
    ranked.sort(key=lambda row: row is not first[row.teacher])
    window = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return EncodedData((ranked[:window] * _steps(args) + ranked[window:])[: len(ranked)], data.dropped)


def _steps(args: Any) -> int:
    """Of a trial: the third one is without a move of the teacher's adapter."""
    return 2 if args.prompt_every == 1 else 3


def _tokens(row: EncodedExample, args: Any, method: Method) -> int:
    """Tokens of prompt and response; a response that a model writes counts as the longest that it may write.

    Where a loss reads the data's response beside the written one, the prompt counts with each of the two.
    """
    prompt, source = max(len(row.prompt_ids), len(row.for_teacher().prompt_ids)), method.responses
    written = [args.max_completion_length] if writes_responses(source) else []
    of_data = [len(row.response_ids)] if source.needs_data or not written else []
    return sum(prompt + response for response in (*written, *of_data))


def take_trial_steps(trainer: Any) -> Trial:
    """Two or three optimizer steps, one if the run has no more, with responses up to their limit; it spends the models.

    The teacher's adapter moves in the first two, whatever `prompt_every` is, and rests in the third.

    Args:
        trainer: a `DistillTrainer` on `longest_rows_first` whose arguments went through `leave_nothing`.
    """
    quiet(trainer)
    trainer.is_trial = True
    trainer.rollout.write_to_the_limit()
    if trainer.tuner is not None:
        trainer.tuner.is_due = lambda step: step < 2
    clock = _Clock(trainer.phases, _steps(trainer.args))
    trainer.add_callback(clock)
    trainer.train()
    counted = min(len(clock.seconds), 2) - 1
    return Trial(
        steps=trainer.state.max_steps,
        seconds=clock.seconds[counted],
        seconds_by_phase=clock.by_phase[counted],
        seconds_between=clock.seconds[2] if len(clock.seconds) > 2 else None,
        prompt_every=trainer.args.prompt_every,
        warm=len(clock.seconds) > 1,
        longest_row=_tokens(trainer.train_dataset[0], trainer.args, trainer.method),
        peak_memory_bytes=trainer.phases.peak,
        peak_memory_by_phase=trainer.phases.peaks,
        sampled=trainer.phases.sampled,
    )


class _Clock(TrainerCallback):
    """Seconds of every step, in all and by phase, and the end of training after so many steps."""

    def __init__(self, phases: Any, steps: int) -> None:
        self.seconds: list[float] = []
        self.by_phase: list[dict[str, float]] = []
        self._phases, self._steps = phases, steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since, self._before = time.perf_counter(), dict(self._phases.seconds)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._since)
        spent = self._phases.seconds.items()
        self.by_phase.append({name: total - self._before.get(name, 0.0) for name, total in spent})
        self.on_train_begin(args, state, control)  # what comes before the next step counts for it
        control.should_training_stop |= len(self.seconds) == self._steps
