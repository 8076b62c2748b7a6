"""The judge's verdicts: what a reply says, and the file in which each is on the disk before the next is waited for."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from promptkd.io.jsonl import ResumableLines
from promptkd.judge.endpoint import Refusal, Reply
from promptkd.judge.questions import Key, Task
from promptkd.judge.verdict_parsing import read_preference, read_scores


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


def verdict_of(task: Task, key: Key, outcome: Reply | Refusal) -> Verdict:
    """The verdict that an endpoint's answer holds."""
    row, model_first = key
    if isinstance(outcome, Refusal):
        return Verdict(row=row, model_first=model_first, model=None, other=None, text="", refused=outcome.reason)
    text = outcome.text or ""
    first, second = (read_scores if task == "score" else read_preference)(text) or (None, None)
    return Verdict(
        row=row,
        model_first=model_first,
        model=first if model_first else second,
        other=second if model_first else first,
        text=text,
        finish_reason=outcome.finish_reason,
        served_model=outcome.model,
        prompt_tokens=outcome.prompt_tokens,
        completion_tokens=outcome.completion_tokens,
    )


def verdict_log(path: Path, settings: dict[str, Any], *, overwrite: bool = False) -> ResumableLines:
    """The verdicts in `path` by their `Key`, if it holds any under the same settings; see `ResumableLines`."""
    key = ("row", "model_first")
    return ResumableLines(path, key, settings=settings, check=Verdict.model_validate, overwrite=overwrite)
