"""A comparison as plain text: a block a pair and data set, what it allows one to say, and what the models cost."""

import shutil
import textwrap
from collections.abc import Sequence

from rich.cells import cell_len

from promptkd.report.cost import cost_table
from promptkd.report.differences import DifferenceRow, difference_table
from promptkd.report.metrics import effect, estimate, in_order, probability
from promptkd.report.sentences import Pair, listed, paired
from promptkd.results import Results
from promptkd.visible import shown

__all__ = ["compared_sentences", "compared_text"]

GAP = "  "
_TYPED = str.maketrans("−–", "--")
WIDTH_WITHOUT_TERMINAL = 100
NONE = "-"


def compared_text(record: Results) -> str:
    """The differences of a record of kind "compare", its cost table and its notes.

    Plain text without a control character, whatever the labels hold.
    """
    columns = shutil.get_terminal_size((WIDTH_WITHOUT_TERMINAL, 24)).columns
    blocks = [
        [*_table(record, pair, rows), textwrap.fill(_sentence(pair, rows), columns)]
        for pair, rows in _pairs(record).items()
    ]
    heads, costs = cost_table([record])
    blocks += [_aligned([heads, *costs])] if costs else []
    said = set(compared_sentences(record))
    blocks += [[textwrap.fill(_plain(note), columns) for note in record.notes if note not in said]]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _table(record: Results, pair: Pair, rows: Sequence[DifferenceRow]) -> list[str]:
    return [_heading(record, pair, rows), *_aligned([_HEAD, *(_cells(record, row) for row in rows)])]


def compared_sentences(record: Results) -> list[str]:
    """What can be said of every pair on every data set."""
    return [f"On {pair[0]}: {_sentence(pair, rows)}" for pair, rows in _pairs(record).items()]


def _pairs(record: Results) -> dict[Pair, list[DifferenceRow]]:
    order = in_order(each.metric for each in record.differences)
    pairs = paired(difference_table([record]))
    return {pair: sorted(rows, key=lambda row: order.index(row.source.metric)) for pair, rows in pairs.items()}


def _sentence(pair: Pair, rows: Sequence[DifferenceRow]) -> str:
    _, model, baseline = pair
    said = [
        f"{word} on {listed([row.figure.phrase for row in rows if row.verdict == word])}"
        for word in ("better", "worse")
        if any(row.verdict == word for row in rows)
    ]
    tied = [row.figure.phrase for row in rows if row.verdict == "tied"]
    unknown = [row.figure.phrase for row in rows if row.verdict == "open"]
    parts = [f"{model} is {' and '.join(said)} than {baseline}."] if said else []
    if tied:
        parts.append(f"Cannot tell {'them' if said else f'{model} and {baseline}'} apart on {listed(tied)}.")
    if unknown:
        parts.append(f"No interval, and so no claim, on {listed(unknown)}.")
    return _plain(" ".join(parts))


_HEAD = ["", "model", "baseline", "difference", "95 % interval", "p adj.", "effect", ""]


def _heading(record: Results, pair: Pair, rows: Sequence[DifferenceRow]) -> str:
    data, model, baseline = pair
    counts = sorted({row.rows for row in rows if row.rows is not None})
    seeds = {len(each.decoding.get("seeds", [])) for each in record.evaluations if each.data == data}
    sizes = [f"{' to '.join(map(str, counts))} rows", *(f"{count} seeds" for count in sorted(seeds) if count > 1)]
    return _plain(f"{model} against {baseline} on {data} ({', '.join(sizes)})")


def _cells(record: Results, row: DifferenceRow) -> list[str]:
    found = row.source
    return [
        ", ".join(part for part in (row.figure.label, row.figure.unit) if part),
        _value(record, row, row.model),
        _value(record, row, row.baseline),
        row.value,
        row.interval or NONE,
        probability(found.p_adjusted),
        effect(found.effect_size),
        row.verdict if row.verdict in ("better", "worse") else _WORDS[row.verdict],
    ]


_WORDS = {"tied": "cannot tell them apart", "open": "no interval"}


def _value(record: Results, row: DifferenceRow, label: str) -> str:
    for each in record.evaluations:
        if (each.model, each.data) == (label, row.source.data) and row.source.metric in each.metrics:
            return estimate(row.figure, each.metrics[row.source.metric].model_copy(update={"low": None}))[0]
    return NONE


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """First and last column to the left if they hold words, figures to the right."""
    texts = [[_plain(cell) for cell in line] for line in lines]
    widths = [max(cell_len(line[column]) for line in texts) for column in range(len(texts[0]))]
    words = {0} | ({len(widths) - 1} if not texts[0][-1] else set())
    aligned = []
    for line in texts:
        cells = []
        for column, text in enumerate(line):
            room = " " * (widths[column] - cell_len(text))
            cells.append(text + room if column in words else room + text)
        aligned.append(GAP.join(cells).rstrip())
    return aligned


def _plain(text: str) -> str:
    return shown(" ".join(text.split())).translate(_TYPED)
