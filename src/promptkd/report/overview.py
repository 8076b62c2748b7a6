"""Which method of a study to take: all of them by one metric, who cannot be told apart from the best, and costs."""

from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

from promptkd.report.formatting import DASH, duration, listed
from promptkd.report.labels import is_teacher
from promptkd.report.metrics import MetricInfo, in_order, metric_info
from promptkd.report.tables import Cell, ComparisonRow, comparison_table
from promptkd.results import Results, Training, metric_named

INTERIM = "Interim: "  # how the note of an unfinished study begins
_USUAL = "rouge_l"


class Line(NamedTuple):
    """One model in the table."""

    model: str
    cells: list[Cell | None]  # one per column; None where it was not measured
    time: str  # of training, with a dash where there was none
    memory: str


class Overview(NamedTuple):
    metric: MetricInfo
    columns: list[tuple[str, str]]  # data set, and "sampled" or "greedy" where it was decoded in both ways
    lines: list[Line]  # teachers first, then from the best mean over the columns down
    interim: list[str]  # that the study is not finished
    sentences: list[str]


def overview_of(records: Sequence[Results]) -> Overview | None:
    """The methods of the one study among `unified` records, by what its own record measured.

    None without a study of at least two methods, with several studies, and without a metric to rank by.
    """
    studies = [each for each in records if each.kind == "study" and len(each.training) > 1]
    name = _ranked_by(studies[0]) if len(studies) == 1 else ""
    if not name:
        return None
    (study,) = studies
    rows = [row for row in comparison_table(studies) if name in row.cells]
    settings = list(dict.fromkeys((row.data, row.decoding) for row in rows))
    by_place = {(row.model, row.data, row.decoding): row for row in rows}
    info, models = metric_info(name), list(dict.fromkeys(row.model for row in rows))

    def rank(model: str) -> tuple[bool, int, float]:
        """Teachers, then by how many columns have it, then by its mean over them."""
        values = [by_place[key].metrics[name].value for key in by_place if key[0] == model]
        mean = sum(values) / len(values)
        return not is_teacher(model), -len(values), mean if info.better == "lower" else -mean

    lines = []
    for model in sorted(models, key=rank):
        held = [by_place.get((model, *setting)) for setting in settings]
        lines.append(
            Line(model, [None if row is None else row.cells[name] for row in held], *_cost(study.training.get(model)))
        )
    columns = [(data, _manner(data, decoding, settings)) for data, decoding in settings]
    said = [note for note in study.notes if note.startswith(INTERIM)]
    tested = [_tested(name, [row for row in rows if (row.data, row.decoding) == each]) for each in settings]
    methods = [line for line in lines if line.model in study.training and all(line.model in each for each in tested)]
    return Overview(info, columns, lines, said, _sentences(info, methods, study.training))


def _ranked_by(study: Results) -> str:
    """The first metric that the study was asked to compare of those with a better direction, else ROUGE-L or any."""
    known = in_order(each.metric for each in study.differences)
    asked = study.config.get("metrics") or []
    wanted = [metric_named(str(each), known) for each in asked] if isinstance(asked, list) else []
    return next((name for name in [*wanted, _USUAL, *known] if name in known), "")


def _tested(name: str, rows: Sequence[ComparisonRow]) -> list[str]:
    """The models of a column that were tested against each other; of older records, all."""
    known = next((row.apart[name].models for row in rows if name in row.apart), None)
    return [row.model for row in rows] if known is None else known


def _manner(data: str, decoding: str, settings: Sequence[tuple[str, str]]) -> str:
    return decoding.split(" ")[0].strip(",") if sum(other == data for other, _ in settings) > 1 else ""


def _cost(training: Training | None) -> tuple[str, str]:
    if training is None:
        return DASH, DASH
    return duration(training.seconds), f"{training.peak_memory_bytes / 2**30:.1f} GiB"


def _sentences(info: MetricInfo, methods: Sequence[Line], training: dict[str, Training]) -> list[str]:
    """Which methods lead, which of them is the cheapest, and which fall behind in how many columns."""
    if len(methods) < 2:
        return ["Too few methods have two seeds in common to be compared."]
    columns = list(zip(*(line.cells for line in methods), strict=True))
    telling = [column for column in columns if any(cell is not None and cell.best for cell in column)]
    if not telling:
        return [f"On {info.phrase}, no method can be told apart from the best."]
    behind = {
        line.model: sum(cell is not None and not cell.best for cell in cells)
        for line, cells in zip(methods, zip(*telling, strict=True), strict=True)
    }
    least = min(behind.values())
    nearest = [model for model, times in behind.items() if times == least]
    among = f"in the {len(telling)} of {len(columns)} columns that tell any apart"
    if 1 < len(telling) == len(columns):
        among = "in both columns" if len(columns) == 2 else f"in all {len(columns)} columns"
    elif len(telling) == 1:
        among = f"in the one of {len(columns)} columns that tells any apart" if len(columns) > 1 else "here"
    if least == 0:
        them = listed(nearest)
        told = f"{them} {'is' if len(nearest) == 1 else 'are'} the best or cannot be told apart from the best {among}."
    else:
        told = f"no method is among the best {among}: {listed(nearest)} fell behind in {least}, the fewest."
    said = [f"On {info.phrase}, {told}"]
    cheapest = min(nearest, key=lambda model: training[model].seconds)
    if len(nearest) > 1:
        time, memory = _cost(training[cheapest])
        said.append(f"The fastest of them to train is {cheapest}: {time} and {memory} a run.")
    others = [f"{model} ({times})" for model, times in sorted(behind.items(), key=itemgetter(1)) if times > least]
    if others:
        said.append(f"Behind in columns: {listed(others)}.")
    return said
