"""The context that only the teacher reads, in commands: from their flags to the rows, the record, and what is said."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from shlex import quote
from typing import Any

from promptkd.data.encode import EncodedData
from promptkd.data.teacher_prompt import TeacherPrompts, context_text
from promptkd.errors import RequestError
from promptkd.results import Results

TEACHER_LIMIT = "--max-teacher-prompt-length"
COLUMN = "the rows' column teacher_prompt"
_MOST_SHOWN = 200  # characters of a context that a record or a message holds in full


def context_note(given: str | None) -> str:
    """Whether `--teacher_prompt` is a file or the text itself; "" without one."""
    if given is None:
        return ""
    text, file = context_text(given)
    if not text.strip():
        return "The teacher reads the rows' column teacher_prompt, and no other context: --teacher_prompt is empty."
    what = f"the text of {file}" if file else "the given text, which is no file's name"
    return f"The teacher reads a context that the student does not see: {what} ({len(text):,} characters)."


def recorded_context(text: str | None, *data: EncodedData | None) -> str:
    """Which context the teacher reads of these rows, for the record; "" for none."""
    if not any(each is not None and each.contexts for each in data):
        return ""
    if text is None or not text.strip():
        return COLUMN
    return text if len(text) <= _MOST_SHOWN else f"{text[:160]}… (sha256 {sha256(text.encode()).hexdigest()[:12]})"


def with_context_text(options: Any) -> Any:
    """The options of a measurement with the text itself where `--teacher-prompt` names a file, which may change."""
    if options.teacher_prompt is None:
        return options
    return replace(options, teacher_prompt=context_text(options.teacher_prompt)[0])


def measured_teacher_prompts(options: Any) -> TeacherPrompts | None:
    """What the teacher of a measurement reads; None for what its student reads.

    `RequestError` for a limit without a context, and for a text that is no Jinja template.
    """
    if options.teacher_prompt is None:
        if options.max_teacher_prompt_length is not None:
            told = "--max-teacher-prompt-length limits what the teacher reads with its context"
            raise RequestError(f"{told}. Give --teacher-prompt, or leave it out.")
        return None
    prompts = TeacherPrompts(options.teacher_prompt)
    most = options.max_teacher_prompt_length
    return prompts if most is None else replace(prompts, most=most)


def context_notes(
    options: Any, teacher: str, sets: Mapping[str, EncodedData], runs: Iterable[str], told: str
) -> list[str]:
    """What must be said of the context of a measured teacher, or of its absence.

    Args:
        sets: the rows by the label of their data set.
        runs: places of the measured models and of a soft prompt, which may be those of runs that know a context.
        told: how a sentence on a data set with contexts begins.
    """
    if options.teacher_prompt is None:
        return [
            *(_unread(name) for name, data in sets.items() if "teacher_prompt" in data.unread),
            *(note for run in runs if (note := _without(run, teacher))),
        ]
    notes = []
    for name, data in sets.items():
        seen, rows = data.contexts, len(data.examples)
        if not seen:
            advice = "Give --teacher-prompt a text, or rows with a column teacher_prompt"
            notes.append(f"{name}: no row has a context for the teacher, which reads what the student reads. {advice}.")
            continue
        of = "" if seen == rows else f" in {seen:,} of the {rows:,} rows, and without one in the others"
        notes.append(f"{name}: {told} the teacher with its context{of}.")
        if data.informed:
            holds = f"in {data.informed:,} of {rows:,} rows the teacher's context holds the row's reference"
            notes.append(f"Warning: {name}: {holds}. What is measured is then a teacher that has seen the answer.")
    return notes


def _unread(name: str) -> str:
    return f"{name}: the teacher does not read the column teacher_prompt. --teacher-prompt '' has it read."


def _without(run: str, teacher: str) -> str:
    """That the teacher of a run read a context in training, and how to measure with it; "" if it read none."""
    record = _record_of(Path(run).expanduser())
    contexts = [] if record is None else [model.context for model in record.models.values() if model.context]
    if record is None or not contexts:
        return ""
    text = record.config.get("teacher_prompt") or ""
    if not text.strip():
        advice = "To measure with it, give --teacher-prompt '' and rows with the column teacher_prompt"
    elif len(text) <= _MOST_SHOWN:
        advice = f"To measure with it: --teacher-prompt {quote(text)}"
    else:
        advice = "To measure with it, give --teacher-prompt a file that holds teacher_prompt of the run's config.yaml"
    told = f"In training the teacher of {run} read a context; here {teacher} is measured without it"
    return f"{told}. {advice}."


def _record_of(place: Path) -> Results | None:
    """The record of the run whose folder this is, or that of its student or soft prompt; None if it is no run's."""
    folders = [place, place.parent] if place.name in ("student", "prompt") else [place]
    for folder in folders:
        if all((folder / name).is_file() for name in ("config.yaml", "results.json")):
            try:
                return Results.read(folder / "results.json")
            except RequestError:  # of another version, perhaps, and of no matter to the measurement
                return None
    return None
