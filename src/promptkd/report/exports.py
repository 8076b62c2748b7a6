"""The report for papers and other programs: Markdown, CSV and JSON. Hostile text stays text in each."""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from pydantic_core import to_json

from promptkd.report.differences import DifferenceRow, difference_table
from promptkd.report.formatting import DASH, effect, joined, probability
from promptkd.report.labels import unified
from promptkd.report.metrics import metric_info
from promptkd.report.plots import bias_plots
from promptkd.report.summary import summarize
from promptkd.report.tables import Cell, ComparisonRow, by_setting, comparison_table, cost_table, costs, metric_columns
from promptkd.results import Results
from promptkd.visible import visible

_COLUMNS = ("model", "data", "decoding", "run", "metric", "unit", "value", "low", "high", "deviation", "rows")
_SOURCE = {"kind", "created", "command", "config", "code", "machine", "models", "data", "notes"}
_ARROWS = {"higher": " ↑", "lower": " ↓", None: ""}
_IN_MARKDOWN = str.maketrans(
    {character: f"\\{character}" for character in "\\`*_{}[]#|~$"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
)
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠", "\t", "\n")


def render_csv(records: Sequence[Results]) -> str:
    """One line per model, data set, decoding and metric, in the metric's unit; cells without a value are empty.

    `low` and `high` are the 95 % interval over rows, `deviation` is the standard deviation between seeds.
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for line in _metric_lines(unified(records)):
        writer.writerow({name: csv_text(value) if isinstance(value, str) else value for name, value in line.items()})
    return out.getvalue()


def render_json(records: Sequence[Results]) -> str:
    """The metrics of `render_csv`, and paired differences, curves, costs and sources, as one JSON object.

    What is not finite is written as one of the words NaN, Infinity and -Infinity, as in the records.
    """
    story = unified(records)
    value = {
        "figures": _metric_lines(story),
        "differences": [row.source.model_dump() | {"verdict": row.verdict} for row in difference_table(story)],
        "curves": [curve for record in story for curve in record.curves],
        "costs": [cost._asdict() for cost in costs(story)],
        "sources": [record.model_dump(mode="json", include=_SOURCE) for record in story],
    }
    plain = json.loads(to_json(value, inf_nan_mode="strings"))
    return json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _metric_lines(story: Sequence[Results]) -> list[dict[str, Any]]:
    found = []
    for row in comparison_table(story):
        for name, measured in row.metrics.items():
            info = metric_info(name)
            labels = {"model": row.model, "data": row.data, "decoding": row.decoding, "run": row.run}
            numbers = measured.model_dump(include={"value", "low", "high", "deviation"})
            numbers = {key: None if value is None else value * info.scale for key, value in numbers.items()}
            found.append({**labels, "metric": name, "unit": info.unit, **numbers, "rows": measured.rows})
    return found


def csv_text(text: str) -> str:
    """A cell that no spreadsheet reads as a formula: an apostrophe stands before one that begins like one."""
    shown = visible(text)
    return f"'{shown}" if shown.startswith(_FORMULA) else shown


def markdown_text(text: str) -> str:
    """One line that Markdown shows as it is: no markup, no table cell, no HTML."""
    return visible(" ".join(text.split())).translate(_IN_MARKDOWN)


def render_markdown(records: Sequence[Results], *, title: str | None = None) -> str:
    """Summary, one table per data set and decoding, paired differences, exposure bias and costs."""
    story = unified(records)
    summary, rows = summarize(story), comparison_table(story)
    parts = [f"# {markdown_text(title)}"] if title else []
    parts += [markdown_text(text) for text in (summary.introduction, summary.lead) if text]
    for setting, group in by_setting(rows).items():
        names = [name for name in metric_columns(story) if any(name in row.cells for row in group)]
        parts += [f"## {markdown_text(setting)}", _results(group, names)]
    if rows:
        sampled = "seeds of training and rows" if any(record.kind == "study" for record in records) else "rows"
        parts.append(
            f"Square brackets: 95 % interval over {sampled}. ±: standard deviation between seeds. Bold: the best "
            "student of a column and every student that cannot be told apart from it."
        )
    if differences := difference_table(story):
        parts += ["## Paired differences", _differences(differences)]
    for plot in bias_plots(story):
        heads = ["Model", *(f"l = {length:g}" for length in plot.lengths)]
        cells = [[joined(*cell, by=" ") for cell in plot.cells(curve)] for curve in plot.curves]
        lines = [[markdown_text(curve.model), *line] for curve, line in zip(plot.curves, cells, strict=True)]
        parts.append(f"## Exposure bias on {markdown_text(joined(plot.data, plot.settings))}")
        parts += ["ExAccErr(l) in %, l in tokens.", _table(heads, lines)]
    heads, lines = cost_table(story)
    if lines:
        parts += ["## Sizes and cost of training", _table(heads, [list(map(markdown_text, line)) for line in lines])]
    return "\n\n".join(parts) + "\n"


def _results(rows: list[ComparisonRow], names: list[str]) -> str:
    heads = ["Model"]
    for info in map(metric_info, names):
        heads.append(markdown_text(f"{info.label} ({info.unit})" if info.unit else info.label) + _ARROWS[info.better])
    labels = [markdown_text(f"{row.model} ({row.run})" if row.run else row.model) for row in rows]
    cells = [[_cell(row.cells.get(name)) for name in names] for row in rows]
    return _table(heads, [[label, *line] for label, line in zip(labels, cells, strict=True)])


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return DASH
    return joined(f"**{cell.value}**" if cell.best else cell.value, cell.deviation, cell.interval, by=" ")


def _differences(rows: list[DifferenceRow]) -> str:
    tested = any(row.source.p_value is not None or row.source.p_adjusted is not None for row in rows)
    sized = any(row.source.effect_size is not None for row in rows)
    many = len({row.pair.data for row in rows}) > 1
    shown = [many, True, True, True, True, tested, tested, sized, True]
    lines = [["Data", "Model", "Baseline", "Metric", "Difference", "p", "p (Holm)", "d", "Verdict"]]
    for row in rows:
        amount = joined(row.value, row.interval, row.info.difference_unit, by=" ")
        p_values = map(probability, (row.source.p_value, row.source.p_adjusted))
        names = map(markdown_text, (*row.pair, row.info.label))
        lines.append([*names, amount, *p_values, effect(row.source.effect_size), row.words])
    head, *kept = ([cell for cell, show in zip(line, shown, strict=True) if show] for line in lines)
    return _table(head, kept)


def _table(head: list[str], lines: list[list[str]]) -> str:
    """Cells are Markdown already."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))
