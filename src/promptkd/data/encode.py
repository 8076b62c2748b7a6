"""Examples become token ids, and plain text becomes pieces of token ids. Nothing is ever cut.

With a chat template the response is what the template writes for the answer: its text of the whole conversation less
the prompt, up to the end token, so that prompt and response are together the template's own text. Otherwise it is the
answer's text and the end token. Prompt and response share no token: where a tokenizer would join them across their
boundary, they are tokenized apart, as they are when a model answers. What the data may write, tokens.py says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from promptkd.data.prompt_tokens import marked_text, prompt_tokens, spelling_of
from promptkd.data.rows import Example, Instruction, each_turn, spoken, text_field
from promptkd.data.sources import read_objects
from promptkd.data.teacher_prompt import holds_reference
from promptkd.data.templates import Template, resolve_template
from promptkd.data.tokens import Spelling
from promptkd.errors import RequestError, at

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

Turns = Literal["last", "all"]
MOST = 0.95  # the share of rows that a length limit should leave


@dataclass(frozen=True)
class EncodedExample:
    """One row, or one turn of it, as tokens."""

    prompt_ids: list[int]
    response_ids: list[int]  # the first reference and the end token; [] if the row has no reference
    references: tuple[str, ...]
    prompt: str  # the text of `prompt_ids`, without the BOS that the tokenizer adds
    row: int  # index of the row in its source, from 0
    request: tuple[tuple[str, str], ...] = ()  # what was asked without the template, by role; () for a prompt's text
    teacher_prompt_ids: list[int] | None = None  # the prompt with the context that only the teacher reads; None without
    teacher: str = ""  # the name of the teacher whose row it is, of several; "" where the row has none

    def for_teacher(self) -> "EncodedExample":
        """The row as the teacher reads it, under the same text: itself without a context."""
        if self.teacher_prompt_ids is None:
            return self
        return replace(self, prompt_ids=self.teacher_prompt_ids, teacher_prompt_ids=None)


@dataclass(frozen=True)
class Limits:
    """Most tokens of a prompt, of a response, and of a teacher's prompt with its context; 0 for no limit."""

    prompt: int
    response: int
    teacher_prompt: int = 0


@dataclass(frozen=True)
class EncodedData:
    """The examples within the limits, in their order, and the number of those that were not."""

    examples: list[EncodedExample]
    dropped: int
    unanswered: int = 0  # conversations left out, for they end with the user and a response is needed
    as_text: int = 0  # rows whose prompt is a text, which no template renders
    unread: Mapping[str, int] = field(default_factory=dict)  # columns that nothing reads: in how many rows they stand
    limits: Limits | None = None
    keeps_most: Limits | None = None  # the limits that 95 % of the examples are within, where fewer are
    keeps_all: Limits | None = None
    turns: Turns = "last"
    informed: int = 0  # examples whose teacher reads a reference of theirs in its context
    template: Template | None = field(default=None, compare=False, repr=False)  # None where all prompts are texts
    cut: int = 0  # rows left out, for their responses were cut at a length limit and whole ones are needed

    @property
    def contexts(self) -> int:
        """How many examples have a context that only the teacher reads."""
        return sum(example.teacher_prompt_ids is not None for example in self.examples)

    @property
    def rows(self) -> int:
        """How many rows the examples are from."""
        return len({example.row for example in self.examples})


class NoRowFitsError(RequestError):
    """No row is within the length limits; `keeps_all` would keep every one."""

    def __init__(self, told: str, limits: Limits, keeps_all: Limits):
        super().__init__(told)
        self.limits, self.keeps_all = limits, keeps_all


def teacher_of(example: Example) -> str:
    """What the column `teacher` says, by which several teachers share the rows."""
    named = example.fields.get("teacher")
    return "" if named is None else str(named)


def encode_examples(
    examples: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    template: Template | str = "auto",
    *,
    max_prompt_length: int = 256,
    max_response_length: int = 256,
    overlong: Literal["drop", "error"] = "drop",
    need_response: bool = True,
    turns: Turns = "last",
) -> EncodedData:
    """Render, tokenize and measure every example; with `turns` "all", every assistant turn of each.

    One over a limit, in tokens with BOS and end token, is dropped and counted, or an "error"; so is one whose response
    was cut when it was written. A conversation that ends with the user is dropped and counted. Without `need_response`
    all of these are used, and responses have no limit.
    `NoRowFitsError` where all are over a limit, `RequestError` for wrong arguments, no row left, or a row that cannot
    be rendered, or lacks tokens or a reference, with its location.
    """
    if not examples:
        raise RequestError("Expected at least one row to encode. Got none.")
    if max_prompt_length < 1 or max_response_length < 1:
        got = f"{max_prompt_length} and {max_response_length}"
        raise RequestError(f"The limits on prompt and response must be at least 1 token. Got {got}.")
    if overlong not in ("drop", "error"):
        raise RequestError(f'Rows over the limit are met with "drop" or "error". Got {overlong!r}.')
    if turns not in ("last", "all"):
        raise RequestError(f'The turns to train are "last" or "all". Got {turns!r}.')
    template = resolve_template(template, tokenizer) if isinstance(template, str) else template
    unread: dict[str, int] = {}
    for example in examples:
        for name in sorted(template.unread(example)):
            unread[name] = unread.get(name, 0) + 1
    given, examples = len(examples), _whole(examples, overlong) if need_response else examples
    cut = given - len(examples)
    if turns == "all":
        examples = [turn for example in examples for turn in each_turn(example)]
    asked = [example for example in examples if not (need_response and _ends_with_the_user(example))]
    if not asked:
        none = f"None of the {len(examples)} rows has a response (an assistant message at the end)"
        raise RequestError(f"{none}, and one is needed.")
    prompts, texts, responses, references = _encoded(asked, tokenizer, template, need_response)
    of_teacher, informed = _for_teacher(asked, references, tokenizer, template)
    longest = 0 if template.teacher is None else template.teacher.most
    limits = Limits(max_prompt_length, max_response_length if need_response else 0, longest)
    lengths = [tuple(map(len, each)) for each in zip(prompts, responses, of_teacher, strict=True)]
    kept, kept_informed = [], 0
    for index, (example, prompt, response) in enumerate(zip(asked, prompts, responses, strict=True)):
        problem = excess = ""
        read = of_teacher[index]
        if not prompt:
            problem = "the prompt has no tokens. Expected at least one."
        elif need_response and not example.references:
            problem = "the row has no reference ('output' or 'completion'), and one is needed."
        elif need_response and not response:
            problem = "the reference has no tokens, for it is empty and the tokenizer has no EOS."
        elif len(prompt) > max_prompt_length:
            excess = f"the prompt has {len(prompt)} tokens, and the limit is {max_prompt_length}"
        elif need_response and len(response) > max_response_length:
            excess = f"the response has {len(response)} tokens with its end, and the limit is {max_response_length}"
        elif len(read) > longest:
            excess = f"the teacher's prompt has {len(read)} tokens with its context, and the limit is {longest}"
        if excess and overlong == "error":
            problem = f"{excess}. Raise the limit, shorten the row, or drop such rows."
        if problem:
            raise RequestError(f"{example.location}: {problem}")
        if not excess:
            own = references[index], texts[index], example.row, spoken(example)
            kept.append(EncodedExample(prompt, response, *own, read or None, teacher_of(example)))
            kept_informed += informed[index]
    if not kept:
        and_response = f"; the shortest response has {min(map(len, responses))}, and the limit is {max_response_length}"
        limit = f"{max_prompt_length}{and_response if need_response else ''}"
        if any(of_teacher):
            shortest = min(len(ids) for ids in of_teacher if ids)
            limit += f"; the shortest of the teacher's prompts has {shortest}, and the limit is {longest}"
        prompt_length = f"{min(map(len, prompts))} tokens, template included, and the limit is {limit}"
        told = f"None of the {len(asked)} rows is within the limits. The shortest prompt has {prompt_length}."
        raise NoRowFitsError(told, limits, _that_keep(1.0, lengths, limits))
    dropped, most, every = len(asked) - len(kept), None, None
    if dropped > (1 - MOST) * len(asked):
        most, every = _that_keep(MOST, lengths, limits), _that_keep(1.0, lengths, limits)
    as_text, unanswered = sum(isinstance(example.request, str) for example in asked), len(examples) - len(asked)
    rendered = template if any(example.request for example in kept) else None
    counts: dict[str, Any] = {"unanswered": unanswered, "as_text": as_text, "informed": kept_informed, "cut": cut}
    return EncodedData(
        kept,
        dropped,
        unread=unread,
        limits=limits,
        keeps_most=most,
        keeps_all=every,
        turns=turns,
        template=rendered,
        **counts,
    )


def stop_token_ids(
    tokenizer: "PreTrainedTokenizerBase",
    generation_config: "GenerationConfig | None" = None,
    template: Template | str | None = None,
) -> tuple[int, ...]:
    """The ids that end a response, in ascending order: the EOS ids of tokenizer and model, the template's end."""
    configured = None if generation_config is None else generation_config.eos_token_id
    template = resolve_template(template, tokenizer) if isinstance(template, str) else template
    ids = [tokenizer.eos_token_id, *(configured if isinstance(configured, list | tuple) else [configured])]
    ids += [] if template is None else [template.end_token_id]
    return tuple(sorted({index for index in ids if index is not None}))


def encode_texts(source: str | Path, tokenizer: "PreTrainedTokenizerBase", *, length: int) -> list[list[int]]:
    """Rows of `source` ({"text": ...}), an EOS after each, in pieces of `length` tokens for a language-model loss."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    spelling = Spelling(tokenizer)
    stream: list[int] = []
    for location, row in read_objects(source):
        if not isinstance(row, dict) or "text" not in row:
            got = f"the keys {', '.join(map(repr, row)):.200}" if isinstance(row, dict) else f"a {type(row).__name__}"
            raise RequestError(f'{location}: expected an object with a "text" field. Got {got}.')
        with at(location):
            text = text_field(row["text"], "text")
        stream += spelling.tokens([text], spell=True)[0] + end
    starts = range(0, len(stream), length)  # the last piece may be shorter; one token predicts nothing
    pieces = [piece for start in starts if len(piece := stream[start : start + length]) > 1]
    if not pieces:
        raise RequestError(f"{source} holds too little text: at least two tokens are needed.")
    return pieces


def _encoded(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase", template: Template, need_response: bool
) -> tuple[list[list[int]], list[str], list[list[int]], list[tuple[str, ...]]]:
    """By example: the tokens and the text of the prompt, the tokens of the response, and the references."""
    spelling, end = spelling_of(tokenizer, template), template.end_token_id
    texts = [template.render(example) for example in examples]
    prompts = prompt_tokens(examples, texts, tokenizer, template)
    references = [example.references for example in examples]
    responses: list[list[int]] = [[] for _ in examples]
    has_answer = [index for index, example in enumerate(examples) if example.references]
    written: dict[int, str] = {}  # by a chat template
    if need_response:
        answers = {index: template.render_answer(examples[index], texts[index]) for index in has_answer}
        written = {index: _turn_only(text, template) for index, text in answers.items() if text is not None}
    plain = [index for index in has_answer if index not in written]
    locations = [examples[index].location for index in plain]
    said = [examples[index].references[0] for index in plain]
    for index, ids in zip(plain, spelling.response_tokens(said, end, locations), strict=True):
        responses[index] = ids
    wholes = spelling.tokens([texts[index] + text for index, text in written.items()], spell=False)
    for (index, text), whole in zip(written.items(), wholes, strict=True):
        example, prompt, chat = examples[index], prompts[index], template.chat
        assert chat is not None
        marked = marked_text(example, spelling, chat.whole)
        if marked is None and whole[: len(prompt)] == prompt:
            ids = whole[len(prompt) :]
        else:
            if marked is not None:
                start = len(marked_text(example, spelling, template.render) or "")
                text = _turn_only(marked[start:], template)
            ids = spelling.tokens_of_marked(text, answer_of=example.location)
        responses[index] = _ended(ids, spelling, chat.written_end, end)
        if (example.answer or {}).get("tool_calls"):  # no text of the row says them
            references[index] = (tokenizer.decode(responses[index], skip_special_tokens=True).strip(),)
    return prompts, texts, responses, references


def _for_teacher(
    examples: Sequence[Example],
    references: Sequence[tuple[str, ...]],
    tokenizer: "PreTrainedTokenizerBase",
    template: Template,
) -> tuple[list[list[int]], list[bool]]:
    """By example: the tokens of the teacher's prompt, [] without a context; whether the context holds a reference."""
    contexts = [template.context(example) for example in examples]
    has_context = [index for index, context in enumerate(contexts) if context]
    read = [template.for_teacher(examples[index], contexts[index]) for index in has_context]
    encoded = prompt_tokens(read, [template.render(example) for example in read], tokenizer, template)
    prompts: list[list[int]] = [[] for _ in examples]
    for index, ids in zip(has_context, encoded, strict=True):
        prompts[index] = ids
    return prompts, [bool(c) and holds_reference(c, said) for c, said in zip(contexts, references, strict=True)]


def _ends_with_the_user(example: Example) -> bool:
    return not example.references and not isinstance(example.request, str | Instruction)


def _whole(examples: Sequence[Example], overlong: str) -> Sequence[Example]:
    """Those of the examples whose responses were not cut. `RequestError` if none is left, or none may be dropped."""
    cut = [example for example in examples if example.is_cut]
    told = "cut at the length limit when it was written ('ended' is false), and a whole one is needed"
    advice = "Write the file again by `promptkd generate` with a higher --max-completion-length"
    if len(cut) == len(examples):
        raise RequestError(f"The response of each of the {len(examples)} rows was {told}. {advice}.")
    if cut and overlong == "error":
        raise RequestError(f"{cut[0].location}: the response was {told}. {advice}, or drop such rows.")
    return [example for example in examples if not example.is_cut] if cut else examples


def _turn_only(text: str, template: Template) -> str:
    """What a chat template writes for an answer; where it writes no end token, without what follows the answer."""
    if template.chat is None or template.chat.written_end is not None:
        return text
    return text.removesuffix(template.chat.suffix)


def _ended(ids: list[int], spelling: Spelling, written: int | None, end: int | None) -> list[int]:
    """The tokens of an answer up to the end token that the template wrote, or with `end` where it wrote none."""
    if written is not None:
        own, decode = {written} if written in ids else spelling.closing, spelling.tokenizer.decode
        places = [place for place, index in enumerate(ids) if index in own]
        while len(places) > 1 and not decode(ids[places[-2] + 1 : places[-1]]).strip():
            places.pop()  # nothing is said between the two
        if places and (written in ids or not decode(ids[places[-1] + 1 :]).strip()):
            return ids[: places[-1] + 1]
    return ids if end is None else [*ids, end]


def _that_keep(share: float, lengths: Sequence[tuple[int, ...]], limits: Limits) -> Limits:
    """The limits, none lower than now, within which at least this share of the examples is."""
    now = (limits.prompt, limits.response, limits.teacher_prompt)

    def excess(of: tuple[int, ...]) -> float:
        return max(length / limit for length, limit in zip(of, now, strict=True) if limit)

    within = sorted(lengths, key=excess)[: ceil(share * len(lengths))]
    return Limits(
        *(max(limit, *most) if limit else 0 for limit, most in zip(now, zip(*within, strict=True), strict=True))
    )
