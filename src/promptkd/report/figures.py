"""The report's plots as SVG and PDF for papers, by matplotlib: training, exposure bias, metrics with intervals."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from promptkd.errors import RequestError
from promptkd.record_parts import PositionCurve
from promptkd.report.formatting import joined
from promptkd.report.labels import is_teacher, unified
from promptkd.report.metrics import MetricInfo, metric_info
from promptkd.report.plots import BiasKind, Line, bias_plots, stages
from promptkd.report.prompts import COLORS, CURVES
from promptkd.report.tables import ComparisonRow, by_setting, comparison_table, metric_columns
from promptkd.results import CurvePoint, Results
from promptkd.visible import shown

_SIZE = (3.4, 2.4)  # inches: a column of a two-column paper
# told apart without color, too: Okabe and Ito's palette, which most color-blind readers can read
_COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
_STYLES = ("-", "--", "-.", ":")
_SETTINGS = {
    **{"font.size": 8, "axes.titlesize": 8, "legend.fontsize": 7, "axes.spines.top": False, "axes.spines.right": False},
    **{"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "promptkd"},  # fonts embedded; the same bytes again
}
_UNDATED: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
_LONGEST_NAME = 80
_SHOWN = ("Losses", "Validation")  # groups of what training logs
Draw = Callable[[Any], None]


def check_figures() -> None:
    """Raise `RequestError` if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401 - an extra
    except ImportError as error:
        told = "--figures draws by matplotlib. Install it: pip install 'promptkd[figures]'."
        raise RequestError(told) from error


def write_figures(
    records: Sequence[Results], folder: Path, *, every: bool = False, on_plot: Callable[[int], None] | None = None
) -> list[Path]:
    """Write the plots of the records into `folder`, as NAME.svg and NAME.pdf. Errors as for `check_figures`.

    Of training's log its losses and validations, and with `every` all else that it holds. `on_plot` is called with
    the number of plots drawn so far.
    """
    check_figures()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    with TemporaryDirectory(prefix=".figures-", dir=folder) as partial, rc_context(_SETTINGS):
        for done, (name, draw) in enumerate(_plots(unified(records), every=every), start=1):
            figure = Figure(figsize=_SIZE, layout="constrained")
            draw(figure.subplots())
            stem = name if not any(path.stem == name for path in written) else f"{name}-{len(written)}"
            for suffix, metadata in _UNDATED.items():
                path = Path(partial, f"{stem}.{suffix}")
                figure.savefig(path, metadata=metadata)
                written.append(path)
            if on_plot is not None:
                on_plot(done)
        return [path.replace(folder / path.name) for path in written]  # all of them or none


def count_plots(records: Sequence[Results], *, every: bool = False) -> int:
    """How many plots `write_figures` draws."""
    return sum(1 for _ in _plots(unified(records), every=every))


def _plots(story: Sequence[Results], *, every: bool) -> Iterator[tuple[str, Draw]]:
    """The name of each file, and what draws it."""
    for stage in stages(story):
        for chart in (chart for title, group in stage.groups.items() if every or title in _SHOWN for chart in group):
            yield _name(stage.name, chart.info.name), _lines(chart.info, chart.lines)
    for plot in bias_plots(story):
        several = sum(each.kind is plot.kind for each in bias_plots(story)) > 1
        yield (
            _name("exposure-bias", plot.kind.told, plot.data, plot.settings if several else ""),
            _curves(plot.curves, plot.kind),
        )
    for at, each in enumerate(prompts := [prompt for record in story for prompt in record.prompts]):
        if each.kl:
            yield (_name("prompt-kl", str(at) if len(prompts) > 1 else ""), _by_position(each.kl))
    for rows in by_setting(comparison_table(story)).values():
        for name in metric_columns(story):
            held = [row for row in rows if name in row.metrics and math.isfinite(row.metrics[name].value)]
            if held:
                yield (
                    _name("metric", name, rows[0].data, rows[0].decoding.split(",")[0].split(" ")[0]),
                    _intervals(metric_info(name), held),
                )


def _name(*parts: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", joined(*parts, by="-"))[:_LONGEST_NAME].strip("-.")


def _text(text: str) -> str:
    """Text that matplotlib sets as it is, without its mathematics."""
    return shown(text).replace("$", r"\$")


def _style(at: int) -> dict[str, Any]:
    return {
        "color": _COLORS[at % len(_COLORS)],
        "linestyle": _STYLES[at // len(_COLORS) % len(_STYLES)],
        "linewidth": 1,
    }


def _lines(info: MetricInfo, lines: Sequence[Line]) -> Draw:
    """Over steps; the mean of a method's seeds has a band from their least to their largest."""

    def draw(axes: Any) -> None:
        for at, line in enumerate(lines):
            style = _style(at + 1)
            axes.plot(line.x, _with_gaps(line.y), label=_text(line.name), **style)
            if line.low:
                ends = _with_gaps(line.low), _with_gaps(line.high)
                axes.fill_between(line.x, *ends, color=style["color"], alpha=0.15, linewidth=0)
        axes.set(
            xlabel="optimizer step", ylabel=_text(joined(info.label, f"({info.unit})" if info.unit else "", by=" "))
        )
        if len(lines) > 1:
            axes.legend(frameon=False)

    return draw


def _with_gaps(values: Sequence[float | None]) -> list[float]:
    return [math.nan if each is None else each for each in values]


def _curves(curves: Sequence[Any], kind: BiasKind) -> Draw:
    def draw(axes: Any) -> None:
        for at, curve in enumerate(curves):
            points = [each for each in curve.points if each.value is not None]
            style = _style(0 if is_teacher(curve.model) else at + 1)
            axes.plot([each.x for each in points], [each.value for each in points], label=_text(curve.model), **style)
            band: list[CurvePoint] = [each for each in points if each.low is not None and each.high is not None]
            x, low, high = ([vars(each)[end] for each in band] for end in ("x", "low", "high"))
            axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axes.axhline(0, color="0.6", linewidth=0.5)
        axes.set(xlabel=kind.x, ylabel=kind.y)
        axes.legend(frameon=False)

    return draw


def _by_position(kl: Mapping[str, PositionCurve]) -> Draw:
    def draw(axes: Any) -> None:
        for name in (each for each in CURVES if each in kl):
            points, style = kl[name].positions, _style(COLORS[CURVES[name]])
            x = [(each.first + each.last) / 2 for each in points]
            axes.plot(x, [each.value for each in points], label=_text(CURVES[name]), **style)
            ends = [(at, each.low, each.high) for at, each in zip(x, points, strict=True) if each.low is not None]
            if ends:
                axes.fill_between(*zip(*ends, strict=True), color=style["color"], alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="position in the response (tokens)", ylabel="KL (nats per token)")
        axes.legend(frameon=False)

    return draw


def _intervals(info: MetricInfo, rows: Sequence[ComparisonRow]) -> Draw:
    """A point per model with its 95 % interval, the first model at the top."""

    def draw(axes: Any) -> None:
        for at, row in enumerate(rows):
            own = row.metrics[info.name]
            value, color = own.value * info.scale, _COLORS[0] if is_teacher(row.model) else _COLORS[1]
            ends = [value if end is None else end * info.scale for end in (own.low, own.high)]
            if all(map(math.isfinite, ends)):
                axes.plot(ends, [-at, -at], color=color, linewidth=1)
            axes.plot([value], [-at], marker="o", markersize=4, color=color)
        axes.set_yticks([-at for at in range(len(rows))], [_text(joined(row.model, row.run, by=", ")) for row in rows])
        axes.set_ylim(0.5 - len(rows), 0.5)
        axes.set_xlabel(_text(joined(info.label, f"({info.unit})" if info.unit else "", by=" ")))

    return draw
