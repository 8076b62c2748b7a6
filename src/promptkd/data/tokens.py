"""Texts as tokens, without text of the data ever becoming a control token.

"<|im_end|>" in an answer or an instruction is spelled in ordinary tokens. Control tokens come from the template, the
tokenizer's BOS, and prompts that are text already. The exception are an assistant's own marks of reasoning and of tool
calls: "<think>" or "[TOOL_CALLS]" in an answer is the token of that name where the tokenizer has one.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from promptkd.data.chat import with_marks
from promptkd.data.messages import from_json
from promptkd.data.rows import Example
from promptkd.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_AT_ONCE = 1000  # texts of a call of the tokenizer
# Two code points that Unicode reserves for use within a program: they enclose control tokens that the data spells.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
KEPT = "prompt_token_ids"  # the column of a prompt's tokens, where its text alone would be read as others
_OF_ANSWERS = re.compile(r"think|thought|reason|tool.?call|function.?call|python_tag|answer|solution", re.IGNORECASE)


@dataclass(frozen=True)
class Spelling:
    """A tokenizer, and which of its control tokens the data may not write."""

    tokenizer: "PreTrainedTokenizerBase"
    ends: frozenset[str] = frozenset()  # further tokens that end a turn

    @cached_property
    def control(self) -> re.Pattern[str]:
        """The control tokens, longer ones before their prefixes: those that a request may not write."""
        return _any_of(self._control)

    @cached_property
    def control_of_answers(self) -> re.Pattern[str]:
        """The control tokens that an answer may not write either."""
        tokenizer = self.tokenizer
        roles = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token, *self.ends}
        spelled = self._control | self.ends
        return _any_of(token for token in spelled if token in roles or not _OF_ANSWERS.search(token))

    @cached_property
    def closing(self) -> set[int]:
        """The ids of added tokens that can end a turn: not an answer's own marks, nor white space."""
        added = self.tokenizer.added_tokens_decoder.items()
        return {index for index, token in added if token.content.strip() and not _OF_ANSWERS.search(token.content)}

    @cached_property
    def _control(self) -> set[str]:
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        return special.union(self.tokenizer.all_special_tokens)

    def marked(self, example: Example) -> Example:
        """`example` with marks around every control token that its data spells. Most examples have none."""
        if isinstance(example.request, str):
            return replace(example, context=_mark(example.context, self.control))
        return with_marks(example, lambda text: _mark(text, self.control), self.mark_answer)

    def mark_answer(self, text: str) -> str:
        return _mark(text, self.control_of_answers)

    def tokens(self, texts: Sequence[str], *, spell: bool) -> list[list[int]]:
        """Tokens of the texts alone. With `spell`, control tokens are text, spelled in ordinary tokens."""
        options = {"split_special_tokens": spell, "return_attention_mask": False, "verbose": False}
        found: list[list[int]] = []
        for start in range(0, len(texts), _AT_ONCE):  # a tokenizer's own record of a text is many times its tokens
            batch = self.tokenizer(list(texts[start : start + _AT_ONCE]), add_special_tokens=False, **options)
            found += [[self._held.setdefault(index, index) for index in ids] for ids in batch["input_ids"]]
        return found

    @cached_property
    def _held(self) -> dict[int, int]:
        """One object per token id: a list of those takes 8 bytes a token, one of objects of its own 36."""
        return {}

    def tokens_of_marked(self, text: str, *, answer_of: str | None = None) -> list[int]:
        """Tokenize piece by piece: text between marks is data, the rest is the template's.

        An answer stands behind its prompt; one of the row at `answer_of` is refused if it cannot be spelled.
        """
        ids: list[int] = []
        for index, piece in enumerate(map(unmarked, re.split(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}", text))):
            # SentencePiece puts a space before a text, but not after a line break.
            lead, led, plain = self.tokens(["\n", "\n" + piece, piece], spell=index % 2 == 1)
            continues = answer_of is not None or index > 0
            ids += (found := led[len(lead) :] if continues and led[: len(lead)] == lead else plain)
            if answer_of is not None and index % 2 == 1:
                self._check_spelled(piece, found, answer_of)
        return ids

    def response_tokens(
        self, texts: Sequence[str], end_token_id: int | None, locations: Sequence[str]
    ) -> list[list[int]]:
        """The tokens of answers that are text alone, each with the end token. `RequestError` if one is spelled."""
        end = [] if end_token_id is None else [end_token_id]
        encoded = self.tokens(texts, spell=True)
        for index, (text, location) in enumerate(zip(texts, locations, strict=True)):
            if self.control.search(text) and self.control.search(self.control_of_answers.sub("", text)):
                encoded[index] = self.tokens_of_marked(self.mark_answer(text))
            self._check_spelled(text, encoded[index], location, end)
        return [ids + end for ids in encoded]

    def _check_spelled(self, text: str, ids: Iterable[int], location: str, end: Sequence[int] = ()) -> None:
        """Refuse an answer whose tokens `ids` hold a control token that its `text` spells."""
        tokenizer = self.tokenizer
        # The unknown token is excepted: a text gets it for other reasons than spelling its name.
        control = {tokenizer.convert_tokens_to_ids(token) for token in self.control_of_answers.findall(text)}
        if found := (control - {tokenizer.unk_token_id}).union(end).intersection(ids):
            problem = f"the response spells the control token {tokenizer.convert_ids_to_tokens(min(found))!r}"
            reason = "which this tokenizer cannot write in ordinary tokens. Take it out of the row."
            raise RequestError(f"{location}: {problem}, {reason}")

    def answer_text(self, ids: Sequence[int]) -> str:
        """The text of a response: its marks of reasoning and of tool calls stay, other special tokens go."""
        if self._own_marks.isdisjoint(ids):
            return self.tokenizer.decode(ids, skip_special_tokens=True)
        return self.tokenizer.decode([index for index in ids if index not in self._other_control])

    @cached_property
    def _own_marks(self) -> frozenset[int]:
        """The ids of control tokens that an answer may write."""
        own = [token for token in self._control if not self.control_of_answers.fullmatch(token)]
        return frozenset(self.tokenizer.convert_tokens_to_ids(own))

    @cached_property
    def _other_control(self) -> frozenset[int]:
        return frozenset(self.tokenizer.convert_tokens_to_ids(list(self._control))) - self._own_marks

    def kept_ids(self, text: str, held: Any) -> list[int] | None:
        """The tokens `held` that a row keeps of its prompt's `text`; None where this tokenizer reads them otherwise.

        `RequestError` for what is no list of ids.
        """
        ids = from_json(held) if isinstance(held, str) else held
        if not isinstance(ids, list | tuple) or not all(type(each) is int and each >= 0 for each in ids):
            raise RequestError(f"{KEPT!r} must be a list of token ids. Got {held!r:.80}.")
        if not ids or max(ids) >= len(self.tokenizer):
            return None
        bos = self.tokenizer.bos_token or ""  # tokenizers may move the white space of a text
        read, said = ("".join(each.removeprefix(bos).split()) for each in (self.tokenizer.decode(ids), text))
        return list(ids) if read == said else None

    def front(self, probe: str) -> list[int]:
        """What the tokenizer puts before a text. What it appends (EOS) would end the prompt, and is left out."""
        plain = self.tokens([probe], spell=True)[0]
        framed = self.tokenizer(probe, add_special_tokens=True, split_special_tokens=True, verbose=False)["input_ids"]
        for start in range(len(framed)):
            if framed[start : start + len(plain)] == plain:
                return framed[:start]
        problem = f"It splits {probe[:40]!r} into other tokens then. Choose another tokenizer."
        raise RequestError(f"The tokenizer must keep the tokens of a text when it adds its BOS and EOS. {problem}")


def unmarked(text: str) -> str:
    return text.replace(_OPEN, "").replace(_CLOSE, "")


def _mark(text: str, control: re.Pattern[str]) -> str:
    return control.sub(f"{_OPEN}\\g<0>{_CLOSE}", unmarked(text)) if control.search(text) else text


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")
