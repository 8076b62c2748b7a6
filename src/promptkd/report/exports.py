"""The merged figures of all records, one row per model, data set, decoding and metric: for CSV and JSON."""

import csv
import io
import json
import math
from collections.abc import Sequence
from typing import Any

from promptkd.report.cost import costs
from promptkd.report.differences import difference_table
from promptkd.report.escape import csv_text
from promptkd.report.metrics import metric
from promptkd.report.story import unified
from promptkd.report.tables import comparison_table
from promptkd.results import Results

__all__ = ["render_csv", "render_json"]

COLUMNS = ("model", "data", "decoding", "run", "metric", "unit", "value", "low", "high", "deviation", "rows")


def render_csv(records: Sequence[Results]) -> str:
    """One tidy line per model, data set, decoding and metric, in the metric's unit; empty cells where nothing is known.

    `low` and `high` are the 95 % interval over rows, `deviation` is the standard deviation between seeds.
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in _figures(unified(records)):
        writer.writerow({name: csv_text(value) if isinstance(value, str) else value for name, value in row.items()})
    return out.getvalue()


def render_json(records: Sequence[Results]) -> str:
    """The figures of `render_csv`, and paired differences, curves, costs and sources, as one JSON object.

    What is not finite is written as one of the words NaN, Infinity and -Infinity, as in the records.
    """
    story = unified(records)
    value = {
        "figures": _figures(story),
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


_SOURCE = {"kind", "created", "command", "config", "code", "machine", "models", "data", "notes"}


def _figures(story: Sequence[Results]) -> list[dict[str, Any]]:
    found = []
    for row in comparison_table(story):
        for name, cell in row.cells.items():
            scale, measured = metric(name).scale, cell.source
            numbers = {key: _scaled(getattr(measured, key), scale) for key in ("value", "low", "high", "deviation")}
            labels = {"model": row.model, "data": row.data, "decoding": row.decoding, "run": row.run}
            found.append({**labels, "metric": name, "unit": metric(name).unit, **numbers, "rows": measured.rows})
    return found


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else value * scale


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
