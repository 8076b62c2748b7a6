"""The exceptions that end a command: a failure, a wrong request, a signal."""

import errno
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # a disk became unwritable while a command runs


class PromptKDError(Exception):
    """The run failed. The message says what was expected, what came and what to do (exit status 1)."""

    exit_status = 1


class RequestError(PromptKDError, ValueError):
    """The request was wrong: usage, configuration or data (exit status 2)."""

    exit_status = 2


class Stopped(SystemExit):
    """A signal ended the command; `reached` says how far: "after step 7 of 10". It is no `Exception`."""

    def __init__(self, number: int, reached: str = ""):
        super().__init__(128 + number)
        self.status, self.reached = 128 + number, reached
        self._name = "Interrupted" if number == signal.SIGINT else f"Stopped by {signal.Signals(number).name}"

    def __str__(self) -> str:
        return f"{self._name} {self.reached}".rstrip() + "."


def check_all(lead: str, checks: Iterable[tuple[bool, str]], advice: str = "") -> None:
    """Raise one `RequestError`, "lead: problem; problem. advice", of those `checks` (is wrong, problem) that are."""
    if problems := [problem for is_wrong, problem in checks if is_wrong]:
        raise RequestError(f"{lead}: {'; '.join(problems)}.{advice and f' {advice}'}")


def raise_together(problems: Sequence[str], of: str, advice: str = "") -> None:
    """Raise one `RequestError` of all problems, a line each where there are several; nothing if there is none."""
    if len(problems) > 1:
        lines = [f"{len(problems)} things are wrong with the {of}:", *(f"  - {each}" for each in problems), advice]
        raise RequestError("\n".join(lines).rstrip())
    if problems:
        raise RequestError(f"{problems[0]} {advice}".rstrip())


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn an `OSError` of the body into "Cannot write `target`": `RequestError`, on a full disk `PromptKDError`."""
    try:
        yield
    except OSError as error:
        problem = f"Cannot write {target}: {error.strerror or error}."
        if error.errno in NO_ROOM and error.errno != errno.EROFS:
            raise PromptKDError(f"{problem} Make room there or give another --out.") from error
        raise RequestError(problem) from error


@contextmanager
def at(place: str, kinds: type[Exception] | tuple[type[Exception], ...] = RequestError) -> Iterator[None]:
    """Put "place: " before the message of a `RequestError` in the body; exceptions of other `kinds` become one."""
    try:
        yield
    except kinds as error:
        raise RequestError(f"{place}: {error}") from error
