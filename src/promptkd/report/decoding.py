"""How responses were decoded and curves were made, in words."""

import json
from typing import Any

__all__ = ["decoding_words", "setting_words"]

_SAID = {"strategy", "temperature", "top_p", "top_k", "seeds", "seed", "max_new_tokens", "batch_size"}


def decoding_words(decoding: dict[str, Any]) -> str:
    """ "sampled at temperature 1, top-p 0.9, 5 seeds, up to 256 tokens"; "" where nothing was recorded.

    What changes no answer is left out: the batch size, and the seed and cut-offs of greedy decoding. A setting that
    this file does not know is told as it is.
    """
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
    words += [f"{key} {_plain(value)}" for key, value in sorted(decoding.items()) if key not in _SAID]
    return ", ".join(words)


def setting_words(settings: dict[str, Any]) -> str:
    """ "samples 4, ended rows left out, prompted teacher: yes": settings of which no more is known than their names."""
    words = []
    for name, value in settings.items():
        spoken = name.replace("_", " ")
        words.append(
            f"{spoken}: {'yes' if value else 'no'}" if isinstance(value, bool) else f"{spoken} {_plain(value)}"
        )
    return ", ".join(words)


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
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
