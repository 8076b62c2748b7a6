"""Thousands of optimizer steps on a tiny model: memory, open files and disk use stay flat, and restarts lose nothing.

    python -m benchmarks.reliability.soak
    python -m benchmarks.reliability.soak --steps 500 --restart-every 100 --json soak.json

PromptKD runs twice over the same steps, with a validation every 50 and a checkpoint every 25 steps: once in one
process, and once stopped by SIGTERM and resumed at regular intervals. Each process is observed from outside. The script
fails if

- the memory of a process grows in its second half, by a fitted line, by more than 4 KiB per step (a run keeps the log
  of its steps, about 2 KiB each) plus 2 MiB (the allocator's memory varies that much);
- a process has more open files in its last quarter than in its second, by their medians;
- the run's folder, without its log, ever contains more than four checkpoints (two that are kept, one being written, one
  being removed) and the finished files;
- student, prompt, log or record differ between the two runs.
"""

import argparse
import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from helpers.commands import LIMITS, World, make_world, steps  # noqa: E402

GROWTH, SLACK = 2**12, 2**21  # bytes per step, and bytes
_LOGS = ("metrics.jsonl", "trainer_state.json")  # which must grow with the steps


@dataclass
class Process:
    """Measurements of one process, one sample per row: step, bytes of memory, open files, bytes on the disk."""

    samples: list[tuple[int, int, int, int]] = field(default_factory=list)

    def growth(self) -> float:
        """Bytes of memory per step, by a least-squares line through the second half."""
        half = self.samples[len(self.samples) // 2 :]
        if len({step for step, *_ in half}) < 2:
            return 0.0
        return statistics.linear_regression([s for s, *_ in half], [memory for _, memory, *_ in half]).slope

    def files(self) -> tuple[float, float]:
        """Median of open files in the second quarter and in the last one."""
        quarter = max(len(self.samples) // 4, 1)
        second, last = self.samples[quarter : 2 * quarter], self.samples[-quarter:]
        return tuple(statistics.median(files for _, _, files, _ in part or self.samples) for part in (second, last))  # type: ignore[return-value]


@dataclass
class Run:
    """A run of one or several processes."""

    name: str
    processes: list[Process]
    seconds: float
    checkpoint_bytes: int
    finished_bytes: int


def main() -> int:
    options = _options()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        world = make_world(folder / "world")
        alone = _run("in one process", world, folder / "alone", options.steps, options.steps)
        restarted = _run("restarted", world, folder / "restarted", options.steps, options.restart_every)
        problems = [problem for run in (alone, restarted) for problem in _problems(run)]
        problems += _differences(folder / "alone", folder / "restarted", options.steps)
    for run in (alone, restarted):
        print(_table(run))
    print("\n".join(problems) or f"Flat over {options.steps} steps; the restarted run ends with the same bits.")
    if options.json:
        summary = {"steps": options.steps, "problems": problems, "runs": [asdict(run) for run in (alone, restarted)]}
        options.json.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return 1 if problems else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps (default 2000)")
    parser.add_argument("--restart-every", type=int, default=400, help="steps between two restarts (default 400)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the run (default 0)")
    parser.add_argument("--json", type=Path, help="write every sample to this file")
    return parser.parse_args()


def _command(world: World, out: Path, total: int) -> list[str]:
    models = ["--student", world.student, "--teacher", world.teacher, "--data", world.train, "--eval-data", world.valid]
    training = ["--max_steps", total, "--per_device_train_batch_size", 4, "--learning_rate", 1e-3, "--use_cpu"]
    saving = ["--select", "last", "--eval_steps", 50, "--save_strategy", "steps", "--save_steps", 25]
    return [str(each) for each in ["distill", *models, "--out", out, *LIMITS, *training, *saving, "--logging_steps", 2]]


def _run(name: str, world: World, out: Path, total: int, stretch: int) -> Run:
    began, processes = time.monotonic(), []
    until: float = stretch
    while True:
        until = until if until < total else math.inf  # the last process ends by itself
        watched, status = _watch(_command(world, out, total) + (["--resume"] if processes else []), out, until)
        processes.append(watched)
        if status == 0:
            break
        if status != 143:
            raise SystemExit(f"{name}: a process ended with {status}.\n{out.with_suffix('.log').read_text()}")
        until = _step(out) + stretch
        print(f"{name}: stopped after step {_step(out)} of {total}", file=sys.stderr)
    last = max((out / "checkpoints").iterdir(), key=lambda each: int(each.name.rpartition("-")[2]))
    finished = _size(out) - _size(out / "checkpoints")
    return Run(name, processes, time.monotonic() - began, _size(last), finished)


def _watch(command: list[str], out: Path, until: float) -> tuple[Process, int]:
    """Run a command, send it SIGTERM at step `until`, and take samples while it runs."""
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    record = Process()
    with out.with_suffix(".log").open("a") as log:
        child = subprocess.Popen([sys.executable, "-m", "promptkd", *command], env=environment, stdout=log, stderr=log)
        try:
            _look(child, out, until, record)
        finally:
            child.kill()  # if it has not ended
        return record, child.wait()


def _look(child: "subprocess.Popen[bytes]", out: Path, until: float, record: Process) -> None:
    process, last, told = psutil.Process(child.pid), _step(out), False
    while child.poll() is None:
        step = _step(out)
        if step > last:  # it trains: neither loading nor finishing is sampled
            with contextlib.suppress(psutil.NoSuchProcess):
                record.samples.append((step, process.memory_info().rss, process.num_fds(), _size(out)))
            last = step
        if step >= until and not told:
            child.send_signal(signal.SIGTERM)
            told = True
        time.sleep(0.1)


def _step(out: Path) -> int:
    """The last step of the log, whose last line may be incomplete."""
    file = out / "metrics.jsonl"
    if not file.exists():
        return 0
    with file.open("rb") as lines:
        lines.seek(max(file.stat().st_size - 4096, 0))
        whole = lines.read().rpartition(b"\n")[0].splitlines()
    return int(json.loads(whole[-1])["step"]) if whole else 0


def _size(folder: Path) -> int:
    """Bytes of a folder's files without logs; files may be removed while they are counted."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += (Path(place) / name).stat().st_size if name not in _LOGS else 0
    return total


def _problems(run: Run) -> list[str]:
    found = []
    limit = 4 * run.checkpoint_bytes + run.finished_bytes
    for number, process in enumerate(run.processes, start=1):
        where = f"{run.name}, process {number}"
        if not process.samples:
            found.append(f"{where}: it ended before a training step was seen.")
            continue
        half = (process.samples[-1][0] - process.samples[0][0]) / 2
        if process.growth() * half > GROWTH * half + SLACK:
            found.append(f"{where}: memory grows by {process.growth():,.0f} bytes per step over {half:.0f} steps.")
        second, last = process.files()
        if last > second:
            found.append(f"{where}: {last:g} files are open in the last quarter, {second:g} in the second.")
        most = max((size for *_, size in process.samples), default=0)
        if most > limit:
            found.append(f"{where}: {most:,} bytes on the disk, more than {limit:,}.")
    return found


def _differences(alone: Path, restarted: Path, total: int) -> list[str]:
    pairs: dict[str, Any] = {
        name: [(run / name).read_bytes() for run in (alone, restarted)]
        for name in ("student/model.safetensors", "prompt/adapter_model.safetensors")
    }
    pairs["metrics.jsonl"] = [steps(run) for run in (alone, restarted)]
    pairs["results.json"] = [
        json.loads((run / "results.json").read_text())["evaluations"] for run in (alone, restarted)
    ]
    found = [f"{name} differs between the two runs." for name, (one, other) in pairs.items() if one != other]
    logged = [line["step"] for line in pairs["metrics.jsonl"][1] if "loss" in line]
    if logged != list(range(2, total + 1, 2)):
        found.append("The restarted run's log misses a step or has a duplicate.")
    return found


def _table(run: Run) -> str:
    heads = "process | steps | MiB of memory first, last | bytes per step | open files | KiB of disk first, most"
    lines = [f"{run.name} ({run.seconds:.0f} s)", f" {heads}"]
    for number, process in enumerate(run.processes, start=1):
        if not process.samples:
            continue
        memory, disk = [m / 2**20 for _, m, *_ in process.samples], [d / 2**10 for *_, d in process.samples]
        second, last = process.files()
        lines.append(
            f" {number:7} | {process.samples[0][0]}-{process.samples[-1][0]} | {memory[0]:.1f}, {memory[-1]:.1f} | "
            f"{process.growth():+.0f} | {second:g}, {last:g} | {disk[0]:.0f}, {max(disk):.0f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
