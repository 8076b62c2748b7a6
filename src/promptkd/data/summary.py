"""What happened to the rows of a data set, in sentences for the terminal and the record."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, replace
from typing import Any

from promptkd.data.chat import DAY
from promptkd.data.chat_form import prompt_end, saved_chat_template
from promptkd.data.encode import MOST, EncodedData, Limits, NoRowFitsError, Turns
from promptkd.data.teacher_prompt import TeacherPrompts
from promptkd.data.templates import Template
from promptkd.errors import RequestError

_SHOWN = 40  # characters of a prompt's end
Flags = tuple[str, str, str]  # those that limit a prompt, a response, and the teacher's prompt
FLAGS: Flags = ("--max_prompt_length", "--max_completion_length", "--max_teacher_prompt_length")  # of training
GENERATION_FLAGS: Flags = ("--max-prompt-length", "--max-completion-length", "--max-teacher-prompt-length")
EVALUATION_FLAGS: Flags = ("--max-prompt-length", "--max-reference-length", "--max-teacher-prompt-length")


def row_counts(data: EncodedData) -> str:
    """How many rows are used, how many examples they give, and how many were too long."""
    several = f", {len(data.examples):,} examples (one per assistant turn)" if data.turns == "all" else ""
    what = "examples " if data.turns == "all" else ""
    dropped = f"; {data.dropped:,} {what}over a length limit were dropped" if data.dropped else ""
    return f"{data.rows:,} rows{several}{dropped}"


def row_notes(source: str, data: EncodedData, flags: Flags = FLAGS) -> list[str]:
    """What a reader of the run must know of the rows of `source`; `flags` set the limits on prompt and response."""
    notes = []
    if data.unread:
        columns = ", ".join(f"{name!r} ({rows:,} rows)" for name, rows in data.unread.items())
        notes.append(f"{source}: not used: {columns}. --columns OLD=NEW maps a column to one that is.")
    if data.contexts:
        told = f"in {data.informed:,} of them it holds the row's reference: the teacher sees the answer there"
        rest = f"; {told}." if data.informed else "."
        notes.append(f"{source}: {data.contexts:,} rows have a context that only the teacher reads{rest}")
    if data.as_text:
        advice = "--columns prompt=instruction has it rendered."
        notes.append(f"{source}: {data.as_text:,} prompts are texts, used as they stand, with no template. {advice}")
    if data.cut:
        responses, were = ("response", "was") if data.cut == 1 else ("responses", "were")
        told = f"{data.cut:,} {responses} that {were} cut at the length limit when written ('ended' is false)"
        notes.append(f"{source}: {told} {were} dropped with {'its row' if data.cut == 1 else 'their rows'}.")
    if data.unanswered:
        rows, were = ("1 row ends", "was") if data.unanswered == 1 else (f"{data.unanswered:,} rows end", "were")
        notes.append(f"{source}: {rows} with the user and {were} dropped, since a response is needed.")
    if data.limits is not None and data.keeps_most is not None and data.keeps_all is not None:
        total = len(data.examples) + data.dropped
        has_contexts = data.contexts > 0 or data.keeps_all.teacher_prompt > data.limits.teacher_prompt
        now = data.limits if has_contexts else replace(data.limits, teacher_prompt=0)
        limits = _limits(flags, (now.prompt, now.response, now.teacher_prompt))
        most, every = (_raised(flags, data.limits, each) for each in (data.keeps_most, data.keeps_all))
        kept = f"{most} keeps {MOST:.0%}" + ("." if most == every else f", {every} keeps all.")
        noun = "examples" if data.turns == "all" else "rows"
        share = f"{data.dropped:,} of {total:,} {noun} ({data.dropped / total:.0%})"
        notes.append(f"Warning: {source}: {share} are over {' or '.join(limits)} and were dropped. {kept}")
    return notes


def prompt_notes(train: EncodedData | None, validation: EncodedData | None) -> list[str]:
    """A warning where prompts to train on are texts that some other template wrote than that of the validation rows."""
    if train is None or validation is None:
        return []
    texts = [row.prompt for row in train.examples if not row.request]
    ends = "" if validation.template is None else prompt_end(validation.template)
    if not texts or not ends or any(text.endswith(ends) for text in texts):
        return []
    told = "the prompts to train on are texts, and none ends as the template ends those to validate on"
    advice = "Write them with the --template of this training, or the answers are measured on prompts of another form"
    return [f"Warning: {told}, {ends[-_SHOWN:]!r}: the first ends with {texts[0][-_SHOWN:]!r}. {advice}."]


def context_notes(
    train: EncodedData | None, validation: EncodedData | None, teacher: TeacherPrompts | None
) -> list[str]:
    """What a context of the teacher means for what is trained and measured."""
    trained, notes = 0 if train is None else train.contexts, []
    if teacher is not None and trained and (named := teacher.names_of_answers):
        told = f"--teacher_prompt names {', '.join(named)}: in training the teacher sees each row's answer"
        notes.append(f"{told}, and the student does not.")
    if validation is None or not (trained or validation.contexts):
        return notes
    seen, rows = validation.contexts, len(validation.examples)
    if not seen:
        return [
            *notes,
            "The validation rows have no context: there the KL to the teacher is to the teacher without one.",
        ]
    of = "" if seen == rows else f" in {seen:,} of the {rows:,} validation rows, and without one in the others"
    is_bound = "they bound what a student can reach that does not see it"
    notes.append(
        f"The KL to the teacher is to the teacher with its context{of}. Its own answers have it, too: {is_bound}."
    )
    if validation.informed:
        told = f"in {validation.informed:,} of {rows:,} validation rows the teacher's context holds the row's reference"
        what = "The teacher's answers and loss, and the KL to it, are then those of a teacher that has seen the answer"
        notes.append(
            f"Warning: {told}. {what}. Leave it out of the validation rows to measure what the student can know."
        )
    return notes


@contextmanager
def limits_named(flags: Flags = FLAGS) -> Iterator[None]:
    """Let the message that no row is within the limits end with the `flags` and values that keep all rows."""
    try:
        yield
    except NoRowFitsError as error:
        every = _raised(flags, error.limits, error.keeps_all)
        raise RequestError(f"{error} {every} keeps all.") from error


def template_note(template: Template, owner: str, turns: Turns | None = None, saved_with: Any = None) -> str:
    """Which template renders the rows (that of `owner`), and which of their turns are trained.

    And whether the files of the tokenizer `saved_with` the model can hold a chat template that writes the same.
    """
    name = {"chat": f"the chat template of {owner}", "jinja": "the given Jinja text"}.get(template.name, template.name)
    if template.trained:
        name = f"{'alpaca' if template.name == 'alpaca' else 'the Jinja text'}, on which {owner} was trained"
    if template.chat is not None and template.chat.writes_day:
        name += f", which writes the date; that is {DAY:%d %b %Y} on every day, so that the rows stay the same"
        if template.chat.names("date_string"):
            name += ' (another: --chat_template_kwargs \'{"date_string": "..."}\')'
    if turns is None:
        return f"Template: {name}."
    trained = {"last": "the last one of each row", "all": "all of each row"}[turns]
    told = f"Template: {name}. Assistant turns that are trained: {trained} (--turns {turns})."
    if saved_with is None or saved_chat_template(saved_with, template) is not None:
        return told
    return f"{told} No chat template was found to write it: who serves the model must render its prompts so."


def _limits(flags: Flags, values: tuple[int, int, int]) -> list[str]:
    return [f"{flag} {value}" for flag, value in zip(flags, values, strict=True) if value]


def _raised(flags: Flags, now: Limits, new: Limits) -> str:
    """The flags that differ from now."""
    prompt, response, teacher_prompt = (
        (after if after > before else 0) for before, after in zip(astuple(now), astuple(new), strict=True)
    )
    return " ".join(_limits(flags, (prompt, response, teacher_prompt)))
