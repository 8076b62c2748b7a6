"""The interval of a paired difference as a small drawing."""

import math

from markupsafe import Markup

from promptkd.report.differences import DifferenceRow

__all__ = ["interval_bar"]

BAR_WIDTH, BAR_HEIGHT = 156, 22


def interval_bar(row: DifferenceRow) -> Markup:
    """The interval, the value and zero, drawn small. Every bar has its own scale, so that zero inside is seen to be."""
    measured = row.source.difference
    ends = [end for end in (measured.low, measured.value, measured.high) if end is not None]
    middle = BAR_WIDTH / 2
    drawn = f'<line class="zero" x1="{middle:g}" y1="1" x2="{middle:g}" y2="{BAR_HEIGHT - 1}"/>'
    if all(math.isfinite(end) for end in ends):
        reach = max(map(abs, ends)) or 1.0
        at = [f"{middle + end / reach * (middle - 8):.1f}" for end in ends]
        y = BAR_HEIGHT // 2
        if len(at) == 3:
            drawn += f'<line class="span" x1="{at[0]}" y1="{y}" x2="{at[2]}" y2="{y}"/>'
        drawn += f'<circle cx="{at[len(at) // 2]}" cy="{y}" r="4"/>'
    return Markup(
        f'<svg class="bar {row.verdict}" viewBox="0 0 {BAR_WIDTH} {BAR_HEIGHT}" width="{BAR_WIDTH}" '
        f'height="{BAR_HEIGHT}" aria-hidden="true" focusable="false">{drawn}</svg>'
    )
