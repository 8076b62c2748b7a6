"""Run a study: methods x settings x seeds, each run an ordinary `promptkd distill` in a process and folder of its own.

The study is a YAML file whose keys are the options below; flags win over it. Everything is checked before the first run
starts. Run the same command again to resume: finished runs are skipped, the others resume from their last checkpoint.
A run that fails stops no other.

    out: runs/study
    base: {student: student, teacher: runs/teacher, data: train.jsonl, eval_data: valid.jsonl, max_steps: 500}
    methods: [kd, promptkd, {name: promptkd-slow, method: promptkd, prompt_learning_rate: 1e-4}]
    seeds: [1, 2, 3]
    grid: {learning_rate: [5e-5, 1e-4]}
    evaluate: {data: [dolly_test.jsonl], seeds: [10, 20]}

    promptkd study study.yaml --dry-run
    promptkd study study.yaml --workers 2

Each run's folder is OUT/NAME and its log OUT/logs/NAME.log. At the end the methods are compared over their seeds, in
OUT/comparison.json and OUT/report.html.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from promptkd.settings import option

POSITIONAL = "config"


@dataclass
class Options:
    config: Path
    """The study."""
    out: Path
    """Folder of the study, with a folder for each run in it."""
    base: dict[str, Any]
    """Settings of every run, spelled as the flags of `promptkd distill`; `config` names a recipe to start from."""
    methods: list[Any]
    """Methods: names, or mappings with a name, settings of their own (`config` too), and a `grid` of their own."""
    seeds: list[int]
    """Seeds of training."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Settings to vary, each with its values; every combination is run."""
    evaluate: dict[str, Any] = field(default_factory=dict)
    """Flags of `promptkd evaluate`, to measure each student after its training; else validation is compared."""
    exposure_bias: dict[str, Any] = field(default_factory=dict)
    """Flags of `promptkd exposure-bias`, to measure it of each student after its training, over seeds too."""
    baseline: str | None = None
    """The method that the others are compared with, with its setting of the grid; by default the first."""
    metrics: list[str] = field(default_factory=list)
    """The metrics to compare, by default all. p is adjusted for their number: name those that you decide by."""
    file_sha256: dict[str, Any] = field(default_factory=dict)
    """Kept in OUT/config.yaml at the start: the SHA-256 of the data and the files of your own methods and metrics."""
    references: bool = True
    """Measure the teacher and the student before training too, once each, for the table."""
    keep_models: bool = True
    """Keep each run's student and checkpoints; false deletes them, not the records, once all of a run is measured."""
    workers: int = option(1, at_least=1)
    """Runs at a time on this machine, which share its cores and have a GPU each."""
    engine: Literal["local", "ray"] = "local"
    """Where runs run: local on this machine, ray on a Ray cluster whose nodes share the folders."""
    ray_address: str | None = None
    """Address of the Ray cluster; by default RAY_ADDRESS, or the cluster on this machine."""
    cpus_per_run: int = option(1, at_least=1)
    """ray: cores of a run."""
    gpus_per_run: float = option(0.0, at_least=0)
    """ray: GPUs of a run; with 0 it sees none."""
    dry_run: bool = False
    """List the runs, their commands and what they would cost, and write nothing."""
