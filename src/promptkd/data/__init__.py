"""Data: rows from files, folders and the hub, rendered by a template and encoded as tokens."""

from promptkd.data.encode import EncodedData, EncodedExample, encode_examples, stop_token_ids
from promptkd.data.messages import Message
from promptkd.data.rows import Example, Instruction, Request, examples_from_rows, read_columns
from promptkd.data.sources import read_examples
from promptkd.data.templates import Template, resolve_template

__all__ = ["EncodedData", "EncodedExample", "Example", "Instruction", "Message", "Request", "Template"]
__all__ += [
    "encode_examples",
    "examples_from_rows",
    "read_columns",
    "read_examples",
    "resolve_template",
    "stop_token_ids",
]
