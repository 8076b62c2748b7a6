"""Data: rows from files, folders and the hub, rendered by a template and encoded as tokens."""

from promptkd.data.encode import EncodedData, EncodedExample, encode_examples, stop_token_ids
from promptkd.data.rows import Example, Instruction, Message, Request, examples_from_rows
from promptkd.data.sources import read_examples
from promptkd.data.templates import Template, resolve_template
