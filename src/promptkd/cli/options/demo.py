"""Distill a small student offline on embedded defaults, with a report.

A 135M-parameter teacher (SmolLM2-135M-Instruct) is tuned on a small instruction set, pruned to a student, and the
student recovers by knowledge distillation and then learns by PromptKD. Every stage is measured on held-out requests.
The tuned teacher and the recovered student are kept in the cache folder for the next time.

    promptkd demo --out runs/demo
"""

from dataclasses import dataclass
from pathlib import Path

from promptkd.settings import option

RESUMED_BY = ("--overwrite",)  # finished stages come from the cache


@dataclass
class Options:
    out: Path = Path("runs/demo")
    """Folder of the run."""
    layers: int = option(24, at_least=1, at_most=30)
    """Layers of the student, of the teacher's 30."""
    steps: int = option(6, at_least=1)
    """Optimizer steps of PromptKD."""
    seed: int = option(0, at_least=0)
    """Seed of everything random."""
    overwrite: bool = False
    """Replace the run in OUT."""
