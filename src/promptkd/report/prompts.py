"""What trained soft prompts are made of: a table of vectors, curves by position, and answers side by side."""

import json
import shutil
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from promptkd.record_parts import PositionCurve, PositionMean, PromptExplanation
from promptkd.report.formatting import DASH, number
from promptkd.report.text import text_table, wrapped
from promptkd.results import Results
from promptkd.visible import shown, visible

CURVES = {
    "prompted_to_plain": "prompted || plain",
    "prompted_to_student": "prompted || student",
    "plain_to_student": "plain || student",
}  # of the KL: the teacher with the prompt, the teacher without it, the student
COLORS = dict(zip(CURVES.values(), (1, 2, 0), strict=True))
ANSWERS = {"plain": "teacher", "prompted": "teacher with the prompt", "student": "student"}
_COLORS_OF_ANSWERS = {"teacher": 0, "teacher with the prompt": 1, "student": 2}
_TABLED = (1, 2, 4, 8, 16, 32)  # of the single positions, those that tables show; the buckets behind are shown all
_WIDTH = (100, 24)


class Near(NamedTuple):
    token: str  # in quotes
    cosine: str
    is_near: bool  # nearer than random directions come


class VectorRow(NamedTuple):
    number: int
    start: str
    nearest: list[Near]
    norm: str
    distance: str
    cosine: str  # with its start


class PromptView(NamedTuple):
    """One prompt, as the page shows it."""

    id: str
    title: str
    vectors: list[VectorRow]
    sentences: list[str]
    spans: list[str]  # positions, for the head of the table below the plot
    curves: list[tuple[str, list[tuple[str, str]]]]  # label; value and interval at each of the spans, the whole first
    answers: list[dict[str, Any]]


def prompt_views(records: Sequence[Results]) -> list[PromptView]:
    """Every explained prompt of the records."""
    found = [each for record in records for each in record.prompts]
    return [_view(each, f"prompt-{at}", len(found)) for at, each in enumerate(found)]


def prompt_data(records: Sequence[Results]) -> list[dict[str, Any]]:
    """What the page's script draws: per prompt and curve, positions with value, low and high."""
    found = [each for record in records for each in record.prompts]

    def drawn(name: str, curve: PositionCurve) -> dict[str, Any]:
        points = [
            [(each.first + each.last) / 2, each.value, each.low, each.high, _span(each)] for each in curve.positions
        ]
        return {"label": CURVES[name], "color": COLORS[CURVES[name]], "points": points}

    return [
        {"id": f"prompt-{at}", "curves": [drawn(name, each.kl[name]) for name in CURVES if name in each.kl]}
        for at, each in enumerate(found)
        if each.kl
    ]


def quoted(token: str) -> str:
    """A token in quotes, so that its spaces are seen: `" the"`; several in a row are drawn."""
    return visible(json.dumps(token, ensure_ascii=False)).replace("  ", "␣␣")


def vector_rows(explained: PromptExplanation) -> list[VectorRow]:
    def row(at: int) -> VectorRow:
        vector = explained.vectors[at]
        near = [
            Near(quoted(each.token), number(each.cosine, 2), each.cosine > explained.random_cosine)
            for each in vector.nearest
        ]
        start = DASH if vector.start is None else quoted(vector.start)
        numbers = (_written(vector.norm), _written(vector.distance), _written(vector.cosine_with_start))
        return VectorRow(at + 1, start, near, *numbers)

    return [row(at) for at in range(len(explained.vectors))]


def sentences(explained: PromptExplanation) -> list[str]:
    """What the numbers of a prompt say, and how near is near."""
    count, limit = len(explained.vectors), number(explained.random_cosine, 2)
    near = [each for each in explained.vectors if each.nearest and each.nearest[0].cosine > explained.random_cosine]
    own = [each for each in near if each.start is not None and each.start == each.nearest[0].token]
    told = [
        f"95 % of random directions of this width have a cosine below {limit} with the nearest of {explained.tokens:,} "
        f"tokens, so a nearest token below that says nothing. Nearer than that: {len(near)} of {count} vectors."
    ]
    if explained.distance is not None:
        apart = f"The prompt's norm is {number(explained.norm, 3)}, its distance from its start "
        apart += number(explained.distance, 3)
        kept = f" Still nearest to the token of their start: {len(own)} of {count} vectors."
        told.append(f"{apart}.{kept if any(each.start for each in explained.vectors) else ''}")
    else:
        told.append(
            f"The prompt's norm is {number(explained.norm, 3)}. What it started from is not in the run's record."
        )
    if explained.kl:
        moved, prompted, plain = (" ".join(_cell(explained.kl[name].whole)).strip() for name in CURVES)
        told.append(
            f"On what the student writes, KL(teacher || student) is {prompted} nats per token with the prompt and "
            f"{plain} without it; KL(prompted || plain teacher) is {moved}."
        )
    return told


def explanation_text(explained: PromptExplanation, *, width: int | None = None) -> str:
    """The whole for a terminal, in lines of `width` cells, else of the terminal's."""
    width = width or shutil.get_terminal_size(_WIDTH).columns
    heads = ["", "start", "nearest tokens and their cosines", "norm", "distance", "cosine with start"]
    lines = [
        [
            str(row.number),
            row.start,
            ", ".join(f"{near.token} {near.cosine}" for near in row.nearest),
            row.norm,
            row.distance,
            row.cosine,
        ]
        for row in vector_rows(explained)
    ]
    parts = [text_table([heads, *lines], left=(1, 2))]
    parts += [wrapped(each, width) for each in sentences(explained)]
    if explained.kl:
        view = _view(explained, "", 1)
        table = [["KL in nats per token, at position", *view.spans]]
        table += [[label, *(value for value, _ in cells)] for label, cells in view.curves]
        parts.append(text_table(table))
    return "\n\n".join([*parts, *(_side_by_side(each, width) for each in explained.answers)])


def _side_by_side(answer: Any, width: int) -> str:
    table = Table(width=width, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for label in ANSWERS.values():
        table.add_column(label, ratio=1, overflow="fold")
    table.add_row(*(Text(shown(getattr(answer, who)) or "(empty)") for who in ANSWERS))  # a cell keeps its lines
    console = Console(width=width, color_system=None, force_terminal=False, force_jupyter=False)
    with console.capture() as written:
        console.print(table)
    asked = answer.request[-1][1] if answer.request else answer.prompt
    drawn = "\n".join(line.rstrip() for line in written.get().splitlines())
    return f"{wrapped(f'Row {answer.row}: {asked}', width)}\n{drawn}"


def _view(explained: PromptExplanation, place: str, prompts: int) -> PromptView:
    title = explained.folder if prompts > 1 else ""
    spans, curves = _table(explained)
    answers = [
        {
            "row": each.row,
            "asked": each.request or [("", each.prompt)],
            "given": [(label, _COLORS_OF_ANSWERS[label], getattr(each, who)) for who, label in ANSWERS.items()],
        }
        for each in explained.answers
    ]
    return PromptView(place, title, vector_rows(explained), sentences(explained), spans, curves, answers)


def _table(explained: PromptExplanation) -> tuple[list[str], list[tuple[str, list[tuple[str, str]]]]]:
    curves = [(CURVES[name], explained.kl[name]) for name in CURVES if name in explained.kl]
    if not curves:
        return [], []
    kept = [at for at, each in enumerate(curves[0][1].positions) if each.first < each.last or each.first in _TABLED]
    spans = ["all", *(_span(curves[0][1].positions[at]) for at in kept)]
    return spans, [
        (label, [_cell(curve.whole), *(_cell(curve.positions[at]) for at in kept)]) for label, curve in curves
    ]


def _cell(mean: PositionMean) -> tuple[str, str]:
    ends = "" if mean.low is None or mean.high is None else f"[{number(mean.low, 2)}, {number(mean.high, 2)}]"
    return number(mean.value, 2), ends


def _span(mean: PositionMean) -> str:
    return str(mean.first) if mean.first == mean.last else f"{mean.first}–{mean.last}"


def _written(value: float | None) -> str:
    return DASH if value is None else number(value, 2)
