"""The command's own lines on the terminal, from the first process alone."""

import os
import sys
import time
from collections.abc import Callable

from promptkd.visible import shown


def say(text: str) -> None:
    """A line on standard error, from the first process alone; no terminal obeys what a name in it holds."""
    if is_main_process():
        print(shown(text), file=sys.stderr, flush=True)


def is_main_process() -> bool:
    """Whether this is the process of rank 0, by the environment that torchrun and accelerate set."""
    return os.environ.get("RANK", "0") == "0"


def progress_lines(title: str, total: int, every: float = 10.0) -> Callable[[str, int], None]:
    """A callback that says how many of `total` rows are done, at most every `every` seconds."""
    last = time.monotonic()

    def tell(what: str, done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= every:
            say(f"{title}: {done} of {total} {what}")
            last = now

    return tell
