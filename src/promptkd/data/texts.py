"""Plain text for a language-modelling loss."""

from pathlib import Path
from typing import TYPE_CHECKING

from promptkd.data.rows import text_field
from promptkd.data.sources import read_objects
from promptkd.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["encode_texts"]


def encode_texts(source: str | Path, tokenizer: "PreTrainedTokenizerBase", *, length: int) -> list[list[int]]:
    """Rows of `source` ({"text": ...}) one after another, an EOS behind each, in pieces of `length` tokens.

    The last piece may be shorter; one of a single token, which predicts nothing, is left out.

    Raises:
        RequestError: for a row without text, or too little text for one prediction.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    for location, row in read_objects(source):
        if not isinstance(row, dict) or "text" not in row:
            got = f"the keys {', '.join(map(repr, row)):.200}" if isinstance(row, dict) else f"a {type(row).__name__}"
            raise RequestError(f'{location}: expected an object with a "text" field. Got {got}.')
        text = text_field(row["text"], "text", location)
        stream += tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"] + end
    pieces = [stream[first : first + length] for first in range(0, len(stream), length)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    if not pieces:
        raise RequestError(f"{source} holds too little text: at least two tokens are needed.")
    return pieces
