"""Answers on the terminal: side by side while they are written, or one after another where there is no terminal."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from promptkd.cli.terminal import say
from promptkd.generation.conversation import StreamedAnswer
from promptkd.visible import shown

_NARROWEST = 36
"""Cells of a column below which fewer columns stand side by side."""
_SECONDS_BETWEEN_FRAMES = 0.08


@dataclass
class Writing:
    """An answer on its way."""

    label: str
    answer: StreamedAnswer
    pieces: Iterator[str]
    seconds: float = 0.0
    running: bool = True
    stopped: bool = False

    def advance(self) -> str:
        """The next piece of text; `running` becomes false when there is none."""
        started = time.perf_counter()
        piece = next(self.pieces, None)
        self.seconds += time.perf_counter() - started
        self.running = piece is not None
        return piece or ""

    @property
    def status(self) -> str:
        """Length, speed, and why it ended if not by itself."""
        answer = self.answer
        rate = f", {answer.tokens / self.seconds:.0f}/s" if self.seconds and answer.tokens > 1 else ""
        end = "" if self.running or answer.ended else f", cut at {answer.limit}"
        return f"{answer.tokens} token{'s' * (answer.tokens != 1)}{rate}{', stopped' if self.stopped else end}"


def write_side_by_side(console: Console, writings: Sequence[Writing]) -> None:
    """Let all answers grow together, a token each in turn. Ctrl-C stops them and leaves what there is."""
    drawn = 0.0
    with Live(console=console, auto_refresh=False, transient=True) as live:
        try:
            while running := [each for each in writings if each.running]:
                for each in running:
                    each.advance()
                if time.monotonic() - drawn >= _SECONDS_BETWEEN_FRAMES:
                    live.update(_page(console, writings, lines=console.height - 1), refresh=True)
                    drawn = time.monotonic()
        except KeyboardInterrupt:
            for each in writings:
                each.stopped, each.running = each.running, False
    console.print(_page(console, writings))


def write_in_turn(console: Console, writings: Sequence[Writing]) -> None:
    """One labeled block per answer, its text as it comes; how it ended goes to standard error."""
    for each in writings:
        console.out(f"== {shown(each.label)} ==", highlight=False)
        while each.running:
            console.out(shown(each.advance()), end="", highlight=False)
            console.file.flush()
        console.out("\n", highlight=False)
        say(f"{each.label}: {each.status}.")


def _page(console: Console, writings: Sequence[Writing], lines: int | None = None) -> Table:
    """Panels in as many columns as fit. With `lines`, the end of each answer that fits into so many."""
    across = max(1, min(len(writings), console.width // _NARROWEST))
    width = console.width // across - 4  # without border and padding
    inside = None if lines is None else max(1, lines // math.ceil(len(writings) / across) - 2)
    page = Table.grid(*(Column(ratio=1, overflow="fold") for _ in range(across)), expand=True)
    for first in range(0, len(writings), across):
        page.add_row(*(_panel(console, each, width, inside) for each in writings[first : first + across]))
    return page


def _panel(console: Console, writing: Writing, width: int, lines: int | None) -> Panel:
    text = Text(shown(writing.answer.text).strip("\n"), overflow="fold")
    if lines is not None:
        text = Text("\n", overflow="fold").join(text.wrap(console, width)[-lines:])
    return Panel(
        text,
        title=Text(shown(writing.label), style="bold"),
        subtitle=Text(writing.status, style="dim"),
        title_align="left",
        subtitle_align="left",
        border_style="green" if writing.running else "dim",
    )
