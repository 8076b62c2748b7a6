"""KD from kept teacher logits beside KD with the teacher: size, seconds, memory and error, as a Markdown table.

    python -m benchmarks.kept_logits --student STUDENT --teacher TEACHER --data train.jsonl --out runs/kept

The logits are written once for each K, with the error measured against the student. Then every round trains each arm in
a process of its own, one after the other; seconds per step are medians over all rounds, each process's first step left
out. Values come from the commands' records and lines.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.methods import LIMITS, TEMPLATE

WHOLE = "teacher in memory"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--student", "--teacher", "--data", "--out"):
        parser.add_argument(flag, required=True)
    parser.add_argument("--kept", nargs="+", type=int, default=[16, 64, 256])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", default="10")
    parser.add_argument("--rows", default="60", help="training rows, before those over a length limit are dropped")
    given = parser.parse_args()
    out = Path(given.out)
    speeds = {count: scored(given, count, out / f"logits-{count}") for count in given.kept}
    arms = [WHOLE, *given.kept]
    for number in range(given.rounds):
        for arm in arms:
            train(given, arm, out / f"round-{number}" / str(arm).replace(" ", "-"))
    print("| teacher | bytes per token | scored, tokens/s | seconds per step | peak memory, GiB | mass outside of K "
          "| forward KL, whole and kept | adaptive KL, whole and kept |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for arm in arms:
        print(row(arm, out, given.rounds, speeds), flush=True)


def promptkd(*arguments: object) -> str:
    command = [sys.executable, "-m", "promptkd", *map(str, arguments), *LIMITS, "--template", TEMPLATE]
    return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def scored(given: argparse.Namespace, count: int, folder: Path) -> str:
    """Response tokens scored per second."""
    models = ("--model", given.teacher, "--student", given.student, "--data", given.data, "--limit", given.rows)
    how = ("--score", "--keep-logits", count, "--dtype", "float32", "--overwrite")
    told = promptkd("generate", *models, "--out", folder, *how)
    found = re.search(r"scored at (\d+) response tokens", told)
    return found[1] if found else ""


def train(given: argparse.Namespace, arm: str | int, folder: Path) -> None:
    teacher = ("--teacher", given.teacher) if arm == WHOLE else ("--kept_logits", Path(given.out) / f"logits-{arm}")
    rows = ("--student", given.student, "--data", given.data, "--limit", given.rows, "--out", folder)
    steps = ("--max_steps", given.steps, "--per_device_train_batch_size", 4, "--save_strategy", "no")
    how = ("--use_cpu", "--no-preflight", "--overwrite")
    promptkd("distill", "--method", "kd", *rows, *teacher, *steps, *how)


def row(arm: str | int, out: Path, rounds: int, speeds: dict[int, str]) -> str:
    seconds, peaks = [], []
    for number in range(rounds):
        record = json.loads((out / f"round-{number}" / str(arm).replace(" ", "-") / "results.json").read_text())
        (cost,), (steps,) = record["training"].values(), record["history"]
        seconds += [point["seconds_student"] for point in steps["points"] if "seconds_student" in point][1:]
        peaks.append(cost["peak_memory_bytes"] / 2**30)
    time, memory = f"{statistics.median(seconds):.2f}", f"{statistics.median(peaks):.2f}"
    if isinstance(arm, str):
        return f"| {arm} | | | {time} | {memory} | | | |"
    index = json.loads((out / f"logits-{arm}" / "index.json").read_text())
    error, size = index["error"], sum(shard["bytes"] for shard in index["shards"]) / index["tokens"]
    kl, adaptive = (f"{error[name]:.4f}, {error[name + '_kept']:.4f}" for name in ("forward_kl", "adaptive_kl"))
    kept = f"K = {arm} | {size:.0f} | {speeds[arm]} | {time} | {memory}"
    return f"| {kept} | {error['rest_mass_mean']:.2%} | {kl} | {adaptive} |"


if __name__ == "__main__":
    main()
