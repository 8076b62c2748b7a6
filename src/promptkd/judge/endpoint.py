"""Questions to an OpenAI-compatible endpoint, several at a time, each asked again where the failure may pass.

408, 409, 429, 5xx, time-outs, broken connections and bodies that are no chat completion may pass. A key that is not
accepted, an unknown model or address, or a redirection stops everything. Any other status refuses its one question. The
client's own retries are off: they take any body for an answer, never give up on a server that sends a byte at a time,
wait in silence, and know no pause that holds for all requests. The key goes into the header and nowhere else, and is
starred out where the server repeats it.
"""

import asyncio
import json
import random
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Generic, NamedTuple, TypeVar
from urllib.parse import urlsplit

from pydantic import AliasPath, BaseModel, Field, ValidationError

from promptkd.errors import PromptKDError, RequestError
from promptkd.io.redact import starred

K = TypeVar("K", bound=Hashable)

_MAY_PASS = frozenset({408, 409, 429})
_KEY_ADVICE = "Set OPENAI_API_KEY, or name the variable that holds it with --key-variable."
_FATAL = {
    401: f"The key was not accepted. {_KEY_ADVICE}",
    403: f"The key has no right to this. {_KEY_ADVICE}",
    404: "Check --judge-model, and --endpoint, which ends in /v1 with most servers.",
}
_LONGEST_PAUSE = 60.0  # cap of the exponential back-off, in seconds
_LONGEST_RETRY_AFTER = 600.0  # a server that asks for more patience than this many seconds has failed
_LONGEST_QUOTE = 300  # characters of a server's message that are repeated
_FAILURES_IN_A_ROW = 5  # or as many as are asked at a time, if more: then the endpoint is at fault, not the questions


@dataclass(frozen=True)
class Endpoint:
    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    fields: Mapping[str, Any] = field(default_factory=dict)  # of every request: temperature, seed, max_tokens, …
    timeout: float = 120.0  # seconds for a complete answer
    retries: int = 5
    backoff: float = 1.0  # seconds before the first retry; doubled for every further one, less up to a half at random


class Reply(BaseModel):
    message: dict[str, Any] = Field(validation_alias=AliasPath("choices", 0, "message"), repr=False)
    text: str | None = Field(None, validation_alias=AliasPath("choices", 0, "message", "content"))
    finish_reason: str | None = Field(None, validation_alias=AliasPath("choices", 0, "finish_reason"))
    model: str | None = None  # the model as the server names it
    prompt_tokens: int | None = Field(None, validation_alias=AliasPath("usage", "prompt_tokens"))
    completion_tokens: int | None = Field(None, validation_alias=AliasPath("usage", "completion_tokens"))


class Refusal(NamedTuple):
    reason: str  # why the server will not answer this question, however often it is asked


class _FailureError(Exception):
    """An attempt failed, in a way that may pass; `wait` is what the server asks for, in seconds."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


def check_url(url: str) -> None:
    """Refuse what is no plain http or https address. A key inside the address would be written into the record."""
    if {*"@?#"} & {*url}:
        advice = "A key is read from the environment alone."
        raise RequestError(f"--endpoint must hold no user name, password, query or fragment. {advice}")
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address or any(character.isspace() for character in url):
        raise RequestError(f"--endpoint must be an address such as http://localhost:8000/v1. Got {url!r}.")


def ask_all(
    endpoint: Endpoint,
    questions: Mapping[K, str],
    take: Callable[[K, Reply | Refusal], None],
    *,
    concurrency: int,
    proven: bool = False,
    on_wait: Callable[[str, float], None] = lambda reason, seconds: None,
) -> dict[K, str]:
    """Ask every question, `concurrency` at a time, and hand each answer to `take` as it comes.

    Refusals are handed over once any question was answered, now or, if the endpoint is `proven`, before: one that
    refuses everything says nothing about the questions. `on_wait` hears why a question is asked again, and in how many
    seconds. Returns the questions that got no answer in `endpoint.retries` + 1 attempts, with the last reason. Raises
    `PromptKDError` if the endpoint cannot be used; what `take` was given until then is valid.
    """
    if not questions:
        return {}
    return asyncio.run(_Asker(endpoint, take, proven, on_wait).ask_all(questions, concurrency))


@dataclass
class _Asker(Generic[K]):
    """Asks until each question is answered or the endpoint is at fault; a pause that it asks for holds for all."""

    endpoint: Endpoint
    take: Callable[[K, Reply | Refusal], None]
    proven: bool
    on_wait: Callable[[str, float], None]
    failed: dict[K, str] = field(default_factory=dict)
    refused: dict[K, Refusal] = field(default_factory=dict)  # held back until the endpoint is proven
    in_a_row: int = 0
    not_before: float = 0.0

    async def ask_all(self, questions: Mapping[K, str], concurrency: int) -> dict[K, str]:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        # No redirection is followed: it would carry the questions to another address than the record names.
        http, key = DefaultAsyncHttpxClient(follow_redirects=False), self.endpoint.key or "none"
        client = AsyncOpenAI(api_key=key, base_url=self.endpoint.url, max_retries=0, http_client=http)
        waiting, most = iter(questions.items()), max(_FAILURES_IN_A_ROW, concurrency)
        try:
            async with client, asyncio.TaskGroup() as group:
                for _ in range(min(concurrency, len(questions))):
                    group.create_task(self._work(client, waiting, most))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        if not self.proven:
            reasons = [*self.failed.values(), *(each.reason for each in self.refused.values())]
            raise self._stop(len(questions), reasons[-1])
        return self.failed

    async def _work(self, client: Any, waiting: Iterator[tuple[K, str]], most: int) -> None:
        for key, question in waiting:
            try:
                outcome = await self._ask(client, question)
            except _FailureError as failure:
                self.failed[key] = reason = str(failure)
            else:
                if isinstance(outcome, Reply):
                    self.proven, self.in_a_row = True, 0
                    for held, refusal in self.refused.items():
                        self.take(held, refusal)
                    self.refused.clear()
                if self.proven:
                    self.take(key, outcome)
                    continue
                assert isinstance(outcome, Refusal)
                self.refused[key], reason = outcome, outcome.reason
            self.in_a_row += 1
            if self.in_a_row >= most:
                raise self._stop(self.in_a_row, reason)

    def _stop(self, count: int, reason: str) -> PromptKDError:
        which = f"None of the last {count} requests" if count > 1 else "No request"
        return PromptKDError(f"{which} to {self.endpoint.url} was answered: {reason}.")

    async def _ask(self, client: Any, question: str) -> Reply | Refusal:
        """Raises `_FailureError` when every attempt has failed."""
        attempt = 0
        while True:
            await asyncio.sleep(max(0.0, self.not_before - time.monotonic()))
            try:
                return await self._attempt(client, question)
            except _FailureError as failure:
                if failure.wait > _LONGEST_RETRY_AFTER:
                    too_long = f"{failure} (and to ask again in {failure.wait:.0f} s, which is too long)"
                    raise _FailureError(too_long) from None
                if attempt >= self.endpoint.retries:
                    raise
                pause = min(self.endpoint.backoff * 2**attempt, _LONGEST_PAUSE) * random.uniform(0.5, 1.0)
                if failure.wait:
                    self.not_before = max(self.not_before, time.monotonic() + failure.wait)
                self.on_wait(str(failure), max(pause, failure.wait))
                await asyncio.sleep(max(pause, failure.wait))
            attempt += 1

    async def _attempt(self, client: Any, question: str) -> Reply | Refusal:
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        endpoint, messages = self.endpoint, [{"role": "user", "content": question}]
        asked = {"model": endpoint.model, "messages": messages, "extra_body": dict(endpoint.fields)}
        try:
            async with asyncio.timeout(endpoint.timeout):  # the client's own starts over with every byte
                answer = await client.chat.completions.with_raw_response.create(**asked, timeout=endpoint.timeout)
            reply = Reply.model_validate_json(answer.content)
        except APIStatusError as error:
            return self._refused(error)
        except (TimeoutError, APITimeoutError):
            raise _FailureError(f"no answer within {endpoint.timeout:g} seconds") from None
        except APIConnectionError as error:
            cause = type(error.__cause__).__name__ if error.__cause__ else "no more is known"
            raise _FailureError(f"no connection, or one that broke ({cause})") from None
        except ValidationError:  # not `from error`: its message quotes the body
            raise _FailureError("the body is no chat completion") from None
        for name in ("text", "finish_reason", "model"):
            setattr(reply, name, starred(getattr(reply, name) or "", endpoint.key) or None)
        return reply

    def _refused(self, error: Any) -> Refusal:
        """What a status other than success means. Raises where it is more than the refusal of one question."""
        status, url = error.status_code, self.endpoint.url
        if status in _FATAL:
            raise PromptKDError(f"{url} answered {status}. {_FATAL[status]}") from None
        if 300 <= status < 400:
            raise PromptKDError(f"{url} answered {status}, a redirection. Give its target.") from None
        # Decoded and encoded again, lest an escape such as \/ hide the key from the stars.
        body = error.body if isinstance(error.body, str) else json.dumps(error.body, ensure_ascii=False)
        said = " ".join(starred(body, self.endpoint.key).split())
        reason = f"status {status}: {said[:_LONGEST_QUOTE] or 'no word why'}"
        if status in _MAY_PASS or status >= 500:
            raise _FailureError(reason, _retry_after(error.response.headers.get("retry-after"))) from None
        return Refusal(reason)


def _retry_after(header: str | None) -> float:
    """Seconds that a Retry-After header asks for, as a number or as a date; 0 where it says nothing readable."""
    try:
        seconds = float(header or 0)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(header or "") - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):  # no date, or one without a time zone
            return 0.0
    return max(0.0, seconds) if seconds == seconds else 0.0
