"""Run every method for a few steps on one pair of models and the same rows, and print a Markdown table.

    python benchmarks/methods.py --student STUDENT --teacher TEACHER --data train.jsonl --eval-data valid.jsonl \\
        --out runs/methods

Each run is a separate process of the command line. A run that already has results is not run again. The table shows
the values in the runs' own records: median seconds per step, peak memory of the process, validation loss before and
after.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

METHODS = (
    *("promptkd", "promptkd-lora", "promptkd-full", "kd", "seqkd", "imitkd"),
    *("gkd", "minillm", "distillm", "akl", "dpkd", "okd", "skd"),
    *("opd", "distillm2", "taid", "veto", "abkd", "eopd", "opcd", "opsd", "promptkd-taid", "promptkd-veto"),
)
VARIANTS = {"promptkd-taid": "promptkd", "promptkd-veto": "promptkd"}  # by the method that they are of
TEMPLATE = (
    "<|im_start|>user\n{{ instruction }}{% if input %}\n\n{{ input }}{% endif %}<|im_end|>\n<|im_start|>assistant\n"
)
LIMITS = ["--max_prompt_length", "96", "--max_completion_length", "40"]
PROMPT = ["--prompt_learning_rate", "5e-3"]
CONTEXT = ["--teacher_prompt", "A good answer to the request below is: {{ output }}"]
EXTRA = {
    "opcd": ["--teacher_prompt", "Answer in few words, with the facts that were asked for and nothing else."],
    "opsd": CONTEXT,
    "distillm": ["--student_share", "0.5"],
    "promptkd": PROMPT,
    "okd": PROMPT,
    "promptkd-taid": [*PROMPT, "--objective", "taid"],
    "promptkd-veto": [*PROMPT, "--objective", "veto", "--veto_direction", "reverse"],
    "promptkd-full": ["--prompt_learning_rate", "1e-5"],
    "promptkd-lora": ["--prompt_learning_rate", "1e-4"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--student", "--teacher", "--data", "--eval-data", "--out"):
        parser.add_argument(flag, required=True)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--steps", default="10")
    parser.add_argument("--batch-size", default="4")
    parser.add_argument("--rows", default="200", help="training rows, before those over a length limit are dropped")
    parser.add_argument(
        "--eval-rows", default="120", help="validation rows, before those over a length limit are dropped"
    )
    parser.add_argument("--rate", default="5e-5")
    parser.add_argument("--template", default=TEMPLATE)
    given = parser.parse_args()
    before = validation_loss_before(given)
    print("| method | seconds per step | peak memory, GiB | validation loss before | after |")
    print("|---|---|---|---|---|")
    for method in given.methods:
        folder = Path(given.out) / method
        if not (folder / "results.json").is_file():
            distill(given, method, folder)
        print(row(method, folder, before), flush=True)


def validation_loss_before(given: argparse.Namespace) -> float:
    file = Path(given.out) / "before.json"
    if not file.is_file():
        promptkd(
            *("evaluate", "--model", given.student, "--data", given.eval_data, "--limit", given.eval_rows),
            *("--out", str(file), "--template", given.template, *LIMITS, "--temperature", "0"),
            *("--max-reference-length", LIMITS[-1]),  # the rows on which `distill` validates
        )
    return json.loads(file.read_text())["evaluations"][0]["metrics"]["loss"]["value"]


def distill(given: argparse.Namespace, method: str, folder: Path) -> None:
    teacher = "self" if method == "opsd" else given.teacher
    promptkd(
        *("distill", "--method", VARIANTS.get(method, method), "--student", given.student, "--teacher", teacher),
        *("--data", given.data, "--eval-data", given.eval_data, "--out", str(folder), "--overwrite"),
        *(
            "--select",
            "last",
            "--eval_strategy",
            "no",
            "--save_strategy",
            "no",
            "--measure",
            "student",
            "--no-preflight",
        ),
        *("--limit", given.rows, "--eval-limit", given.eval_rows),
        *("--max_steps", given.steps, "--per_device_train_batch_size", given.batch_size),
        *("--learning_rate", given.rate, "--template", given.template, *LIMITS, *EXTRA.get(method, [])),
    )


def promptkd(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "promptkd", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"promptkd {' '.join(arguments[:3])} failed:\n{done.stderr}")


def row(method: str, folder: Path, before: float) -> str:
    record = json.loads((folder / "results.json").read_text())
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    parts = ("seconds_rollout", "seconds_prompt", "seconds_student")
    seconds = statistics.median(sum(step[part] for part in parts) for step in steps if parts[0] in step)
    (cost,) = record["training"].values()
    memory = cost["peak_memory_bytes"] / 2**30
    after = record["evaluations"][0]["metrics"]["loss"]["value"]
    return f"| `{method}` | {seconds:.1f} | {memory:.1f} | {before:.2f} | {after:.2f} |"


if __name__ == "__main__":
    main()
