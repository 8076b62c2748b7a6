"""How OpenMP's threads wait for work. torch reads it when it is imported, so it is settled before that."""

from collections.abc import MutableMapping

__all__ = ["let_threads_sleep"]

_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def let_threads_sleep(environment: MutableMapping[str, str]) -> None:
    """Have threads sleep while they wait, unless the environment says how they do.

    By default they spin: a thread that waits for another takes a core from whatever that other one, or a neighbor on
    the same machine, could do with it. Processes that share cores then wait for each other's waiting
    (docs/performance.md has figures).
    """
    if not any(name in environment for name in _SETTINGS):
        environment["OMP_WAIT_POLICY"] = "passive"
