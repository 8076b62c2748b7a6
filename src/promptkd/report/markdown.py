"""Tables and sentences in Markdown, for a paper or an issue."""

from collections.abc import Sequence

from promptkd.report.bias import bias_plots
from promptkd.report.cost import cost_table
from promptkd.report.differences import DifferenceRow, difference_table
from promptkd.report.escape import markdown_text
from promptkd.report.metrics import effect, metric, probability
from promptkd.report.story import unified
from promptkd.report.summary import summarise
from promptkd.report.tables import Cell, ComparisonRow, by_setting, comparison_table, metric_columns
from promptkd.results import Results

__all__ = ["render_markdown"]

_ARROWS = {"higher": " ↑", "lower": " ↓", None: ""}


def render_markdown(records: Sequence[Results], *, title: str | None = None) -> str:
    """Summary, one table per data set and decoding, paired differences, exposure bias and costs."""
    story = unified(records)
    summary = summarise(story)
    rows = comparison_table(story)
    parts = [f"# {markdown_text(title)}"] if title else []
    parts += [markdown_text(text) for text in (summary.introduction, summary.lead) if text]
    for setting, group in by_setting(rows).items():
        names = [name for name in metric_columns(story) if any(name in row.cells for row in group)]
        parts += [f"## {markdown_text(setting)}", _figures(group, names)]
    if rows:
        sampled = "seeds of training and rows" if any(record.kind == "study" for record in records) else "rows"
        parts.append(
            f"Square brackets: 95 % interval over {sampled}. ±: standard deviation between seeds. Bold: the best "
            "student of a column and every student that cannot be told apart from it."
        )
    if differences := difference_table(story):
        parts += ["## Paired differences", _differences(differences)]
    for plot in bias_plots(story):
        heading = [f"l = {length:g}" for length in plot.lengths]
        lines = [
            [markdown_text(curve.model), *(" ".join(cell).strip() for cell in plot.cells(curve))]
            for curve in plot.curves
        ]
        where = f", {plot.settings}" if plot.settings else ""
        parts += [
            f"## Exposure bias on {markdown_text(plot.data + where)}",
            "ExAccErr(l) in %, l in tokens.",
            _table(["Model", *heading], lines),
        ]
    heads, costs = cost_table(story)
    if costs:
        lines = [[markdown_text(cell) for cell in line] for line in costs]
        parts += ["## Sizes and cost of training", _table(heads, lines)]
    return "\n\n".join(parts) + "\n"


def _figures(rows: list[ComparisonRow], names: list[str]) -> str:
    heads = [metric(name) for name in names]
    head = [markdown_text(f"{each.label} ({each.unit})" if each.unit else each.label) for each in heads]
    head = [text + _ARROWS[each.better] for text, each in zip(head, heads, strict=True)]
    lines = [
        [markdown_text(f"{row.model} ({row.run})" if row.run else row.model)]
        + [_cell(row.cells.get(name)) for name in names]
        for row in rows
    ]
    return _table(["Model", *head], lines)


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    value = f"**{cell.value}**" if cell.best else cell.value
    return " ".join(part for part in (value, cell.deviation, cell.interval) if part)


def _differences(rows: list[DifferenceRow]) -> str:
    known = [row.source for row in rows]
    tested = any(each.p_value is not None or each.p_adjusted is not None for each in known)
    sized = any(each.effect_size is not None for each in known)
    many = len({row.data for row in rows}) > 1
    head = [*(["Data"] if many else []), "Model", "Baseline", "Metric", "Difference"]
    head += [*(["p", "p (Holm)"] if tested else []), *(["d"] if sized else []), "Verdict"]
    lines = []
    for row in rows:
        named = [*([row.data] if many else []), row.model, row.baseline, row.figure.label]
        line = [markdown_text(text) for text in named]
        line.append(" ".join(part for part in (row.value, row.interval, row.figure.difference_unit) if part))
        line += [probability(row.source.p_value), probability(row.source.p_adjusted)] if tested else []
        line += [effect(row.source.effect_size)] if sized else []
        lines.append([*line, row.words])
    return _table(head, lines)


def _table(head: list[str], lines: list[list[str]]) -> str:
    """Cells are Markdown already."""
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))
