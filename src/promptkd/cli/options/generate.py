"""Write a model's responses to a data set, one JSON object per line.

Each line holds row, prompt, completion, references, tokens and whether the response ended by itself; and
prompt_token_ids where the prompt's text alone would be read as other tokens. The file is data for `promptkd distill`
too: a teacher's responses for --method seqkd or dpkd. Responses that were cut at the limit are
left out of it by --ended-only. The same command resumes after a kill: until it is through, OUT.unfinished holds what
is decoded.

    promptkd generate --model runs/promptkd --data test.jsonl --out responses.jsonl --seed 10

A teacher's distributions can be kept for `promptkd distill --kept_logits FOLDER`, which then needs no teacher: those at
its own responses in responses.logits beside the file, or at the responses that the data have (docs/kept-logits.md).

    promptkd generate --model TEACHER --data train.jsonl --out responses.jsonl --keep-logits 64
    promptkd generate --model TEACHER --data train.jsonl --out train.logits --keep-logits 64 --score
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from promptkd.cli.options.common import LESS_MEMORY_TO_DECODE, Measuring, Sampling
from promptkd.settings import option

LESS_MEMORY = LESS_MEMORY_TO_DECODE
RESUMED_BY: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Options(Sampling, Measuring):
    model: str
    """Who answers: a hub name, folder, run folder or GGUF file."""
    data: str
    """Requests: a JSONL, .jsonl.gz, Parquet or CSV file, a folder, or a hub data set."""
    out: Path
    """The JSONL file to write; with --score the folder of kept logits."""
    seed: int = option(10, at_least=0)
    """Seed of the samples."""
    ended_only: bool = False
    """Leave out the responses that were cut at the limit, and count them."""
    keep_logits: int | None = option(None, at_least=1)
    """Keep the model's so many largest log-probabilities at each response token, and the sum of the others; as many as
    the vocabulary keeps all. Responses that were cut are left out. Run the same command again to resume."""
    score: bool = False
    """With --keep-logits: write no responses, keep those of the responses in --data."""
    logits_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Precision in which log-probabilities are kept."""
    student: str | None = None
    """With --keep-logits: the student that will learn from them. Its tokenizer cuts the rows, and the error of keeping
    so few is measured against its distribution."""
    turns: Literal["last", "all"] = "last"
    """With --score: the assistant turns that distill will train on (its --turns)."""
