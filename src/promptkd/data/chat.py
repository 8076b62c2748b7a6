"""The chat template of a tokenizer: a row's prompt, its whole conversation, and what the template takes.

Templates differ in the form in which they take tool calls, missing contents, reasoning and text parts. What one takes
is found by rendering short probes, never by its name; a row then comes in that form.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from itertools import product
from re import DOTALL, escape, search
from re import compile as compile_pattern
from typing import TYPE_CHECKING, Any

import jinja2

from promptkd.data.messages import REASONING, Message, content_text
from promptkd.data.rows import Example, Instruction, Unrendered
from promptkd.errors import RequestError, at

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What an expression of a template can raise, beside Jinja's own errors.
ERRORS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError)
_PROBE = "3141592653"
_QUESTION = {"role": "user", "content": "Question"}
_TOOL = {"type": "function", "function": {"name": "probe", "description": "", "parameters": {"type": "object"}}}
_ARGUMENTS = {"value": _PROBE}
_CALL_ID = "abcDEF123"  # Mistral's templates take nine letters and digits
_SET_HERE = ("conversation", "tools", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict")
_THOUGHT = compile_pattern(r"\s*<think>\n?(.*?)\n?</think>\s*", DOTALL)
DAY = datetime(2024, 7, 26)  # what Llama's templates write where there is no clock
_CLOCK = compile_pattern(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_SHOWN = 60  # characters of a text on either side of where two part


@dataclass(frozen=True)
class ChatTemplate:
    """Renders conversations as `tokenizer.apply_chat_template` does, with `kwargs` beside those of a row.

    A template that writes today's date writes `day`: rows must be the same when a run is resumed, or its teacher's
    logits are read, on another day.
    """

    tokenizer: "PreTrainedTokenizerBase"
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    day: datetime = DAY

    def __post_init__(self) -> None:
        self._check(self.kwargs)

    def prompt(self, example: Example) -> str:
        """The conversation up to the answer, and the header of the answer."""
        return self._render(self._messages(example.request), example, add_generation_prompt=True)

    def whole(self, example: Example) -> str:
        """The conversation with the answer, as the template writes it once the answer is there."""
        answer = example.answer or {"role": "assistant", "content": example.references[0]}
        return self._render([*self._messages(example.request), self._taken(answer)], example)

    def unread(self, example: Example) -> Iterator[str]:
        """What the row says and the template does not read, by name."""
        if example.tools and not self.names("tools"):
            yield "tools"
        yield from (f"chat_template_kwargs.{key}" for key in example.template_kwargs if not self.names(key))
        turns = [] if isinstance(example.request, Instruction | str) else [*example.request, example.answer or {}]
        for name in REASONING:
            if any(name in turn for turn in turns) and self._reasoning[name] is None:
                yield name

    @property
    def end_token_id(self) -> int | None:
        """The token that ends an answer: the template's own, else the tokenizer's EOS."""
        return self.tokenizer.eos_token_id if self.written_end is None else self.written_end

    @cached_property
    def written_end(self) -> int | None:
        """The first control token that the template writes after an answer, if it writes one."""
        # Added tokens that end a turn need not be marked as special; Gemma's added line breaks end none.
        added = self.tokenizer.added_tokens_decoder
        control = {index for index, token in added.items() if not token.content.isspace()}
        ids = self.tokenizer(self.suffix, add_special_tokens=False, split_special_tokens=False)["input_ids"]
        return next((index for index in ids if index in control), None)

    @cached_property
    def suffix(self) -> str:
        """What the template writes after an answer; "" if it does not write answers."""
        text = self._rendered([self._taken(_QUESTION), self._taken({"role": "assistant", "content": _PROBE})])
        return text.rpartition(_PROBE)[2] if _PROBE in text else ""

    def _render(self, messages: list[Message], example: Example, *, add_generation_prompt: bool = False) -> str:
        self._check(example.template_kwargs)
        kwargs = {**self.kwargs, **example.template_kwargs, "add_generation_prompt": add_generation_prompt}
        return self._rendered(messages, list(example.tools) or None, **kwargs)

    def _rendered(self, messages: list[Message], tools: list[Any] | None = None, **kwargs: Any) -> str:
        try:
            if self.names("strftime_now"):
                source = self.tokenizer.get_chat_template(kwargs.pop("chat_template", None), tools)
                kwargs["chat_template"] = _CLOCK.sub(lambda call: repr(self.day.strftime(call[2])), source)
            return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **kwargs)
        except ERRORS as error:
            problem = f"the tokenizer's chat template cannot render the messages: {error}"
            raise RequestError(f"{problem}. Change the messages, or choose another template.") from error

    def _check(self, kwargs: Mapping[str, Any]) -> None:
        if taken := [name for name in _SET_HERE if name in kwargs]:
            raise RequestError(f"chat_template_kwargs may not set {', '.join(taken)}: rows and training do.")

    def _messages(self, request: Unrendered | str) -> list[Message]:
        assert not isinstance(request, str)
        return [self._taken(message) for message in as_messages(request)]

    def _taken(self, message: Message) -> Message:
        """The message in the form that the template takes."""
        message, is_answer = dict(message), message["role"] == "assistant"
        text = content_text(message)
        if message.get("tool_calls"):
            if self._calls is None:
                problem = "the row holds tool calls, which the tokenizer's chat template does not write"
                raise RequestError(f"{problem}. Take the row out, or choose a model whose template does.")
            content, as_text = self._calls
            message = (content if "content" not in message else {}) | message
            if as_text:
                message["tool_calls"] = [_with_text(call) for call in message["tool_calls"]]
        elif "content" not in message:
            message["content"] = ""
        has_reasoning = any(name in message for name in REASONING)
        if is_answer and not has_reasoning and self._splits_reasoning and (opened := _THOUGHT.match(text)):
            message |= {REASONING[0]: opened[1], "content": (text := text[opened.end() :])}
        for name in REASONING:
            if name in message:
                reasoning = message.pop(name)
                if (taken := self._reasoning[name]) == "content":
                    message["content"] = text = f"<think>\n{reasoning.strip()}\n</think>\n\n{text}"
                elif taken is not None:
                    message[taken] = reasoning
        if self._needs_parts and "content" in message:
            message["content"] = [{"type": "text", "text": text}]
        elif not isinstance(message.get("content", ""), str) and not self._takes_parts:
            message["content"] = text
        return message

    def _probed(self, answer: Message, question: Message = _QUESTION) -> str:
        """The rendering of a probe; "" where the template refuses it."""
        try:
            return self._rendered([question, answer], [_TOOL] if "tool_calls" in answer else None)
        except RequestError:
            return ""

    @cached_property
    def writes_system(self) -> bool:
        """Whether the template writes a system message."""
        try:
            return _PROBE in self._rendered(
                [self._taken({"role": "system", "content": _PROBE}), self._taken(_QUESTION)]
            )
        except RequestError:
            return False

    @cached_property
    def writes_day(self) -> bool:
        """Whether the template writes the date, which `kwargs` may set."""
        if not self.names("strftime_now"):
            return False
        days, question = (self, replace(self, day=datetime(1999, 1, 2))), [self._taken(_QUESTION)]
        try:
            return len({each._rendered(question, **self.kwargs) for each in days}) > 1
        except RequestError:
            return True

    @cached_property
    def _calls(self) -> tuple[Message, bool] | None:
        """For a message with tool calls: its content where the row has none, and whether arguments come as JSON text.

        None where no form of them is written.
        """
        for content, as_text in product(({}, {"content": ""}), (False, True)):
            call = {"id": _CALL_ID, "type": "function", "function": {"name": "probe", "arguments": _ARGUMENTS}}
            calls = [_with_text(call) if as_text else call]
            text = self._probed({"role": "assistant", **content, "tool_calls": calls})
            # Python's own form of an object, or JSON within JSON, is none that a model should write.
            if _PROBE in text and str(_ARGUMENTS) not in text and '\\"value' not in text:
                return content, as_text
        return None

    @cached_property
    def _reasoning(self) -> dict[str, str | None]:
        """By each name of an answer's reasoning the field that the template writes; "content" if it belongs there."""
        written = [name for name in REASONING if _PROBE in self._probed({**_ANSWER, name: _PROBE})]
        inline = {**_ANSWER, "content": f"<think>\n{_PROBE}\n</think>\n\nAnswer"}
        other = written[0] if written else None
        if other is None and "think>" in self._source and _PROBE in self._probed(inline):
            other = "content"
        return {name: name if name in written else other for name in REASONING}

    @cached_property
    def _splits_reasoning(self) -> bool:
        """Whether reasoning in the content would stand behind an empty one, and has a field of its own."""
        text = self._probed({**_ANSWER, "content": f"<think>\n{_PROBE}\n</think>\n\nAnswer"})
        return text.count("<think>") > 1 and self._reasoning[REASONING[0]] not in (None, "content")

    @cached_property
    def _takes_parts(self) -> bool:
        plain, parts = ({**_QUESTION, "content": each} for each in (_PROBE, [{"type": "text", "text": _PROBE}]))
        return (written := self._probed(_ANSWER, parts)) != "" and (
            written == self._probed(_ANSWER, plain) or self._needs_parts
        )

    @cached_property
    def _needs_parts(self) -> bool:
        plain, parts = ({**_QUESTION, "content": each} for each in (_PROBE, [{"type": "text", "text": _PROBE}]))
        answer = {**_ANSWER, "content": [{"type": "text", "text": "Answer"}]}
        return _PROBE not in self._probed(_ANSWER, plain) and _PROBE in self._probed(answer, parts)

    @cached_property
    def _source(self) -> str:
        template = self.tokenizer.chat_template
        return json.dumps(template, ensure_ascii=False) if isinstance(template, dict) else str(template)

    def names(self, name: str) -> bool:
        """Whether the template names a variable or a field, as far as its text tells."""
        return search(rf"\b{escape(name)}\b", self._source) is not None


_ANSWER = {"role": "assistant", "content": "Answer"}


def as_messages(request: Unrendered) -> list[Message]:
    """A request as a conversation; of an instruction with its input below it."""
    if not isinstance(request, Instruction):
        return list(request)
    parts = [request.instruction, *([request.input] if request.input.strip() else [])]
    turns = [(role, text) for pair in request.history for role, text in zip(("user", "assistant"), pair, strict=True)]
    turns = [*([("system", request.system)] if request.system.strip() else []), *turns]
    turns.append(("user", "\n\n".join(parts)))
    return [{"role": role, "content": text} for role, text in turns]


def split_off(prompt: str, whole: str) -> str:
    """What `whole` has after `prompt`. `RequestError`, with both around the place, where it begins otherwise."""
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    pairs = zip(prompt, whole, strict=False)
    same = next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(prompt), len(whole)))
    before = prompt[max(0, same - _SHOWN) : same]
    shown = f"after {before!r} it has {prompt[same:][:_SHOWN]!r}, and the conversation {whole[same:][:_SHOWN]!r}"
    problem = "the prompt is not how the chat template begins the whole conversation"
    advice = "Bring the answer into the form that the template expects, give other chat_template_kwargs, or give prompt"
    advice += " and completion as texts."
    raise RequestError(f"{problem}: {shown}. {advice}")


def adopt(tokenizer: "PreTrainedTokenizerBase", teacher: "PreTrainedTokenizerBase", name: str) -> None:
    """Give `tokenizer` the chat template of the teacher `name`, and the special tokens that the template asks for.

    `RequestError` if there is none, or it writes a control token that `tokenizer` does not have.
    """
    if not teacher.chat_template:
        raise RequestError(f"--template teacher: {name} has no chat template. Choose another template.")
    before = tokenizer.chat_template
    theirs, ours = ChatTemplate(teacher), ChatTemplate(tokenizer)
    conversation = [_QUESTION, _ANSWER]
    text = theirs._rendered(conversation, add_generation_prompt=True)
    ids, own = (each(text, add_special_tokens=False)["input_ids"] for each in (teacher, tokenizer))
    control = [index for index in ids if index in teacher.added_tokens_decoder]
    if missing := {teacher.convert_ids_to_tokens(index) for index in control if ids.count(index) != own.count(index)}:
        tokens = ", ".join(sorted(missing))
        raise RequestError(f"--template teacher: the student's tokenizer lacks {tokens}, which the template writes.")
    tokenizer.chat_template = teacher.chat_template
    for token in ("bos_token", "eos_token"):
        if token in ours._source and getattr(teacher, token) is not None:
            setattr(tokenizer, token, getattr(teacher, token))
    with at("--template teacher"):
        if ChatTemplate(tokenizer)._rendered(conversation, add_generation_prompt=True) != text:
            tokenizer.chat_template = before
            raise RequestError("the template writes other texts with the student's tokenizer.")


def with_marks(example: Example, mark: Any, mark_answer: Any) -> Example:
    """`example` with every text of the data replaced: of an assistant by `mark_answer`, any other by `mark`."""

    def changed(value: Any, change: Any) -> Any:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, Mapping):
            return {changed(key, change): changed(part, change) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(changed(part, change) for part in value)
        return value

    def turn(message: Message) -> Message:
        change = mark_answer if message["role"] == "assistant" else mark
        return {key: part if key == "role" else changed(part, change) for key, part in message.items()}

    request = example.request
    if isinstance(request, Instruction):
        history = tuple((mark(asked), mark_answer(answered)) for asked, answered in request.history)
        request = Instruction(mark(request.instruction), mark(request.input), mark(request.system), history)
    elif not isinstance(request, str):
        request = tuple(turn(message) for message in request)
    answer = None if example.answer is None else turn(example.answer)
    references = tuple(mark_answer(each) for each in example.references)
    changes: dict[str, Any] = {"references": references, "answer": answer, "tools": changed(example.tools, mark)}
    return replace(example, request=request, context=mark(example.context), **changes)


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are JSON text."""
    function = call["function"]
    if isinstance(function["arguments"], str):
        return call
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
