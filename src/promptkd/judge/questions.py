"""The answers that are judged, as `generate` and `evaluate` write them, and the questions about them."""

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, StrictInt, ValidationError

from promptkd.data.rows import Instruction, Request, text_field
from promptkd.data.sources import read_examples, read_objects
from promptkd.errors import RequestError
from promptkd.judge.prompt_template import fill_prompt
from promptkd.judge.verdict_log import Key


@dataclass(frozen=True)
class Answer:
    """One request, a model's answer to it, and the references."""

    row: int
    """Index of the row in the data file that the request comes from."""
    prompt: str
    response: str
    references: tuple[str, ...]


class _Line(BaseModel):
    row: StrictInt
    prompt: str
    response: str | None = None
    completion: str | None = None
    references: list[str] = []


def read_answers(path: Path, *, limit: int | None = None) -> dict[int, Answer]:
    """The answers in `path` by the number of their row, in its order; of the first `limit` lines, if that is given.

    Raises:
        RequestError: there is no such file, a row lacks a field, or two rows have the same number.
    """
    if not path.is_file():
        raise RequestError(f"Expected a file of answers at {path}. There is none; `promptkd generate` writes one.")
    answers: dict[int, Answer] = {}
    for location, found in read_objects(path, limit=limit):
        answer = _answer(found, location)
        if answer.row in answers:
            raise RequestError(f"{location}: row {answer.row} stands twice. Judge the answers of one seed at a time.")
        answers[answer.row] = answer
    return dict(sorted(answers.items()))


def _answer(found: Any, location: str) -> Answer:
    try:
        line = _Line.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the row"
        raise _no_answer(location, f"{where}: {first['msg']}") from error
    texts = [text for text in (line.response, line.completion) if text is not None]
    if len(texts) != 1:
        raise _no_answer(location, f"it holds {'both' if texts else 'neither'}")
    for text in (line.prompt, texts[0], *line.references):
        text_field(text, "text", location)
    return Answer(line.row, line.prompt, texts[0], tuple(line.references))


def _no_answer(location: str, reason: str) -> RequestError:
    return RequestError(
        f"{location}: expected row, prompt, references, and response or completion, as `promptkd evaluate` and "
        f"`promptkd generate` write them: {reason}."
    )


def with_requests(answers: Mapping[int, Answer], source: str) -> dict[int, Answer]:
    """The answers with the requests of the data set they answer in place of their prompts: no template around them.

    Raises:
        RequestError: `source` lacks a row, or a row's request does not stand in its prompt.
    """
    requests = {example.row: _request_text(example.request) for example in read_examples(source)}
    missing = sum(row not in requests for row in answers)
    if missing:
        raise RequestError(f"{missing} of {len(answers)} rows are not in {source}. Give the data they were made from.")
    strange = sum(_flat(requests[row][1]) not in _flat(answer.prompt) for row, answer in answers.items())
    if strange:
        raise RequestError(
            f"{strange} of {len(answers)} rows hold another request than their prompt in {source}. "
            "Give the data they were made from."
        )
    return {row: replace(answer, prompt=requests[row][0]) for row, answer in answers.items()}


def _request_text(request: Request) -> tuple[str, str]:
    """The request as a person would read it, and the part of it that stands in every rendering."""
    if isinstance(request, str):
        return request, request
    if isinstance(request, Instruction):
        parts = [part for part in (request.instruction, request.input) if part.strip()]
        return "\n\n".join(parts), request.instruction
    last = str(request[-1]["content"])
    if len(request) == 1:
        return last, last
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in request), last


def _flat(text: str) -> str:
    return " ".join(text.split())


def check_same_requests(answers: Mapping[int, Answer], others: Mapping[int, Answer], names: tuple[str, str]) -> None:
    """Refuse two files of answers that do not answer the same requests."""
    missing, surplus = len(answers.keys() - others.keys()), len(others.keys() - answers.keys())
    changed = sum(answers[row].prompt != others[row].prompt for row in answers.keys() & others.keys())
    problems = [f"{missing} of its {len(answers)} rows are missing there"] if missing else []
    problems += [f"{surplus} further rows are there"] if surplus else []
    problems += [f"{changed} rows have another prompt there"] if changed else []
    if problems:
        raise RequestError(
            f"Expected {names[1]} to answer the same requests as {names[0]}, but {', '.join(problems)}. "
            "Generate both from the same data with the same template and limits."
        )


def requests_sha256(answers: Iterable[Answer]) -> str:
    """Hex SHA-256 over rows, prompts and references: equal where models answered the same requests."""
    lines = (json.dumps([each.row, each.prompt, each.references], ensure_ascii=False) + "\n" for each in answers)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def questions_about(models: Sequence[Mapping[int, Answer]], prompt: str) -> dict[Key, str]:
    """The questions about the answers of one model, beside each row's first reference, or of two models.

    Against the reference one question a row; which answer stands first is drawn from the number of the row. Between
    two models two questions a row, in both orders.

    Raises:
        RequestError: rows without a reference to stand beside a single model's answer.
    """
    answers, *others = models
    orders: dict[int, tuple[bool, ...]]
    if others:
        texts = {row: answer.response for row, answer in others[0].items()}
        orders = dict.fromkeys(answers, (True, False))
    else:
        texts = _first_references(answers)
        orders = {row: (random.Random(row).random() < 0.5,) for row in answers}
    return {
        (row, model_first): _question(prompt, answer, texts[row], model_first)
        for row, answer in answers.items()
        for model_first in orders[row]
    }


def _first_references(answers: Mapping[int, Answer]) -> dict[int, str]:
    bare = sum(not answer.references for answer in answers.values())
    if bare:
        raise RequestError(
            f"{bare} of {len(answers)} rows hold no reference, which the score is relative to. Generate them from data "
            "with outputs, or compare two models with --against."
        )
    return {row: answer.references[0] for row, answer in answers.items()}


def _question(prompt: str, answer: Answer, other: str, model_first: bool) -> str:
    first, second = (answer.response, other) if model_first else (other, answer.response)
    return fill_prompt(prompt, request=answer.prompt, first=first, second=second)
