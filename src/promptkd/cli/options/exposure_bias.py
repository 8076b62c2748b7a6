"""Measure how errors accumulate on a student's own continuations.

ExAccErr(l) in %: by how much the KL(teacher || student), added up over the first l tokens, is larger on what the
student writes than on what the teacher writes (Arora et al. 2022). Both write several continuations of every request
at temperature 1; intervals are 95 %, by bootstrap over rows. The data need no responses. Run a command again that was
stopped, and it does only what is missing.

    promptkd exposure-bias --student runs/promptkd runs/kd --teacher T --data test.jsonl --out exposure.json
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from promptkd.cli.options.common import LESS_MEMORY_TO_DECODE, Measuring, TeacherContext
from promptkd.settings import option

LESS_MEMORY = LESS_MEMORY_TO_DECODE


@dataclass(kw_only=True)
class Options(Measuring, TeacherContext):
    student: list[str]
    """The students: hub names, folders, run folders or GGUF files."""
    teacher: str
    """The teacher that all of them are compared with."""
    data: list[str]
    """Requests: files, folders or hub data sets."""
    out: Path
    """The results file to write."""
    prompt: Path | None = None
    """A run or PEFT folder with a soft prompt: the prompted teacher is sampled and compared in the teacher's place."""
    every_checkpoint: bool = False
    """Measure the checkpoints of each student's run too, in the order of their steps."""
    samples_per_row: int = option(3, at_least=1)
    """Continuations of each request, by every model."""
    seed: int = option(10, at_least=0)
    """Seed of the first continuation; the others take the seeds after it."""
    ended: Literal["leave", "zero"] = "leave"
    """Rows that have ended: leave the mean of later tokens, or count there as errors of zero (as the authors do)."""
