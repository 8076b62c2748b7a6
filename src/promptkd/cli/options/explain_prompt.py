"""Show what the trained soft prompt of a run is made of, and what it changes in the run's teacher.

For each vector the nearest tokens, its norm and its way from the start; the answers of the teacher without and with the
prompt, and of the student, side by side; KL(prompted || plain) and KL(prompted || student) by position in the response,
on what the student itself writes. The record goes into RUN/explain-prompt, where `promptkd report RUN` finds it.

    promptkd explain-prompt runs/promptkd
    promptkd report runs/promptkd --out report.html
"""

from dataclasses import dataclass
from pathlib import Path

from promptkd.cli.options.common import Loading, TeacherPrecision
from promptkd.settings import option

POSITIONAL = "run"
REPEATABLE = ("teacher",)
LESS_MEMORY = ("a smaller --batch-size", "a smaller --limit (now {limit})")


@dataclass(kw_only=True)
class Options(Loading, TeacherPrecision):
    run: Path
    """The folder of a finished run that trained a soft prompt."""
    data: str | None = None
    """Requests, in any of the forms of training rows; by default the run's validation rows."""
    rows: int = option(5, at_least=0)
    """Requests that are answered side by side, the first so many."""
    limit: int = option(64, at_least=1)
    """Requests over which the KL by position is a mean, the first so many."""
    seed: int = option(10, at_least=0)
    """Seed of the student's samples, on which the KL is measured."""
    teacher: str | list[str] | None = None
    """The run's teacher, where it is no longer found under the name that the run recorded; of a run with several
    teachers NAME=PATH, once for each that was moved."""
    out: Path | None = None
    """Folder for results.json; by default RUN/explain-prompt."""
    batch_size: int | None = option(None, at_least=1)
    """Rows to decode at a time; by default 32 on CPU, 128 on a GPU."""
    overwrite: bool = False
    """Replace the record of an earlier call."""
