"""Should the student be shipped: what it keeps of its teacher, at what size and speed; in a sentence and a table."""

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from promptkd.report.formatting import DASH, decoding_words, estimate, joined, listed, manner, millions, number
from promptkd.report.labels import is_teacher
from promptkd.report.metrics import metric_info
from promptkd.results import BEFORE, Difference, Evaluation, Inference, Metric, Results

_METRIC = "rouge_l"
_LEAST_ROWS = 20  # a bootstrap over fewer says too little of other rows
_LEAST_VALUE = 2.0  # of 100: a share of less is a share of nothing
_HEADS = ("Model", "Parameters", "Share of the teacher", "Weights on disk", "Weights in memory", "First token")
_NO_TEACHER = (
    "The teacher was not measured here, so nothing is said of what the student keeps of it: "
    "promptkd evaluate --model STUDENT --teacher TEACHER --data ROWS measures both."
)


class Verdict(NamedTuple):
    lead: str
    others: list[str]  # of further data sets and decodings, or of further students


def verdict_of(records: Sequence[Results]) -> Verdict | None:
    """What the `unified` records say of students against their teacher; None where they are not about that."""
    found = [
        (record, each)
        for record in records
        for each in record.differences
        if each.metric == _METRIC and is_teacher(each.baseline) and not is_teacher(each.model)
    ]
    if not found:
        is_distilled = len(records) == 1 and records[0].kind == "distill"
        has_teacher = any(is_teacher(each.model) for record in records for each in record.evaluations)
        return Verdict(_NO_TEACHER, []) if is_distilled and not has_teacher else None
    told: dict[tuple[str, str], list[str]] = {}  # by student and teacher: its size and speed are told once
    plain = set()
    for record, each in found:
        pair = (each.model, each.baseline)
        if (sentence := _sentence(record, each, "")) in plain:  # a run and its evaluation may measure the same
            continue
        plain.add(sentence)
        takes = "" if pair in told else _takes(records, *pair)
        told.setdefault(pair, []).append(_sentence(record, each, takes))
    lead, *others = [sentence for sentences in told.values() for sentence in sentences]
    return Verdict(lead, others)


def _sentence(record: Results, difference: Difference, takes: str) -> str:
    model, teacher, rows = difference.model, difference.baseline, difference.difference.rows or 0
    where = f" on {difference.data}" if difference.data else ""
    measured = _measured(record, teacher, difference.data)
    of_teacher = None if measured is None else measured.value
    ratio = difference.ratio or _without_interval(record, difference, of_teacher)
    if ratio is None or (measured is not None and _is_next_to_nothing(measured)):
        value = "0" if measured is None else joined(*estimate(metric_info(_METRIC), measured), by=" ") + " of 100"
        told = f"ROUGE-L says nothing of {model}{where}: the teacher's own is {value}."
        return joined(told, _loss(record, difference), f"{model} has {takes}." if takes else "", by=" ")
    if ratio.low is None or ratio.high is None or rows < _LEAST_ROWS:
        share = f"{model} has {ratio.value * 100:.0f} % of the teacher's ROUGE-L{where}"
        why = f"{rows} rows are too few to say what it keeps" if rows < _LEAST_ROWS else "no interval was recorded"
        told = f"{share}, but {why}."
        return joined(told, f"It has {takes}." if takes else "", by=" ")
    share = f"{ratio.value * 100:.0f} % [{ratio.low * 100:.0f}, {ratio.high * 100:.0f}]"
    told = joined(f"{model} keeps {share} of the teacher's ROUGE-L{where} ({rows} rows)", takes, by=" at ")
    before = _measured(record, BEFORE, difference.data)
    if before is not None and of_teacher is not None:
        told += f". Before training it had {before.value / of_teacher * 100:.0f} %"
    return f"{told}.{_chosen(record)}"


def _chosen(record: Results) -> str:
    """A warning where a run's rows have chosen the checkpoint that they measure."""
    most = max((each.chosen_from for each in record.training.values()), default=1) if record.kind == "distill" else 1
    if most == 1:
        return ""
    flattered = f"The same rows chose it out of {most} validations, which flatters it"
    return f" {flattered}: measure it on others by promptkd evaluate."


def _is_next_to_nothing(of_teacher: Metric) -> bool:
    return of_teacher.value < _LEAST_VALUE or (of_teacher.low is not None and of_teacher.low <= 0)


def _without_interval(record: Results, difference: Difference, of_teacher: float | None) -> Metric | None:
    """The ratio in a record that holds none, as older ones."""
    ours = _measured(record, difference.model, difference.data)
    if ours is None or not of_teacher:
        return None
    return Metric(value=ours.value / of_teacher, rows=difference.difference.rows)


def _measured(record: Results, model: str, data: str) -> Metric | None:
    for each in record.evaluations:
        if each.model == model and data in _names(each) and _METRIC in each.metrics:
            return each.metrics[_METRIC]
    return None


def _names(evaluation: Evaluation) -> tuple[str, ...]:
    """How differences may name the data of an evaluation: alone, or with its decoding."""
    data, decoding = evaluation.data, evaluation.decoding
    return "", data, joined(data, manner(decoding)), joined(data, decoding_words(decoding))


def _source(record: Results, data: str) -> str:
    """The data set of a difference, without the decoding that its label may name."""
    return next((each.data for each in record.evaluations if data in _names(each)), data)


def _loss(record: Results, difference: Difference) -> str:
    """By how much the student's loss exceeds the teacher's, where ROUGE cannot tell."""
    wanted = (difference.model, difference.baseline, _source(record, difference.data))
    for each in record.differences:
        if each.metric == "loss" and (each.model, each.baseline, _source(record, each.data)) == wanted:
            above = each.difference.value >= 0
            size, interval = estimate(metric_info("loss"), each.difference, flip=not above)
            amount = joined(size, interval, "nats/token", by=" ")
            return f"Its loss on the references is {amount} {'above' if above else 'below'} the teacher's."
    return ""


def _takes(records: Sequence[Results], model: str, teacher: str) -> str:
    """ "82 % of its size and 1.21 times its speed (32 rows at a time; 1.19 times for a single row)"."""
    parts, sizes = [], {label: each.parameters for record in records for label, each in record.models.items()}
    measured = next((r.inference for r in records if model in r.inference and teacher in r.inference), None)
    if measured is not None:
        ours, theirs = measured[model], measured[teacher]
        parts.append(f"{ours.weight_bytes / theirs.weight_bytes * 100:.0f} % of its size")
        together = _times(ours.tokens_per_second, theirs.tokens_per_second)
        single = _times(ours.tokens_per_second_one_row, theirs.tokens_per_second_one_row)
        how = joined(
            f"{ours.rows} rows at a time",
            f"{single} times for a single row",
            "" if ours.precision == theirs.precision else f"the teacher in {theirs.precision}",
            by="; ",
        )
        parts.append(f"{together} times its speed ({how})")
    elif model in sizes and sizes.get(teacher):
        parts.append(f"{sizes[model] / sizes[teacher] * 100:.0f} % of its size")
    return listed(parts) if parts else ""


def _times(ours: list[float], theirs: list[float]) -> str:
    """The median over rounds of the ratio within a round."""
    ratio = median(mine / other for mine, other in zip(ours, theirs, strict=True))
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def running_table(records: Sequence[Results]) -> tuple[list[str], list[list[str]], str]:
    """Headings, cells and how it was measured, of models whose speed was measured; empty without one.

    A cell of a speed is the median over rounds, with the smallest and largest in square brackets.
    """
    record = next((each for each in records if each.inference), None)
    if record is None:
        return [], [], ""
    measured = dict(sorted(record.inference.items(), key=lambda each: not is_teacher(each[0])))
    one = next(iter(measured.values()))
    of_teacher = next((each.weight_bytes for label, each in measured.items() if is_teacher(label)), None)
    heads = [*_HEADS, "Tokens/s, one row", f"Tokens/s, {one.rows} rows"]
    lines = [_running_cells(record, label, each, of_teacher) for label, each in measured.items()]
    precisions = list(dict.fromkeys(each.precision for each in measured.values()))
    rounds = len(one.tokens_per_second)
    how = (
        f"Measured in turns on one machine ({one.device}, {' and '.join(precisions)}), by promptkd's own decoder: the "
        f"median of {rounds} rounds and their range; the first token of a prompt of {one.prompt_tokens} tokens, then "
        f"{one.new_tokens} tokens a row."
    )
    return heads, lines, how


def _running_cells(record: Results, label: str, each: Inference, of_teacher: int | None) -> list[str]:
    model = record.models.get(label)
    share = f"{each.weight_bytes / of_teacher * 100:.0f} %" if of_teacher and not is_teacher(label) else ""
    return [
        label,
        millions(model.parameters) if model else DASH,
        share or DASH,
        size(model.bytes_on_disk) if model and model.bytes_on_disk else DASH,
        size(each.weight_bytes),
        _spread([1000 * seconds for seconds in each.first_token_seconds], " ms"),
        _spread(each.tokens_per_second_one_row),
        _spread(each.tokens_per_second),
    ]


def size(count: int) -> str:
    """538214400 -> "0.54 GB", as disks and model hubs count."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def _spread(values: list[float], unit: str = "") -> str:
    """The median and the range, with three digits at most behind the first."""
    middle = median(values)
    decimals = 0 if middle >= 100 else 1
    low, high = (number(each, decimals) for each in (min(values), max(values)))
    return f"{number(middle, decimals)}{unit} [{low}, {high}]"
