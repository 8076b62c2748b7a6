"""What commands print: the evaluations as a table, a comparison with its costs, and aligned cells for other tables."""

import io
import shutil
import textwrap
from collections.abc import Collection, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from promptkd.report.differences import (
    DifferenceRow,
    compared_pairs,
    compared_sentence,
    compared_sentences,
    comparison_sentences,
    difference_table,
)
from promptkd.report.formatting import effect, estimate, joined, probability, typed
from promptkd.report.labels import unified
from promptkd.report.metrics import metric_info
from promptkd.report.tables import ComparisonRow, by_setting, comparison_table, cost_table, metric_columns
from promptkd.results import Results

_WITHOUT_TERMINAL = (100, 24)
_UNLIMITED = 1 << 16
_LEGEND = "* the best student, and every student that cannot be told apart from it"
_COMPARED = ["", "model", "baseline", "difference", "95 % interval", "p adj.", "effect", ""]
_VERDICTS = {"tied": "cannot tell them apart", "open": "no interval"}


def text_table(lines: Sequence[Sequence[str]], *, left: Collection[int] = (0,)) -> str:
    """Cells aligned in columns, those in `left` to the left, the others to the right. A cell may have several lines.

    Plain text without color or control characters. Lines are as wide as their cells, on a terminal and in a pipe: no
    cell is ever wrapped or cut.
    """
    table = Table.grid(padding=(0, 2, 0, 0))
    for column in range(len(lines[0])):
        table.add_column(justify="left" if column in left else "right", no_wrap=True)
    for line in lines:
        table.add_row(*(Text("\n".join(map(typed, cell.split("\n")))) for cell in line))
    written = io.StringIO()
    Console(file=written, width=_UNLIMITED, color_system=None, force_terminal=False, force_jupyter=False).print(table)
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines())


def terminal_table(records: Sequence[Results], *, width: int | None = None) -> str:
    """The table of evaluations and a sentence per compared pair, in lines of at most `width` cells.

    Columns that do not fit go into a further block below. `width` is by default the terminal's, or 100 without one.
    """
    width = width or shutil.get_terminal_size(_WITHOUT_TERMINAL).columns
    story = unified(records)
    table = comparison_table(story)
    groups = by_setting(table)
    paragraphs = []
    for setting, rows in groups.items():
        paragraphs += [_wrapped(setting, width)] if len(groups) > 1 else []
        paragraphs += _blocks(rows, metric_columns(story), width)
    said = [_LEGEND] if any(cell.best for row in table for cell in row.cells.values()) else []
    said += comparison_sentences(difference_table(story)).values()
    return "\n\n".join(paragraphs + [_wrapped(sentence, width) for sentence in said])


def _wrapped(text: str, width: int) -> str:
    return textwrap.fill(typed(text), width, break_on_hyphens=False, break_long_words=False)


def _blocks(rows: list[ComparisonRow], metrics: list[str], width: int) -> list[str]:
    """The table, split between columns wherever it would exceed `width`."""
    labels = [["\n", *(row.model for row in rows)]]
    labels += [["\n", *(row.run for row in rows)]] if any(row.run for row in rows) else []

    def block(columns: list[list[str]]) -> str:
        return text_table(list(zip(*labels, *columns, strict=True)), left=range(len(labels)))

    blocks: list[list[list[str]]] = []
    for column in (_column(name, rows) for name in metrics if any(name in row.cells for row in rows)):
        if not blocks or max(map(cell_len, block([*blocks[-1], column]).split("\n"))) > width:
            blocks.append([])
        blocks[-1].append(column)
    return [block(columns) for columns in blocks]


def _column(name: str, rows: list[ComparisonRow]) -> list[str]:
    """Label over unit and direction, then per row the value over deviation between seeds and interval."""
    info = metric_info(name)
    cells = [f"{info.label}\n{joined(info.unit, info.better)}"]
    for cell in (row.cells.get(name) for row in rows):
        below = cell and joined(cell.deviation, cell.interval, by=" ")
        cells.append(f"{'*' if cell.best else ''}{cell.value}\n{below}" if cell else "-\n")
    return cells


def compared_text(record: Results) -> str:
    """The differences of a record of kind "compare", what they allow one to say, its cost table and its notes."""
    width = shutil.get_terminal_size(_WITHOUT_TERMINAL).columns
    blocks = []
    for pair, rows in compared_pairs(record).items():
        counts = sorted({row.source.difference.rows for row in rows if row.source.difference.rows is not None})
        seeds = {len(each.decoding.get("seeds", [])) for each in record.evaluations if each.data == pair.data}
        sizes = [f"{' to '.join(map(str, counts))} rows", *(f"{count} seeds" for count in sorted(seeds) if count > 1)]
        heading = typed(f"{pair.model} against {pair.baseline} on {pair.data} ({', '.join(sizes)})")
        table = text_table([_COMPARED, *(_compared_cells(record, row) for row in rows)], left=(0, len(_COMPARED) - 1))
        blocks.append(f"{heading}\n{table}\n{textwrap.fill(compared_sentence(pair, rows), width)}")
    heads, costs = cost_table([record])
    blocks += [text_table([heads, *costs])] if costs else []
    said = compared_sentences(record)
    blocks.append("\n".join(textwrap.fill(typed(note), width) for note in record.notes if note not in said))
    return "\n\n".join(filter(None, blocks))


def _compared_cells(record: Results, row: DifferenceRow) -> list[str]:
    measured = {
        each.model: estimate(row.info, each.metrics[row.source.metric].model_copy(update={"low": None}))[0]
        for each in reversed(record.evaluations)  # the first of a model counts
        if each.data == row.pair.data and row.source.metric in each.metrics
    }
    return [
        joined(row.info.label, row.info.unit),
        measured.get(row.pair.model, "-"),
        measured.get(row.pair.baseline, "-"),
        row.value,
        row.interval or "-",
        probability(row.source.p_adjusted),
        effect(row.source.effect_size),
        _VERDICTS.get(row.verdict, row.verdict),
    ]
