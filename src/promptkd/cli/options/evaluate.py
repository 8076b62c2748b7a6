"""Score a model's answers to one or several data sets, sampled under every seed and greedy.

The record, --out, holds every figure with its interval over rows and its deviation between seeds, and every row's
answers and scores. The answers are kept beside it while they are made, a JSONL file a data set and seed. Run a command
that was stopped once more, and it does only what is missing; sets and seeds may be added in the same way.

    promptkd evaluate --model runs/promptkd --data dolly.jsonl sni.jsonl --seeds 10 20 30 40 50 --out results.json
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

RESUMED_BY: tuple[str, ...] = ()
LESS_MEMORY = (
    "a smaller --batch-size (now {batch_size})",
    "a smaller --max-completion-length (now {max_completion_length})",
)


@dataclass
class Options:
    model: str
    """The model to score: a hub name, folder, run folder or GGUF file."""
    data: list[str]
    """Rows with references: files, folders or hub data sets."""
    out: Path
    """The results file to write; answers go beside it."""
    teacher: str | None = None
    """A teacher, to report the KL from the model to it."""
    seeds: list[int] = field(default_factory=lambda: [10])
    """Seeds of the sampled answers; each is a decoding of every row."""
    greedy: bool = True
    """Decode greedily as well; --no-greedy leaves it out."""
    metrics: list[str] = field(default_factory=list)
    """More metrics, of Hugging Face's `evaluate`: names, or paths of metric scripts."""
    temperature: float = 1.0
    """Sampling temperature; 0 gives the greedy answers alone."""
    top_p: float = 1.0
    """Share of the probability mass to sample from."""
    top_k: int = 0
    """Number of tokens to sample from; 0 for all."""
    batch_size: int | None = None
    """Rows that are decoded at a time; by default 32 on CPU, 128 on a GPU."""
    limit: int | None = None
    """Use the first so many rows of each data set."""
    template: str = "auto"
    """auto, alpaca, chat, or a Jinja text."""
    max_prompt_length: int = 256
    """Most tokens of a prompt; rows above it are dropped and counted."""
    max_completion_length: int = 256
    """Most tokens of a response."""
    max_reference_length: int = 768
    """Most tokens of a first reference; rows above it are dropped and counted."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision to compute in, with weights in float32; auto is bfloat16 where the device has units for it."""
    teacher_dtype: Literal["float32", "bfloat16", "float16", "auto"] | None = None
    """Precision of the teacher's weights; by default bfloat16 where the device has units for it, else float32."""
    trust_remote_code: bool = False
    """Run code that a hub model ships."""
    overwrite: bool = False
    """Begin anew: replace --out and the answers beside it."""
