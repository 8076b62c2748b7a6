"""What happened to the rows of a data set, in sentences for the terminal and the record."""

from collections.abc import Iterator
from contextlib import contextmanager

from promptkd.data.encode import MOST, EncodedData, Limits, NoRowFitsError, Turns
from promptkd.data.templates import Template
from promptkd.errors import RequestError

FLAGS = ("--max_prompt_length", "--max_completion_length")  # of training
GENERATION_FLAGS = ("--max-prompt-length", "--max-completion-length")
EVALUATION_FLAGS = ("--max-prompt-length", "--max-reference-length")


def row_counts(data: EncodedData) -> str:
    """How many rows are used, how many examples they give, and how many were too long."""
    several = f", {len(data.examples):,} examples (one per assistant turn)" if data.turns == "all" else ""
    what = "examples " if data.turns == "all" else ""
    dropped = f"; {data.dropped:,} {what}over a length limit were dropped" if data.dropped else ""
    return f"{data.rows:,} rows{several}{dropped}"


def row_notes(source: str, data: EncodedData, flags: tuple[str, str] = FLAGS) -> list[str]:
    """What a reader of the run must know of the rows of `source`; `flags` set the limits on prompt and response."""
    notes = []
    if data.unread:
        columns = ", ".join(f"{name!r} ({rows:,} rows)" for name, rows in data.unread.items())
        notes.append(f"{source}: not used: {columns}. --columns OLD=NEW maps a column to one that is.")
    if data.as_text:
        advice = "--columns prompt=instruction has it rendered."
        notes.append(f"{source}: {data.as_text:,} prompts are texts, used as they stand, with no template. {advice}")
    if data.unanswered:
        rows, were = ("1 row ends", "was") if data.unanswered == 1 else (f"{data.unanswered:,} rows end", "were")
        notes.append(f"{source}: {rows} with the user and {were} dropped, since a response is needed.")
    if data.limits is not None and data.keeps_most is not None and data.keeps_all is not None:
        total = len(data.examples) + data.dropped
        limits = _limits(flags, data.limits.prompt, data.limits.response)
        most, every = (_raised(flags, data.limits, each) for each in (data.keeps_most, data.keeps_all))
        kept = f"{most} keeps {MOST:.0%}" + ("." if most == every else f", {every} keeps all.")
        noun = "examples" if data.turns == "all" else "rows"
        share = f"{data.dropped:,} of {total:,} {noun} ({data.dropped / total:.0%})"
        notes.append(f"Warning: {source}: {share} are over {' or '.join(limits)} and were dropped. {kept}")
    return notes


@contextmanager
def limits_named(flags: tuple[str, str] = FLAGS) -> Iterator[None]:
    """Let the message that no row is within the limits end with the `flags` and values that keep all rows."""
    try:
        yield
    except NoRowFitsError as error:
        every = _raised(flags, error.limits, error.keeps_all)
        raise RequestError(f"{error} {every} keeps all.") from error


def template_note(template: Template, owner: str, turns: Turns | None = None) -> str:
    """Which template renders the rows (a chat template is that of `owner`), and which of their turns are trained."""
    name = {"chat": f"the chat template of {owner}", "jinja": "the given Jinja text"}.get(template.name, template.name)
    if turns is None:
        return f"Template: {name}."
    trained = {"last": "the last one of each row", "all": "all of each row"}[turns]
    return f"Template: {name}. Assistant turns that are trained: {trained} (--turns {turns})."


def _limits(flags: tuple[str, str], prompt: int, response: int) -> list[str]:
    return [f"{flag} {value}" for flag, value in zip(flags, (prompt, response), strict=True) if value]


def _raised(flags: tuple[str, str], now: Limits, new: Limits) -> str:
    """The flags that differ from now."""
    prompt, response = (
        (new.prompt if new.prompt > now.prompt else 0),
        (new.response if new.response > now.response else 0),
    )
    return " ".join(_limits(flags, prompt, response))
