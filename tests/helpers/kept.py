"""Kept logits of a tiny teacher, written as `promptkd generate --keep-logits` writes them."""

from pathlib import Path

from torch import nn

from helpers.tiny import END_ID, VOCABULARY, tiny_tokenizer
from promptkd.data import EncodedData
from promptkd.data.kept_logits import KeptLogits, KeptSettings, LogitsDtype, vocabulary_sha256
from promptkd.data.kept_writing import KeptWriter
from promptkd.evaluation.kept_scoring import measured_error, write_logits


def settings(count: int, dtype: LogitsDtype = "float16", masked: tuple[int, ...] = ()) -> KeptSettings:
    """What logits of `count` tokens depend on."""
    return KeptSettings(
        teacher="teacher",
        teacher_sha256="",
        teacher_parameters=1,
        precision="float32",
        kept=count,
        dtype=dtype,
        vocabulary=VOCABULARY,
        masked=list(masked),
        vocabulary_sha256=vocabulary_sha256(tiny_tokenizer()),
        ends=[END_ID],
        data="rows.jsonl",
        data_sha256="",
        rows={"template": "auto", "max_prompt_length": 16, "max_completion_length": 8},
    )


def keep(folder: Path, teacher: nn.Module, data: EncodedData, count: int, **how: LogitsDtype) -> KeptLogits:
    """The `count` largest log-probabilities of `teacher` at the responses of the rows."""
    kept = settings(count, **how)
    writer = KeptWriter(folder, kept, data.examples, overwrite=False)
    writer.begin()
    write_logits(teacher, writer, batch_size=5, progress=lambda what, done: None)
    writer.finish(measured_error(teacher, data.examples, kept, batch_size=5))
    return KeptLogits(folder)
