"""The judge's verdicts: two numbers read from what it wrote, and the file that keeps each before the next is awaited.

Both readers take the forms in which judges usually answer and no others. A text that holds two different verdicts, or
a score outside 1 to 10, has none: a wrong guess would enter a mean, a missing verdict is counted.
"""

import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from promptkd.io.jsonl import ResumableLines
from promptkd.judge.endpoint import Refusal, Reply
from promptkd.judge.questions import Key, Task

# Every repetition is bounded, or ends within a line: a hostile text must not take time beyond its length.
_LONGEST_LINE = 200
_WHO = r"(?:answer|assistant|response)"
_OPEN, _CLOSE = r"[\s*_`\"'(\[{<]{0,8}", r"[\s*_`\"')\]}>]{0,8}"
_NUMBER = r"(\d{1,4}(?:\.\d{1,4})?)(?![.\d]{0,8}\d)(?:\s?/\s?10(?!\d)|\sout\sof\s10\b)?(?:\spoints?\b)?"
_SEPARATOR = r"(?:\s*[,;|&]\s*|\s+and\s+|\s+)"
_PAIR = re.compile(
    rf"{_OPEN}(?:(?:the\s+)?(?:scores?|ratings?){_CLOSE}(?:are\s*)?[:=]?)?{_OPEN}"
    rf"{_NUMBER}{_CLOSE}{_SEPARATOR}{_OPEN}{_NUMBER}{_CLOSE}[.,]?{_CLOSE}",
    re.IGNORECASE,
)
_LABELED = re.compile(
    rf"\b(?:{_WHO}|score|rating)[\s_#-]{{0,2}}([12]){_CLOSE}(?:'s\s)?_?(?:score|rating)?{_CLOSE}"
    rf"(?:[:=]|[–—-](?=\s)|\bis\b){_OPEN}{_NUMBER}{_CLOSE}(?=$|[.,;|(–—-]|and\b|{_WHO}\b)",
    re.IGNORECASE | re.MULTILINE,
)

_CHOICE = r"(1|2|a|b|c|tie|tied|draw|equal|neither|both)"
_BRACKETED = re.compile(rf"\[\[\s*(?:{_WHO}\s+)?{_CHOICE}\s*\]\]", re.IGNORECASE)
_NAMED = re.compile(
    rf"{_OPEN}(?:(?:my|the|final|overall)\s+)*(?:verdict|winner|better(?:\s+answer)?|best(?:\s+answer)?|preference)"
    rf"{_CLOSE}(?:[:=]|\bis\b\s?:?){_OPEN}(?:it(?:'s| is) )?(?:a\s+)?(?:{_WHO}\s+)?{_CHOICE}{_CLOSE}[.!]?{_CLOSE}",
    re.IGNORECASE,
)
_BARE = re.compile(
    rf"{_OPEN}(?:it(?:'s| is) )?(?:a\s+)?(?:{_WHO}\s+)?{_CHOICE}{_CLOSE}(?:is\s+better|wins)?{_CLOSE}[.!]?{_CLOSE}",
    re.IGNORECASE,
)
_SENTENCE = re.compile(
    rf"{_OPEN}{_WHO}\s+(1|2|a|b){_CLOSE}(?:is\s+(?:(?:clearly|slightly|much|far|the)\s+)*better|wins)\b", re.IGNORECASE
)
_SHARES = {"1": (1.0, 0.0), "a": (1.0, 0.0), "2": (0.0, 1.0), "b": (0.0, 1.0)}


class Verdict(BaseModel):
    model_config = ConfigDict(extra="forbid")

    row: int
    model_first: bool  # whether the model's answer was shown before the one it is compared with
    model: float | None  # the model's score, or its share of the win: 1, 0.5 or 0; None where it could not be read
    other: float | None  # the same of the reference's or the other model's answer
    text: str  # what the judge wrote
    refused: str | None = None  # why the endpoint would not answer
    finish_reason: str | None = None
    served_model: str | None = None  # the judge as the endpoint names it
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


def verdict_of(task: Task, key: Key, outcome: Reply | Refusal) -> Verdict:
    row, model_first = key
    if isinstance(outcome, Refusal):
        return Verdict(row=row, model_first=model_first, model=None, other=None, text="", refused=outcome.reason)
    text = outcome.text or ""
    first, second = (read_scores if task == "score" else read_preference)(text) or (None, None)
    model, other = (first, second) if model_first else (second, first)
    told = outcome.model_dump(include={"finish_reason", "prompt_tokens", "completion_tokens"})
    told |= {"text": text, "served_model": outcome.model}
    return Verdict(row=row, model_first=model_first, model=model, other=other, **told)


def verdict_log(path: Path, settings: dict[str, Any], *, overwrite: bool = False) -> ResumableLines:
    """The verdicts in `path` by their `Key`, if it holds any under the same settings; see `ResumableLines`."""
    key = ("row", "model_first")
    return ResumableLines(path, key, settings=settings, check=Verdict.model_validate, overwrite=overwrite)


def read_scores(text: str) -> tuple[float, float] | None:
    """The scores of the answers shown first and second, each in 1..10; None where they are not said plainly.

    Read are a line of nothing but two numbers ("7/10, 9/10") and labeled numbers (`{"answer_1": 7, "answer_2": 9}`).
    """
    said = _without_thoughts(text)
    pairs = {(float(found[1]), float(found[2])) for line in _lines(said) if (found := _PAIR.fullmatch(line))}
    labeled: dict[str, set[float]] = {"1": set(), "2": set()}
    for who, number in _LABELED.findall(said):
        labeled[who].add(float(number))
    pairs |= {(first, second) for first in labeled["1"] for second in labeled["2"]}
    return pairs.pop() if len(pairs) == 1 and all(1 <= score <= 10 for pair in pairs for score in pair) else None


def read_preference(text: str) -> tuple[float, float] | None:
    """(1, 0) if the answer shown first is preferred, (0, 1) if the second is, (0.5, 0.5) for a tie; None if unclear.

    Read are, in this order: "[[1]]" or "[[A]]"; "Verdict: 1" on a line; a first or last line of nothing but "1",
    "Answer 1" or "tie"; and a first line that begins with "Answer 1 is better". "C" is a tie, as in MT-Bench.
    """
    said = _without_thoughts(text)
    lines = _lines(said)
    if not lines:
        return None
    for found in (
        _BRACKETED.findall(said),
        [match[1] for line in lines if (match := _NAMED.fullmatch(line))],
        [match[1] for line in (lines[0], lines[-1]) if (match := _BARE.fullmatch(line))],
        [match[1] for match in [_SENTENCE.match(lines[0])] if match],
    ):
        verdicts = {_SHARES.get(choice.lower(), (0.5, 0.5)) for choice in found}
        if verdicts:
            return verdicts.pop() if len(verdicts) == 1 else None
    return None


def _without_thoughts(text: str) -> str:
    """What follows a reasoning model's thoughts; nothing where they were cut before their end."""
    _, _, after = text.rpartition("</think>")
    return "" if "<think>" in after else after


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and len(line) <= _LONGEST_LINE]
