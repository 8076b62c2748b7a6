"""What `exposure-bias` shows on the terminal: each student's KL and its ExAccErr at a few lengths."""

from collections.abc import Mapping

from promptkd.evaluation import ExposureBias
from promptkd.results import CurvePoint, Metric
from promptkd.visible import shown

MOST_LENGTHS = 5


def exposure_table(measured: Mapping[str, ExposureBias]) -> str:
    """A student a line, intervals below the values; the lengths are the highest powers of two that a curve reaches."""
    longest = max(len(each.points) for each in measured.values())
    lengths = [2**power for power in range(longest.bit_length())][-MOST_LENGTHS:]
    lines = [
        ["", "KL on own", "on teacher's", *(f"ExAccErr({length})" for length in lengths)],
        ["", "nats/token", "nats/token", *("%" for _ in lengths)],
    ]
    for label, each in measured.items():
        points = dict(enumerate(each.points, 1))
        cells = [_cell(each.on_student, 3), _cell(each.on_teacher, 3), *(_cell(points.get(x), 1) for x in lengths)]
        lines.append([shown(label), *(value for value, _ in cells)])
        lines.append(["", *(interval for _, interval in cells)])
    return "\n".join(_aligned(line, [max(map(len, column)) for column in zip(*lines, strict=True)]) for line in lines)


def _cell(figure: Metric | CurvePoint | None, digits: int) -> tuple[str, str]:
    """Value and interval as text."""
    if figure is None or figure.value is None:
        return "-", ""
    if figure.low is None or figure.high is None:
        return _written(figure.value, digits), ""
    return _written(figure.value, digits), f"[{_written(figure.low, digits)}, {_written(figure.high, digits)}]"


def _written(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0 takes the sign off a zero


def _aligned(line: list[str], widths: list[int]) -> str:
    cells = [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
    return "  ".join(cells).rstrip()
