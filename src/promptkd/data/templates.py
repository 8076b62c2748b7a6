"""Templates: how a request becomes the text of a prompt, and which token ends its answer."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import jinja2
from jinja2 import meta
from jinja2.sandbox import SandboxedEnvironment

from promptkd.data.rows import Example, Instruction, Unrendered, at
from promptkd.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The Alpaca text, in the wording of MiniLLM and PromptKD.
_ALPACA = (
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
    """The template called `name`.

    Args:
        name: "alpaca"; "chat", the tokenizer's chat template; "auto", which is "chat" if the tokenizer has one and
            "alpaca" if not; or a Jinja string, taken exactly as it is, with the variables `instruction` and `input` (""
            if there is none), or `messages` where the row holds messages.

    Raises:
        RequestError: for an unknown name, or a template that is absent, fails or names other variables.
    """
    if "{{" in name or "{%" in name:
        return Template("jinja", tokenizer.eos_token_id, _jinja(name))
    if name == "auto":
        name = "chat" if tokenizer.chat_template else "alpaca"
    if name == "alpaca":
        return Template("alpaca", tokenizer.eos_token_id, _alpaca)
    if name != "chat":
        raise RequestError(
            f'The template must be "auto", "alpaca", "chat" or a Jinja string with {{{{ instruction }}}}. Got {name!r}.'
        )
    if not tokenizer.chat_template:
        raise RequestError('The tokenizer has no chat template. Choose "alpaca" or give a Jinja string.')
    return Template("chat", _chat_end_token(tokenizer), partial(_chat, tokenizer))


def _alpaca(request: Unrendered) -> str:
    if not isinstance(request, Instruction):
        raise RequestError(
            "the row holds messages, and the Alpaca template renders instructions only. "
            'Choose the template "chat" or a Jinja string that uses `messages`.'
        )
    has_input = bool(request.input.strip())
    given = f"### Input:\n{request.input}\n\n" if has_input else ""
    return _ALPACA.format(more=_MORE * has_input, instruction=request.instruction, input=given)


def _chat(tokenizer: "PreTrainedTokenizerBase", request: Unrendered, *, add_generation_prompt: bool = True) -> str:
    if isinstance(request, Instruction):
        parts = [request.instruction, *([request.input] if request.input.strip() else [])]
        request = ({"role": "user", "content": "\n\n".join(parts)},)
    options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
    try:
        return tokenizer.apply_chat_template(list(request), **options)
    except _ERRORS as error:
        raise RequestError(
            f"the tokenizer's chat template cannot render the messages: {error}. "
            "Change the messages, or choose another template."
        ) from error


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
    unknown = sorted(named - _JINJA_NAMES - environment.globals.keys())
    if unknown or not named & _JINJA_NAMES:
        got = ", ".join(unknown) or "none of them"
        raise RequestError(f"A Jinja template may name `instruction`, `input` and `messages`. Got {got}: {text!r}.")

    def render(request: Unrendered) -> str:
        if isinstance(request, Instruction):
            variables = vars(request)
        else:
            variables = {"messages": [dict(message) for message in request]}
        try:
            return template.render(variables)
        except _ERRORS as error:
            given = " and ".join(f"`{name}`" for name in variables)
            raise RequestError(f"the Jinja template cannot render the row, which gives it {given}: {error}.") from error

    return render
