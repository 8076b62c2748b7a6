"""Distil a small student offline on embedded defaults, with a report.

A 135M-parameter teacher (SmolLM2-135M-Instruct) is tuned on a small instruction set, pruned to a student, and the
student recovers by knowledge distillation and then learns by PromptKD. Every stage is measured on held-out requests.
The tuned teacher and the recovered student are kept in the cache folder for the next time.

    promptkd demo --out runs/demo
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

GOES_ON = ("--overwrite",)  # finished stages come from the cache


@dataclass
class Options:
    out: Path = Path("runs/demo")
    """Folder of the run."""
    layers: int = 24
    """Layers of the student, of the teacher's 30."""
    steps: int = 40
    """Optimiser steps of PromptKD."""
    seed: int = 0
    """Seed of everything random."""
    overwrite: bool = False
    """Replace the run in OUT."""


def run(options: Options, training: dict[str, Any]) -> None:
    from promptkd.cli.options import merged_config
    from promptkd.cli.session import RunFolder, quiet_libraries, say
    from promptkd.demo.pipeline import Demo
    from promptkd.demo.settings import DemoSettings, teacher_file
    from promptkd.errors import RequestError
    from promptkd.io.jsonl import write_whole
    from promptkd.memory import peak_memory
    from promptkd.report import render_report, terminal_table

    if not 1 <= options.layers <= 30:
        raise RequestError(f"--layers must lie between 1 and 30, the number the teacher has. Got {options.layers}.")
    if options.steps < 1:
        raise RequestError(f"--steps must be at least 1. Got {options.steps}.")
    if options.seed < 0:
        raise RequestError(f"--seed must be 0 or more. Got {options.seed}.")
    quiet_libraries()
    teacher_file()
    folder = RunFolder(options.out)
    folder.open(merged_config(options, {}), resume=False, overwrite=options.overwrite)
    demo = Demo(DemoSettings(layers=options.layers, steps=options.steps, seed=options.seed), options.out, say)
    results = demo.run()
    results.notes = [*results.notes, f"Peak memory {peak_memory() / 2**30:.1f} GiB."]
    results.write(folder.results)
    write_whole(folder.report, render_report([results], title="promptkd demo").encode())
    print(terminal_table([results]))
    say(f"The student is in {options.out / 'student'}, the soft prompt in {options.out / 'prompt'}.")
    say(f"Open {folder.report} in a browser.")
