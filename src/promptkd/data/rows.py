"""A row of data: the forms in which it may come, and `Example`, the one form in which it is used.

    {"instruction", "input", "output"}   Alpaca's; also Dolly's {"instruction", "context", "response"}
    {"question", "answer"}               also {"query", "response"} and {"input", "output"}; "context" may stand beside
    {"messages": [...]}                  also ShareGPT's {"conversations"}; the last assistant message is the answer
    {"prompt", "completion"}             TRL's: strings, or lists of messages; also {"prompt", "chosen"}

A file may mix the forms. A null field counts as missing, and a row that fits several forms is read as the first of
instruction, messages, prompt, question. docs/data.md lists every column; `Example.unread` names those of a row that
nothing reads.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from promptkd.data.cells import cell_value
from promptkd.data.messages import (
    Message,
    check_characters,
    content_text,
    from_json,
    kind,
    read_messages,
    read_tools,
    without_nulls,
)
from promptkd.errors import RequestError, at

_INSTRUCTIONS = ("instruction", "question", "query", "input")
_CONVERSATIONS = ("messages", "conversations", "conversation")
_INPUTS = ("input", "context")
_ANSWERS = ("output", "response", "answer", "answers", "completion", "chosen")
_COMPLETIONS = ("completion", "response", "output", "answer", "chosen")
_SYSTEMS = ("system", "system_prompt")
_TOOLS = ("tools", "functions")
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_COLUMNS = {*_INSTRUCTIONS, *_CONVERSATIONS, *_INPUTS, *_ANSWERS, *_SYSTEMS, *_TOOLS, "prompt", "history"}
_COLUMNS |= {"teacher", "chat_template_kwargs", "teacher_prompt"}
_FORMS = (
    '{"instruction", "input", "output"}, {"messages": [...]}, {"conversations": [...]}, {"prompt", "completion"} or '
    '{"question", "answer"}'
)


@dataclass(frozen=True)
class Instruction:
    """A request that a template renders."""

    instruction: str
    input: str  # what the instruction is about; "" if there is nothing
    system: str = ""
    history: tuple[tuple[str, str], ...] = ()  # earlier instructions, each with its answer


Unrendered = Instruction | tuple[Message, ...]  # what a template renders
Request = Unrendered | str
Context = str | tuple[Message, ...]  # what only the teacher reads (teacher_prompt.py)


@dataclass(frozen=True)
class Example:
    """One request and its reference answers."""

    request: Request  # an instruction (a template renders it), a prompt's text used as it is, or messages
    references: tuple[str, ...]  # training uses the first, evaluation all of them; empty if the row has none
    location: str  # for error messages: "train.jsonl, line 12" (from 1) or "train.parquet, row 11" (from 0)
    row: int  # index of the row in its source, from 0
    answer: Message | None = None  # the assistant message that the first reference is the text of, where there is one
    tools: tuple[Any, ...] = ()  # JSON schemas, which a chat template shows
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # the row's own, for its chat template
    unread: tuple[str, ...] = ()  # columns that nothing reads
    teacher_prompt: Context | None = None  # the column of that name; None without one
    context: str = ""  # a text before the rendered request, for the teacher alone
    fields: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # the row's columns

    @property
    def is_cut(self) -> bool:
        """Whether `promptkd generate` marks its response as cut: an end token behind it would be untrue."""
        return bool(self.references) and self.fields.get("ended") in (False,)  # NumPy's False, too


def asked_text(request: Request) -> str:
    """What is asked, as a text: an instruction with its input, the last message of a conversation, a prompt's text."""
    if isinstance(request, str):
        return request
    if isinstance(request, Instruction):
        return "\n\n".join(part for part in (request.instruction, request.input) if part)
    return content_text(request[-1])


def spoken(example: Example) -> tuple[tuple[str, str], ...]:
    """What a reader sees of the request: roles and texts, as no template writes them; () for a prompt's text."""
    request = example.request
    if isinstance(request, str):
        return ()
    if isinstance(request, Instruction):
        before = [turn for asks, answer in request.history for turn in (("user", asks), ("assistant", answer))]
        return (*([("system", request.system)] if request.system else []), *before, ("user", asked_text(request)))
    return tuple((str(message.get("role", "")), _shown(message)) for message in request)


def _shown(message: Message) -> str:
    """The text of a message and, as JSON, the tools that it calls."""
    content, calls = message.get("content"), message.get("tool_calls")
    parts = [content if isinstance(content, str) else "" if content is None else json.dumps(content)]
    parts += [json.dumps(calls, ensure_ascii=False)] if calls else []
    return "\n".join(part for part in parts if part)


def examples_from_rows(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str] | None = None) -> list[Example]:
    """Read `rows` in any of the forms, `columns` (old to new names) renamed.

    `RequestError` if there are none, or naming the first that is wrong.
    """
    located = [(f"row {index}", row) for index, row in enumerate(rows)]
    if not located:
        raise RequestError(f"Expected at least one row of data: {_FORMS}. Got none.")
    return examples_from_objects(located, columns, "The data")


def examples_from_objects(
    located: Sequence[tuple[str, Any]], columns: Mapping[str, str] | None, source: str
) -> list[Example]:
    """As `examples_from_rows`, of rows with their locations."""
    for old in columns or {}:
        if not any(isinstance(fields, Mapping) and old in fields for _, fields in located):
            fields = located[0][1]
            names = ", ".join(map(repr, fields)) if isinstance(fields, Mapping) else "none"
            raise RequestError(f"{source} has no column {old!r}, which --columns maps. The first row has: {names}.")
    examples = [
        example_from_row(_renamed(fields, columns), location=location, row=index)
        for index, (location, fields) in enumerate(located)
    ]
    if not columns:
        return examples
    both = zip(located, examples, strict=True)  # a text for the teacher may name a column by its old name, too
    return [replace(example, fields={**without_nulls(fields), **example.fields}) for (_, fields), example in both]


def read_columns(given: Sequence[str] | Mapping[str, str] | None) -> dict[str, str]:
    """Names to map, as "old=new" or a mapping, checked: `new` is a column that some form reads."""
    pairs = list(given.items()) if isinstance(given, Mapping) else [each.partition("=")[::2] for each in given or ()]
    for old, new in pairs:
        if not old or new not in _COLUMNS:
            known = ", ".join(sorted(_COLUMNS))
            raise RequestError(f"--columns takes OLD=NEW, where NEW is one of {known}. Got {f'{old}={new}'!r:.100}.")
        if old == "teacher_prompt" != new:
            told = "'teacher_prompt' is what the teacher alone reads. Rename it in the data to use it otherwise"
            raise RequestError(f"--columns teacher_prompt={new}: {told}.")
    names = dict(pairs)
    if len(names) < len(pairs) or len(set(names.values())) < len(names):
        told = " ".join(f"{old}={new}" for old, new in pairs)
        raise RequestError(f"--columns must name each column once, old or new. Got {told}.")
    return names


def example_from_row(fields: Mapping[str, Any], *, location: str, row: int) -> Example:
    """Read one row. `RequestError`, with `location`, if it fits none of the forms."""
    with at(location):
        if not isinstance(fields, Mapping):
            raise RequestError(f"expected an object with the fields of a row, got {kind(fields)}.")
        columns = _Columns(fields)
        request, references, answer = _read_form(columns)
        columns.take("ended")  # see `Example.is_cut`
        for name in _MEDIA:
            if isinstance(columns.present.get(name), list | dict | bytes) and columns.present[name]:
                raise RequestError(
                    f"the row holds {name!r}, and models are trained on text alone. Leave such rows out."
                )
        tools: tuple[Any, ...] = ()
        kwargs: Any = {}
        if not isinstance(request, str):
            tools = read_tools(columns.take(*_TOOLS))
            kwargs = columns.take("chat_template_kwargs") or {}
            kwargs = from_json(kwargs) if isinstance(kwargs, str) else kwargs
            if not isinstance(kwargs, Mapping):
                raise RequestError(f"'chat_template_kwargs' must be an object, or its JSON, got {kind(kwargs)}.")
        own = _context(columns.take("teacher_prompt"))
        rest = columns.unread(), own, "", columns.present
        return Example(request, references, location, row, answer, tools, dict(kwargs), *rest)


def _context(value: Any) -> Context | None:
    """A column `teacher_prompt`: a text, or messages (also as JSON); null counts as missing, no message as no text."""
    found = from_json(value) if isinstance(value, str) and value.lstrip().startswith("[{") else value
    if isinstance(found, list | tuple) and all(isinstance(each, Mapping) for each in found):
        return tuple(read_messages(found, "teacher_prompt")) if found else ""
    if value is not None and not isinstance(value, str):
        raise RequestError(f"'teacher_prompt' must be a text or a list of messages, got {kind(value)}.")
    return None if value is None else text_field(value, "teacher_prompt")


def text_field(value: Any, field: str, *, may_be_empty: bool = True) -> str:
    """`value` if it is a string that UTF-8 can encode, else `RequestError`."""
    if not isinstance(value, str):
        raise RequestError(f"{field!r} must be a string, got {kind(value)}.")
    if not may_be_empty and not value.strip():
        raise RequestError(f"{field!r} is empty. Expected some text.")
    check_characters(value, field)
    return value


def each_turn(example: Example) -> list[Example]:
    """An example per assistant turn that answers something, each with the conversation up to it."""
    request, turns = example.request, []
    if isinstance(request, Instruction):
        for index, (asked, answered) in enumerate(request.history):
            earlier = Instruction(asked, "", request.system, request.history[:index])
            turns.append(_turn_of(example, earlier, {"role": "assistant", "content": answered}))
    elif not isinstance(request, str):
        for index, message in enumerate(request):
            if message["role"] == "assistant" and any(each["role"] in ("user", "tool") for each in request[:index]):
                turns.append(_turn_of(example, request[:index], message))
    return [*turns, example] if example.references or not turns else turns


def _turn_of(example: Example, request: Unrendered, answer: Message) -> Example:
    found = answer if not isinstance(request, Instruction) else None
    if isinstance(own := example.teacher_prompt, tuple) and own[-1]["role"] in ("user", "tool"):
        problem = "'teacher_prompt' is a whole conversation, and --turns all trains several turns of the row"
        raise RequestError(f"{example.location}: {problem}. Give a text, or --turns last.")
    return replace(example, request=request, references=(content_text(answer),), answer=found)


class _Columns:
    """The columns of a row that are not null, and which of them were read."""

    def __init__(self, fields: Mapping[str, Any]):
        self.present = {key: cell_value(key, value) for key, value in fields.items() if value is not None}
        self._read: set[str] = set()

    def first(self, names: Sequence[str]) -> str | None:
        """The first of `names` that the row has and that was not read yet."""
        return next((name for name in names if name in self.present and name not in self._read), None)

    def take(self, *names: str) -> Any:
        """The value of the first of `names` that is there, which then counts as read; None without any."""
        if (name := self.first(names)) is None:
            return None
        self._read.add(name)
        return self.present[name]

    def unread(self) -> tuple[str, ...]:
        return tuple(str(name) for name in self.present if name not in self._read)


_Form = tuple[Request, tuple[str, ...], Message | None]


def _read_form(columns: _Columns) -> _Form:
    if "instruction" in columns.present:
        return _instruction(columns, "instruction")
    if name := columns.first(_CONVERSATIONS):
        return _conversation(columns, name, read_messages(columns.take(name), name))
    if isinstance(columns.present.get("prompt"), str):
        if isinstance(chosen := columns.present.get("chosen"), list) and len(chosen) > 1:
            messages = read_messages(columns.take("chosen"), "chosen")
            if columns.present["prompt"] in map(content_text, messages):  # so it is read, as a message
                columns.take("prompt")
            return _conversation(columns, "chosen", messages)
        prompt = text_field(columns.take("prompt"), "prompt", may_be_empty=False)
        columns.take("prompt_token_ids")  # tokens.py reads them
        return prompt, _references(columns, _COMPLETIONS), None
    if "prompt" in columns.present:
        return _conversation(columns, "prompt", read_messages(columns.take("prompt"), "prompt"))
    if name := columns.first(_INSTRUCTIONS):
        return _instruction(columns, name)
    if isinstance(columns.present.get("chosen"), list):
        return _conversation(columns, "chosen", read_messages(columns.take("chosen"), "chosen"))
    keys = ", ".join(f"{key!r:.60}" for key in islice(columns.present, 8)) or "no field that is not null"
    raise RequestError(f"expected {_FORMS}; --columns OLD=NEW maps other names. Got {keys}.")


def _instruction(columns: _Columns, name: str) -> _Form:
    instruction = text_field(columns.take(name), name, may_be_empty=False)
    found = columns.first(_INPUTS)
    about = "" if found is None else text_field(columns.take(found), found)
    system = _system(columns)
    history = columns.take("history") or ()
    history = from_json(history) if isinstance(history, str) else history
    rounds = history if isinstance(history, list | tuple) else [history]
    pairs = [each for each in rounds if isinstance(each, list | tuple) and len(each) == 2]
    if len(pairs) < len(rounds):
        raise RequestError(f"'history' must be a list of [instruction, answer] pairs. Got {history!r:.80}.")
    earlier = tuple((text_field(q, "history"), text_field(a, "history")) for q, a in pairs)
    return Instruction(instruction, about, system, earlier), _references(columns, _ANSWERS), None


def _conversation(columns: _Columns, name: str, messages: list[Message]) -> _Form:
    """The messages without the last assistant turn, and that turn; of a list of prompts its completion."""
    answer: Message | None = None
    references: tuple[str, ...] = ()
    if name == "prompt" and (found := columns.first(_COMPLETIONS)):
        if isinstance(columns.present[found], str):
            references = _references(columns, (found,))
            answer = {"role": "assistant", "content": references[0]}
        else:
            turns = read_messages(columns.take(found), found)
            if turns[-1]["role"] != "assistant":
                roles = ", ".join(message["role"] for message in turns)
                raise RequestError(f"{found!r} must end with an assistant message. Got messages from: {roles}.")
            is_whole = found == "chosen" and turns[: len(messages)] == messages  # the prompt stands in it again
            messages, answer = ([] if is_whole else messages) + turns[:-1], turns[-1]
    elif name != "prompt" and messages[-1]["role"] == "assistant":
        answer = messages.pop()
    if messages and messages[0]["role"] not in ("system", "developer") and (system := _system(columns)):
        messages.insert(0, {"role": "system", "content": system})
    if (last := messages[-1]["role"] if messages else "nobody") not in ("user", "tool"):
        expected = "must end with a user (or tool) message, for the model answers it"
        raise RequestError(f"the request in {name!r} {expected}. Got {last}.")
    return tuple(messages), references if answer is None else (content_text(answer),), answer


def _system(columns: _Columns) -> str:
    return "" if (name := columns.first(_SYSTEMS)) is None else text_field(columns.take(name), name)


def _references(columns: _Columns, names: Sequence[str]) -> tuple[str, ...]:
    """Of the first of `names`: a text, a list of texts, SQuAD's {"text": [...]}, or one assistant message."""
    name, found = columns.first(names), columns.take(*names)
    if name is None:
        return ()
    if isinstance(found, Mapping) and isinstance(found.get("text"), list | tuple):
        return tuple(text_field(each, f"{name}.text") for each in found["text"])
    if isinstance(found, str):
        return (text_field(found, name),)
    if name in ("completion", "chosen"):
        answer = read_messages(found, name)
        if len(answer) != 1 or answer[0]["role"] != "assistant":
            roles = ", ".join(message["role"] for message in answer)
            raise RequestError(f"{name!r} must hold one assistant message. Got messages from: {roles}.")
        if answer[0].get("tool_calls"):
            raise RequestError(f"{name!r} holds tool calls, which need a prompt of messages, not of text.")
        return (content_text(answer[0]),)
    if not isinstance(found, list | tuple):
        raise RequestError(f"{name!r} must be a string or a list of strings, got {kind(found)}.")
    if not found:
        raise RequestError(f"{name!r} is an empty list. Leave it out if the row has no reference.")
    return tuple(text_field(each, f"{name}[{index}]") for index, each in enumerate(found))


def _renamed(fields: Any, columns: Mapping[str, str] | None) -> Any:
    """`fields` with columns of other names, in the place of columns that have those names already."""
    if not columns or not isinstance(fields, Mapping):
        return fields
    new = {columns[key]: value for key, value in fields.items() if key in columns}
    return {key: value for key, value in fields.items() if key not in columns and key not in new} | new
