"""How responses were decoded and curves were made, in words."""

import json
from typing import Any

__all__ = ["curve_words", "decoding_words"]

_SAID = {"strategy", "temperature", "top_p", "top_k", "seeds", "seed", "max_new_tokens", "batch_size"}


def decoding_words(decoding: dict[str, Any]) -> str:
    """ "sampled at temperature 1, top-p 0.9, 5 seeds, up to 256 tokens"; "" where nothing was recorded.

    What changes no answer is left out: the batch size, and the seed and cut-offs of greedy decoding. A setting that
    this file does not know is told as it is. A judge's figures depend on how it was asked: "judged by gpt-4o,
    temperature 0".
    """
    if "judge" in decoding:
        asked = {name: value for name, value in decoding.items() if name != "judge"}
        return ", ".join(part for part in (f"judged by {_plain(decoding['judge'])}", _setting_words(asked)) if part)
    temperature, limit = decoding.get("temperature"), decoding.get("max_new_tokens")
    words = []
    if decoding.get("strategy") == "greedy" or temperature == 0:
        words.append("greedy")
    else:
        if temperature is not None:
            words.append(f"sampled at temperature {_plain(temperature)}")
        elif "strategy" in decoding:
            words.append(_plain(decoding["strategy"]))
        words += _cut_offs(decoding) + _seeds(decoding)
    if limit is not None:
        words.append(f"up to {_plain(limit)} tokens")
    others = _setting_words({name: value for name, value in sorted(decoding.items()) if name not in _SAID})
    return ", ".join(words + ([others] if others else []))


def curve_words(settings: dict[str, Any]) -> str:
    """What a curve depends on: "ended leave, sampled at temperature 1, 4 seeds, up to 256 tokens".

    Under a prompted teacher every student has a prompt of its own, so that there is one is all that is said.
    """
    prompted = ["prompted teacher"] if settings.get("prompt") is not None else []
    own = _setting_words({name: value for name, value in settings.items() if name not in _SAID and name != "prompt"})
    decoded = decoding_words({name: value for name, value in settings.items() if name in _SAID})
    return ", ".join(part for part in (*prompted, own, decoded) if part)


def _setting_words(settings: dict[str, Any]) -> str:
    """ "teacher runs/teacher, ended leave": each setting that has a value, by its name."""
    return ", ".join(
        f"{name.replace('_', ' ')} {_plain(value)}" for name, value in settings.items() if value is not None
    )


def _cut_offs(decoding: dict[str, Any]) -> list[str]:
    top_p, top_k = decoding.get("top_p", 1), decoding.get("top_k", 0)
    return ([f"top-p {_plain(top_p)}"] if top_p != 1 else []) + ([f"top-k {_plain(top_k)}"] if top_k else [])


def _seeds(decoding: dict[str, Any]) -> list[str]:
    seeds = decoding.get("seeds", [decoding["seed"]] if decoding.get("seed") is not None else [])
    if not isinstance(seeds, list) or not seeds:
        return []
    return [f"{len(seeds)} seeds" if len(seeds) > 1 else f"seed {_plain(seeds[0])}"]


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return " and ".join(value)
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
