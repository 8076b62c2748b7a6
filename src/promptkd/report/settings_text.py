"""The settings of a decoding and of an exposure-bias curve in words."""

import json
from typing import Any

_NAMED = {"strategy", "temperature", "top_p", "top_k", "seeds", "seed", "max_new_tokens", "batch_size"}


def decoding_words(decoding: dict[str, Any]) -> str:
    """ "sampled at temperature 1, top-p 0.9, 5 seeds, up to 256 tokens"; "" where nothing was recorded.

    Settings that change no answer are left out: the batch size, and of greedy decoding the seed and cut-offs. Unknown
    settings are named as they are. A judge's metrics depend on its settings: "judged by gpt-4o, temperature 0".
    """
    if "judge" in decoding:
        own = {name: value for name, value in decoding.items() if name != "judge"}
        return _joined(f"judged by {_plain(decoding['judge'])}", _by_name(own))
    temperature, limit, strategy = (decoding.get(name) for name in ("temperature", "max_new_tokens", "strategy"))
    words = ["greedy"]
    if strategy != "greedy" and temperature != 0:
        top_p, top_k = decoding.get("top_p", 1), decoding.get("top_k", 0)
        words = [
            _plain(strategy or "") if temperature is None else f"sampled at temperature {_plain(temperature)}",
            f"top-p {_plain(top_p)}" if top_p != 1 else "",
            f"top-k {_plain(top_k)}" if top_k else "",
            _seeds(decoding.get("seeds", [decoding["seed"]] if decoding.get("seed") is not None else [])),
        ]
    others = {name: value for name, value in sorted(decoding.items()) if name not in _NAMED}
    return _joined(*words, "" if limit is None else f"up to {_plain(limit)} tokens", _by_name(others))


def curve_words(settings: dict[str, Any]) -> str:
    """The settings of a curve: "ended leave, sampled at temperature 1, 4 seeds, up to 256 tokens".

    Each student's prompted teacher has a prompt of its own, so of a prompt only its presence is told.
    """
    prompted = "" if settings.get("prompt") is None else "prompted teacher"
    own = {name: value for name, value in settings.items() if name not in _NAMED and name != "prompt"}
    decoding = {name: value for name, value in settings.items() if name in _NAMED}
    return _joined(prompted, _by_name(own), decoding_words(decoding))


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _by_name(settings: dict[str, Any]) -> str:
    """ "teacher runs/teacher, ended leave": each setting that has a value, by its name."""
    given = {name: value for name, value in settings.items() if value is not None}
    return _joined(*(f"{name.replace('_', ' ')} {_plain(value)}" for name, value in given.items()))


def _seeds(seeds: Any) -> str:
    if not isinstance(seeds, list) or not seeds:
        return ""
    return f"{len(seeds)} seeds" if len(seeds) > 1 else f"seed {_plain(seeds[0])}"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return " and ".join(value)
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
