"""`kill -9` at random moments of pruning, conversion, distillation and reports must lose nothing.

    python -m benchmarks.reliability.kill
    python -m benchmarks.reliability.kill --kills 10 --seed 7 --json kills.json

A job on tiny models prunes a student from a GGUF teacher (which is converted first), distills it with PromptKD,
including validation and checkpoints, and makes a report. It runs once undisturbed. Then it runs again and again. Its
processes are killed from outside at a random moment after they have entered a randomly chosen part, and restarted
(`distill` with --resume) until the job is done. Each kill is counted for the part that it actually interrupted. Every
job must end with the same bits as the undisturbed one: the student's and the prompt's weights, the log except its
timings, the evaluations of the record, the pruned student and the converted teacher. Its report must be complete.

Processes are forked from this one, which has imported everything. Each calls the command's own `main`.
"""

import argparse
import functools
import json
import mmap
import os
import random
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import huggingface_hub.constants  # noqa: E402

import promptkd.cli.commands.prune  # noqa: E402
import promptkd.cli.commands.report  # noqa: E402
import promptkd.evaluation  # noqa: E402
import promptkd.models.gguf_format  # noqa: E402
import promptkd.report  # noqa: E402
from helpers.commands import LIMITS, World, make_world, steps  # noqa: E402
from helpers.gguf_file import write_gguf  # noqa: E402
from helpers.tiny import tiny_model  # noqa: E402
from promptkd.cli import main as promptkd_main  # noqa: E402
from promptkd.cli.training_run import TrainingRun  # noqa: E402
from promptkd.training.rollout import Rollout  # noqa: E402
from promptkd.training.teacher_tuner import TeacherTuner  # noqa: E402
from promptkd.training.trainer import DistillTrainer  # noqa: E402

PARTS: dict[str, tuple[Any, str, str]] = {
    "conversion": (promptkd.models.gguf_format, "convert_gguf", "prune"),
    "pruning": (promptkd.cli.commands.prune, "run", "prune"),
    "rollout": (Rollout, "__call__", "distill"),
    "prompt step": (TeacherTuner, "step", "distill"),
    "student step": (DistillTrainer, "training_step", "distill"),
    "validation": (DistillTrainer, "evaluate", "distill"),
    "checkpoint": (DistillTrainer, "_save_checkpoint", "distill"),
    "saving the student": (DistillTrainer, "save_student", "distill"),
    "record and page": (TrainingRun, "record", "distill"),
    "report": (promptkd.cli.commands.report, "run", "report"),
}
"""The parts that are killed: owner and name of the function, and the command that it belongs to."""


class Marks:
    """Memory shared with a child: its current part, how often it entered each part, and the seconds spent there."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 4096)
        self._names = list(PARTS)
        self.entered, self.alarm = os.pipe()

    def watch(self, target: str, entry: int) -> None:
        """In the child: mark every part, and send the alarm at entry number `entry` into `target`."""
        for name, (owner, function, _) in PARTS.items():
            setattr(owner, function, self._marked(getattr(owner, function), name, target, entry))

    def _marked(self, function: Callable[..., Any], name: str, target: str, entry: int) -> Callable[..., Any]:
        @functools.wraps(function)
        def marked(*args: Any, **kwargs: Any) -> Any:
            before, began = self._get(0), time.perf_counter()
            self._put(0, self._names.index(name) + 1)
            self._put(self._place(name), self.count(name) + 1)
            if name == target and self.count(name) == entry:
                os.write(self.alarm, b"!")
            try:
                return function(*args, **kwargs)
            finally:
                self._put(0, before)
                self._put(self._place(name) + 1, self.seconds(name) + time.perf_counter() - began)

        return marked

    def part(self) -> str:
        return ["between parts", *self._names][int(self._get(0))]

    def count(self, name: str) -> int:
        return int(self._get(self._place(name)))

    def seconds(self, name: str) -> float:
        return self._get(self._place(name) + 1)

    def clear(self) -> None:
        self._memory[:] = bytes(len(self._memory))
        while select.select([self.entered], [], [], 0)[0]:
            os.read(self.entered, 1)

    def _place(self, name: str) -> int:
        return 1 + 2 * self._names.index(name)

    def _get(self, place: int) -> float:
        return struct.unpack_from("d", self._memory, 8 * place)[0]

    def _put(self, place: int, value: float) -> None:
        struct.pack_into("d", self._memory, 8 * place, value)


class Job:
    """The commands of one job in `folder`; each is repeated until it ends by itself."""

    def __init__(self, folder: Path, world: World, teacher: Path, seed: int):
        self.folder = folder
        folder.mkdir()
        student, run = folder / "student", folder / "run"
        models = ["--student", student, "--teacher", teacher, "--data", world.train, "--eval-data", world.valid]
        training = ["--max_steps", 12, "--per_device_train_batch_size", 4, "--learning_rate", 1e-3, "--use_cpu"]
        saving = ["--select", "loss", "--eval_steps", 2, "--logging_steps", 3, "--seed", seed]
        self.commands = {
            "prune": ["prune", "--model", teacher, "--layers", 2, "--data", world.train, *LIMITS, "--out", student],
            "distill": ["distill", *models, *LIMITS, *training, *saving, "--measure", "student", "--out", run],
            "report": ["report", run, "--out", folder / "report.html"],
        }

    def attempt(self, command: str, marks: Marks, target: str, entry: int, delay: float) -> int:
        """Start the command, and kill it `delay` seconds after it entered `target`. Returns `os.waitpid`'s status."""
        arguments = [str(each) for each in self.commands[command]]
        if command == "distill" and (self.folder / "run" / "config.yaml").exists():
            arguments.append("--resume")
        marks.clear()
        child = os.fork()
        if child == 0:
            log = os.open(self.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ["PROMPTKD_CACHE"] = str(self.folder / "cache")
            huggingface_hub.constants.HF_HUB_OFFLINE = True
            sys.argv = ["promptkd", *arguments]
            marks.watch(target, entry)
            os._exit(promptkd_main(arguments))
        while True:
            if select.select([marks.entered], [], [], 0.05)[0]:
                time.sleep(delay)
                os.kill(child, signal.SIGKILL)
                return os.waitpid(child, 0)[1]
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return status

    def outcome(self) -> dict[str, Any]:
        """Everything that must not differ between jobs."""
        run = self.folder / "run"
        bits: dict[str, Any] = {
            str(path.relative_to(self.folder)): path.read_bytes()
            for path in (
                *(run / "student").iterdir(),
                *(run / "prompt").iterdir(),
                *(path for path in (self.folder / "student").iterdir() if path.name != "results.json"),
                *next(each for each in (self.folder / "cache" / "gguf").iterdir()).iterdir(),
            )
        }
        bits["metrics.jsonl"] = steps(run)
        bits["evaluations"] = json.loads((run / "results.json").read_text())["evaluations"]
        for page in (run / "report.html", self.folder / "report.html"):
            bits[f"{page.relative_to(self.folder)} is complete"] = page.read_text().rstrip().endswith("</html>")
        bits["left over"] = sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob("*partial*"))
        return bits


def main() -> int:
    options = _options()
    began, draw = time.monotonic(), random.Random(options.seed)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        world = make_world(folder / "world")
        teacher = write_gguf(folder / "teacher.gguf", tiny_model("llama", layers=4, hidden=24, seed=2))
        marks, usual = Marks(), {}
        reference = Job(folder / "job", world, teacher, options.seed)
        for command in reference.commands:
            if reference.attempt(command, marks, "", 0, 0.0):
                raise SystemExit((reference.folder / "log.txt").read_text())
            usual |= {name: (marks.count(name), marks.seconds(name)) for name in PARTS if PARTS[name][2] == command}
        expected = reference.outcome()
        shutil.rmtree(reference.folder)
        plan = _plan(options.kills, draw)
        met: Counter[str] = Counter()
        problems: list[str] = []
        jobs = 0
        while plan and not problems:
            jobs += 1
            job = Job(folder / "job", world, teacher, options.seed)  # the same folder, because records contain paths
            problems += _disturb(job, plan, marks, usual, draw, met)
            if not problems:
                outcome = job.outcome()
                names = [name for name in expected | outcome if expected.get(name) != outcome.get(name)]
                problems = [f"job {jobs}: {name} differs" for name in names]
            shutil.rmtree(job.folder)
            seconds = time.monotonic() - began
            print(f"{met.total()} of {options.kills} kills, {jobs} jobs, {seconds:.0f} s", file=sys.stderr)
    print("\n".join(f"{count:4} {name}" for name, count in met.most_common()))
    print("\n".join(problems) or f"{met.total()} kills in {jobs} jobs; all ended with the undisturbed bits.")
    if options.json:
        summary = {"seed": options.seed, "kills": met.total(), "met": dict(met), "jobs": jobs, "problems": problems}
        options.json.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return 1 if problems else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="number of kills (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default 0)")
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    return parser.parse_args()


def _plan(kills: int, draw: random.Random) -> list[str]:
    """The parts to kill, each as often as the others, shuffled."""
    parts = [list(PARTS)[index % len(PARTS)] for index in range(kills)]
    draw.shuffle(parts)
    return parts


def _disturb(
    job: Job, plan: list[str], marks: Marks, usual: dict[str, tuple[int, float]], draw: random.Random, met: Counter[str]
) -> list[str]:
    """Run the job with at most six kills per command, taken from the plan. Returns the problems."""
    for command in job.commands:
        for kills in range(1000):
            target = next((part for part in plan if PARTS[part][2] == command), "") if kills < 6 else ""
            entries, seconds = usual[target] if target else (1, 0.0)
            delay = draw.uniform(0, 1.1 * seconds / max(entries, 1))
            status = job.attempt(command, marks, target, draw.randint(1, min(entries, 4)), delay)
            if os.WIFSIGNALED(status):
                met[marks.part()] += 1
                plan.remove(target)
            elif status:
                log = (job.folder / "log.txt").read_text()
                return [f"{command} ended with {os.waitstatus_to_exitcode(status)}:\n{log}"]
            else:
                break
    return []


if __name__ == "__main__":
    sys.exit(main())
