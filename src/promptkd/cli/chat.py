"""Ask one or several models, and see their answers side by side as they are written.

With a chat template each model reads the whole conversation with its own answers; without one (--template alpaca, or a
tokenizer that has none) every request stands alone. Without a terminal each line of standard input is a request, and
the answers are plain text, one labelled block a model. A model's control characters are shown and never obeyed.

    promptkd chat runs/promptkd runs/kd --teacher runs/teacher
    promptkd chat runs/promptkd --prompt "Name three rivers." --temperature 0.7 --seed 1
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from promptkd.cli.values import LARGEST_INTEGER
from promptkd.errors import RequestError

if TYPE_CHECKING:
    from rich.console import Console

    from promptkd.generation.conversation import Conversation, Decoding

POSITIONAL = "models"
LESS_MEMORY = ("fewer models", "a smaller --max-completion-length (now {max_completion_length})")
Number = TypeVar("Number", int, float)
HELP = """\
/reset            forget what was said, and the count of answers that seeds depend on
/temperature T    sample at this temperature; 0 decodes greedily
/seed N           draw the samples from another seed
/exit             leave, as Ctrl-D does; Ctrl-C stops an answer
A request that begins with a slash is typed with a space before it."""


@dataclass
class Options:
    models: list[str]
    """Who answers: hub names, folders, run folders or GGUF files."""
    teacher: str | None = None
    """One more model, shown last and labelled as the teacher."""
    prompt: str | None = None
    """Ask this once and leave."""
    temperature: float = 0.0
    """Sampling temperature; 0 decodes greedily."""
    top_p: float = 1.0
    """Share of the probability mass to sample from."""
    top_k: int = 0
    """Number of tokens to sample from; 0 for all."""
    seed: int = 10
    """Seed of the samples."""
    template: str = "auto"
    """auto, alpaca, chat, or a Jinja text."""
    max_completion_length: int = 256
    """Most tokens of an answer."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision to compute in, with weights in float32; auto is bfloat16 where the device has units for it."""
    trust_remote_code: bool = False
    """Run code that a hub model ships."""


def run(options: Options, training: dict[str, Any]) -> None:
    from rich.console import Console

    from promptkd.cli.measuring import computing_in, settled_precision
    from promptkd.cli.session import quiet_libraries
    from promptkd.generation.conversation import Decoding

    decoding = Decoding(
        max_new_tokens=options.max_completion_length,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
    )
    labels = _labels(options)
    if options.prompt is not None and not options.prompt.strip():
        raise RequestError("--prompt is empty. Expected some text.")
    quiet_libraries()
    session = _Session(_load(options, labels), decoding, Console(highlight=False))
    with computing_in(settled_precision(options.dtype)):
        _talk(session, options.prompt)


def _talk(session: "_Session", prompt: str | None) -> None:
    if prompt is not None:
        session.ask(prompt)
    elif sys.stdin.isatty() and sys.stdout.isatty():
        session.talk()
    else:
        for line in _piped_lines():
            if line.strip() and not session.take(line.rstrip("\n")):
                break


def _labels(options: Options) -> dict[str, str]:
    """The label of each model, the teacher last."""
    from promptkd.cli.measuring import label_of

    names = [*options.models, *([] if options.teacher is None else [options.teacher])]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RequestError(f"Each model answers once. {', '.join(twice)} is given more than once.")
    labels = {name: label_of(name, among=names) for name in names}
    if options.teacher is not None:
        labels[options.teacher] = f"teacher: {labels[options.teacher]}"
    return labels


def _load(options: Options, labels: dict[str, str]) -> dict[str, "Conversation"]:
    from promptkd.cli.measuring import load_subject
    from promptkd.generation.conversation import Conversation
    from promptkd.models import load_tokenizer

    loaded = {}
    for name, label in labels.items():
        tokenizer = load_tokenizer(name, trust_remote_code=options.trust_remote_code)
        model = load_subject(name, options.trust_remote_code)
        loaded[label] = Conversation(model, tokenizer, options.template)
    return loaded


class _Session:
    """The models, how they decode, and where their answers go."""

    def __init__(self, conversations: dict[str, "Conversation"], decoding: "Decoding", console: "Console"):
        self.conversations, self.decoding, self.console = conversations, decoding, console
        self.turn = 0

    def talk(self) -> None:
        """Read requests from the terminal until /exit or Ctrl-D."""
        from promptkd.cli.session import say

        say(self._greeting())
        for line in _typed_lines():
            try:
                if line.strip() and not self.take(line):
                    return
            except KeyboardInterrupt:
                say("Stopped.")
            except RequestError as error:
                say(str(error))

    def take(self, line: str) -> bool:
        """Do what a line asks for, a command or a request; return whether to go on."""
        if not line.startswith("/"):
            self.ask(line.strip())
            return True
        name, _, value = line.strip().partition(" ")
        match name:
            case "/exit":
                return False
            case "/help":
                self.console.out(HELP, highlight=False)
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
        from promptkd.cli.chat_view import Writing, on_terminal, write_in_turn, write_side_by_side

        writings = []
        for label, conversation in self.conversations.items():
            try:
                writings.append(Writing(label, *conversation.ask(request, self.decoding, self.turn)))
            except RequestError as error:
                raise RequestError(f"{label}: {error}") from error
        self.turn += 1
        (write_side_by_side if on_terminal(self.console) else write_in_turn)(self.console, writings)

    def _greeting(self) -> str:
        alone = [label for label, each in self.conversations.items() if not each.remembers]
        memory = "Each model reads the whole conversation, with its own answers."
        if alone:
            memory = f"Each request stands alone for {', '.join(alone)}: the template takes no conversation."
        return f"{memory} /help lists the commands, Ctrl-D leaves."


def _number(kind: type[Number], name: str, value: str) -> Number:
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
