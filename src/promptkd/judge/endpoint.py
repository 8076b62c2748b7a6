"""One question to an OpenAI-compatible endpoint, asked again where the failure may pass.

What may pass: 408, 409, 429 and 5xx, time-outs, refused and broken connections, bodies that are cut or are no answer.
What stops everything: a key that is not accepted (401, 403), an unknown model or address (404), a redirection. Any
other status (400, 413, 422) refuses its one question.

The key is a secret: it goes into the header and nowhere else, and a text in which the server repeats it is starred out.
"""

import asyncio
import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from promptkd.errors import PromptKDError, RequestError

_PASSING = frozenset({408, 409, 429})
_FATAL = {
    401: "The key was not accepted. Set OPENAI_API_KEY, or name the variable that holds it with --key-variable.",
    403: "The key has no right to this. Set OPENAI_API_KEY, or name the variable that holds it with --key-variable.",
    404: "Check --judge-model, and --endpoint, which ends in /v1 with most servers.",
}
_LONGEST_PAUSE = 60.0
"""Cap of the exponential back-off, in seconds."""
_LONGEST_RETRY_AFTER = 600.0
"""A server that asks for more patience than this many seconds has failed."""
_LONGEST_QUOTE = 300
"""Characters of a server's message that are repeated."""
_SHORTEST_SECRET = 8
"""Local servers are given words such as "EMPTY" as a key; starring them out would change what a judge says."""


@dataclass(frozen=True)
class Endpoint:
    """Where and how to ask."""

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of every request: temperature, seed, max_tokens and the like."""
    timeout: float = 120.0
    """Seconds for a whole answer."""
    retries: int = 5
    backoff: float = 1.0
    """Seconds before the first retry; doubled for every further one, less a random part of up to a half."""


@dataclass(frozen=True)
class Reply:
    text: str
    finish_reason: str | None = None
    model: str | None = None
    """The model as the server names it."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True)
class Refusal:
    """The server will not answer this question, however often it is asked."""

    reason: str


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Body(BaseModel):
    """What is needed of a chat completion."""

    choices: list[_Choice]
    model: str | None = None
    usage: _Usage | None = None


class _FailureError(Exception):
    """One attempt failed, in a way that may pass; `wait` is what the server asks for, in seconds."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


def check_client() -> None:
    """Refuse to begin without the `openai` package."""
    try:
        import openai  # noqa: F401
    except ImportError as error:
        raise RequestError(
            "The judge is asked through the openai package, which is not installed. "
            "Install it with: pip install 'promptkd[judge]'."
        ) from error


def check_url(url: str) -> None:
    """Refuse what is no plain http or https address. A key inside the address would be written into the record."""
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        whole = False
    if "@" in url or "?" in url or "#" in url:
        raise RequestError(
            "--endpoint must hold no user name, password, query or fragment. A key is read from the environment alone."
        )
    if not whole or any(character.isspace() for character in url):
        raise RequestError(f"--endpoint must be an address such as http://localhost:8000/v1. Got {url!r}.")


@dataclass(frozen=True)
class Unanswered:
    """Every attempt failed; the next run may have more luck."""

    reason: str


class Asker:
    """Asks questions until they are answered; a pause that the server asks for holds for all of them."""

    def __init__(self, endpoint: Endpoint, on_wait: Callable[[str, float], None]):
        """`on_wait` hears why a question is asked again, and in how many seconds."""
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        self.endpoint = endpoint
        self.on_wait = on_wait
        # No redirection is followed: it would carry the questions to another address than the record names.
        http = DefaultAsyncHttpxClient(follow_redirects=False)
        self.client = AsyncOpenAI(
            api_key=endpoint.key or "none", base_url=endpoint.url, max_retries=0, http_client=http
        )
        self._not_before = 0.0

    async def ask(self, question: str) -> Reply | Refusal | Unanswered:
        for attempt in range(self.endpoint.retries + 1):
            await asyncio.sleep(max(0.0, self._not_before - time.monotonic()))
            try:
                return await self._attempt(question)
            except _FailureError as failure:
                reason = str(failure)
                if failure.wait > _LONGEST_RETRY_AFTER:
                    return Unanswered(f"{reason} (and to ask again in {failure.wait:.0f} s, which is too long)")
                if attempt == self.endpoint.retries:
                    break
                pause = min(self.endpoint.backoff * 2**attempt, _LONGEST_PAUSE) * random.uniform(0.5, 1.0)
                if failure.wait:
                    self._not_before = max(self._not_before, time.monotonic() + failure.wait)
                self.on_wait(reason, max(pause, failure.wait))
                await asyncio.sleep(max(pause, failure.wait))
        return Unanswered(reason)

    async def _attempt(self, question: str) -> Reply | Refusal:
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        endpoint = self.endpoint
        try:
            async with asyncio.timeout(endpoint.timeout):  # the client's own counts anew with every byte
                answer = await self.client.chat.completions.with_raw_response.create(
                    model=endpoint.model,
                    messages=[{"role": "user", "content": question}],
                    extra_body=dict(endpoint.fields),
                    timeout=endpoint.timeout,
                )
            return self._read(answer.content)
        except APIStatusError as error:
            return self._refused(error)
        except (TimeoutError, APITimeoutError):
            raise _FailureError(f"no answer within {endpoint.timeout:g} seconds") from None
        except APIConnectionError as error:
            cause = type(error.__cause__).__name__ if error.__cause__ else "no more is known"
            raise _FailureError(f"no connection, or one that broke ({cause})") from None

    def _read(self, body: bytes) -> Reply:
        try:
            found = _Body.model_validate_json(body)
            choice = found.choices[0]
        except (ValidationError, IndexError):  # not `from error`: its message quotes the body
            raise _FailureError("the body is no chat completion") from None
        usage = found.usage or _Usage()
        return Reply(
            text=self._starred(choice.message.content or ""),
            finish_reason=choice.finish_reason and self._starred(choice.finish_reason),
            model=found.model and self._starred(found.model),
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
        )

    def _refused(self, error: Any) -> Refusal:
        """What a status other than success means. Raises where it is more than the refusal of one question."""
        status = error.status_code
        if status in _FATAL:
            raise PromptKDError(f"{self.endpoint.url} answered {status}. {_FATAL[status]}") from None
        if 300 <= status < 400:
            raise PromptKDError(f"{self.endpoint.url} answered {status}, a redirection. Give its target.") from None
        # Decoded and written anew, lest an escape such as \/ hide the key from the stars.
        body = error.body if isinstance(error.body, str) else json.dumps(error.body, ensure_ascii=False)
        said = " ".join(self._starred(body).split())
        reason = f"status {status}: {said[:_LONGEST_QUOTE] or 'no word why'}"
        if status in _PASSING or status >= 500:
            raise _FailureError(reason, _retry_after(error.response.headers.get("retry-after"))) from None
        return Refusal(reason)

    def _starred(self, text: str) -> str:
        key = self.endpoint.key
        return text.replace(key, "***") if key and len(key) >= _SHORTEST_SECRET else text


def _retry_after(header: str | None) -> float:
    """Seconds that a Retry-After header asks for, as a number or as a date; 0 where it says nothing readable."""
    if header is None:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = parsedate_to_datetime(header)
        except ValueError:
            return 0.0
        seconds = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if seconds == seconds else 0.0
