"""Let a language model score a model's answers, or compare them with another model's.

Alone, --responses asks a score from 1 to 10 for every answer and for its row's first reference, and reports the ratio
of the sums in % (the feedback score of MiniLLM and PromptKD). With --against it asks which of two models' answers is
better, in both orders, and reports win, tie and flip rates.

The judge is any OpenAI-compatible endpoint. Its key is read from the environment variable OPENAI_API_KEY, or the one
that --key-variable names, and is written nowhere; a server without keys needs none. Every verdict goes at once to a
JSONL file beside --out, and the same command asks for the missing ones alone.

    promptkd judge --responses student.jsonl --endpoint http://localhost:8000/v1 --judge-model NAME --out judged.json
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promptkd.settings import option

RESUMED_BY: tuple[str, ...] = ()


@dataclass
class Options:
    responses: Path
    """The answers to judge, as `promptkd generate` or `promptkd evaluate` writes them."""
    endpoint: str
    """Base address of an OpenAI-compatible server, such as http://localhost:8000/v1."""
    judge_model: str
    """The judge, by the name that the server knows it by."""
    out: Path
    """The results file to write; the verdicts go beside it."""
    against: Path | None = None
    """Another model's answers to the same requests, to compare with."""
    label: str | None = None
    """Name of the model; by default the file's."""
    against_label: str | None = None
    """Name of the other model; by default the file's."""
    data: str | None = None
    """The data the answers were made from: the judge is then shown its requests, without the template around them."""
    columns: dict[str, str] | list[str] | None = None
    """Columns of --data to read under other names, as OLD=NEW."""
    data_label: str | None = None
    """Name of the data set in tables and reports; by default that of --data, else "requests"."""
    prompt_file: Path | None = None
    """Text to ask with, in place of the one that ships; it must hold {{ request }}, {{ first }} and {{ second }}."""
    limit: int | None = None
    """Judge the first so many rows."""
    temperature: float | None = option(0.0, at_least=0)
    """Temperature of the judge; none sends none."""
    seed: int | None = 0
    """Seed of the judge; none sends none."""
    max_tokens: int | None = option(512, at_least=1)
    """Most tokens of a verdict; none sends none."""
    extra_body: dict[str, Any] | None = None
    """Further fields of every request, such as {"reasoning_effort": "low"}."""
    key_variable: str | None = None
    """The environment variable that holds the key, in place of OPENAI_API_KEY."""
    concurrency: int = option(4, at_least=1)
    """Requests under way at a time."""
    timeout: float = option(120.0, above=0)
    """Seconds to wait for a whole answer."""
    retries: int = option(5, at_least=0)
    """How often a request is repeated after a failure that may pass."""
    backoff: float = option(1.0, at_least=0)
    """Seconds before the first repetition, doubled for each further one; a server's Retry-After counts where longer."""
    overwrite: bool = False
    """Replace --out and the verdicts beside it."""
