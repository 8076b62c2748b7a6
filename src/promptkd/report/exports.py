"""The report for papers and other programs: Markdown, CSV and JSON."""

import csv
import io
import json
import math
from collections.abc import Sequence
from typing import Any

from promptkd.report.differences import DifferenceRow, difference_table
from promptkd.report.escape import csv_text, markdown_text
from promptkd.report.formatting import DASH, effect, probability
from promptkd.report.labels import unified
from promptkd.report.metrics import metric_info
from promptkd.report.plots import bias_plots
from promptkd.report.summary import summarize
from promptkd.report.tables import (
    Cell,
    ComparisonRow,
    by_setting,
    comparison_table,
    cost_table,
    costs,
    metric_columns,
)
from promptkd.results import Results

_COLUMNS = ("model", "data", "decoding", "run", "metric", "unit", "value", "low", "high", "deviation", "rows")
_SOURCE = {"kind", "created", "command", "config", "code", "machine", "models", "data", "notes"}
_ARROWS = {"higher": " ↑", "lower": " ↓", None: ""}


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
        "differences": [
            row.source.model_dump(mode="json") | {"verdict": row.verdict} for row in difference_table(story)
        ],
        "curves": [curve.model_dump(mode="json") for record in story for curve in record.curves],
        "costs": [
            {
                "model": cost.model,
                "parameters": cost.parameters,
                "training": cost.training.model_dump(mode="json") if cost.training else None,
            }
            for cost in costs(story)
        ],
        "sources": [record.model_dump(mode="json", include=_SOURCE) for record in story],
    }
    return json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _metric_lines(story: Sequence[Results]) -> list[dict[str, Any]]:
    found = []
    for row in comparison_table(story):
        for name, measured in row.metrics.items():
            info = metric_info(name)
            numbers = {key: getattr(measured, key) for key in ("value", "low", "high", "deviation")}
            numbers = {key: None if value is None else value * info.scale for key, value in numbers.items()}
            labels = {"model": row.model, "data": row.data, "decoding": row.decoding, "run": row.run}
            found.append({**labels, "metric": name, "unit": info.unit, **numbers, "rows": measured.rows})
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


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
        parts += [
            f"## Exposure bias on {markdown_text(', '.join(filter(None, (plot.data, plot.settings))))}",
            "ExAccErr(l) in %, l in tokens.",
            _table(
                ["Model", *(f"l = {length:g}" for length in plot.lengths)],
                [
                    [markdown_text(curve.model), *(" ".join(cell).strip() for cell in plot.cells(curve))]
                    for curve in plot.curves
                ],
            ),
        ]
    heads, lines = cost_table(story)
    if lines:
        escaped = [[markdown_text(cell) for cell in line] for line in lines]
        parts += ["## Sizes and cost of training", _table(heads, escaped)]
    return "\n\n".join(parts) + "\n"


def _results(rows: list[ComparisonRow], names: list[str]) -> str:
    infos = [metric_info(name) for name in names]
    heads = [f"{info.label} ({info.unit})" if info.unit else info.label for info in infos]
    return _table(
        ["Model", *(markdown_text(head) + _ARROWS[info.better] for head, info in zip(heads, infos, strict=True))],
        [
            [markdown_text(f"{row.model} ({row.run})" if row.run else row.model)]
            + [_cell(row.cells.get(name)) for name in names]
            for row in rows
        ],
    )


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return DASH
    value = f"**{cell.value}**" if cell.best else cell.value
    return " ".join(part for part in (value, cell.deviation, cell.interval) if part)


def _differences(rows: list[DifferenceRow]) -> str:
    tested = any(row.source.p_value is not None or row.source.p_adjusted is not None for row in rows)
    sized = any(row.source.effect_size is not None for row in rows)
    many = len({row.source.data for row in rows}) > 1
    head = ["Data", "Model", "Baseline", "Metric", "Difference", "p", "p (Holm)", "d", "Verdict"]
    shown = [many, True, True, True, True, tested, tested, sized, True]
    lines = [
        [
            *map(markdown_text, (*row.pair, row.info.label)),
            " ".join(part for part in (row.value, row.interval, row.info.difference_unit) if part),
            probability(row.source.p_value),
            probability(row.source.p_adjusted),
            effect(row.source.effect_size),
            row.words,
        ]
        for row in rows
    ]
    kept = [[cell for cell, show in zip(line, shown, strict=True) if show] for line in (head, *lines)]
    return _table(kept[0], kept[1:])


def _table(head: list[str], lines: list[list[str]]) -> str:
    """Cells are Markdown already."""
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))
