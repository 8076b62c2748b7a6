"""The report as text: what commands print, and Markdown, CSV and JSON, in each of which hostile text stays text."""

import csv
import io
import json
import shutil
import textwrap
from collections.abc import Collection, Sequence
from typing import Any

from pydantic_core import to_json
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from promptkd.report import differences
from promptkd.report.formatting import DASH, effect, estimate, joined, probability, typed
from promptkd.report.labels import unified
from promptkd.report.metrics import metric_info
from promptkd.report.models import context_sentence
from promptkd.report.overview import overview_of
from promptkd.report.plots import bias_plots
from promptkd.report.summary import summarize
from promptkd.report.tables import (
    ComparisonRow,
    by_setting,
    comparison_table,
    cost_table,
    costs,
    metric_columns,
    prompts_sentences,
)
from promptkd.report.verdict import running_table, verdict_of
from promptkd.results import Results
from promptkd.visible import visible

_WITHOUT_TERMINAL = (100, 24)
_MOST_PAIRS = 12  # that are told in sentences where a study's methods are told in fewer
_LEGEND = "* the best student, and every student that cannot be told apart from it"
_COMPARED = ["", "model", "baseline", "difference", "95 % interval", "p adj.", "effect", ""]
_VERDICTS = {"tied": "cannot tell them apart", "open": "no interval"}
_COLUMNS = ("model", "data", "decoding", "run", "metric", "unit", "value", "low", "high", "deviation", "rows")
_SOURCE = {"kind", "created", "command", "config", "code", "machine", "models", "data", "notes"}
_ARROWS = {"higher": " ↑", "lower": " ↓", None: ""}
_HTML = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
_IN_MARKDOWN = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_{}[]#|~$"} | _HTML)
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠", "\t", "\n")


def text_table(lines: Sequence[Sequence[str]], *, left: Collection[int] = (0,)) -> str:
    """Cells aligned in columns, those in `left` to the left: plain text, of which no cell is ever wrapped or cut."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for column in range(len(lines[0])):
        table.add_column(justify="left" if column in left else "right", no_wrap=True)
    for line in lines:
        table.add_row(*(Text("\n".join(map(typed, cell.split("\n")))) for cell in line))
    written = io.StringIO()
    Console(file=written, width=1 << 16, color_system=None, force_terminal=False, force_jupyter=False).print(table)
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines())


def terminal_table(records: Sequence[Results], *, width: int | None = None) -> str:
    """The table of evaluations and a sentence per compared pair, in lines of `width` cells, else of the terminal's."""
    width, story = width or shutil.get_terminal_size(_WITHOUT_TERMINAL).columns, unified(records)
    table, paragraphs = comparison_table(story), _verdict(story, width)
    groups = by_setting(table)
    for setting, rows in groups.items():
        paragraphs += [wrapped(setting, width)] if len(groups) > 1 else []
        paragraphs += _blocks(rows, metric_columns(story), width)
    said = [_LEGEND] if any(cell.best for row in table for cell in row.cells.values()) else []
    said += [*prompts_sentences(table), *([sentence] if (sentence := context_sentence(story)) else [])]
    compared, overview = differences.comparison_sentences(differences.difference_table(story)), overview_of(story)
    if overview is None or len(compared) <= _MOST_PAIRS:
        said += compared.values()
    if overview is not None:
        said += overview.sentences
    return "\n\n".join(paragraphs + [wrapped(sentence, width) for sentence in said])


def _verdict(story: Sequence[Results], width: int) -> list[str]:
    """What the student keeps of its teacher, and what both take to run, a column per model."""
    told, (heads, lines, how) = verdict_of(story), running_table(story)
    paragraphs = [wrapped(sentence, width) for sentence in ([told.lead, *told.others] if told else [])]
    if lines:
        columns = ["", *heads[1:]], *lines
        paragraphs += [text_table(list(zip(*columns, strict=True))), wrapped(how, width)]
    return paragraphs


def wrapped(text: str, width: int) -> str:
    """Text in lines of at most `width` cells, as a terminal shows it."""
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
        below = joined(cell.deviation, cell.interval, by=" ") if cell else ""
        cells.append(f"{'*' if cell.best else ''}{cell.value}\n{below}" if cell else "-\n")
    return cells


def compared_text(record: Results) -> str:
    """The differences of a record of kind "compare", what they allow one to say, its cost table and its notes."""
    width, blocks = shutil.get_terminal_size(_WITHOUT_TERMINAL).columns, []
    for pair, rows in differences.compared_pairs(record).items():
        counts = sorted({row.source.difference.rows for row in rows if row.source.difference.rows is not None})
        seeds = {len(each.decoding.get("seeds", [])) for each in record.evaluations if each.data == pair.data}
        sizes = [f"{' to '.join(map(str, counts))} rows", *(f"{count} seeds" for count in sorted(seeds) if count > 1)]
        heading = typed(f"{pair.model} against {pair.baseline} on {pair.data} ({', '.join(sizes)})")
        table = text_table([_COMPARED, *(_compared_cells(record, row) for row in rows)], left=(0, len(_COMPARED) - 1))
        blocks.append(f"{heading}\n{table}\n{textwrap.fill(differences.compared_sentence(pair, rows), width)}")
    heads, lines = cost_table([record])
    blocks += [text_table([heads, *lines])] if lines else []
    said = differences.compared_sentences(record)
    blocks.append("\n".join(textwrap.fill(typed(note), width) for note in record.notes if note not in said))
    return "\n\n".join(filter(None, blocks))


def _compared_cells(record: Results, row: differences.DifferenceRow) -> list[str]:
    measured = {
        each.model: estimate(row.info, each.metrics[row.source.metric].model_copy(update={"low": None}))[0]
        for each in reversed(record.evaluations)  # the first of a model counts
        if each.data == row.pair.data and row.source.metric in each.metrics
    }
    values = [measured.get(label, "-") for label in (row.pair.model, row.pair.baseline)]
    tested = [probability(row.source.p_adjusted), effect(row.source.effect_size)]
    told = _VERDICTS.get(row.verdict, row.verdict)
    return [joined(row.info.label, row.info.unit), *values, row.value, row.interval or "-", *tested, told]


def render_csv(records: Sequence[Results]) -> str:
    """One line per model, data set, decoding and metric, in its unit: value, 95 % interval, deviation between seeds."""
    out = io.StringIO()
    writer = csv.DictWriter(out, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for line in _metric_lines(unified(records)):
        writer.writerow({name: csv_text(value) if isinstance(value, str) else value for name, value in line.items()})
    return out.getvalue()


def render_json(records: Sequence[Results]) -> str:
    """The metrics of `render_csv`, paired differences, curves, costs and sources as one JSON object.

    What is not finite is one of the words NaN, Infinity and -Infinity, as in the records.
    """
    story = unified(records)
    compared = differences.difference_table(story)
    metrics = _metric_lines(story)
    value = {
        "metrics": metrics,
        "differences": [row.source.model_dump() | {"verdict": row.verdict} for row in compared],
        "curves": [
            curve.model_dump(exclude={"points": {"__all__": {"row_parts"}}})
            for record in story
            for curve in record.curves
        ],
        "prompts": [prompt for record in story for prompt in record.prompts],
        "verdict": verdict_of(story),
        "inference": {label: each for record in story for label, each in record.inference.items()},
        "costs": [cost._asdict() for cost in costs(story)],
        "sources": [record.model_dump(mode="json", include=_SOURCE) for record in story],
        "figures": metrics,  # their old name, for one version
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
    """Verdict, summary, one table per data set and decoding, paired differences, exposure bias and costs."""
    story = unified(records)
    summary, rows = summarize(story), comparison_table(story)
    parts = [f"# {markdown_text(title)}"] if title else []
    told, (running, models, how) = verdict_of(story), running_table(story)
    parts += [markdown_text(text) for text in ([told.lead, *told.others] if told else [])]
    if models:
        parts += [markdown_table(running, [list(map(markdown_text, line)) for line in models]), markdown_text(how)]
    parts += [markdown_text(text) for text in (summary.introduction, summary.lead) if text]
    for setting, group in by_setting(rows).items():
        names = [name for name in metric_columns(story) if any(name in row.cells for row in group)]
        parts += [f"## {markdown_text(setting)}", _results(group, names)]
    if rows:
        sampled = "seeds of training and rows" if any(record.kind == "study" for record in records) else "rows"
        marks = f"Square brackets: 95 % interval over {sampled}. ±: standard deviation between seeds."
        parts.append(f"{marks} Bold: the best student of a column and every student that cannot be told apart from it.")
        parts += map(markdown_text, prompts_sentences(rows))
    if compared := differences.difference_table(story):
        parts += ["## Paired differences", _differences(compared)]
    for plot in bias_plots(story):
        heads = ["Model", *(f"{plot.kind.symbol} = {length:g}" for length in plot.lengths)]
        curves = [(curve.model, plot.cells(curve)) for curve in plot.curves]
        lines = [[markdown_text(model), *(joined(*cell, by=" ") for cell in cells)] for model, cells in curves]
        parts.append(f"## Exposure bias on {markdown_text(joined(plot.title, plot.settings))}")
        parts += [plot.kind.sentence, markdown_table(heads, lines)]
    heads, lines = cost_table(story)
    if lines:
        parts += [
            "## Sizes and cost of training",
            markdown_table(heads, [list(map(markdown_text, line)) for line in lines]),
        ]
    return "\n\n".join(parts) + "\n"


def _results(rows: list[ComparisonRow], names: list[str]) -> str:
    heads = ["Model"]
    for info in map(metric_info, names):
        heads.append(markdown_text(f"{info.label} ({info.unit})" if info.unit else info.label) + _ARROWS[info.better])
    lines = []
    for row in rows:
        label = markdown_text(f"{row.model} ({row.run})" if row.run else row.model)
        values = {name: f"**{cell.value}**" if cell.best else cell.value for name, cell in row.cells.items()}
        cells = {name: joined(values[name], cell.deviation, cell.interval, by=" ") for name, cell in row.cells.items()}
        lines.append([label, *(cells.get(name, DASH) for name in names)])
    return markdown_table(heads, lines)


def _differences(rows: list[differences.DifferenceRow]) -> str:
    tested = any(row.source.p_value is not None or row.source.p_adjusted is not None for row in rows)
    sized = any(row.source.effect_size is not None for row in rows)
    shown = [len({row.pair.data for row in rows}) > 1, True, True, True, True, tested, tested, sized, True]
    lines = [["Data", "Model", "Baseline", "Metric", "Difference", "p", "p (Holm)", "d", "Verdict"]]
    for row in rows:
        amount = joined(row.value, row.interval, row.info.difference_unit, by=" ")
        p_values = map(probability, (row.source.p_value, row.source.p_adjusted))
        names = map(markdown_text, (*row.pair, row.info.label))
        lines.append([*names, amount, *p_values, effect(row.source.effect_size), row.words])
    head, *kept = ([cell for cell, show in zip(line, shown, strict=True) if show] for line in lines)
    return markdown_table(head, kept)


def markdown_table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))
