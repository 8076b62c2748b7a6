"""Score a model's answers to one or several data sets, sampled under every seed and greedy.

The record, --out, holds every metric with its interval over rows and its deviation between seeds, and every row's
answers and scores. The answers are kept beside it while they are made, a JSONL file per data set and
seed. Run a command again that was stopped, and it does only what is missing; sets and seeds may be added likewise.

    promptkd evaluate --model runs/promptkd --data dolly.jsonl sni.jsonl --seeds 10 20 30 40 50 --out results.json
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from promptkd.cli.options.common import LESS_MEMORY_TO_DECODE, Measuring, Sampling, TeacherContext
from promptkd.settings import option

RESUMED_BY: tuple[str, ...] = ()
LESS_MEMORY = LESS_MEMORY_TO_DECODE


@dataclass(kw_only=True)
class Options(Sampling, Measuring, TeacherContext):
    model: str
    """The model to score: a hub name, folder, run folder or GGUF file."""
    data: list[str]
    """Rows with references: files, folders or hub data sets."""
    out: Path
    """The results file to write; answers go beside it."""
    teacher: str | None = None
    """A teacher, to report the KL from the model to it, and what the model keeps of it."""
    measure: Literal["all", "student"] = "all"
    """With --teacher: all also scores the teacher's answers and measures speed and size of both; student does not."""
    seeds: list[int] = field(default_factory=lambda: [10], metadata={"at_least": 0})
    """Seeds of the sampled answers; each is a decoding of every row."""
    kl_seeds: int | None = option(None, at_least=1)
    """Take the KL to the teacher on the samples of the first so many seeds; none takes all. It is the dearest score."""
    greedy: bool = True
    """Decode greedily as well; --no-greedy leaves it out."""
    metrics: list[str] = field(default_factory=list)
    """More metrics: functions of your own as FILE.py:NAME, score(prediction, references) -> float; or those of Hugging
    Face's `evaluate`, by name or by the path of a metric script."""
    rouge_tokenizer: Literal["words", "unicode", "characters", "model"] = "words"
    """Tokens that ROUGE compares: words (a-z and digits, stemmed, as in the papers), unicode (words of any script),
    characters, or those of the model."""
    max_reference_length: int = 768
    """Most tokens of a first reference; rows above it are dropped and counted."""
    overwrite: bool = False
    """Start from scratch: replace --out and the answers beside it."""
