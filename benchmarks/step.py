"""How long a PromptKD step takes compared with other implementations, on the same rows, responses and models.

    python -m benchmarks.step --data dolly.jsonl --json step.json
    python -m benchmarks.step --data dolly.jsonl --variants ours trl --repeats 1 --steps 1

Variants alternate, and each runs in its own process. `authors_512` and `authors_256` work as the authors' code does
(`benchmarks/authors.py`), with its own padding (rows to 512 tokens, prompts to 256) and with padding for shorter rows
(256, 128). `trl` is trl.DistillationTrainer, which has no prompt step. `ours` is this project's trainer,
`ours_reference` the same with the reference engine, and `ours_256` the same on the shorter rows. `ours_length2` and
`ours_batch4` use rows that are twice as long, and four times as many rows.

A ratio is a variant's seconds per step over ours on the same rows, the median of all pairs.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("rollout", "prompt", "student")


@dataclass(frozen=True)
class Variant:
    """The settings with which a process is started."""

    kind: str
    max_length: int = 512
    max_prompt_length: int = 256
    length_factor: int = 1
    batch_factor: int = 1
    engine: str = ""
    """The value of `PROMPTKD_ENGINE`; empty for the device's own engine."""
    baseline: str = "ours"
    """The variant that it is compared with."""


VARIANTS = {
    "authors_512": Variant("authors"),
    "authors_256": Variant("authors", 256, 128, baseline="ours_256"),
    "trl": Variant("trl"),
    "ours": Variant("ours"),
    "ours_256": Variant("ours", 256, 128, baseline="ours_256"),
    "ours_reference": Variant("ours", engine="reference"),
    "ours_length2": Variant("ours", length_factor=2),
    "ours_batch4": Variant("ours", batch_factor=4),
}


@dataclass
class Measured:
    """All steps of a variant, in the order of the repeats."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    peak_rss: list[int] = field(default_factory=list)
    matmul_rate: list[float] = field(default_factory=list)


def main() -> None:
    given = arguments()
    measured = {name: Measured() for name in given.variants}
    for repeat in range(given.repeats):
        for name in given.variants:
            result = run(name, given, first=repeat * given.steps)
            measured[name].steps += result["steps"]
            measured[name].peak_rss.append(result["peak_rss"])
            measured[name].matmul_rate.append(result["matmul_rate"])
            total = sum(step["seconds"] for step in result["steps"]) / given.steps
            print(f"repeat {repeat + 1}, {name}: {total:.1f} s per step", file=sys.stderr, flush=True)
    record = {
        "variants": {name: summary(each) for name, each in measured.items()},
        "ratios": ratios(measured),
        "settings": {name: asdict(VARIANTS[name]) for name in given.variants} | {"arguments": vars(given)},
    }
    print(table(record))
    if given.json:
        Path(given.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="rows; by default those of the demo, which are shorter than Dolly's")
    parser.add_argument("--teacher", help="by default the demo's, SmolLM2-135M-Instruct")
    parser.add_argument("--student", help="by default 10 of the teacher's layers, made once and cached")
    parser.add_argument("--template", default="alpaca")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each variant")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps in each process")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--json", help="file for the record")
    parser.add_argument("--prefix", default="", help='command prefix of every process, such as "taskset -c 0,1"')
    given = parser.parse_args()
    if given.repeats < 1 or given.steps < 1 or given.batch_size < 1:
        parser.error("--repeats, --steps and --batch-size must be at least 1")
    given.teacher = given.teacher or str(demo_teacher())
    given.data = given.data or str(demo_rows())
    given.student = given.student or str(pruned_student(given))
    return given


def demo_teacher() -> Path:
    from promptkd.demo.pipeline import teacher_file

    return teacher_file()


def demo_rows() -> Path:
    from promptkd.demo.pipeline import data_file

    return data_file("train")


def pruned_student(given: argparse.Namespace) -> Path:
    """10 of the teacher's layers, chosen on the rows."""
    from promptkd.models import cache_folder

    folder = cache_folder() / "benchmarks" / "student"
    if not (folder / "config.json").is_file():
        command = ["-m", "promptkd", "prune", "--model", given.teacher, "--layers", "10", "--data", given.data]
        start([*shlex.split(given.prefix), sys.executable, *command, "--out", str(folder)], {})
    return folder


def run(name: str, given: argparse.Namespace, *, first: int) -> dict[str, Any]:
    variant = VARIANTS[name]
    command = [*shlex.split(given.prefix), sys.executable, "-m", "benchmarks.variants", variant.kind]
    for flag in ("student", "teacher", "data", "template"):
        command += [f"--{flag}", vars(given)[flag]]
    numbers = {
        "first": first,
        "steps": given.steps,
        "batch-size": given.batch_size * variant.batch_factor,
        "max-length": variant.max_length,
        "max-prompt-length": variant.max_prompt_length,
        "length-factor": variant.length_factor,
    }
    command += [part for flag, number in numbers.items() for part in (f"--{flag}", str(number))]
    return json.loads(start(command, {"PROMPTKD_ENGINE": variant.engine}).splitlines()[-1])


def start(command: Sequence[str], environment: dict[str, str]) -> str:
    """Run the command in this repository, offline, and return what it prints."""
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    whole = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"} | environment
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=whole, cwd=os.getcwd())
    if done.returncode != 0:
        sys.exit(f"{shlex.join(command)} failed:\n{done.stderr}")
    return done.stdout


def summary(measured: Measured) -> dict[str, Any]:
    """Medians over all steps of a variant, and under "ranges" their minimum and maximum."""
    steps = measured.steps
    per_step: dict[str, list[float]] = {
        "total": [step["seconds"] for step in steps],
        **{part: [step[part] for step in steps] for part in PARTS},
        "tokens_per_second": [step["tokens"] / step["seconds"] for step in steps],
        "rollout_tokens_per_second": [step["response_tokens"] / step["rollout"] for step in steps],
        "matmul_gflops": [rate / 1e9 for rate in measured.matmul_rate],
    }
    if all(step["prompt"] for step in steps):  # the floor is that of both steps
        rate = statistics.median(measured.matmul_rate)
        floor = [step["flops"]["total"] / rate for step in steps]
        both = [step["prompt"] + step["student"] for step in steps]
        per_step |= {
            "floor_seconds": floor,
            "over_floor": [each / least for each, least in zip(both, floor, strict=True)],
            "milliseconds_per_token": [1e3 * each / step["tokens"] for each, step in zip(both, steps, strict=True)],
            "attention_share": [step["flops"]["attention"] / step["flops"]["total"] for step in steps],
        }
    medians = {name: statistics.median(values) for name, values in per_step.items()}
    seconds = {part: medians.pop(part) for part in (*PARTS, "total")}
    ranges = {name: [min(values), max(values)] for name, values in per_step.items()}
    losses = [{name: step[name] for name in ("prompt_loss", "student_loss") if name in step} for step in steps]
    return {"seconds": seconds, **medians, "peak_rss": max(measured.peak_rss), "ranges": ranges, "losses": losses}


def ratios(measured: dict[str, Measured]) -> dict[str, float]:
    """Median over pairs of a variant's seconds per step divided by ours on the same rows."""
    found = {}
    for name, each in measured.items():
        variant = VARIANTS[name]
        comparable = variant.length_factor == variant.batch_factor == 1 and name != variant.baseline
        if comparable and variant.baseline in measured:
            pairs = zip(each.steps, measured[variant.baseline].steps, strict=True)
            found[name] = statistics.median(theirs["seconds"] / ours["seconds"] for theirs, ours in pairs)
    return found


def table(record: dict[str, Any]) -> str:
    names = (*PARTS, "total", "range", "tokens/s", "GiB", "steps / floor", "over ours")
    lines = [f"| variant, seconds | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for name, each in record["variants"].items():
        least, most = each["ranges"]["total"]
        cells = [f"{each['seconds'][part]:.1f}" for part in (*PARTS, "total")]
        cells += [f"{least:.1f}-{most:.1f}", f"{each['tokens_per_second']:.0f}", f"{each['peak_rss'] / 2**30:.1f}"]
        cells += [f"{found:.2f}" if found else "" for found in (each.get("over_floor"), record["ratios"].get(name))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
