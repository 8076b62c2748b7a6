"""One self-contained HTML page from one or more records."""

import base64
import contextlib
import hashlib
import json
import math
import shlex
import zlib
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from promptkd.errors import RequestError
from promptkd.report.answers import answering_models, browser_data, row_sets
from promptkd.report.differences import DifferenceRow, compared_sentences, difference_columns, difference_table
from promptkd.report.formatting import duration, effect, estimate, joined, listed, probability, score
from promptkd.report.labels import is_teacher, run_labels, unified
from promptkd.report.metrics import MetricInfo, in_order, metric_info
from promptkd.report.models import PROMPTKD, is_about_promptkd, shown_models
from promptkd.report.overview import overview_of
from promptkd.report.plots import MOST_BANDS, bias_data, bias_plots, chart_data, stages
from promptkd.report.preflight import preflight_lines
from promptkd.report.prompts import COLORS, prompt_data, prompt_views
from promptkd.report.summary import summarize
from promptkd.report.tables import (
    ComparisonRow,
    by_setting,
    comparison_table,
    cost_table,
    metric_columns,
    model_order,
    prompts_sentences,
)
from promptkd.report.verdict import running_table, verdict_of
from promptkd.results import Metric, Results
from promptkd.visible import visible

# in the order in which they stand in the page's one script
_SCRIPTS = (
    "page",
    "unpack",
    "charts",
    "files",
    "training",
    "bias",
    "prompts",
    "distributions",
    "diff",
    "rows",
    "start",
)
_COLORS = 16  # 9 to 16 are 1 to 8 with hollow marks and dashed lines; students beyond share colors; the teacher's is 0
_MOST_COLUMNS = 8
_MOST_NAMED = 4
_MOST_NOTES, _FEW = 12, 5
# metrics of an answer's form, which have a table of their own where the columns are many
_FORM = ("eos_share", "cut_share", "length_ratio", "distinct_1", "distinct_2", "response_length")
_BAR_WIDTH, _BAR_MARGIN = 156, 8
_Table = tuple[list[MetricInfo], list[ComparisonRow]]


def render_report(records: Sequence[Results], *, title: str | None = None) -> str:
    """The report as one HTML page that needs no other file and no network. The same records give the same page.

    Every text from a record is escaped by the template engine, or reaches the page's script as packed data and the page
    from there as text; no script but the page's own would run. Raises `RequestError` for no record.
    """
    if not records:
        raise RequestError("Expected at least one results record to report on, got none. Name a run's folder.")
    context, data = _context(records)
    draws = bool(data["charts"] or data["bias"] or data["prompts"] or data["browser"]["sets"])
    folder = resources.files("promptkd.report")
    files = "\n".join(folder.joinpath(f"scripts/{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS)
    script = Markup(f'"use strict";\n(() => {{\n{files}}})();\n' if draws else "")
    style = Markup(folder.joinpath("style.css").read_text(encoding="utf-8"))
    own = {"policy": _policy([script, get_plotlyjs()] if draws else []), "style": style}
    packed = {"data": packed_json(data), "plotly": _packed_plotly() if draws else ""}
    context |= {"title": title or context["title"]} | own | packed
    return _environment().get_template("page.html").render(context, script=script)


@cache
def _environment() -> Environment:
    """Escapes by default, refuses undefined names, and shows control characters instead of emitting them."""
    environment = Environment(
        loader=PackageLoader("promptkd.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    functions = (is_teacher, in_order, score, probability, effect, bar_positions)
    environment.globals.update({each.__name__: each for each in functions}, bar_width=_BAR_WIDTH)
    return environment


def packed_json(value: Any) -> Markup:
    """JSON for the page's script, as `_packed`. Raises ValueError for NaN."""
    return _packed(json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":")))


def _packed(text: str) -> Markup:
    """zlib-compressed UTF-8 in base64, whose alphabet holds nothing that could end a <script> or open a tag."""
    return Markup(base64.b64encode(zlib.compress(text.encode(), 9)).decode("ascii"))


@cache
def _packed_plotly() -> Markup:
    return _packed(get_plotlyjs())


def _policy(scripts: Sequence[str]) -> str:
    """No request, no script but the page's own, which it names by hash."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes) or "'none'"
    styles = "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src {allowed}; {styles}"


def _title(story: Sequence[Results]) -> str:
    runs = [record for record in story if record.kind != "explain-prompt"] or story
    if len(runs) == 1:
        return f"{runs[0].kind.capitalize()} report"
    if methods := max((len(each.training) for each in story if each.kind == "study"), default=0):
        return f"Study of {methods} methods"
    measured = model_order(story)
    students = [model for model in measured if not is_teacher(model)] or measured
    named = listed(students) if 0 < len(students) <= _MOST_NAMED else f"{len(students)} models"
    return f"Report on {named if students else f'{len(story)} records'}"


def _context(records: Sequence[Results]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The names of the templates, and the data that the page's script reads: numbers, and texts as texts."""
    story = unified(records)
    sets, found, bias = row_sets(story), stages(story), bias_plots(story)
    models = answering_models(story, sets)
    colors = dict.fromkeys(filter(is_teacher, models), 0)
    colors |= {model: 1 + at % _COLORS for at, model in enumerate(model for model in models if not is_teacher(model))}
    rows, differences = comparison_table(story), difference_table(story)
    sources = list(map(_provenance, run_labels(story), story))
    cost_heads, cost_lines = cost_table(story)
    data: dict[str, Any] = {
        "models": [{"label": visible(model), "teacher": is_teacher(model), "color": colors[model]} for model in models],
        "charts": chart_data(found),
        "bias": bias_data(bias, models),
        "prompts": prompt_data(story),
        "browser": browser_data(story, sets, models),
    }
    views = [view for each in sets for view in each.views.values()]
    pooled = any(record.kind == "study" for record in records)
    pairs: dict[str, dict[tuple[str, str, str], list[DifferenceRow]]] = {}
    for row in differences:
        pairs.setdefault(row.pair.data, {}).setdefault((row.pair.model, row.pair.baseline, row.run), []).append(row)
    context = {
        "title": _title(story),
        "pooled": pooled,
        "sampled": "the seeds of training and the rows of the data" if pooled else "the rows of the data",
        "verdict": verdict_of(story),
        "running": running_table(story),
        "promptkd": PROMPTKD if is_about_promptkd(story) else (),
        "shown_models": shown_models(story),
        "overview": overview_of(story),
        "summary": summarize(story),
        "notes": _notes(records, [entry["run"] for entry in sources]),
        "groups": _tables(rows, metric_columns(story)),
        "other_prompts": prompts_sentences(rows),
        "explained": [info for info in map(metric_info, metric_columns(story)) if info.meaning],
        "deviations": any(cell.deviation for row in rows for cell in row.cells.values()),
        "differences": pairs,
        "difference_tables": {data: difference_columns(found) for data, found in pairs.items()},
        "tested": any(row.source.p_adjusted is not None for row in differences),
        "bias": bias,
        "most_bands": MOST_BANDS,
        "prompts": prompt_views(story),
        "prompt_colors": COLORS,
        "distributions": bool(data["browser"]["metrics"]),
        "answered": [model for model in models if any(model in view.answers for view in views)],
        "models": models,
        "rows": sets[0] if sets else None,
        "view": views[0] if views else None,
        "recorded_requests": sum(len(each.places) for each in sets),
        "cost_heads": cost_heads,
        "cost_lines": cost_lines,
        "stages": found,
        # a run has the color of its model; the page's script falls back in the same way
        "run_colors": lambda stage: {run: colors.get(run, 1 + at % _COLORS) for at, run in enumerate(stage.runs)},
        "provenance": sources,
        "span": " to ".join(dict.fromkeys(pick(entry["created"] for entry in sources) for pick in (min, max))),
        "colors": colors,
    }
    return context, data


def _provenance(run: str, record: Results) -> dict[str, Any]:
    """What ran, on which code, data and machine, as text."""
    plain = record.model_dump(mode="json", include={"config", "machine"})
    measured = [(metric_info(name), record.metrics[name]) for name in in_order(record.metrics)]
    versions = [(name, version or "not installed") for name, version in record.code.items() if name != "git_commit"]
    facts: dict[str, list[tuple[str, Any]]] = {
        "Before training": preflight_lines(record.preflight) if record.preflight else [],
        "Metrics of the run": [(info.label, joined(*estimate(info, own), info.unit, by=" ")) for info, own in measured],
        "Time": [(name, duration(seconds)) for name, seconds in record.timings.items()],
        "Code": [*versions, ("git commit", record.code.get("git_commit") or "not a checkout")],
        "Machine": [
            ("memory", f"{value / 2**30:.1f} GiB")
            if name == "memory_bytes" and isinstance(value, int)
            else (name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
            for name, value in plain["machine"].items()
        ],
    }
    config = json.dumps(plain["config"], indent=2, ensure_ascii=False) if plain["config"] else ""
    created = record.created
    with contextlib.suppress(ValueError):  # a text that is no time is shown as it is
        moment = datetime.fromisoformat(created)
        created = f"{moment:%Y-%m-%d %H:%M} {moment.tzname() or ''}".strip()
    told = {"created": created, "command": shlex.join(record.command), "config": config}
    return {"run": run, "record": record, "facts": facts, **told}


def _notes(records: Sequence[Results], runs: Sequence[str]) -> dict[str, dict[str, str]]:
    """Each note once, with the runs that have it; not those of a comparison that the summary says in its own words.

    The first ones are shown. The others wait folded: where there are many, those of few runs, unless they warn.
    """
    found: dict[str, list[str]] = {}
    for record, run in zip(records, runs, strict=True):
        said = compared_sentences(record)
        for note in (note for note in record.notes if note not in said):
            found.setdefault(note, []).append(run)
    told = {note: joined(*own, by="; ") if len(own) <= 2 else f"in {len(own)} records" for note, own in found.items()}
    kept_of_study = {note for record in records if record.kind == "study" for note in record.notes}
    kept = kept_of_study | {note for note, own in found.items() if len(own) > _FEW or note.startswith("Warning")}
    others = (
        {note: run for note, run in told.items() if note not in kept}
        if kept_of_study and len(told) > _MOST_NOTES
        else {}
    )
    return {"first": {note: run for note, run in told.items() if note not in others}, "others": others}


def _tables(rows: Sequence[ComparisonRow], names: Sequence[str]) -> dict[str, list[_Table]]:
    """By data and decoding, one table, or two where one would be too wide to read."""
    groups = {}
    for setting, found in by_setting(rows).items():
        measured = [name for name in names if any(name in row.cells for row in found)]
        form = [name for name in measured if name in _FORM] if len(measured) > _MOST_COLUMNS else []
        parts = [[name for name in measured if name not in form], form]
        groups[setting] = [([metric_info(name) for name in part], found) for part in parts if part]
    return groups


def bar_positions(measured: Metric) -> list[str]:
    """Lower end, value and upper end on a bar with zero in its middle and a scale of its own; empty if not finite."""
    ends = [end for end in (measured.low, measured.value, measured.high) if end is not None]
    if not all(math.isfinite(end) for end in ends):
        return []
    middle, reach = _BAR_WIDTH / 2, max(map(abs, ends)) or 1.0
    return [f"{middle + end / reach * (middle - _BAR_MARGIN):.1f}" for end in ends]
