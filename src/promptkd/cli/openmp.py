"""How OpenMP's threads wait for work. torch reads it when it is imported, so it is settled before that."""

from collections.abc import MutableMapping

_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_SPINS = "1000"


def let_threads_sleep(environment: MutableMapping[str, str]) -> None:
    """Have threads that wait look a thousand times and then sleep, unless the environment says how they wait.

    By default they spin for milliseconds: a thread that waits for another takes a core from whatever that other one, or
    a neighbor on the same machine, could do with it. Processes that share cores then wait for each other's waiting.
    Sleeping at once would cost a process alone half of its decoding (docs/performance.md has the measurements).
    """
    if not any(name in environment for name in _SETTINGS):
        environment["GOMP_SPINCOUNT"] = _SPINS
