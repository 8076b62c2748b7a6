"""A `PromptKDTrainer` whose phases are watched from outside, as by the ranges of a profile."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from transformers import TrainerCallback

from promptkd import PromptKDTrainer

__all__ = ["PHASES", "UpdateWatch", "watched_trainer"]

PHASES = ("rollout", "prompt", "student", "update")
Watch = Callable[[str], AbstractContextManager[Any]]
"""From a phase's name to what is entered while it runs."""


def watched_trainer(watch: Watch) -> type[PromptKDTrainer]:
    """A trainer that enters `watch` for "rollout", "prompt" and "student"; the former two run inside of the latter."""

    class WatchedTrainer(PromptKDTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            with watch("student"):
                return super().training_step(*args, **kwargs)

        def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
            with watch("rollout"):
                return super()._generate_and_score_completions(*args, **kwargs)

        def _tune_teacher(self, *args: Any, **kwargs: Any) -> Any:
            with watch("prompt"):
                return super()._tune_teacher(*args, **kwargs)

    return WatchedTrainer


class UpdateWatch(TrainerCallback):
    """Enters `watch` for "update", the step of the student's optimizer."""

    def __init__(self, watch: Watch):
        self._watch = watch
        self._running = ExitStack()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._running.enter_context(self._watch("update"))

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._running.close()
