"""The answers that are judged, as `generate` and `evaluate` write them, and the questions about them.

A question is a prompt with {{ request }}, {{ first }} and {{ second }} filled in, in one pass: a placeholder inside an
answer stays text.
"""

import hashlib
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, StrictInt, ValidationError

from promptkd.data.messages import content_text
from promptkd.data.rows import Instruction, Request, text_field
from promptkd.data.sources import read_examples, read_objects
from promptkd.errors import RequestError, at, check_all
from promptkd.io.files import MIB, read_regular

Task = Literal["score", "pairwise"]
Key = tuple[int, bool]  # of a question and its verdict: the row, and whether the model's answer is shown first

_PLACEHOLDER = re.compile(r"\{\{\s*(.*?)\s*\}\}")
_PLACEHOLDERS = ("request", "first", "second")


@dataclass(frozen=True)
class JudgedAnswer:
    """One request, a model's answer to it, and the references."""

    row: int  # its index in the data file
    prompt: str
    response: str
    references: tuple[str, ...]


Answers = dict[int, JudgedAnswer]  # by the number of their row


class _Line(BaseModel):
    row: StrictInt
    prompt: str
    response: str | None = None
    completion: str | None = None
    references: list[str] = []


def read_answers(path: Path, *, limit: int | None = None) -> Answers:
    """The answers in `path`, sorted by row; of the first `limit` lines, if that is given."""
    if not path.is_file():
        raise RequestError(f"Expected a file of answers at {path}. There is none; `promptkd generate` writes one.")
    answers: Answers = {}
    for location, found in read_objects(path, limit=limit):
        written = "as `promptkd evaluate` and `promptkd generate` write them"
        expected = f"{location}: expected row, prompt, references, and response or completion, {written}"
        try:
            line = _Line.model_validate(found)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the row"
            raise RequestError(f"{expected}: {where}: {first['msg']}.") from error
        texts = [text for text in (line.response, line.completion) if text is not None]
        if len(texts) != 1:
            raise RequestError(f"{expected}: it holds {'both' if texts else 'neither'}.")
        with at(location):
            for text in (line.prompt, *texts, *line.references):
                text_field(text, "text")
        if line.row in answers:
            raise RequestError(f"{location}: row {line.row} is there twice. Judge the answers of one seed at a time.")
        answers[line.row] = JudgedAnswer(line.row, line.prompt, texts[0], tuple(line.references))
    return dict(sorted(answers.items()))


def read_models(
    files: Sequence[tuple[str, Path]],
    *,
    limit: int | None,
    data: str | None,
    columns: Mapping[str, str] | None = None,
) -> dict[str, Answers]:
    """The answers of one model, or of two to the same requests, by label; of the first `limit` lines of the first file.

    With `data`, the data set they answer, each prompt becomes the request itself: no template around it.
    """
    (label, path), *other = files
    models: dict[str, Answers] = {label: read_answers(path, limit=limit)}
    for other_label, against in other:
        rows = read_answers(against)
        models[other_label] = {row: rows[row] for row in rows if limit is None or row in models[label]}
    if data is not None:
        models = {each: _with_requests(answers, data, columns) for each, answers in models.items()}
    for other_label, against in other:
        answers, others = models[label], models[other_label]
        missing, surplus = len(answers.keys() - others.keys()), len(others.keys() - answers.keys())
        changed = sum(answers[row].prompt != others[row].prompt for row in answers.keys() & others.keys())
        checks = [
            (missing > 0, f"{missing} of its {len(answers)} rows are missing there"),
            (surplus > 0, f"{surplus} further rows are there"),
            (changed > 0, f"{changed} rows have another prompt there"),
        ]
        advice = "Generate both from the same data with the same template and limits."
        check_all(f"Expected {against} to answer the same requests as {path}", checks, advice)
    return models


def _with_requests(answers: Answers, source: str, columns: Mapping[str, str] | None) -> Answers:
    """The answers, each prompt replaced by the plain request of its row in `source`, which it must contain."""
    requests = {example.row: _request_text(example.request) for example in read_examples(source, columns=columns)}
    count, advice = f"of {len(answers)} rows", "Give the data they were made from."
    if missing := sum(row not in requests for row in answers):
        raise RequestError(f"{missing} {count} are not in {source}. {advice}")
    texts = [(requests[row][1].split(), answer.prompt.split()) for row, answer in answers.items()]
    if strange := sum(" ".join(request) not in " ".join(prompt) for request, prompt in texts):
        raise RequestError(f"{strange} {count} hold another request than their prompt in {source}. {advice}")
    return {row: replace(answer, prompt=requests[row][0]) for row, answer in answers.items()}


def _request_text(request: Request) -> tuple[str, str]:
    """The request as a person would read it, and the part of it that is in every rendering."""
    if isinstance(request, str):
        return request, request
    if isinstance(request, Instruction):
        said = [text for pair in request.history for text in pair]
        parts = [part for part in (request.system, *said, request.instruction, request.input) if part.strip()]
        return "\n\n".join(parts), request.instruction
    last = content_text(request[-1])
    if len(request) == 1:
        return last, last
    return "\n\n".join(f"{message['role']}: {content_text(message)}" for message in request), last


def requests_sha256(answers: Iterable[JudgedAnswer]) -> str:
    """Hex SHA-256 over rows, prompts and references: equal where models answered the same requests."""
    lines = (json.dumps([each.row, each.prompt, each.references], ensure_ascii=False) + "\n" for each in answers)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def load_prompt(task: Task, path: Path | None = None) -> str:
    """The prompt of `task`: the one that ships, or the text of `path`."""
    if path is None:
        return (resources.files("promptkd.judge") / "prompts" / f"{task}.txt").read_text(encoding="utf-8")
    try:
        text = read_regular(path, most=MIB).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror or error if isinstance(error, OSError) else f"it is not valid UTF-8: {error}"
        raise RequestError(f"Expected the judge's prompt in {path}: {reason}.") from error
    found = set(_PLACEHOLDER.findall(text))
    checks = [(name not in found, f"it lacks {{{{ {name} }}}}") for name in _PLACEHOLDERS]
    checks += [(True, f"it holds {{{{ {name} }}}}, which is unknown") for name in sorted(found - {*_PLACEHOLDERS})]
    known = ", ".join(f"{{{{ {name} }}}}" for name in _PLACEHOLDERS)
    check_all(f"Cannot use the judge's prompt {path}", checks, f"It must hold {known} and no other.")
    return text


def fill_prompt(prompt: str, *, request: str, first: str, second: str) -> str:
    values = {"request": request, "first": first, "second": second}
    return _PLACEHOLDER.sub(lambda found: values[found[1]], prompt)


def questions_about(models: Sequence[Mapping[int, JudgedAnswer]], prompt: str) -> dict[Key, str]:
    """One question per row of one model, beside the row's first reference, or two of two models, in both orders.

    Which is shown first, answer or reference, is drawn from the number of the row.
    """
    answers, *others = models
    bare = sum(not answer.references for answer in answers.values())
    if bare and not others:
        advice = "Generate them from data with outputs, or compare two models with --against."
        told = f"{bare} of {len(answers)} rows hold no reference, which the score is relative to."
        raise RequestError(f"{told} {advice}")
    questions = {}
    for row, answer in answers.items():
        other = others[0][row].response if others else answer.references[0]
        for model_first in (True, False) if others else (random.Random(row).random() < 0.5,):
            first, second = (answer.response, other) if model_first else (other, answer.response)
            questions[row, model_first] = fill_prompt(prompt, request=answer.prompt, first=first, second=second)
    return questions
