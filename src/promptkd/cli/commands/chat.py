"""`promptkd chat`."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from rich.console import Console

from promptkd.cli.chat_view import Writing, write_in_turn, write_side_by_side
from promptkd.cli.inference_run import InferenceRun, sampling
from promptkd.cli.options.chat import Options
from promptkd.cli.parsing.config_file import LARGEST_INTEGER
from promptkd.cli.provenance import label_of
from promptkd.cli.terminal import say
from promptkd.errors import RequestError
from promptkd.generation import Decoding
from promptkd.generation.conversation import Conversation

_HELP = """\
/reset            forget what was said, and the count of answers that seeds depend on
/temperature T    sample at this temperature; 0 decodes greedily
/seed N           draw the samples from another seed
/exit             leave, as Ctrl-D does; Ctrl-C stops an answer
A request that begins with a slash is typed with a space before it."""


def run(options: Options, training: dict[str, Any]) -> None:
    decoding = Decoding(max_new_tokens=options.max_completion_length, seed=options.seed, **sampling(options))
    labels = _labels(options)
    if options.prompt is not None and not options.prompt.strip():
        raise RequestError("--prompt is empty. Expected some text.")
    job = InferenceRun(options)
    conversations = {
        label: Conversation(tokenizer=job.load_tokenizer(name), model=job.load_model(name), template=options.template)
        for name, label in labels.items()
    }
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


def _labels(options: Options) -> dict[str, str]:
    """The label of each model, the teacher last."""
    names = options.models if options.teacher is None else [*options.models, options.teacher]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RequestError(f"Each model answers once. {', '.join(twice)} is given more than once.")
    labels = {name: label_of(name, among=names) for name in names}
    if options.teacher is not None:
        labels[options.teacher] = f"teacher: {labels[options.teacher]}"
    return labels


class _Session:
    """The models, how they decode, and where their answers go."""

    def __init__(self, conversations: dict[str, Conversation], decoding: Decoding, console: Console):
        self.conversations, self.decoding, self.console = conversations, decoding, console
        self.turn = 0

    def talk(self) -> None:
        """Read requests from the terminal until /exit or Ctrl-D."""
        alone = [label for label, each in self.conversations.items() if not each.remembers]
        memory = "Each model reads the whole conversation, with its own answers."
        if alone:
            memory = f"Each request stands alone for {', '.join(alone)}: the template takes no conversation."
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
        """Have every model answer."""
        writings = []
        for label, conversation in self.conversations.items():
            try:
                writings.append(Writing(label, *conversation.ask(request, self.decoding, self.turn)))
            except RequestError as error:
                raise RequestError(f"{label}: {error}") from error
        self.turn += 1
        can_redraw = self.console.is_terminal and not self.console.is_dumb_terminal
        (write_side_by_side if can_redraw else write_in_turn)(self.console, writings)


def _number(kind: Callable[[str], Any], name: str, value: str) -> Any:
    try:
        number = kind(value)
        if abs(number) <= LARGEST_INTEGER:  # neither NaN nor infinite
            return number
    except ValueError:
        pass
    raise RequestError(f"{name} expects a number. Got {value[:40] or 'nothing'}.")


def _piped_lines() -> Iterator[str]:
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        raise RequestError(f"Expected UTF-8 on standard input: {error}.") from error


def _typed_lines() -> Iterator[str]:
    """Lines from the terminal, with editing and a history by the arrow keys."""
    import readline  # noqa: F401  its import is what gives `input` both

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
