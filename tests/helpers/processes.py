"""Start processes_worker.py in several processes that train together."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

CHECKS = ("fixed", "empty", "early", "mixed", "uneven", "resumed", "served", "heads", "sharded")
SECONDS = 150  # in which it is done, or hangs


def port() -> int:
    """One that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def start(folder: Path, processes: int, checks: tuple[str, ...], seconds: float = SECONDS) -> list[str]:
    """Run the checks on so many processes and return what each printed.

    Raises:
        AssertionError: if one fails, or they are not done in time; the others are ended with it.
    """
    common = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port()),
        "OMP_NUM_THREADS": "1",
    }
    outputs = [folder / f"output-{rank}" for rank in range(processes)]
    running = []
    for rank, output in enumerate(outputs):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-W", "ignore", "-m", "helpers.processes_worker", str(folder), *checks]
        with output.open("w") as file:
            running.append(subprocess.Popen(command, env=os.environ | common | own, stdout=file, stderr=file))
    until = time.monotonic() + seconds
    try:
        while any(each.poll() is None for each in running):
            failed = [rank for rank, each in enumerate(running) if each.poll() not in (None, 0)]
            if failed or time.monotonic() > until:
                break
            time.sleep(0.1)
    finally:
        ended = [each.poll() for each in running]
        for each in running:
            each.kill()
    texts = [output.read_text() for output in outputs]
    assert ended == [0] * processes, "\n".join(
        f"process {rank}: {ended[rank]}\n{texts[rank][-3000:]}" for rank in range(processes)
    )
    return texts
