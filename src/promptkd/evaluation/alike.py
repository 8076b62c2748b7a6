"""Whether models were measured alike: on the same data and rows, asked and decoded in the same way."""

from typing import Any

from promptkd.evaluation.pairing import Measurement, Setting, decoding_of

__all__ = ["unlike"]


def unlike(setting: Setting) -> list[str]:
    """A sentence for each candidate that was not measured as the first was."""
    (first, reference), *others = setting.measured.items()
    sentences = []
    for label, measurement in others:
        if differing := [*_unlike_data(reference, measurement), *_unlike_decoding(reference, measurement)]:
            sentences.append(f"{first} and {label} differ on {setting.data} in {'; '.join(differing)}.")
    return sentences


def _unlike_data(ours: Measurement, theirs: Measurement) -> list[str]:
    differing = []
    if ours.sha256 and theirs.sha256 and ours.sha256 != theirs.sha256:
        differing.append(f"data (sha256 {ours.sha256[:8]} and {theirs.sha256[:8]})")
    if ours.rows != theirs.rows:
        differing.append(f"rows ({len(ours.rows)} and {len(theirs.rows)}, {len(ours.rows & theirs.rows)} in both)")
    pairs = [
        (row, ours.answers[row, seed], theirs.answers[row, seed])
        for row, seed in ours.answers.keys() & theirs.answers.keys()
    ]
    prompts = {row for row, one, other in pairs if one.prompt != other.prompt}
    references = {row for row, one, other in pairs if one.references != other.references}
    if prompts:
        differing.append(f"prompts (of {len(prompts)} rows, row {min(prompts)} first; another template?)")
    if references:
        differing.append(f"references (of {len(references)} rows, row {min(references)} first)")
    return differing


def _unlike_decoding(ours: Measurement, theirs: Measurement) -> list[str]:
    mine, other = decoding_of(ours.evaluation), decoding_of(theirs.evaluation)
    differing = [
        f"{name} ({_written(mine.get(name))} and {_written(other.get(name))})"
        for name in dict.fromkeys([*mine, *other])
        if mine.get(name) != other.get(name)
    ]
    both = ours.answers.keys() & theirs.answers.keys()
    if not differing and ours.rows == theirs.rows and ours.answers.keys() != theirs.answers.keys():
        differing.append(f"answers ({len(ours.answers)} and {len(theirs.answers)}, {len(both)} in both)")
    return differing


def _written(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "none" if value is None else str(value)
