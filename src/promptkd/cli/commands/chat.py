"""`promptkd chat`: answers side by side while they are written, or one after another where there is no terminal."""

import math
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from promptkd.cli.inference_run import InferenceRun, sampling
from promptkd.cli.options.chat import Options
from promptkd.cli.outputs import label_of
from promptkd.cli.parsing.fields import LARGEST_INTEGER
from promptkd.cli.terminal import say
from promptkd.errors import RequestError
from promptkd.generation import Decoding
from promptkd.generation.conversation import Conversation, StreamedAnswer
from promptkd.visible import shown

_NARROWEST = 36  # cells of a column, below which fewer columns stand side by side
_SECONDS_BETWEEN_FRAMES = 0.08
_HELP = """\
/reset            forget what was said, and the count of answers that seeds depend on
/temperature T    sample at this temperature; 0 decodes greedily
/seed N           draw the samples from another seed
/exit             leave, as Ctrl-D does; Ctrl-C stops an answer
A request that begins with a slash is typed with a space before it."""


def run(options: Options, training: dict[str, Any]) -> None:
    decoding = Decoding(max_new_tokens=options.max_completion_length, seed=options.seed, **sampling(options))
    names = [*options.models, *([] if options.teacher is None else [options.teacher])]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RequestError(f"Each model answers once. {', '.join(twice)} is given more than once.")
    labels = {name: label_of(name, among=names) for name in names}
    if options.teacher is not None:
        labels[options.teacher] = f"teacher: {labels[options.teacher]}"
    if options.prompt is not None and not options.prompt.strip():
        raise RequestError("--prompt is empty. Expected some text.")
    job = InferenceRun(options)
    conversations = {}
    for name, label in labels.items():
        tokenizer, kwargs = job.load_tokenizer(name), options.chat_template_kwargs
        # which writes a request as training did, and earlier turns before it
        template = "chat" if options.template == "auto" and tokenizer.chat_template else options.template
        conversations[label] = Conversation(job.load_model(name), tokenizer, template, kwargs)
    session = _Session(conversations, decoding, Console(highlight=False))
    job.settle_precision()
    with job.computing():
        if options.prompt is not None:
            session.ask(options.prompt)
        elif sys.stdin.isatty() and sys.stdout.isatty():
            session.talk()
        else:
            for line in _piped_lines():
                if line.strip() and not session.take(line.rstrip("\n")):
                    break


class _Session:
    def __init__(self, conversations: dict[str, Conversation], decoding: Decoding, console: Console):
        self.conversations, self.decoding, self.console = conversations, decoding, console
        self.turn = 0

    def talk(self) -> None:
        memory = "Each model reads the whole conversation, with its own answers."
        if alone := ", ".join(label for label, each in self.conversations.items() if not each.remembers):
            memory = f"Each request stands alone for {alone}: the template takes no conversation."
        say(f"{memory} /help lists the commands, Ctrl-D leaves.")
        for line in _typed_lines():
            try:
                if line.strip() and not self.take(line):
                    return
            except KeyboardInterrupt:
                say("Stopped.")
            except RequestError as error:
                say(str(error))

    def take(self, line: str) -> bool:
        """Do what a line asks for, a command or a request; return whether to continue."""
        if not line.startswith("/"):
            self.ask(line.strip())
            return True
        name, _, value = line.strip().partition(" ")
        match name:
            case "/exit":
                return False
            case "/help":
                self.console.out(_HELP, highlight=False)
            case "/reset":
                self.turn = 0
                for conversation in self.conversations.values():
                    conversation.reset()
            case "/temperature":
                self.decoding = replace(self.decoding, temperature=_number(float, name, value))
            case "/seed":
                self.decoding = replace(self.decoding, seed=_number(int, name, value))
            case _:
                raise RequestError(f"{name} is no command. /help lists them; text that begins so takes a space before.")
        return True

    def ask(self, request: str) -> None:
        writings = []
        for label, conversation in self.conversations.items():
            try:
                writings.append(Writing(label, *conversation.ask(request, self.decoding, self.turn)))
            except RequestError as error:
                raise RequestError(f"{label}: {error}") from error
        self.turn += 1
        can_redraw = self.console.is_terminal and not self.console.is_dumb_terminal
        try:
            (write_side_by_side if can_redraw else write_in_turn)(self.console, writings)
        finally:  # stopped before some model has begun, all still read the same conversation
            for conversation, each in zip(self.conversations.values(), writings, strict=True):
                each.pieces.close()
                conversation.remember(request, each.answer)


def _number(kind: Callable[[str], Any], name: str, value: str) -> Any:
    with suppress(ValueError):
        if abs(number := kind(value)) <= LARGEST_INTEGER:  # neither NaN nor infinite
            return number
    raise RequestError(f"{name} expects a number. Got {value[:40] or 'nothing'}.")


def _piped_lines() -> Iterator[str]:
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        raise RequestError(f"Expected UTF-8 on standard input: {error}.") from error


def _typed_lines() -> Iterator[str]:
    import readline  # noqa: F401  its import is what gives `input` both

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()


@dataclass
class Writing:
    label: str
    answer: StreamedAnswer
    pieces: Generator[str]
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
    title, status = Text(shown(writing.label), style="bold"), Text(writing.status, style="dim")
    border = "green" if writing.running else "dim"
    return Panel(text, title=title, subtitle=status, title_align="left", subtitle_align="left", border_style=border)
