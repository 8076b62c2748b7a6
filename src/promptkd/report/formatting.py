"""Numbers and settings as text: metrics with their intervals, p-values, durations, sizes; decodings in words."""

import json
import math
from typing import Any

from promptkd.report.metrics import MetricInfo, metric_info
from promptkd.results import Metric
from promptkd.visible import shown

DASH = "–"
_MOST_EXTRA_DECIMALS = 4
_ROUNDING = 1e-9  # less, in a metric's unit, is what sums of floating-point numbers leave
_NAMED = {"strategy", "temperature", "top_p", "top_k", "seeds", "seed", "max_new_tokens", "batch_size"}
_TYPED = str.maketrans("−–", "--")
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float, decimals: int, *, signed: bool = False) -> str:
    """`value` with so many decimals and a true minus sign. Zero has no sign."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
    written = f"{abs(value):.{decimals}f}"
    if value != 0 and float(written) == 0:
        written = power_of_ten(f"{abs(value):.1e}")
    return ("" if value == 0 else "−" if value < 0 else "+" if signed else "") + written


def power_of_ten(written: str) -> str:
    """ "2.0e-05" -> "2.0×10⁻⁵"."""
    mantissa, marker, exponent = written.partition("e")
    return f"{mantissa}×10{str(int(exponent)).translate(_SUPERSCRIPT)}" if marker else written


def estimate(info: MetricInfo, measured: Metric, *, signed: bool = False, flip: bool = False) -> tuple[str, str | None]:
    """Value and "[low, high]" (None without an interval) in the metric's unit, as text; `flip` negates all three."""
    factor = -info.scale if flip else info.scale
    values = [measured.value * factor]
    if measured.low is not None and measured.high is not None:
        values += sorted((measured.low * factor, measured.high * factor))
    values = [0.0 if abs(each) < _ROUNDING else each for each in values]
    decimals = _decimals(info, values)
    value, *ends = (number(each, decimals, signed=signed) for each in values)
    return value, f"[{', '.join(ends)}]" if ends else None


def _decimals(info: MetricInfo, values: list[float]) -> int:
    """As many as it takes that no end but zero reads as zero and two different ends read differently."""
    finite = [value for value in values if math.isfinite(value)]
    for decimals in range(info.decimals, info.decimals + _MOST_EXTRA_DECIMALS):
        rounded = [round(value, decimals) for value in finite]
        ends_read_alike = len(finite) == 3 and finite[1] != finite[2] and rounded[1] == rounded[2]
        if rounded.count(0) == finite.count(0) and not ends_read_alike:
            return decimals
    return info.decimals + _MOST_EXTRA_DECIMALS


def score(name: str, value: float) -> str:
    """The score of one row: "ROUGE-L 31.2", "Ends by itself: yes", "Answer length 20 tokens"."""
    info = metric_info(name)
    if info.yes is not None and value in (0, info.yes):
        return f"{info.label}: {'yes' if value else 'no'}"
    counted = info.unit == "tokens" and value % 1 == 0
    text = number(value, 0) if counted else estimate(info, Metric(value=value))[0]
    return f"{info.label} {text} {info.unit}" if info.unit in ("%", "tokens") else f"{info.label} {text}"


def probability(value: float | None) -> str:
    """A p-value: "0.012", "< 0.001"; a dash where there is none."""
    return DASH if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def effect(value: float | None) -> str:
    """An effect size: "+0.42"; a dash where there is none."""
    return DASH if value is None else number(value, 2, signed=True)


def duration(seconds: float) -> str:
    """95.3 -> "1 min 35 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def millions(parameters: int) -> str:
    """134515008 -> "135 million"."""
    if parameters < 10**6:
        return f"{parameters:,}"
    size, word = (10**9, "billion") if parameters >= 10**9 else (10**6, "million")
    return f"{parameters / size:{'.0f' if parameters >= 100 * size else '.3g'}} {word}"


def listed(parts: list[str]) -> str:
    """ "a, b and c"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + f" and {parts[-1]}"


def typed(text: str) -> str:
    """One line without control characters, with dashes that a keyboard has."""
    return shown(" ".join(text.split())).translate(_TYPED)


def decoding_words(decoding: dict[str, Any]) -> str:
    """ "sampled at temperature 1, top-p 0.9, 5 seeds, up to 256 tokens"; "" where nothing was recorded.

    Left out is what changes no answer: the batch size, and of greedy decoding the seed and cut-offs. A judge's metrics
    depend on its settings: "judged by gpt-4o, temperature 0".
    """
    if "judge" in decoding:
        own = {name: value for name, value in decoding.items() if name != "judge"}
        return joined(f"judged by {_plain(decoding['judge'])}", _by_name(own))
    temperature, limit, strategy = (decoding.get(name) for name in ("temperature", "max_new_tokens", "strategy"))
    words = ["greedy"]
    if strategy != "greedy" and temperature != 0:
        top_p, top_k, seed = decoding.get("top_p", 1), decoding.get("top_k", 0), decoding.get("seed")
        seeds = decoding.get("seeds", [] if seed is None else [seed])
        seeds = seeds if isinstance(seeds, list) else []
        words = [
            _plain(strategy or "") if temperature is None else f"sampled at temperature {_plain(temperature)}",
            f"top-p {_plain(top_p)}" if top_p != 1 else "",
            f"top-k {_plain(top_k)}" if top_k else "",
            f"{len(seeds)} seeds" if len(seeds) > 1 else f"seed {_plain(seeds[0])}" if seeds else "",
        ]
    others = {name: value for name, value in sorted(decoding.items()) if name not in _NAMED}
    return joined(*words, "" if limit is None else f"up to {_plain(limit)} tokens", _by_name(others))


def manner(decoding: dict[str, Any]) -> str:
    """ "greedy" or "sampled"; "" where the settings do not tell."""
    temperature = decoding.get("temperature")
    return "" if temperature is None else "greedy" if temperature == 0 else "sampled"


def curve_words(settings: dict[str, Any]) -> str:
    """The settings of a curve: "ended leave, sampled at temperature 1, 4 seeds, up to 256 tokens"."""
    # each student's prompted teacher has a prompt of its own, so of a prompt only its presence is told
    prompted = "" if settings.get("prompt") is None else "prompted teacher"
    own = {name: value for name, value in settings.items() if name not in _NAMED and name != "prompt"}
    decoding = {name: value for name, value in settings.items() if name in _NAMED}
    return joined(prompted, _by_name(own), decoding_words(decoding))


def joined(*parts: str | None, by: str = ", ") -> str:
    """The parts that are not empty."""
    return by.join(part for part in parts if part)


def _by_name(settings: dict[str, Any]) -> str:
    """ "teacher runs/teacher, ended leave"."""
    given = (f"{name.replace('_', ' ')} {_plain(value)}" for name, value in settings.items() if value is not None)
    return joined(*given)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return " and ".join(value)
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
