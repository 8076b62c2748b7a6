"""What every command asks of its process: how threads wait for work, and that SIGTERM ends it as Ctrl-C does."""

import signal
import threading
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from types import FrameType

from promptkd.errors import Stopped


def let_threads_sleep(environment: MutableMapping[str, str]) -> None:
    """Have OpenMP's threads look a thousand times for work and then sleep, unless the environment says how they wait.

    By default they spin for milliseconds, and take a core from what they wait for or from a neighbor on the machine.
    Sleeping at once would cost a process alone half of its decoding (docs/performance.md has the measurements). torch
    reads the setting when it is imported.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & environment.keys():
        environment["GOMP_SPINCOUNT"] = "1000"


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM raises `Stopped`, as SIGINT raises `KeyboardInterrupt`, so that the body clears away what it began."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    before = signal.getsignal(signal.SIGTERM)
    if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
