"""A `PromptKDTrainer` whose phases can be observed from outside, for example by the ranges of a profile."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from promptkd import PromptKDTrainer

__all__ = ["PHASES", "watched_trainer"]

PHASES = ("rollout", "prompt", "student", "update")
Watch = Callable[[str], AbstractContextManager[Any]]
"""Maps the name of a phase to a context manager that is entered while the phase runs."""


def watched_trainer(watch: Watch) -> type[PromptKDTrainer]:
    """A trainer that enters `watch` for each of its `PHASES`."""

    class WatchedTrainer(PromptKDTrainer):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            begin, end, entered = self.phases.begin, self.phases.end, []

            def watched_begin(name: str) -> None:
                begin(name)
                entered.append(watch(name))
                entered[-1].__enter__()

            def watched_end(*, synchronize: bool = True) -> None:
                end(synchronize=synchronize)
                entered.pop().__exit__(None, None, None)

            self.phases.begin, self.phases.end = watched_begin, watched_end

    return WatchedTrainer
