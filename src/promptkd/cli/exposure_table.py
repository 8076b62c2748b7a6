"""What `exposure-bias` shows on the terminal: each student's KL and its ExAccErr at a few lengths."""

from collections.abc import Mapping

from promptkd.evaluation import ExposureBias
from promptkd.report.terminal import text_table
from promptkd.results import CurvePoint, Metric

MOST_LENGTHS = 5


def exposure_table(measured: Mapping[str, ExposureBias]) -> str:
    """One line per student, intervals below the values, at the highest powers of two that a curve reaches."""
    longest = max(len(each.points) for each in measured.values())
    lengths = [2**power for power in range(longest.bit_length())][-MOST_LENGTHS:]
    lines = [["", "KL on own\nnats/token", "on teacher's\nnats/token", *(f"ExAccErr({x})\n%" for x in lengths)]]
    for label, each in measured.items():
        points = dict(enumerate(each.points, 1))
        kls = [_cell(each.on_student, 3), _cell(each.on_teacher, 3)]
        lines.append([label, *kls, *(_cell(points.get(x), 1) for x in lengths)])
    return text_table(lines)


def _cell(measured: Metric | CurvePoint | None, digits: int) -> str:
    """The value over its interval."""
    if measured is None or measured.value is None:
        return "-\n"
    value = _written(measured.value, digits)
    if measured.low is None or measured.high is None:
        return f"{value}\n"
    return f"{value}\n[{_written(measured.low, digits)}, {_written(measured.high, digits)}]"


def _written(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0 takes the sign off a zero
