"""The report as LaTeX tables with booktabs: metrics with intervals, what cannot be told apart, differences, costs."""

import re
from collections import Counter
from collections.abc import Sequence
from string import ascii_lowercase

from promptkd.report import differences
from promptkd.report.formatting import DASH, effect, joined, probability
from promptkd.report.labels import unified
from promptkd.report.metrics import MetricInfo, metric_info
from promptkd.report.plots import bias_plots
from promptkd.report.tables import ComparisonRow, by_setting, comparison_table, cost_table, groups, metric_columns
from promptkd.results import Results
from promptkd.visible import shown

_MOST_COLUMNS = 5  # metrics side by side, each with its interval
_OF_REFERENCES = {"loss"}  # metrics of the references, the same under every decoding of a data set
_ESCAPED = {
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "`": r"\textasciigrave{}"},
    **{mark: f"\\{mark}" for mark in "&%$#_{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}"},
    **{"[": "{[}", "]": "{]}", "*": "{*}"},  # behind a line's end they would be LaTeX's own
    **{
        "−": "$-$",
        "–": r"\textendash{}",
        "±": r"$\pm$",
        "×": r"$\times$",
        "∞": r"$\infty$",
        "λ": r"$\lambda$",
        "‖": r"$\Vert$",
    },
    **{"→": r"$\to$", "↑": r"$\uparrow$", "↓": r"$\downarrow$"},
}
_SUPERSCRIPTS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
_MARKS = {"higher": r" $\uparrow$", "lower": r" $\downarrow$", None: ""}
_HEAD = (
    "% Tables by promptkd. In the preamble: \\usepackage{booktabs}, \\usepackage[T1]{fontenc}.\n"
    "% Labels beyond Latin letters need XeLaTeX or LuaLaTeX, with a font that has them."
)


def render_latex(records: Sequence[Results], *, title: str | None = None) -> str:
    """Tables to be included in a paper: per data set and decoding the metrics, then differences, exposure bias, costs.

    The best student of a column is bold. Students that share a letter in a column cannot be told apart: by the paired
    differences where the records hold them, else by intervals that overlap.
    """
    story, parts = unified(records), [_HEAD]
    named = f"{latex_text(title)}. " if title else ""
    pooled = any(record.kind == "study" for record in records)
    printed: set[tuple[str, str, str]] = set()  # of the metrics of references: data, metric and model
    for setting, rows in by_setting(comparison_table(story)).items():
        held = {
            name: {(row.data, name, row.model) for row in rows if name in row.cells} for name in metric_columns(story)
        }
        names = [name for name, cells in held.items() if not cells <= printed]
        printed |= {cell for name in names if name in _OF_REFERENCES for cell in held[name]}
        blocks = [names[at : at + _MOST_COLUMNS] for at in range(0, len(names), _MOST_COLUMNS)]
        parts += [_metrics(rows, block, f"{named}{latex_text(setting)}", pooled=pooled) for block in blocks]
    if compared := differences.difference_table(story):
        parts.append(_differences(compared, named))
    for plot in bias_plots(story):
        symbol = plot.kind.symbol if plot.kind.symbol == "l" else f"\\mathrm{{{plot.kind.symbol}}}"
        heads = ["Model", *(f"${symbol} = {length:g}$" for length in plot.lengths)]
        lines = [
            [latex_text(curve.model), *(latex_text(joined(*cell, by=" ")) for cell in plot.cells(curve))]
            for curve in plot.curves
        ]
        about = latex_text(joined(plot.title, plot.settings))
        told = latex_text(plot.kind.sentence).replace("(l)", "$(l)$").replace(", l in", ", $l$ in")
        parts.append(_table(heads, lines, f"{named}Exposure bias on {about}: {told}", "bias"))
    heads, lines = cost_table(story)
    if lines:
        cells = [list(map(latex_text, line)) for line in lines]
        parts.append(_table(list(map(latex_text, heads)), cells, f"{named}Sizes and cost of training.", "costs"))
    return _with_own_labels("\n\n".join(parts)) + "\n"


def _with_own_labels(text: str) -> str:
    """Each of several tables of a kind gets its number in its label: tab:metrics-1, tab:metrics-2."""
    counts: Counter[str] = Counter()

    def own(found: re.Match[str]) -> str:
        counts[found[1]] += 1
        number = f"-{counts[found[1]]}" if text.count(found[0]) > 1 else ""
        return f"\\label{{tab:{found[1]}{number}}}"

    return re.sub(r"\\label\{tab:([a-z]+)\}", own, text)


def latex_text(text: str) -> str:
    """One line that LaTeX sets as it is: no command, no comment, no mathematics but the signs of numbers."""
    line = " ".join(shown(text).split())
    escaped = "".join(_ESCAPED.get(character, character) for character in line)
    raised = re.sub("[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda found: f"$^{{{found[0].translate(_SUPERSCRIPTS)}}}$", escaped)
    return re.sub(r"([-',])(?=\1)", r"\1{}", raised)  # two would be set as a dash or a quotation mark


def _metrics(rows: list[ComparisonRow], names: list[str], setting: str, *, pooled: bool) -> str:
    heads = ["Model", *(_heading(metric_info(name)) for name in names)]
    letters = {name: _letters(name, rows) for name in names}
    best = {name: _best(name, rows) for name in names}
    lines = []
    for row in rows:
        line = [latex_text(f"{row.model} ({row.run})" if row.run else row.model)]
        for name in names:
            cell = row.cells.get(name)
            if cell is None:
                line.append("--")
                continue
            value = latex_text(cell.value)
            value = f"\\textbf{{{value}}}" if row in best[name] else value
            mark = f"\\textsuperscript{{{letters[name][id(row)]}}}" if id(row) in letters[name] else ""
            rest = joined(*(latex_text(each) for each in (cell.deviation, cell.interval) if each), by=" ")
            line.append(f"{value}{mark}" + (f" {{\\scriptsize {rest}}}" if rest else ""))
        lines.append(line)
    marks = " Bold: the best student." if any(best.values()) else ""
    marks += " Students that share a letter cannot be told apart." if any(letters.values()) else ""
    deviations = any(row.cells[name].deviation for row in rows for name in names if name in row.cells)
    over = "rows"
    if pooled:
        apart = any(not row.cells[name].deviation for row in rows for name in names if name in row.cells)
        over = "training seeds and rows" + (", over rows alone where no $\\pm$ stands (teacher, untrained)" * apart)
    spread = f" $\\pm$: standard deviation between {'training' if pooled else 'decoding'} seeds." * deviations
    caption = f"{setting}. Brackets: 95\\,\\% interval over {over}.{spread}{marks}"
    return _table(heads, lines, caption, "metrics")


def _heading(info: MetricInfo) -> str:
    return latex_text(joined(info.label, f"({info.unit})" if info.unit else "", by=" ")) + _MARKS[info.better]


def _best(name: str, rows: list[ComparisonRow]) -> list[ComparisonRow]:
    """The row with the best value, if anything is told apart from anything in this column."""
    marked = [row for row in rows if name in row.cells and row.cells[name].best]
    if not marked:
        return []
    pick = min if metric_info(name).better == "lower" else max
    return [pick(marked, key=lambda row: row.metrics[name].value)]


def _letters(name: str, rows: list[ComparisonRow]) -> dict[int, str]:
    """By row, the letters of the groups that it is in; nothing where all students are one group."""
    found = groups(name, rows)
    if len(found) < 2 or len(found) > len(ascii_lowercase):
        return {}
    letters: dict[int, str] = {}
    for letter, group in zip(ascii_lowercase, found, strict=False):
        for row in group:
            letters[id(row)] = letters.get(id(row), "") + letter
    return letters


def _differences(rows: Sequence[differences.DifferenceRow], named: str) -> str:
    heads = ["Model", "Baseline", "Metric", "Difference", "$p$ (Holm)", "$d$", ""]
    lines: list[list[str]] = []
    known: list[str] = []
    for row in sorted(rows, key=lambda row: [each.pair.data for each in rows].index(row.pair.data)):
        if (heading := row.pair.data) and heading not in known:  # in a row of its own: it is long, and many share it
            known.append(heading)
            lines.append([f"\\multicolumn{{{len(heads)}}}{{l}}{{\\textit{{{latex_text(heading)}}}}}"])
        amount = joined(row.value, row.interval, row.info.difference_unit, by=" ")
        cells = [row.pair.model, row.pair.baseline, row.info.label, amount]
        cells += [probability(row.source.p_adjusted), effect(row.source.effect_size)]
        lines.append([latex_text(cell) if cell != DASH else "--" for cell in cells])
        lines[-1].append("" if row.verdict == "tied" else latex_text(row.words))
    empty = (
        " Without a word in the last column: cannot be told apart." if any(r.verdict == "tied" for r in rows) else ""
    )
    about = f"{named}Paired differences, model minus baseline, with 95\\,\\% intervals.{empty}"
    return _table(heads, lines, about, "differences")


def _table(heads: list[str], lines: list[list[str]], caption: str, about: str) -> str:
    body = [" & ".join(heads), "\\midrule", *(" & ".join(line) for line in lines)]
    rows = "\n".join(line if line == "\\midrule" else f"{line} \\\\" for line in body)
    columns = "l" + "r" * (len(heads) - 1)
    return (
        f"\\begin{{table*}}\n\\centering\\small\n\\caption{{{caption}}}\\label{{tab:{about}}}\n\\begin{{tabular}}{{{columns}}}\n\\toprule\n{rows}\n"
        "\\bottomrule\n\\end{tabular}\n\\end{table*}"
    )
