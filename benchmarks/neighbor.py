"""What the waiting of OpenMP's threads costs, alone and beside a busy neighbor: python -m benchmarks.neighbor.

Between two parallel regions a thread either spins, ready at once and taking a core from others, or sleeps. Which one it
does is read from the environment before torch is imported, so every measurement is a process of its own. The settings
take turns; a ratio is over the default of the same turn. A round is short, so that the fastest of many is one that
nothing else on the machine disturbed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}
NEIGHBORS = ("none", "busy thread", "the same twice")
PARTS = ("training", "decoding")
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


class Timing(NamedTuple):
    """Seconds of a round."""

    fastest: float
    median: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3, help="measurements of every setting beside every neighbor")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a measurement of each kind of work")
    parser.add_argument("--neighbors", nargs="+", choices=NEIGHBORS, default=NEIGHBORS, help="what runs beside it")
    parser.add_argument("--threads", type=int, default=2, help="OpenMP threads of a process")
    parser.add_argument("--work", action="store_true", help="measure in this process and print it as JSON")
    options = parser.parse_args()
    if options.work:
        print(json.dumps(work(options.seconds)))
        return
    found: dict[tuple[str, str, str], list[Timing]] = {}
    for _ in range(options.turns):
        for neighbor in options.neighbors:
            for setting in SETTINGS:
                for part, seconds in measured(setting, neighbor, options).items():
                    found.setdefault((neighbor, part, setting), []).append(Timing(*seconds))
                    print(f"{neighbor}, {part}, {setting}: {seconds}; load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    print("\n".join(table(found)))


def measured(setting: str, neighbor: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """What a process under `setting` measures beside `neighbor`."""
    environment = {name: value for name, value in os.environ.items() if name not in _WAITING}
    environment |= SETTINGS[setting] | {"OMP_NUM_THREADS": str(options.threads)}
    command = [sys.executable, "-m", "benchmarks.neighbor", "--work", "--seconds", str(options.seconds)]
    beside = {"none": [], "busy thread": [sys.executable, "-c", "while True: pass"]}.get(
        neighbor, [*command[:-1], "3600"]
    )
    with running(beside, environment):
        return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)


@contextmanager
def running(command: list[str], environment: dict[str, str]) -> Iterator[None]:
    """The command runs meanwhile, unless it is empty."""
    if not command:
        yield
        return
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        time.sleep(5 if "--work" in command else 0)  # until it has imported torch
        yield
    finally:
        process.kill()
        process.wait()


def work(seconds: float) -> dict[str, Timing]:
    """A layer's training (512 tokens, forward and backward) and decoding (50 products of 8 rows), each for a while."""
    import torch

    layers = torch.nn.Sequential(torch.nn.Linear(576, 1536), torch.nn.GELU(), torch.nn.Linear(1536, 576))
    tokens, rows = torch.randn(512, 576), torch.randn(8, 576)

    def training() -> None:
        layers(tokens).square().mean().backward()

    def decoding() -> None:
        with torch.no_grad():
            for _ in range(25):
                layers(rows)

    return {part: timed(act, seconds) for part, act in zip(PARTS, (training, decoding), strict=True)}


def timed(act: Callable[[], None], seconds: float) -> Timing:
    """Rounds for so many seconds, five at least; two before them are not counted."""
    rounds: list[float] = []
    while len(rounds) < 7 or sum(rounds) < seconds:
        started = time.perf_counter()
        act()
        rounds.append(time.perf_counter() - started)
    return Timing(min(rounds[2:]), statistics.median(rounds[2:]))


def table(found: dict[tuple[str, str, str], list[Timing]]) -> list[str]:
    """Milliseconds of a round (fastest, median) and the time over that of the default, the median over the turns."""
    lines = [
        "| neighbor | work | setting | fastest, ms | median, ms | fastest over default | median over default |",
        "|---|---|---|---|---|---|---|",
    ]
    for (neighbor, part, setting), timings in sorted(found.items(), key=lambda item: NEIGHBORS.index(item[0][0])):
        default = found[neighbor, part, "default"]
        columns = [
            *(f"{1000 * statistics.median(values):.1f}" for values in zip(*timings, strict=True)),
            *(
                f"{statistics.median(mine / theirs for mine, theirs in zip(*pair, strict=True)):.2f}"
                for pair in zip(zip(*timings, strict=True), zip(*default, strict=True), strict=True)
            ),
        ]
        lines.append(f"| {neighbor} | {part} | {setting} | {' | '.join(columns)} |")
    return lines


if __name__ == "__main__":
    main()
