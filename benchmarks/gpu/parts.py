"""The parts of the run, in the order in which they run."""

from dataclasses import dataclass

__all__ = ["PARTS", "Part", "chosen_parts"]


@dataclass(frozen=True)
class Part:
    """One part of the run."""

    number: int
    name: str
    """Also its module in this package, which has `run(bench)`."""
    seconds: float
    """Time limit, after which the part is ended."""
    title: str


PARTS = (
    Part(1, "machine", 20, "versions, and the rates of copies and matrix products"),
    Part(2, "losses", 60, "losses and gradients against float64"),
    Part(3, "agreement", 50, "packed states and gradients, and three trainer steps, against the reference"),
    Part(4, "decoding", 40, "greedy decoding against generate, and the distribution of samples"),
    Part(5, "memory", 60, "peak memory of a 7B teacher and a 1.5B student with default settings"),
    Part(6, "rollouts", 90, "tokens per second of a rollout"),
    Part(7, "heads", 30, "head and divergence at 8,192 tokens"),
    Part(8, "steps", 85, "a whole optimizer step, ours and other implementations"),
    Part(9, "profiled", 30, "kernels and synchronizations of one step"),
)


def chosen_parts(asked: list[str] | None) -> list[Part]:
    """Parts by number or name, in the order in which they run; all parts for None.

    Raises:
        ValueError: for a string that is neither.
    """
    if asked is None:
        return list(PARTS)
    known = {key: part for part in PARTS for key in (str(part.number), part.name)}
    unknown = [each for each in asked if each not in known]
    if unknown:
        names = ", ".join(f"{part.number} {part.name}" for part in PARTS)
        raise ValueError(f"Parts are {names}. Got {', '.join(unknown)}.")
    return sorted({known[each] for each in asked}, key=lambda part: part.number)
