"""The cost of waiting OpenMP threads, alone and next to a busy neighbor: python -m benchmarks.neighbor.

Between two parallel regions a thread either spins or sleeps. A spinning thread is ready at once, but takes a core from
other programs. The environment determines which one it does, and is read before torch is imported, so every measurement
is a separate process. The settings take turns, and a ratio is over the default of the same turn. A round is short, so
that nothing else on the machine disturbs the fastest of many rounds.
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
    """Seconds per round."""

    fastest: float
    median: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3, help="measurements of every setting with every neighbor")
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds per measurement of each kind of work")
    parser.add_argument("--neighbors", nargs="+", choices=NEIGHBORS, default=NEIGHBORS, help="what runs meanwhile")
    parser.add_argument("--threads", type=int, default=2, help="OpenMP threads per process")
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
    """The measurements of a process with `setting` while `neighbor` runs."""
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
    """Run the command during the body, unless it is empty."""
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
    """Time the training of a layer (512 tokens, forward and backward) and decoding (50 products of 8 rows)."""
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
    """Time rounds for `seconds`, at least five; two warm-up rounds are not counted."""
    rounds: list[float] = []
    while len(rounds) < 7 or sum(rounds) < seconds:
        started = time.perf_counter()
        act()
        rounds.append(time.perf_counter() - started)
    return Timing(min(rounds[2:]), statistics.median(rounds[2:]))


def table(found: dict[tuple[str, str, str], list[Timing]]) -> list[str]:
    """Milliseconds per round (fastest, median) and the ratio to the default's time, as medians over the turns."""
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
