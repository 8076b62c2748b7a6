"""The table of the page as plain text."""

import shutil
import textwrap
from collections.abc import Sequence

from rich.cells import cell_len

from promptkd.report.differences import difference_table
from promptkd.report.metrics import metric
from promptkd.report.sentences import comparison_sentences
from promptkd.report.story import unified
from promptkd.report.tables import ComparisonRow, by_setting, comparison_table, metric_columns
from promptkd.results import Results
from promptkd.visible import shown

__all__ = ["terminal_table"]

GAP = "  "
WIDTH_WITHOUT_TERMINAL = 100
LEGEND = "* the best student, and every student that cannot be told apart from it"


def terminal_table(records: Sequence[Results], *, width: int | None = None) -> str:
    """The table of evaluations and a sentence per compared pair, in lines of at most `width` cells.

    Plain text: no colour, no control character, whatever the labels hold. Columns that do not fit go into a further
    block below. `width` is the terminal's by default, 100 where there is none.
    """
    columns = width or shutil.get_terminal_size((WIDTH_WITHOUT_TERMINAL, 24)).columns
    story = unified(records)
    table = comparison_table(story)
    groups = by_setting(table)
    paragraphs = []
    for setting, rows in groups.items():
        heading = [_wrapped(setting, columns)] if len(groups) > 1 else []
        names = [name for name in metric_columns(story) if any(name in row.cells for row in rows)]
        paragraphs += heading + ["\n".join(block) for block in _blocks(rows, names, columns)]
    if any(cell.best for row in table for cell in row.cells.values()):
        paragraphs.append(_wrapped(LEGEND, columns))
    sentences = comparison_sentences(difference_table(story)).values()
    return "\n\n".join(paragraphs + [_wrapped(sentence, columns) for sentence in sentences])


def _wrapped(text: str, width: int) -> str:
    return textwrap.fill(_plain(text), width, break_on_hyphens=False, break_long_words=False)


def _plain(text: str) -> str:
    """Without control characters or line breaks; the typographic minus becomes one that can be typed."""
    return shown(" ".join(text.split())).replace("−", "-")


def _blocks(rows: list[ComparisonRow], metrics: list[str], width: int) -> list[list[str]]:
    """The table as lines, cut between columns wherever it would exceed `width`."""
    if not rows:
        return []
    keys = [[_plain(text) for text in _key(row, rows)] for row in rows]
    stubs = [GAP.join(_padded(text, column, keys) for column, text in enumerate(key)) for key in keys]
    blocks: list[list[list[str]]] = []
    used = width
    for name in metrics:
        cells = _column(name, rows)
        size = max(cell_len(cell) for cell in cells) + len(GAP)
        if used + size > width:
            blocks.append([["", ""] + [line for stub in stubs for line in (stub, "")]])
            used = max(map(cell_len, blocks[-1][0]))
        blocks[-1].append(cells)
        used += size
    return [_lines(block) for block in blocks]


def _key(row: ComparisonRow, rows: list[ComparisonRow]) -> list[str]:
    """The run stands beside the model only where it tells rows apart."""
    return [row.model, row.run] if any(other.run for other in rows) else [row.model]


def _padded(text: str, column: int, keys: list[list[str]]) -> str:
    return text + " " * (max(cell_len(key[column]) for key in keys) - cell_len(text))


def _column(name: str, rows: list[ComparisonRow]) -> list[str]:
    """Two lines of heading, then two per row: the value; below it deviation between seeds and interval."""
    figure = metric(name)
    found = [row.cells.get(name) for row in rows]
    room = " " if any(cell and cell.best for cell in found) else ""  # keeps digits aligned beside an asterisk
    cells = [
        _plain(figure.label) + room,
        _plain(", ".join(part for part in (figure.unit, figure.better) if part)) + room,
    ]
    for cell in found:
        if cell is None:
            cells += ["-" + room, ""]
        else:
            below = " ".join(filter(None, (cell.deviation, cell.interval)))
            cells += [_plain(cell.value) + ("*" if cell.best else room), _plain(below) + room]
    return cells


def _lines(block: list[list[str]]) -> list[str]:
    stub, *columns = block
    lines = []
    for index, first in enumerate(stub):
        texts = [first + " " * (max(map(cell_len, stub)) - cell_len(first))]
        for cells in columns:
            size = max(map(cell_len, cells))
            texts.append(" " * (size - cell_len(cells[index])) + cells[index])
        lines.append(GAP.join(texts).rstrip())
    return lines
