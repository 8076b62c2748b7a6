"""Many questions to an endpoint, several at a time."""

import asyncio
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Generic, TypeVar

from promptkd.errors import PromptKDError
from promptkd.judge.endpoint import Asker, Endpoint, Refusal, Reply, Unanswered

K = TypeVar("K", bound=Hashable)
Take = Callable[[K, Reply | Refusal], None]

_FAILURES_IN_A_ROW = 5
"""Or as many as are asked at a time, if that is more: then the endpoint is at fault and not the questions."""


def ask_all(
    endpoint: Endpoint,
    questions: Mapping[K, str],
    take: "Take[K]",
    *,
    concurrency: int,
    proven: bool = False,
    on_wait: Callable[[str, float], None] = lambda reason, seconds: None,
) -> dict[K, str]:
    """Ask every question, `concurrency` at a time, and hand each answer to `take` as it comes.

    Args:
        questions: texts by key.
        take: receives a key and a `Reply`, or a `Refusal` once any question was answered: an endpoint that refuses
            everything says nothing about the questions.
        proven: whether the endpoint has answered such questions before.
        on_wait: hears why a question is asked again, and in how many seconds.

    Returns:
        The questions that got no answer in `endpoint.retries` + 1 attempts, with the last reason.

    Raises:
        PromptKDError: the endpoint cannot be used; what `take` was given until then stands.
    """
    return asyncio.run(_Round(endpoint, take, proven).ask(questions, concurrency, on_wait)) if questions else {}


class _Round(Generic[K]):
    def __init__(self, endpoint: Endpoint, take: "Take[K]", proven: bool):
        self.endpoint = endpoint
        self.take = take
        self.proven = proven
        self.failed: dict[K, str] = {}
        self.refused: dict[K, Refusal] = {}  # held back until the endpoint is proven
        self.in_a_row = 0

    async def ask(
        self, questions: Mapping[K, str], concurrency: int, on_wait: Callable[[str, float], None]
    ) -> dict[K, str]:
        waiting = iter(questions.items())
        asker = Asker(self.endpoint, on_wait)
        async with asker.client:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(concurrency, len(questions))):
                        group.create_task(self._work(asker, waiting, max(_FAILURES_IN_A_ROW, concurrency)))
            except* PromptKDError as errors:
                stopped = errors.exceptions[0]
            else:
                if not self.proven:
                    reasons = [*self.failed.values(), *(each.reason for each in self.refused.values())]
                    self._stop(len(questions), reasons[-1])
                return self.failed
        raise stopped

    async def _work(self, asker: Asker, waiting: Iterator[tuple[K, str]], most: int) -> None:
        for key, question in waiting:
            outcome = await asker.ask(question)
            if isinstance(outcome, Reply):
                self._prove()
                self.take(key, outcome)
                continue
            if isinstance(outcome, Unanswered):
                self.failed[key] = outcome.reason
            elif self.proven:
                self.take(key, outcome)
                continue
            else:
                self.refused[key] = outcome
            self.in_a_row += 1
            if self.in_a_row >= most:
                self._stop(self.in_a_row, outcome.reason)

    def _prove(self) -> None:
        self.proven, self.in_a_row = True, 0
        for key, refusal in self.refused.items():
            self.take(key, refusal)
        self.refused.clear()

    def _stop(self, count: int, reason: str) -> None:
        which = f"None of the last {count} requests" if count > 1 else "No request"
        raise PromptKDError(f"{which} to {self.endpoint.url} was answered: {reason}.")
