"""Stages of the demo that are kept, a folder each, named by all that it depends on, and their differences."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from promptkd.evaluation.statistics import paired_difference, paired_token_difference
from promptkd.io.atomic import atomic
from promptkd.io.lock import locked
from promptkd.models import cache_folder, load_model
from promptkd.results import Better, Difference, Evaluation

Trained = tuple[PreTrainedModel, list[dict[str, Any]], float]
"""A model, the history of its training, and the seconds that it took."""
_COMPARED: dict[str, Better] = {"loss": "lower", "kl_to_teacher": "lower", "rouge_l": "higher", "eos_share": "higher"}


@dataclass(frozen=True)
class Stage:
    """A model that a stage of the demo made, and how."""

    model: PreTrainedModel
    folder: Path
    history: list[dict[str, Any]]
    seconds: float  # what the stage took when it ran
    was_cached: bool


def cached_stage(
    name: str, depends_on: dict[str, Any], tokenizer: PreTrainedTokenizerBase, make: Callable[[], Trained]
) -> Stage:
    """The stage `name`, from the cache if all that it depends on is the same, else made and kept."""
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder() / "demo" / f"{name}-{key}"
    if (folder / "stage.json").is_file():
        kept = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
        return Stage(load_model(folder), folder, kept["history"], kept["seconds"], was_cached=True)
    model, history, seconds = make()
    with locked(folder, waits=True), atomic(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        content = {"history": history, "seconds": seconds, "depends_on": depends_on}
        (partial / "stage.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return Stage(model.eval(), folder, history, seconds, was_cached=False)


def differences(evaluations: dict[str, Evaluation], pairs: Sequence[tuple[str, str]]) -> Iterator[Difference]:
    """Paired differences, model less baseline, with 95 % intervals over rows; of what was measured of both."""
    for pair, (metric, better) in product(pairs, _COMPARED.items()):
        ours, theirs = (evaluations[label].samples for label in pair)
        if metric not in ours[0].scores or metric not in theirs[0].scores:
            continue
        a, b = ([row.scores[metric] for row in rows] for rows in (ours, theirs))
        if metric in ours[0].tokens:
            n, m = ([row.tokens[metric] for row in rows] for rows in (ours, theirs))
            a, b = ([x * count for x, count in zip(*each, strict=True)] for each in ((a, n), (b, m)))
            difference = paired_token_difference(a, n, b, m)
        else:
            difference = paired_difference(a, b)
        yield Difference(model=pair[0], baseline=pair[1], metric=metric, better=better, difference=difference)
