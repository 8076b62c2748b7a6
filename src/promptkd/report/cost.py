"""What the models cost to train, and their sizes."""

from collections.abc import Sequence
from dataclasses import dataclass

from promptkd.report.labels import TEACHER, is_teacher
from promptkd.report.metrics import number
from promptkd.report.provenance import duration
from promptkd.results import ModelRecord, Results, Training

__all__ = ["Cost", "cost_table", "costs", "millions"]


@dataclass(frozen=True, slots=True)
class Cost:
    model: str
    parameters: int | None
    share: float | None
    """Of the teacher's parameters, in 0..1; None without a teacher and for a teacher."""
    training: Training | None


def costs(records: Sequence[Results]) -> list[Cost]:
    """One row per model of the `unified` records that has a size or a cost of training, teachers first."""
    sizes: dict[str, ModelRecord] = {}
    training: dict[str, Training] = {}
    for record in records:
        sizes = {**record.models, **sizes}
        training = {**record.training, **training}
    teacher = sizes[TEACHER].parameters if TEACHER in sizes else 0
    found = []
    for label in sorted([*sizes, *(label for label in training if label not in sizes)], key=_students_last):
        size = sizes[label].parameters if label in sizes else None
        share = size / teacher if size is not None and teacher and not is_teacher(label) else None
        found.append(Cost(label, size, share, training.get(label)))
    return found


def cost_table(records: Sequence[Results]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells; a column of which nothing is known for any model is left out."""
    heads = ["Model", "Parameters", "Share of the teacher", "Method", "Steps", "Time", "Tokens/s", "Peak memory"]
    lines = [_cells(cost) for cost in costs(records)]
    kept = [column for column in range(len(heads)) if any(line[column] for line in lines)]
    return [heads[column] for column in kept], [[line[column] or "–" for column in kept] for line in lines]


def _cells(cost: Cost) -> list[str]:
    size = "" if cost.parameters is None else millions(cost.parameters)
    cells = [cost.model, size, "" if cost.share is None else f"{cost.share * 100:.0f} %"]
    trained = cost.training
    if trained is None:
        return [*cells, *[""] * 5]
    speed = "" if trained.tokens_per_second is None else number(trained.tokens_per_second, 0)
    memory = f"{trained.peak_memory_bytes / 2**30:.1f} GiB"
    return [*cells, trained.method, f"{trained.steps:,}", duration(trained.seconds), speed, memory]


def _students_last(label: str) -> bool:
    return not is_teacher(label)


def millions(parameters: int) -> str:
    """134515008 -> "135 million"."""
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if parameters >= size:
            short = parameters / size
            return f"{short:.0f} {word}" if short >= 100 else f"{short:.3g} {word}"
    return f"{parameters:,}"
