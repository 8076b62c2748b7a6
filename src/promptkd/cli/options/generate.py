"""Write a model's responses to a data set, one JSON object a line.

Each line holds row, prompt, completion, references, tokens and whether the response ended by itself. The file is data
for `promptkd distill` too: a teacher's responses for --method seqkd or dpkd. Responses that were cut at the limit are
left out of it by --ended-only.

    promptkd generate --model runs/promptkd --data test.jsonl --out responses.jsonl --seed 10
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

LESS_MEMORY = (
    "a smaller --batch-size (now {batch_size})",
    "a smaller --max-completion-length (now {max_completion_length})",
)


@dataclass
class Options:
    model: str
    """Who answers: a hub name, folder, run folder or GGUF file."""
    data: str
    """Requests: a JSONL, .jsonl.gz, Parquet or CSV file, a folder, or a hub data set."""
    out: Path
    """The JSONL file to write."""
    temperature: float = 1.0
    """Sampling temperature; 0 decodes greedily."""
    top_p: float = 1.0
    """Share of the probability mass to sample from."""
    top_k: int = 0
    """Number of tokens to sample from; 0 for all."""
    seed: int = 10
    """Seed of the samples."""
    batch_size: int | None = None
    """Rows that are decoded at a time; by default 32 on CPU, 128 on a GPU."""
    limit: int | None = None
    """Use the first so many rows."""
    template: str = "auto"
    """auto, alpaca, chat, or a Jinja text."""
    max_prompt_length: int = 256
    """Most tokens of a prompt; rows above it are dropped and counted."""
    max_completion_length: int = 256
    """Most tokens of a response."""
    ended_only: bool = False
    """Leave out the responses that were cut at the limit, and count them."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision to compute in, with weights in float32; auto is bfloat16 where the device has units for it."""
    trust_remote_code: bool = False
    """Run code that a hub model ships."""
    overwrite: bool = False
    """Replace --out."""
