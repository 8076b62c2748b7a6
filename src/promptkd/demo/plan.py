"""What a demo says of itself: its stages and how long they take before it starts, and what to try when it is done."""

import shlex
from collections.abc import Mapping
from pathlib import Path

# Seconds of a run on two cores with AVX2, in float32 (docs/demo.md); PromptKD's are per step.
_SECONDS = {"tuning": 95.0, "recovery": 95.0, "pruning": 15.0, "PromptKD": 12.1, "measuring": 180.0}
_STAGES = (
    ("tuning", "tune the teacher on the training rows"),
    ("pruning", "take layers away: the student"),
    ("recovery", "recover the student by distillation on the data's responses"),
    ("PromptKD", "PromptKD, on the student's own answers"),
    ("measuring", "measure teacher, pruned, recovered and distilled student on the test requests"),
)


def plan_lines(kept: Mapping[str, float | None], steps: int) -> list[str]:
    """A line per stage, then the expected time.

    `kept` has, for each stage that can come from the cache, the seconds that it took when it was made, or None where it
    has to be run. Where there is such a time, the others are scaled by it: it was taken on this machine.
    """
    known = [seconds / _SECONDS[stage] for stage, seconds in kept.items() if seconds is not None]
    pace = sum(known) / len(known) if known else 1.0
    lines, total = [], 0.0
    for at, (stage, what) in enumerate(_STAGES, start=1):
        seconds = _SECONDS[stage] * (steps if stage == "PromptKD" else 1) * pace
        is_kept = kept.get(stage) is not None
        total += 0.0 if is_kept else seconds
        lines.append(f"  {at}. {what}: {'from the cache' if is_kept else f'about {_rough(seconds)}'}")
    where = "by the pace of this machine before" if known else "on two cores of a usual CPU; a slower one takes longer"
    return [f"The demo has {len(_STAGES)} stages and takes about {_rough(total)} ({where}):", *lines]


def _rough(seconds: float) -> str:
    if seconds < 90:
        return f"{max(5, round(seconds / 5) * 5)} seconds"
    return f"{round(seconds / 60)} minutes"


def next_lines(out: Path) -> list[str]:
    """Commands that work on what the demo made; the last one names a reader's own models."""
    student, own = shlex.quote(str(out)), "--student STUDENT --teacher TEACHER --data train.jsonl"
    return [
        "Try next:",
        f"  promptkd chat {student} --prompt {shlex.quote('Name three rivers in Europe.')}",
        f"  promptkd export {student} --to gguf --out {shlex.quote(f'{out}.gguf')}",
        f"  promptkd demo --out {shlex.quote(str(out) + '-seed1')} --seed 1",
        f"  promptkd distill {own} --eval-data valid.jsonl --out runs/mine",
    ]
