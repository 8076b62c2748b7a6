"""Training on two and four CPU processes must equal training on one; with --zero also under DeepSpeed.

    python -m benchmarks.reliability.processes --json processes.json
    python -m benchmarks.reliability.processes --zero        # DeepSpeed must be installed

Every run uses the data's responses, the row order of seed 42 and three steps. The script prints the largest difference
from one process in any logged metric, in the prompt and in the student. It fails above 1e-5, or if a run takes longer
than --seconds.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

TOLERANCE = 1e-5


def largest_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Over all logged metrics, prompt and student of two outcomes (tests/helpers/processes_worker.py)."""
    metrics = [
        abs(mine[name] - other[name]) for mine, other in zip(ours["log"], theirs["log"], strict=True) for name in mine
    ]
    weights = [float((weight - theirs["student"][name]).abs().max()) for name, weight in ours["student"].items()]
    return max(*metrics, *weights, float((ours["prompt"] - theirs["prompt"]).abs().max()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zero", action="store_true", help="Also under DeepSpeed ZeRO-2 and ZeRO-3.")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4], help="1, 2 or 4 (default 2 4).")
    parser.add_argument("--seconds", type=float, default=300, help="Limit for each run (default 300).")
    parser.add_argument("--json", type=Path, help="Where to write the metrics.")
    options = parser.parse_args()

    os.environ["OMP_NUM_THREADS"] = "1"  # set before torch is imported, because threads do not survive a fork
    import torch

    from helpers import processes_worker
    from helpers.processes import CHECKS, start

    differences: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone = processes_worker.CHECKS["fixed"](folder / "alone")
        runs = [("all", CHECKS)] + [(zero, (zero,)) for zero in ("zero2", "zero3") if options.zero]
        for count in options.processes:
            for kind, checks in runs:
                place = folder / f"{kind}-{count}"
                place.mkdir()
                start(place, count, checks, options.seconds)
                for check in {"fixed", "sharded", "zero2", "zero3"} & set(checks):
                    states = [torch.load(place / f"{check}-{rank}.pt", weights_only=False) for rank in range(count)]
                    outcomes = [each.get("fixed", each) for each in states]
                    if any(not torch.equal(each["prompt"], outcomes[0]["prompt"]) for each in outcomes):
                        raise SystemExit(f"{check} on {count} processes: the prompt differs between them.")
                    differences[f"{check}, {count} processes"] = largest_difference(outcomes[0], alone)
    for run, difference in differences.items():
        print(f"{run}: {difference:.1e}")
    if options.json is not None:
        options.json.write_text(json.dumps({"tolerance": TOLERANCE, "differences": differences}, indent=2) + "\n")
    return int(max(differences.values()) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
