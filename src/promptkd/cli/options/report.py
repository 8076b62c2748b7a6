"""Make one HTML page, or tables for a paper, from the results of one or several runs.

Several records of one model (its training, its evaluations, its comparison with others) become one story.

    promptkd report runs/promptkd runs/kd promptkd-test.json kd-test.json --out report.html
    promptkd report promptkd-test.json kd-test.json --out table.md
    promptkd report runs/study --out table.tex --figures figures
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

POSITIONAL = "runs"


@dataclass
class Options:
    runs: list[str]
    """Run folders, results files, or the folder of a study: its runs pooled by method."""
    out: Path
    """The file to write."""
    format: Literal["html", "markdown", "latex", "json", "csv"] | None = None
    """html (a page), markdown or latex (tables), json or csv (metrics); by default what the suffix of --out says."""
    metrics: list[str] = field(default_factory=list)
    """The metrics to show, by default all that were recorded, or a study's own `metrics`."""
    figures: Path | None = None
    """Folder for the plots as SVG and PDF, of training its losses and validations; it is made."""
    figures_all: bool = False
    """Draw everything else that training logged, too: rates, norms, times."""
    title: str | None = None
    """Title of the page."""
    overwrite: bool = False
    """Replace --out."""
