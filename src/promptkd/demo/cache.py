"""Stages of the demo that are kept: a folder each, named by all that it depends on."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from promptkd.io.atomic import atomic
from promptkd.io.lock import locked
from promptkd.models import cache_folder, load_model


@dataclass(frozen=True)
class Stage:
    """A model that a stage of the demo made, and how."""

    model: PreTrainedModel
    folder: Path
    history: list[dict[str, Any]]
    seconds: float
    """What the stage took when it ran."""
    was_cached: bool


def cached_stage(
    name: str,
    depends_on: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    make: Callable[[], tuple[PreTrainedModel, list[dict[str, Any]], float]],
) -> Stage:
    """The stage `name`, from the cache if all that it depends on is the same, else made and kept."""
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder() / "demo" / f"{name}-{key}"
    note = folder / "stage.json"
    if note.is_file():
        kept = json.loads(note.read_text(encoding="utf-8"))
        return Stage(load_model(folder), folder, kept["history"], kept["seconds"], was_cached=True)
    model, history, seconds = make()
    with locked(folder, waits=True), atomic(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        content = {"history": history, "seconds": seconds, "depends_on": depends_on}
        (partial / "stage.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return Stage(model.eval(), folder, history, seconds, was_cached=False)
