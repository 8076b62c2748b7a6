"""What the page's templates and its script are given."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from promptkd.report.answers import answering_models, browser_data, first_requests, row_sets
from promptkd.report.bars import interval_bar
from promptkd.report.bias import bias_data, bias_plots
from promptkd.report.compared import compared_sentences
from promptkd.report.cost import cost_table
from promptkd.report.differences import DifferenceRow, difference_table
from promptkd.report.labels import is_teacher
from promptkd.report.metrics import Figure, effect, metric, probability
from promptkd.report.plots import Stage, chart_data, stages
from promptkd.report.provenance import Provenance, provenance
from promptkd.report.story import unified
from promptkd.report.summary import summarise
from promptkd.report.tables import ComparisonRow, by_setting, comparison_table, metric_columns
from promptkd.results import Results
from promptkd.visible import visible

__all__ = ["page_context"]

COLOURS = 8
"""Students beyond so many share colours; the teacher's is 0."""
MOST_COLUMNS = 8
MOST_RUNS_NAMED = 2
FORM = ("eos_share", "cut_share", "length_ratio", "distinct_1", "distinct_2", "response_length")
"""What is measured of an answer's form; it stands in a table of its own where the columns are many."""
_Tables = list[tuple[list[Figure], list[ComparisonRow]]]
_Pairs = dict[tuple[str, str, str], list[tuple[DifferenceRow, Markup]]]


def page_context(records: Sequence[Results]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the templates name, and the data that the page's script reads: numbers, and texts as texts."""
    story = unified(records)
    sets, found, bias = row_sets(story), stages(story), bias_plots(story)
    models = answering_models(story, sets)
    colours = _colours(models)
    rows, differences, sources = comparison_table(story), difference_table(story), provenance(story)
    cost_heads, cost_lines = cost_table(story)
    data: dict[str, Any] = {
        "models": [
            {"label": visible(model), "teacher": is_teacher(model), "colour": colours[model]} for model in models
        ],
        "charts": chart_data(found),
        "bias": bias_data(bias, models),
        "browser": browser_data(story, sets, models),
    }
    pooled = any(record.kind == "study" for record in records)
    context = {
        "pooled": pooled,
        "sampled": "the seeds of training and the rows of the data" if pooled else "the rows of the data",
        "summary": summarise(story),
        "notes": _notes(records, sources),
        "groups": _tables(rows, metric_columns(story)),
        "explained": [figure for figure in map(metric, metric_columns(story)) if figure.meaning],
        "deviations": any(cell.deviation for row in rows for cell in row.cells.values()),
        "differences": _pairs(differences),
        "tested": any(row.source.p_adjusted is not None for row in differences),
        "bias": bias,
        "distributions": bool(data["browser"]["metrics"]),
        "answered": [model for model in models if any(model in view.answers for each in sets for view in each.views)],
        "requests": first_requests(sets, models),
        "view": sets[0].views[0].label if sets else "",
        "recorded_requests": sum(len(each.places) for each in sets),
        "cost_heads": cost_heads,
        "cost_lines": cost_lines,
        "stages": found,
        "run_colours": lambda stage: _run_colours(stage, colours),
        "provenance": sources,
        "span": " to ".join(dict.fromkeys(f(entry.created for entry in sources) for f in (min, max))),
        "colours": colours,
        "is_teacher": is_teacher,
        "probability": probability,
        "effect": effect,
    }
    return context, data


def _colours(models: Sequence[str]) -> dict[str, int]:
    students = [model for model in models if not is_teacher(model)]
    return {model: 0 if is_teacher(model) else 1 + students.index(model) % COLOURS for model in models}


def _run_colours(stage: Stage, colours: dict[str, int]) -> dict[str, int]:
    """A run has the colour of its model; the page's script falls back in the same way."""
    return {name: colours.get(name, 1 + at % COLOURS) for at, name in enumerate(stage.runs)}


def _notes(records: Sequence[Results], sources: Sequence[Provenance]) -> dict[str, str]:
    """Each note once, with the runs that say it; not those of a comparison that the summary says in its own words."""
    notes: dict[str, list[str]] = {}
    for record, entry in zip(records, sources, strict=True):
        said = compared_sentences(record)
        for note in record.notes:
            if note not in said:
                notes.setdefault(note, []).append(entry.run)
    return {
        note: "; ".join(filter(None, runs)) if len(runs) <= MOST_RUNS_NAMED else f"in {len(runs)} records"
        for note, runs in notes.items()
    }


def _tables(rows: Sequence[ComparisonRow], names: Sequence[str]) -> dict[str, _Tables]:
    """By data and decoding, one table, or two where one would be too wide to read."""
    groups: dict[str, _Tables] = {}
    for setting, found in by_setting(rows).items():
        measured = [name for name in names if any(name in row.cells for row in found)]
        form = [name for name in measured if name in FORM] if len(measured) > MOST_COLUMNS else []
        parts = [[name for name in measured if name not in form], form]
        groups[setting] = [([metric(name) for name in part], found) for part in parts if part]
    return groups


def _pairs(rows: Sequence[DifferenceRow]) -> dict[str, _Pairs]:
    """Data set -> (model, baseline, run) -> its differences, each with its drawing."""
    sets: dict[str, _Pairs] = {}
    for row in rows:
        pairs = sets.setdefault(row.data, {})
        pairs.setdefault((row.model, row.baseline, row.run), []).append((row, interval_bar(row)))
    return sets
