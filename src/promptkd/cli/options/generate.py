"""Write a model's responses to a data set, one JSON object per line.

Each line holds row, prompt, completion, references, tokens and whether the response ended by itself. The file is data
for `promptkd distill` too: a teacher's responses for --method seqkd or dpkd. Responses that were cut at the limit are
left out of it by --ended-only.

    promptkd generate --model runs/promptkd --data test.jsonl --out responses.jsonl --seed 10
"""

from dataclasses import dataclass
from pathlib import Path

from promptkd.cli.options.common import LESS_MEMORY_TO_DECODE, Measuring, Sampling
from promptkd.settings import option

LESS_MEMORY = LESS_MEMORY_TO_DECODE


@dataclass(kw_only=True)
class Options(Sampling, Measuring):
    model: str
    """Who answers: a hub name, folder, run folder or GGUF file."""
    data: str
    """Requests: a JSONL, .jsonl.gz, Parquet or CSV file, a folder, or a hub data set."""
    out: Path
    """The JSONL file to write."""
    seed: int = option(10, at_least=0)
    """Seed of the samples."""
    ended_only: bool = False
    """Leave out the responses that were cut at the limit, and count them."""
