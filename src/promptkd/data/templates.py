"""Templates: how a request becomes the text of a prompt, and which token ends its answer."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import jinja2
from jinja2 import meta
from jinja2.sandbox import SandboxedEnvironment

from promptkd.data.rows import Example, Instruction, Message, Request
from promptkd.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The Alpaca text, in the wording of MiniLLM and PromptKD.
_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_JINJA_NAMES = frozenset({"instruction", "input", "messages"})


@dataclass(frozen=True)
class Template:
    """Renders requests. `resolve_template` makes one."""

    name: str  # "alpaca", "chat" or "jinja"
    adds_special_tokens: bool  # whether the tokenizer adds its BOS to the prompt; a chat template writes its own
    end_token_id: int | None  # the token that ends every response; None if the tokenizer has none
    render_request: Callable[[Instruction | tuple[Message, ...]], str]

    def render(self, example: Example) -> str:
        """The text of the prompt. A request that is text already is used as it is.

        Raises:
            RequestError: if this template cannot render the request; with the row's location.
        """
        if isinstance(example.request, str):
            return example.request
        try:
            return self.render_request(example.request)
        except RequestError as error:
            raise RequestError(f"{example.location}: {error}") from error


def resolve_template(name: str, tokenizer: "PreTrainedTokenizerBase") -> Template:
    """The template called `name`.

    Args:
        name: "alpaca"; "chat", the tokenizer's chat template; "auto", which is "chat" if the tokenizer has one and
            "alpaca" if not; or a Jinja string, taken exactly as it is, with the variables `instruction` and `input` (""
            if there is none), or `messages` where the row holds messages.

    Raises:
        RequestError: for an unknown name, "chat" without a chat template, a Jinja string that does not compile or
            names other variables, or a chat template that fails.
    """
    if "{{" in name or "{%" in name:
        return Template("jinja", True, tokenizer.eos_token_id, partial(_jinja, _compile(name)))
    if name == "auto":
        name = "chat" if tokenizer.chat_template else "alpaca"
    if name == "alpaca":
        return Template("alpaca", True, tokenizer.eos_token_id, _alpaca)
    if name != "chat":
        raise RequestError(
            f'The template must be "auto", "alpaca", "chat" or a Jinja string with {{{{ instruction }}}}. Got {name!r}.'
        )
    if not tokenizer.chat_template:
        raise RequestError('The tokenizer has no chat template. Choose "alpaca" or give a Jinja string.')
    return Template("chat", False, _chat_end_token(tokenizer), partial(_chat, tokenizer))


def _alpaca(request: Request) -> str:
    if not isinstance(request, Instruction):
        raise RequestError(
            "the row holds messages, and the Alpaca template renders instructions only. "
            'Choose the template "chat" or a Jinja string that uses `messages`.'
        )
    if request.input.strip():
        return _ALPACA_WITH_INPUT.format(instruction=request.instruction, input=request.input)
    return _ALPACA.format(instruction=request.instruction)


def _chat(tokenizer: "PreTrainedTokenizerBase", request: Instruction | tuple[Message, ...]) -> str:
    if isinstance(request, Instruction):
        parts = [request.instruction, *([request.input] if request.input.strip() else [])]
        request = ({"role": "user", "content": "\n\n".join(parts)},)
    return _apply_chat_template(tokenizer, request, add_generation_prompt=True)


# What an expression of a template can raise beside Jinja's own errors.
_PYTHON_ERRORS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError)
_RENDER_ERRORS = (jinja2.TemplateError, *_PYTHON_ERRORS)
# Beside Jinja's own errors: numbers that are too long, expressions that are too deep.
_COMPILE_ERRORS = (jinja2.TemplateError, ValueError, RecursionError, SyntaxError, MemoryError)


def _apply_chat_template(
    tokenizer: "PreTrainedTokenizerBase", messages: tuple[Message, ...], *, add_generation_prompt: bool
) -> str:
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except _RENDER_ERRORS as error:
        raise RequestError(
            f"the tokenizer's chat template cannot render the messages: {error}. "
            "Change the messages, or choose another template."
        ) from error


def _chat_end_token(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The first control token that the chat template writes after an answer, else the tokenizer's EOS."""
    probe = "3141592653"
    text = _apply_chat_template(
        tokenizer,
        ({"role": "user", "content": "Question"}, {"role": "assistant", "content": probe}),
        add_generation_prompt=False,
    )
    _, found, after = text.rpartition(probe)
    if not found:
        return tokenizer.eos_token_id
    # Added tokens that end a turn need not be marked as special; Gemma's added line breaks end none.
    control = {index for index, token in tokenizer.added_tokens_decoder.items() if not token.content.isspace()}
    ids = tokenizer(after, add_special_tokens=False, split_special_tokens=False)["input_ids"]
    return next((index for index in ids if index in control), tokenizer.eos_token_id)


def _compile(text: str) -> jinja2.Template:
    environment = SandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    try:
        named = meta.find_undeclared_variables(environment.parse(text))
        template = environment.from_string(text)
    except _COMPILE_ERRORS as error:
        reason = str(error).rstrip(".")
        raise RequestError(f"The Jinja template does not compile: {reason}. It reads: {text!r}.") from error
    unknown = sorted(named - _JINJA_NAMES - environment.globals.keys())
    if unknown or not named & _JINJA_NAMES:
        got = ", ".join(unknown) if unknown else "none of them"
        raise RequestError(f"A Jinja template may name `instruction`, `input` and `messages`. Got {got}: {text!r}.")
    return template


def _jinja(template: jinja2.Template, request: Instruction | tuple[Message, ...]) -> str:
    if isinstance(request, Instruction):
        variables: dict[str, object] = {"instruction": request.instruction, "input": request.input}
    else:
        variables = {"messages": [dict(message) for message in request]}
    try:
        return template.render(variables)
    except _RENDER_ERRORS as error:
        given = " and ".join(f"`{name}`" for name in variables)
        raise RequestError(f"the Jinja template cannot render the row, which gives it {given}: {error}.") from error
