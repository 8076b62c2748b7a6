"""Templates: how a request becomes the text of a prompt, and which token ends its answer."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import jinja2
from jinja2 import meta
from jinja2.sandbox import SandboxedEnvironment

from promptkd.data.rows import Example, Instruction, Unrendered
from promptkd.errors import RequestError, at

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ALPACA = (  # in the wording of MiniLLM and PromptKD
    "Below is an instruction that describes a task{more}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
_MORE = ", paired with an input that provides further context"
_JINJA_NAMES = frozenset({"instruction", "input", "messages"})
# What an expression of a template can raise, beside Jinja's own errors.
_ERRORS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError)


@dataclass(frozen=True)
class Template:
    """Renders requests. `resolve_template` makes one."""

    name: str  # "alpaca", "chat" or "jinja"
    end_token_id: int | None  # the token that ends every response; None if the tokenizer has none
    render_request: Callable[[Unrendered], str]

    def render(self, example: Example) -> str:
        """The text of the prompt: a request that is text already as it is. `RequestError` if it cannot be rendered."""
        if isinstance(example.request, str):
            return example.request
        with at(example.location):
            return self.render_request(example.request)


def resolve_template(name: str, tokenizer: "PreTrainedTokenizerBase") -> Template:
    """The template "alpaca"; "chat", the tokenizer's; "auto", which is "chat" if there is one; or a Jinja string.

    A Jinja string may name `instruction` and `input` ("" if there is none), or `messages` where the row holds those.
    `RequestError` for an unknown name, or a template that is absent, fails or names other variables.
    """
    if "{{" in name or "{%" in name:
        return Template("jinja", tokenizer.eos_token_id, _jinja(name))
    if name == "auto":
        name = "chat" if tokenizer.chat_template else "alpaca"
    if name == "alpaca":
        return Template("alpaca", tokenizer.eos_token_id, _alpaca)
    if name != "chat":
        expected = '"auto", "alpaca", "chat" or a Jinja string with {{ instruction }}'
        raise RequestError(f"The template must be {expected}. Got {name!r}.")
    if not tokenizer.chat_template:
        raise RequestError('The tokenizer has no chat template. Choose "alpaca" or give a Jinja string.')
    return Template("chat", _chat_end_token(tokenizer), partial(_chat, tokenizer))


def _alpaca(request: Unrendered) -> str:
    if not isinstance(request, Instruction):
        advice = 'Choose the template "chat" or a Jinja string that uses `messages`.'
        raise RequestError(f"the row holds messages, and the Alpaca template renders instructions only. {advice}")
    if not request.input.strip():
        return _ALPACA.format(more="", instruction=request.instruction, input="")
    return _ALPACA.format(more=_MORE, instruction=request.instruction, input=f"### Input:\n{request.input}\n\n")


def _chat(tokenizer: "PreTrainedTokenizerBase", request: Unrendered, *, add_generation_prompt: bool = True) -> str:
    if isinstance(request, Instruction):
        parts = [request.instruction, *([request.input] if request.input.strip() else [])]
        request = ({"role": "user", "content": "\n\n".join(parts)},)
    try:
        return tokenizer.apply_chat_template(list(request), tokenize=False, add_generation_prompt=add_generation_prompt)
    except _ERRORS as error:
        problem = f"the tokenizer's chat template cannot render the messages: {error}"
        raise RequestError(f"{problem}. Change the messages, or choose another template.") from error


def _chat_end_token(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The first control token that the chat template writes after an answer, else the tokenizer's EOS."""
    probe = "3141592653"
    messages = ({"role": "user", "content": "Question"}, {"role": "assistant", "content": probe})
    _, found, after = _chat(tokenizer, messages, add_generation_prompt=False).rpartition(probe)
    if not found:
        return tokenizer.eos_token_id
    # Added tokens that end a turn need not be marked as special; Gemma's added line breaks end none.
    control = {index for index, token in tokenizer.added_tokens_decoder.items() if not token.content.isspace()}
    ids = tokenizer(after, add_special_tokens=False, split_special_tokens=False)["input_ids"]
    return next((index for index in ids if index in control), tokenizer.eos_token_id)


def _jinja(text: str) -> Callable[[Unrendered], str]:
    environment = SandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    try:
        named = meta.find_undeclared_variables(environment.parse(text))
        template = environment.from_string(text)
    except (*_ERRORS, SyntaxError, MemoryError) as error:  # numbers that are too long, expressions that are too deep
        reason = str(error).rstrip(".")
        raise RequestError(f"The Jinja template does not compile: {reason}. It reads: {text!r}.") from error
    if (unknown := sorted(named - _JINJA_NAMES - environment.globals.keys())) or not named & _JINJA_NAMES:
        got = ", ".join(unknown) or "none of them"
        raise RequestError(f"A Jinja template may name `instruction`, `input` and `messages`. Got {got}: {text!r}.")

    def render(request: Unrendered) -> str:
        messages = None if isinstance(request, Instruction) else [dict(message) for message in request]
        variables = vars(request) if messages is None else {"messages": messages}
        try:
            return template.render(variables)
        except _ERRORS as error:
            given = " and ".join(f"`{name}`" for name in variables)
            raise RequestError(f"the Jinja template cannot render the row, which gives it {given}: {error}.") from error

    return render
