"""What student and teacher have in common of their vocabularies, and whether rows use anything else."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedTokenizerBase

from promptkd.data.encode import EncodedExample
from promptkd.engine.heads import Vocabulary, head_size
from promptkd.errors import RequestError

# Texts that show differences of merges and normalizers, which tokenizers of one vocabulary can have.
PROBES = (
    "The quick brown fox's 12.5 % of 1999, isn't it? IT'S 3,141,592!",
    "  two  spaces\n\tand a tab\n\n1. One\n\n  2) Two   3\r\n",
    "naïve café – 日本語 ١٢٣ 🙂👩‍💻 Ελλάδα",
    "def f(x):\n    return {x: [0x1F, 'a_b']}  # ok\n",
)
_NAMED = 4  # tokens of each side whose names are told
_ANOTHER_WAY = "`promptkd generate` by the teacher and `promptkd sft` on what it writes need no shared vocabulary."


@dataclass(frozen=True)
class SharedVocabulary(Vocabulary):
    """The tokens that stand for the same in student and teacher, and by id those of one side, which are masked."""

    shared: int = 0  # how many tokens both have
    of_student: Mapping[int, str] = field(default_factory=dict, compare=False)
    of_teacher: Mapping[int, str] = field(default_factory=dict, compare=False)
    teachers_texts: re.Pattern[str] | None = field(default=None, compare=False)  # that it alone reads as one token

    @property
    def notes(self) -> list[str]:
        """Which tokens are left out of the distributions, as a sentence; none if there are none."""
        sides = [("student", self.of_student), ("teacher", self.of_teacher)]
        named = [f"{_names(tokens)} of the {side}" for side, tokens in sides if tokens]
        if not named:
            return []
        one = "1 id is" if len(self.masked) == 1 else f"{len(self.masked)} ids are"
        left_out = f"{one} left out of both distributions and never sampled: {', '.join(named)}"
        return [f"Student and teacher share {self.shared} tokens; {left_out}."]

    def check(self, rows: Iterable[EncodedExample], of: str) -> None:
        """`RequestError`, naming a row of the data that `of` describes, if it uses a token of one side."""
        masked = set(self.masked)
        if not masked:
            return
        for row in rows:
            for part, ids, text in (
                ("prompt", row.prompt_ids, row.prompt),
                ("response", row.response_ids, "".join(row.references[:1])),
                ("teacher's prompt", row.teacher_prompt_ids or (), ""),
            ):
                if found := masked.intersection(ids):
                    self._refuse(min(found), f"Row {row.row} of the {of}: the {part}")
                if self.teachers_texts is not None and (spelled := self.teachers_texts.search(text)):
                    used = f"Row {row.row} of the {of}: the {part} holds {spelled.group()!r}"
                    raise RequestError(f"{used}, which only the teacher reads as one token. {_ANOTHER_WAY}")

    def check_end(self, index: int | None) -> None:
        """`RequestError` if a token of one side ends responses."""
        if index is not None and index in self.masked:
            self._refuse(index, "Every response")

    def _refuse(self, index: int, what: str) -> None:
        mine, other = self.of_student.get(index), self.of_teacher.get(index)
        has = "the teacher does not have" if mine else "the student does not have"
        its = f"which is {other!r} in the teacher" if mine and other else f"which {has}"
        use = "ends with" if what == "Every response" else "uses"
        raise RequestError(
            f"{what} {use} {mine or other!r} (id {index}), {its}. Give a tokenizer and a template whose tokens both "
            f"know, as the teacher's. {_ANOTHER_WAY}"
        )


def shared_vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> SharedVocabulary:
    """The tokens that both tokenizers have under one id.

    Tokens of one side (added ones, renamed ones, placeholders) are masked. `RequestError`, naming a difference, if a
    token has two ids, or if the tokenizers split a text that spells no added token of one side in different ways.
    """
    mine, other = student.get_vocab(), teacher.get_vocab()
    moved = sorted(token for token in mine.keys() & other.keys() if mine[token] != other[token])
    if moved:
        differ = f"{len(moved)} tokens differ, {moved[0]!r} among them"
        ids = f"id {mine[moved[0]]} in the student, {other[moved[0]]} in the teacher"
        reason = "Distillation compares the two distributions id by id; distilling across tokenizers is not supported."
        raise RequestError(f"Student and teacher must share one vocabulary. {differ}: {ids}. {reason} {_ANOTHER_WAY}")
    common = {index for token, index in mine.items() if token in other}
    if not common:
        raise RequestError(f"Student and teacher must share one vocabulary. They share no token. {_ANOTHER_WAY}")
    added = {token.content for each in (student, teacher) for token in each.added_tokens_decoder.values()}
    apart = added & (mine.keys() ^ other.keys())
    words = {student.convert_tokens_to_string([token]) for token in mine if token not in apart}
    words |= {teacher.convert_tokens_to_string([token]) for token in other if token not in mine and token not in apart}
    for text in (*PROBES, " ".join(sorted(words))):
        ours, theirs = (each(text, add_special_tokens=False)["input_ids"] for each in (student, teacher))
        if ours != theirs:
            found = f"{text[:80]!r} is {len(ours)} tokens for the student, {len(theirs)} for the teacher"
            problem = f"Student and teacher share {len(common)} tokens but split text differently: {found}"
            raise RequestError(f"{problem}. Use the teacher's tokenizer for the student. {_ANOTHER_WAY}")
    sides = [
        {index: token for token, index in each.items() if token not in known and index not in common}
        for each, known in ((mine, other), (other, mine))
    ]
    spelled = sorted(apart & other.keys(), key=len, reverse=True)
    return SharedVocabulary(
        size=max(common) + 1,
        masked=tuple(sorted(sides[0].keys() | sides[1].keys())),
        shared=len(common),
        of_student=sides[0],
        of_teacher=sides[1],
        teachers_texts=re.compile("|".join(map(re.escape, spelled))) if spelled else None,
    )


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The highest token id plus one. Columns of a head beyond it are padding."""
    return max(tokenizer.get_vocab().values()) + 1


def vocabulary_without(tokenizer: PreTrainedTokenizerBase, masked: Sequence[int]) -> Vocabulary:
    """A tokenizer's vocabulary without the `masked` ids, and only as long as it is then."""
    size = vocabulary_size(tokenizer)
    while size - 1 in masked:
        size -= 1
    return Vocabulary(size, tuple(masked))


def check_heads(vocabulary: Vocabulary, **models: nn.Module) -> None:
    """`RequestError`, naming the model, if a head lacks columns for a vocabulary."""
    for name, model in models.items():
        if (size := head_size(model)) < vocabulary.size:
            expected = f"a column for each of the tokenizer's {vocabulary.size} tokens"
            raise RequestError(f"The {name}'s head must have {expected}. Got {size}.")


def check_row_ids(role: str, model: nn.Module, rows: Iterable[EncodedExample], *, responses: bool = True) -> None:
    """`check_ids` for the prompts of rows and, with `responses`, for their responses."""
    for row in rows:
        check_ids(role, model, row.prompt_ids, f"The prompt of row {row.row}")
        if responses:
            check_ids(role, model, row.response_ids, f"The response of row {row.row}")


def check_ids(role: str, model: nn.Module, ids: Sequence[int], used_by: str) -> None:
    """`RequestError` if a token is beyond a model's embedding, as those are that a tokenizer alone was given."""
    if (most := max(ids, default=0)) >= (size := head_size(model)):
        _refuse_beyond(role, size, f"{used_by} has the token id {most}")


def check_stop_ids(role: str, model: nn.Module, stop_ids: Sequence[int]) -> None:
    """`RequestError` if a model can write none of the tokens that end its answers."""
    if stop_ids and min(stop_ids) >= (size := head_size(model)):
        _refuse_beyond(role, size, f"Answers end with the token id {min(stop_ids)}")


def _refuse_beyond(role: str, size: int, problem: str) -> None:
    advice = "After adding tokens to a tokenizer, call model.resize_token_embeddings(len(tokenizer)) and save both"
    told = f"{problem}, and the {role} has {size:,} tokens (ids 0 to {size - 1})"
    raise RequestError(f"{told}. {advice}; or give the tokenizer that belongs to the {role}.")


def shared_vocabulary_size(student: nn.Module, teacher: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """The size of one tokenizer's vocabulary, for which both heads must have columns; `RequestError` otherwise."""
    vocabulary = Vocabulary(vocabulary_size(tokenizer))
    check_heads(vocabulary, student=student, teacher=teacher)
    return vocabulary.size


def _names(tokens: Mapping[int, str]) -> str:
    listed = [f"{token!r} ({index})" for index, token in sorted(tokens.items())]
    more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
    return ", ".join(listed[:_NAMED]) + more
