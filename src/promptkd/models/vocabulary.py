"""Whether two models share a vocabulary: the same meaning of every token id, the same tokens for every text."""

from torch import nn
from transformers import PreTrainedTokenizerBase

from promptkd.engine import head_size
from promptkd.errors import RequestError

# Merges and normalizers can differ under one vocabulary; these strings show it.
_PROBES = (
    "The quick brown fox, 12.5 % of 1999!",
    "  two  spaces\n\tand a tab",
    "naïve café – 日本語 🙂",
    "def f(x):\n    return x",
)


def check_same_vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Refuse tokenizers that give an id different meanings or split a text differently.

    Raises:
        RequestError: naming the first difference.
    """
    mine, other = student.get_vocab(), teacher.get_vocab()
    if mine != other:
        differing = sorted(token for token in mine.keys() | other.keys() if mine.get(token) != other.get(token))
        token = differing[0]
        raise RequestError(
            f"Student and teacher must share one vocabulary. {len(differing)} tokens differ, {token!r} among them: id "
            f"{mine.get(token)} in the student, {other.get(token)} in the teacher. Distillation compares the two "
            "distributions id by id; distilling across tokenizers is not supported."
        )
    words = " ".join(sorted(student.convert_tokens_to_string([token]) for token in mine))
    for text in (*_PROBES, words):
        ours, theirs = (each(text, add_special_tokens=False)["input_ids"] for each in (student, teacher))
        if ours != theirs:
            raise RequestError(
                f"Student and teacher share their tokens but split text differently: {text[:80]!r} is {len(ours)} "
                f"tokens for the student, {len(theirs)} for the teacher. Use the teacher's tokenizer for the student."
            )


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The highest token id plus one. Columns of a head beyond it are padding."""
    return max(tokenizer.get_vocab().values()) + 1


def shared_vocabulary_size(student: nn.Module, teacher: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of columns of both heads that stand for tokens; the padding behind them is sliced off.

    Raises:
        RequestError: if a head has fewer columns than the tokenizer has tokens.
    """
    needed = vocabulary_size(tokenizer)
    for name, size in (("student", head_size(student)), ("teacher", head_size(teacher))):
        if size < needed:
            raise RequestError(
                f"The {name}'s head must have a column for each of the tokenizer's {needed} tokens. Got {size}."
            )
    return needed
