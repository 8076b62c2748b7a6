"""Templates: how a request becomes the text of a prompt, and which token ends its answer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import meta
from jinja2.sandbox import SandboxedEnvironment

from promptkd.data.chat import ERRORS, ChatTemplate, split_off
from promptkd.data.messages import REASONING, content_text
from promptkd.data.rows import Context, Example, Instruction
from promptkd.data.teacher_prompt import TeacherPrompts, for_teacher
from promptkd.errors import RequestError, at

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAINED_ON = "promptkd_template"
"""The key of a saved tokenizer's configuration under which the template stands that its model was trained on."""
_PREAMBLE = (  # in the wording of MiniLLM and PromptKD
    "'Below is an instruction that describes a task' ~ (', paired with an input that provides further context' "
    "if input.strip() else '') ~ '. Write a response that appropriately completes the request.'"
)
ALPACA = (  # a system text takes the preamble's place; earlier instructions and answers stand before the last one
    f"{{{{ system if system.strip() else {_PREAMBLE} }}}}\n\n"
    "{% for asked, answered in history %}### Instruction:\n{{ asked }}\n\n### Response:\n{{ answered }}\n\n{% endfor %}"
    "### Instruction:\n{{ instruction }}\n\n{% if input.strip() %}### Input:\n{{ input }}\n\n{% endif %}### Response:\n"
)
_JINJA_NAMES = frozenset({"instruction", "input", "system", "history", "messages", "tools"})


@dataclass(frozen=True)
class Template:
    """Renders requests. `resolve_template` makes one."""

    name: str  # "alpaca", "chat" or "jinja"
    end_token_id: int | None  # the token that ends every response; None if the tokenizer has none
    render_request: Callable[[Example], str]
    chat: ChatTemplate | None = None
    text: str = ""  # of a Jinja text
    names: frozenset[str] = frozenset()  # what a Jinja text names
    trained: bool = False  # whether the tokenizer's files name it as what the model was trained on
    conversations: ChatTemplate | None = None  # renders rows of messages, which a template of instructions does not
    bos: str = ""  # what the tokenizer may put before a text
    teacher: TeacherPrompts | None = None  # what the teacher alone reads; None where no teacher reads the rows

    def render(self, example: Example) -> str:
        """The text of the prompt: a request that is text already as it is. `RequestError` if it cannot be rendered."""
        with at(example.location):
            text = example.request if isinstance(example.request, str) else self._rendered(example)
        return f"{example.context}\n\n{text.removeprefix(self.bos)}" if example.context else text

    def _rendered(self, example: Example) -> str:
        if self.conversations is not None and not isinstance(example.request, Instruction):
            return self.conversations.prompt(example)
        return self.render_request(example)

    def context(self, example: Example) -> Context:
        """What the teacher alone reads of the row; "" for nothing."""
        if self.teacher is None:
            return ""
        with at(example.location):
            return self.teacher.context(example)

    def for_teacher(self, example: Example, context: Context) -> Example:
        """The example as the teacher reads it, with a `context` that is not empty."""
        with at(example.location):
            chat = self.chat or self.conversations
            return for_teacher(example, context, self.chat, reads_messages=chat is not None or "messages" in self.names)

    def render_answer(self, example: Example, prompt: str) -> str | None:
        """What a chat template writes after the rendered `prompt` once the answer is there, to the end of the text.

        None where the answer is its text alone. `RequestError` if the prompt is not how the whole begins.
        """
        with at(example.location):
            if self.chat is None or isinstance(example.request, str):
                if (example.answer or {}).get("tool_calls"):
                    problem = "the answer is a tool call, which a chat template alone can write"
                    raise RequestError(f'{problem}. Choose the template "chat", or take the row out.')
                return None
            return split_off(prompt, self.chat.whole(example))

    def unread(self, example: Example) -> set[str]:
        """The columns of the row that neither its form nor the template reads."""
        found, request = set(example.unread) - (self.teacher.names if self.teacher else frozenset()), example.request
        if self.teacher is None and example.teacher_prompt is not None:
            found.add("teacher_prompt")
        if isinstance(request, str):
            return found
        if self.chat is not None:
            return found.union(self.chat.unread(example))
        found.update(name for name in ("tools",) if example.tools and name not in self.names)
        found.update(["chat_template_kwargs"] if example.template_kwargs else [])
        if isinstance(request, Instruction):
            given = {name for name, value in vars(request).items() if value} - {"instruction"}
            return found | (given - self.names if self.name == "jinja" else set())
        turns = [*request, example.answer or {}]
        return found.union(name for name in REASONING if any(name in turn for turn in turns))


def resolve_template(
    name: str,
    tokenizer: "PreTrainedTokenizerBase",
    kwargs: Mapping[str, Any] | None = None,
    teacher: TeacherPrompts | None = None,
) -> Template:
    """The template "alpaca"; "chat", the tokenizer's; a Jinja string; or "auto".

    "auto" is what the model was trained on if its tokenizer's files name that, else "chat" if there is one.

    A Jinja string may name `instruction`, `input`, `system`, `history` ("" or empty if there is none) and `tools`, or
    `messages` where the row holds those. `kwargs` are variables of a chat template, such as enable_thinking; `teacher`
    says what the teacher alone reads.
    `RequestError` for an unknown name, or a template that is absent, fails or names other variables.
    """
    trained = _trained_on(tokenizer) if name == "auto" else None
    name = trained or name
    if "{{" in name or "{%" in name:
        template = _jinja(name, tokenizer.eos_token_id)
    elif name == "alpaca" or (name == "auto" and not tokenizer.chat_template):
        template = _alpaca(tokenizer.eos_token_id)
    elif name not in ("auto", "chat"):
        expected = '"auto", "alpaca", "chat", "teacher" (of distill) or a Jinja string with {{ instruction }}'
        raise RequestError(f"The template must be {expected}. Got {name!r}.")
    elif not tokenizer.chat_template:
        raise RequestError('The tokenizer has no chat template. Choose "alpaca" or give a Jinja string.')
    else:
        chat = ChatTemplate(tokenizer, kwargs or {})
        template = Template("chat", chat.end_token_id, chat.prompt, chat)
    if kwargs and (unread := [key for key in kwargs if template.chat is None or not template.chat.names(key)]):
        problem = f"chat_template_kwargs sets {', '.join(unread)}, which the template does not read"
        raise RequestError(f"{problem} ({template.name}). Leave it out, or choose a chat template that does.")
    conversations = None
    if trained and "messages" not in template.names and tokenizer.chat_template:
        conversations = ChatTemplate(tokenizer)
    known: dict[str, Any] = {"teacher": teacher, "trained": bool(trained), "conversations": conversations}
    return replace(template, bos=tokenizer.bos_token or "", **known)


def _trained_on(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """The template that the tokenizer's files name as what the model was trained on. `RequestError` if it is none."""
    held = tokenizer.init_kwargs.get(TRAINED_ON)
    if held is not None and held != "alpaca" and not (isinstance(held, str) and ("{{" in held or "{%" in held)):
        where = f"tokenizer_config.json of {tokenizer.name_or_path}"
        raise RequestError(f"{TRAINED_ON} must be alpaca or a Jinja text in {where}. Got {held!r:.80}.")
    return held


def _alpaca(end_token_id: int | None) -> Template:
    template = _jinja(ALPACA, end_token_id)

    def render(example: Example) -> str:
        if not isinstance(example.request, Instruction):
            advice = 'Choose the template "chat" or a Jinja string that uses `messages`; distill takes "teacher" too.'
            told = "the row holds messages, and the Alpaca template renders instructions only"
            raise RequestError(f"{told}. {advice}")
        return template.render_request(example)

    return replace(template, name="alpaca", render_request=render, text="")


def _jinja(text: str, end_token_id: int | None) -> Template:
    environment = SandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    try:
        named = meta.find_undeclared_variables(environment.parse(text))
        template = environment.from_string(text)
    except (*ERRORS, SyntaxError, MemoryError) as error:  # numbers that are too long, expressions that are too deep
        reason = str(error).rstrip(".")
        raise RequestError(f"The Jinja template does not compile: {reason}. It reads: {text!r}.") from error
    if (unknown := sorted(named - _JINJA_NAMES - environment.globals.keys())) or not named & _JINJA_NAMES:
        got = ", ".join(unknown) or "none of them"
        raise RequestError(f"A Jinja template may name `instruction`, `input` and `messages`. Got {got}: {text!r}.")

    def render(example: Example) -> str:
        request, tools = example.request, {"tools": list(example.tools)}
        if isinstance(request, Instruction):
            given, variables = "`instruction` and `input`", {**vars(request), **tools}
        else:
            assert not isinstance(request, str)
            turns = [{**message, "content": content_text(message)} for message in request]
            given, variables = "`messages`", {"messages": turns, **tools}
        try:
            return template.render(variables)
        except ERRORS as error:
            raise RequestError(f"the Jinja template cannot render the row, which gives it {given}: {error}.") from error

    return Template("jinja", end_token_id, render, text=text, names=frozenset(named))
