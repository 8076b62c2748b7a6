"""Compare runs that were measured on the same data: intervals, tests, and what each cost.

A run is a run's folder or a results file (of evaluate, distill, sft or judge). Each model is compared with the first,
row by row: the difference with its 95 % bootstrap interval, a sign-flip test whose p is adjusted for the number of
differences (Holm), and the effect size. Two models are told apart where both interval and p say so. Runs whose data or
decoding differ are refused.

    promptkd compare runs/kd.json runs/promptkd.json --out comparison.json
"""

from dataclasses import dataclass, field
from pathlib import Path

POSITIONAL = "runs"


@dataclass
class Options:
    runs: list[str]
    """Run folders or results files, each as RUN or, to name it, LABEL=RUN."""
    out: Path | None = None
    """The results file to write; `promptkd report` reads it."""
    baseline: str | None = None
    """Label of the model that the others are compared with; by default the first."""
    all_pairs: bool = False
    """Compare every model with every other."""
    metrics: list[str] = field(default_factory=list)
    """The metrics to compare, by default all. p is adjusted for their number: name those that you decide by."""
    allow_different: bool = False
    """Compare the rows that all have although data or decoding differ; the record says in what."""
    overwrite: bool = False
    """Replace --out."""
