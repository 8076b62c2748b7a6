"""What ROUGE counts as a token, by name, and which texts such tokens leave unread.

ROUGE as the papers have it (`words`) knows a-z and 0-9 alone: other scripts score 0, or by their digits, whatever the
answer. `unicode` and `characters` read every script.
"""

import hashlib
import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import regex
from rouge_score.tokenizers import DefaultTokenizer

from promptkd.errors import RequestError

Tokenize = Callable[[str], Sequence[Any]]

ROUGE_TOKENIZERS = ("words", "unicode", "characters", "model")
DEFAULT = "words"
MOST_UNREAD = 0.1  # share of the rows that ROUGE may not read and still choose between checkpoints

# Scripts that are written without spaces: a word would be a sentence there.
_NO_SPACES = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
_UNICODE = regex.compile(
    rf"[{_NO_SPACES}]\p{{M}}*|[\p{{L}}\p{{N}}--[{_NO_SPACES}]][\p{{L}}\p{{M}}\p{{N}}--[{_NO_SPACES}]]*", regex.V1
)
_SEEN = regex.compile("[a-z0-9]")  # by `words`


@dataclass(frozen=True)
class RougeTokenizer:
    """The tokens by which ROUGE compares texts."""

    name: str  # as a record holds it: equal names mean equal tokens
    tokenize: Tokenize

    def reads(self, text: str) -> bool:
        """Whether there are tokens; of `words`, whether they hold at least half of half of the words of `text`."""
        if self.name != DEFAULT:
            return bool(self.tokenize(text))
        words = _unicode_words(text)
        seen = [word for word in words if 2 * len(_SEEN.findall(word)) >= len(word)]
        return bool(self.tokenize(text)) and 2 * len(seen) >= len(words)

    def told_unread(self, references: Sequence[Sequence[str]]) -> str:
        """Says so, with advice, if more rows than `MOST_UNREAD` have no reference that the tokens read; else ""."""
        unread = sum(not any(map(self.reads, row)) for row in references)
        if unread <= MOST_UNREAD * len(references):
            return ""
        knows = "its words are runs of the letters a-z and digits" if self.name == DEFAULT else "no token is in them"
        other = [name for name in ROUGE_TOKENIZERS if name not in (DEFAULT, self.name)]
        told = f"ROUGE cannot score {unread} of {len(references)} rows by {self.name}: {knows}."
        return f"{told} For other scripts give --rouge_tokenizer {', '.join(other[:-1])} or {other[-1]}."


def rouge_tokens(name: str = DEFAULT, tokenizer: Any = None) -> RougeTokenizer:
    """The tokens called `name`.

    - `words`: those of MiniLLM and PromptKD: lower case, runs of a-z and 0-9, stemmed from four letters on.
    - `unicode`: runs of letters (with their marks) and digits of any script, in lower case; each character by itself
      in scripts without spaces (Chinese, Japanese, Thai and their like).
    - `characters`: every character but white space, in lower case.
    - `model`: the tokens of `tokenizer`, that of the model; the name then holds a hash of its vocabulary.

    Raises `RequestError` for another name, or `model` without a tokenizer.
    """
    if name == "words":
        return RougeTokenizer(name, DefaultTokenizer(use_stemmer=True).tokenize)
    if name == "unicode":
        return RougeTokenizer(name, _unicode_words)
    if name == "characters":
        return RougeTokenizer(name, lambda text: [each for each in _folded(text) if not each.isspace()])
    if name == "model" and tokenizer is not None:
        return RougeTokenizer(f"model {_fingerprint(tokenizer)}", lambda text: tokenizer.tokenize(text.strip()))
    if name == "model":
        raise RequestError("The ROUGE tokens of the model need its tokenizer. Got none.")
    raise RequestError(f"rouge_tokenizer must be one of {', '.join(ROUGE_TOKENIZERS)}. Got {name}.")


def _unicode_words(text: str) -> list[str]:
    return _UNICODE.findall(_folded(text))


def _folded(text: str) -> str:
    """One form for what reads the same: full-width and composed letters, and case."""
    return unicodedata.normalize("NFKC", text).lower()


def _fingerprint(tokenizer: Any) -> str:
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:8]
