"""Make a student of the teacher's most useful layers.

The layers are chosen by block influence (1 - cosine between a layer's input and output), measured on rows of --data; or
evenly with --choose even; or by number with --keep 0 1 5 29.

    promptkd prune --model runs/teacher --layers 15 --data train.jsonl --out student
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from promptkd.cli.options.common import Loading, Rows
from promptkd.settings import option

LESS_MEMORY = ("a smaller --max-prompt-length (now {max_prompt_length})", "--choose even, which runs no row")


@dataclass(kw_only=True)
class Options(Loading, Rows):
    model: str
    """The teacher: a hub name, folder, run folder or GGUF file."""
    out: Path
    """Folder of the student that is made."""
    layers: int | None = option(None, at_least=1)
    """How many layers to keep."""
    keep: list[int] = field(default_factory=list)
    """The layers to keep by number from 0, in place of --layers."""
    choose: Literal["influence", "even"] = "influence"
    """How to choose layers: by influence on --data, or evenly spaced."""
    data: str | None = None
    """Rows to measure the influence on: a file, folder or hub name."""
    rows: int = option(64, at_least=1)
    """How many rows to measure it on."""
    max_prompt_length: int = 256
    """Most tokens of a prompt; rows above it are not used."""
    max_completion_length: int = 256
    """Most tokens of a response; rows above it are not used."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision to compute the influence in; auto is bfloat16 where the device has units for it."""
    overwrite: bool = False
    """Replace the model in --out."""
