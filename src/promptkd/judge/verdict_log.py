"""The judge's verdicts as they come: one JSON line each, on the disk before the next is waited for."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from promptkd.io.jsonl import ResumableLines

Key = tuple[int, bool]
"""The row, and whether the model's answer was shown first."""


class Verdict(BaseModel):
    """What the judge said to one question."""

    model_config = ConfigDict(extra="forbid")

    row: int
    model_first: bool
    """Whether the model's answer was shown before the one it is compared with."""
    model: float | None
    """The model's score, or its share of the win: 1, 0.5 or 0. None where the verdict could not be read."""
    other: float | None
    """The same of the reference's or the other model's answer."""
    text: str
    """What the judge wrote."""
    refused: str | None = None
    """Why the endpoint would not answer."""
    finish_reason: str | None = None
    served_model: str | None = None
    """The judge as the endpoint names it."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


def verdict_log(path: Path, settings: dict[str, Any], *, overwrite: bool = False) -> ResumableLines:
    """The verdicts in `path` by their `Key`, if it holds any under the same settings; see `ResumableLines`."""
    return ResumableLines(
        path, ("row", "model_first"), settings=settings, check=Verdict.model_validate, overwrite=overwrite
    )
