"""The command's own lines on the terminal, from the first process alone, and the libraries' silence beside them."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable

from promptkd.io.redact import redacted
from promptkd.visible import shown


def say(text: str) -> None:
    """A line on standard error, from the first process alone, without secrets; no terminal obeys a name in it."""
    if is_main_process():
        print(shown(redacted(text)), file=sys.stderr, flush=True)


def is_main_process() -> bool:
    """Whether this is the process of rank 0, by the environment that torchrun and accelerate set."""
    return os.environ.get("RANK", "0") == "0"


def progress_lines(title: str, total: int) -> Callable[[str, int], None]:
    """A callback that says how many of `total` rows are done, at most every 10 seconds."""
    last = time.monotonic()

    def tell(what: str, done: int) -> None:
        nonlocal last
        if time.monotonic() - last >= 10:
            say(f"{title}: {done} of {total} {what}")
            last = time.monotonic()

    return tell


def quiet_libraries() -> None:
    """Leave the terminal to the command's own lines; errors of the libraries still show."""
    from datasets import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    warnings.filterwarnings("ignore", message=".*ROUGE can compare.*")  # commands say it once, in their record too
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    noting = ("student", "validation", "ends", "setup", "own_teacher", "teachers")  # whose notes a command says
    own = (f"promptkd.training.{each}" for each in noting)
    for name in ("accelerate", *own):
        logging.getLogger(name).setLevel(logging.ERROR)
