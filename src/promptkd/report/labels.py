"""One label for every model and data set, across all records that name it.

The hash of the weights or the data file decides what is the same, else the path, else the label itself. Two models of
one record stay two, whatever their hashes.
"""

from collections.abc import Callable, Mapping, Sequence
from operator import add
from pathlib import PurePath
from typing import TypeVar

from promptkd.report.formatting import decoding_words, joined, manner
from promptkd.results import BEFORE, Curve, DataRecord, Difference, Evaluation, ModelRecord, Results, ToldApart

TEACHER = "teacher"
_TEACHER_OF = "teacher "  # prefix of the label of one of several teachers, and of the teacher in a student's record
_MODEL_ROLES = {"student", "model", TEACHER, BEFORE}
_DATA_ROLES = {"train", "validation"}
_MOST_NAMED = 3
_OF_ONE_MODEL = ("prune", "sft", "distill", "generate", "evaluate", "exposure-bias")
_Key = tuple[str, ...]
_Fact = ModelRecord | DataRecord
_Facts = Sequence[Mapping[str, _Fact]]  # what each record holds of its labels
_Measured = TypeVar("_Measured", Evaluation, Curve)


def is_teacher(label: str) -> bool:
    """Whether a model of this label is a reference for students; it is never the best of a column."""
    return label == TEACHER or label.startswith(_TEACHER_OF)


def unified(records: Sequence[Results]) -> list[Results]:
    """The same records, with one label for a model or data set in all of them.

    A difference without a data set is given the record's only one; on one decoded in two ways, by one record or by
    several, it names the decoding.
    """
    return _with_manners(list(map(_relabeled, records, _model_names(records), _data_names(records))))


def _with_manners(records: list[Results]) -> list[Results]:
    """Let differences on "test" say "test, sampled" or "test, greedy" where the records decode that data both ways."""

    def manners(record: Results, data: str) -> set[str]:
        return {manner(each.decoding) for each in record.evaluations if each.data == data} - {""}

    pairs = [(record, each.data) for record in records for each in record.differences]
    names = {data for _, data in pairs}
    split = {
        name
        for name in names
        if len({own for record, data in pairs if data == name for own in manners(record, data)}) > 1
        or not names.isdisjoint((f"{name}, sampled", f"{name}, greedy"))
    }

    def named(record: Results, difference: Difference) -> Difference:
        own = manners(record, difference.data) if difference.data in split else set()
        data = f"{difference.data}, {own.pop()}" if len(own) == 1 else difference.data
        return difference.model_copy(update={"data": data})

    return [each.model_copy(update={"differences": [named(each, one) for one in each.differences]}) for each in records]


def _relabeled(record: Results, models: dict[str, str], data: dict[str, str]) -> Results:
    sets = list(dict.fromkeys(each.data for each in record.evaluations)) or list(record.data)
    only = sets[0] if len(sets) == 1 else ""

    def renamed(measured: list[_Measured]) -> list[_Measured]:
        return [each.model_copy(update={"model": models[each.model], "data": data[each.data]}) for each in measured]

    def named(label: str) -> str:
        name = data.get(label, "")
        decodings = {decoding_words(each.decoding) for each in record.evaluations if each.data == label}
        if list(data.values()).count(name) > 1 and len(decodings) == 1:  # the record has a label for each decoding
            name = f"{name}, {decodings.pop()}"
        return name

    def compared(difference: Difference) -> Difference:
        labels = {"model": models[difference.model], "baseline": models[difference.baseline]}
        return difference.model_copy(update=labels | {"data": named(difference.data or only)})

    def told_apart(found: ToldApart) -> ToldApart:
        pairs = [(models[better], models[worse]) for better, worse in found.pairs]
        own = {"models": [models[label] for label in found.models], "pairs": pairs, "data": named(found.data)}
        return found.model_copy(update=own)

    relabeled = {
        "models": {models[label]: value for label, value in record.models.items()},
        "data": {data[label]: value for label, value in record.data.items()},
        "training": {models[label]: value for label, value in record.training.items()},
        "inference": {models[label]: value for label, value in record.inference.items()},
        "evaluations": renamed(record.evaluations),
        "curves": renamed(record.curves),
        "differences": list(map(compared, record.differences)),
        "told_apart": list(map(told_apart, record.told_apart)),
    }
    return record.model_copy(update=relabeled)


def run_labels(records: Sequence[Results]) -> list[str]:
    """ "evaluate · promptkd · dolly_test" for each of the `unified` records, with its time where two would be equal."""
    if len(records) < 2:
        return [""] * len(records)
    words = list(map(_run_words, records))
    times = [f" · {each.created}" if words.count(label) > 1 else "" for label, each in zip(words, records, strict=True)]
    return _numbered(list(map(add, words, times)), first=True)


def _run_words(record: Results) -> str:
    measured = dict.fromkeys(evaluation.model for evaluation in record.evaluations)
    models = [label for label in record.models if not is_teacher(label)] or [*record.models] or [*measured]
    models = models[:1] if record.kind in _OF_ONE_MODEL else models
    data = list(dict.fromkeys(each.data for each in record.evaluations if record.kind in ("evaluate", "judge")))
    named = []
    for names in (models, data):
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        named.append(", ".join(names[:_MOST_NAMED]) + more)
    return joined(record.kind, *named, by=" · ")


def _numbered(labels: Sequence[str], *, first: bool) -> list[str]:
    """Equal labels with their numbers, the first of them only if asked for."""
    numbered = [(label, labels[: at + 1].count(label)) for at, label in enumerate(labels)]
    every = {label for label in labels if first and labels.count(label) > 1}
    return [f"{label} ({number})" if number > 1 or label in every else label for label, number in numbered]


def _model_names(records: Sequence[Results]) -> list[dict[str, str]]:
    """By record, the shared name of each label of a model: "student" and "model" give way, one teacher is "teacher"."""
    labels = []
    for record in records:
        compared = [label for each in record.differences for label in (each.model, each.baseline)]
        measured = [each.model for each in record.evaluations] + [each.model for each in record.curves]
        labels.append([*record.models, *measured, *compared, *record.training, *record.inference])

    def candidates(labels: list[str], fact: _Fact | None) -> list[str]:
        own = [label.removeprefix(_TEACHER_OF) for label in labels]
        names = _candidates(own, _MODEL_ROLES, _run_folder(fact.path) if fact else "", fact)
        if not any(map(is_teacher, labels)) or "student" in labels:
            return names
        return [TEACHER, *(_TEACHER_OF + name for name in names if name != TEACHER)]

    return _shared_names(labels, [record.models for record in records], candidates)


def _data_names(records: Sequence[Results]) -> list[dict[str, str]]:
    """The same for data sets. A file of which fewer rows were read is another data set: "dolly_test (200 rows)"."""
    most: dict[_Key, int] = {}
    for found in (found for record in records for found in record.data.values()):
        most[_key(found)[:2]] = max(found.rows, most.get(_key(found)[:2], 0))
    labels = []
    for record in records:
        measured = [each.data for each in record.evaluations] + [each.data for each in record.curves]
        labels.append([*record.data, *measured, *(each.data for each in record.differences if each.data)])

    def candidates(labels: list[str], fact: _Fact | None) -> list[str]:
        stems = {label.rsplit(", ", 1)[0] for label in labels}
        if len(stems) == 1 and len(set(labels)) > 1:  # "test, sampled" and "test, greedy", as a comparison calls them
            labels = [stems.pop()]
        first, *longer = _candidates(labels, _DATA_ROLES, PurePath(fact.path).name if fact else "", fact)
        if not isinstance(fact, DataRecord):
            return [first, *longer]
        counted = [f"{first} ({fact.rows} rows)", *longer]
        return counted if fact.rows < most[_key(fact)[:2]] else [first, *counted]

    return _shared_names(labels, [record.data for record in records], candidates)


def _candidates(labels: list[str], roles: set[str], short: str, fact: _Fact | None) -> list[str]:
    """Names for one thing, from the plainest to one that nothing else bears."""
    path, sha256 = (fact.path, fact.sha256) if fact else ("", "")
    plainest = next((label for label in labels if label not in roles), labels[0])
    hashed = f"{plainest} ({sha256[:8]})" if sha256 else ""
    return list(dict.fromkeys(name for name in (plainest, short, path, hashed) if name))


def _run_folder(path: str) -> str:
    """ "runs/promptkd/student" -> "promptkd": a run keeps its model in a folder of a fixed name."""
    *folders, last = PurePath(path).parts or ("",)
    return folders[-1] if folders and last in _MODEL_ROLES else last


def _shared_names(
    labels: Sequence[Sequence[str]], facts: _Facts, candidates_of: Callable[[list[str], _Fact | None], list[str]]
) -> list[dict[str, str]]:
    """By record, the shared name of each of its labels."""
    keys = _keys(labels, facts)
    candidates = {}
    for key in dict.fromkeys(keys.values()):
        places = [place for place in keys if keys[place] == key]
        fact = next((facts[at][label] for at, label in places if label in facts[at]), None)
        candidates[key] = candidates_of([label for _, label in places], fact)
    names = dict(zip(candidates, _without_clashes(list(candidates.values())), strict=True))
    return [{label: names[keys[at, label]] for label in own} for at, own in enumerate(labels)]


def _keys(labels: Sequence[Sequence[str]], facts: _Facts) -> dict[tuple[int, str], _Key]:
    """What each label of each record speaks of: equal keys mean one model or data set."""
    twins = set()  # models of one record with one hash
    keys: dict[tuple[int, str], _Key] = {}
    for held in facts:
        found = [_key(fact) for fact in held.values() if isinstance(fact, ModelRecord)]
        twins |= {key for key in found if found.count(key) > 1}
    for at, (own, held) in enumerate(zip(labels, facts, strict=True)):
        runs = {_run_folder(fact.path): label for label, fact in held.items() if isinstance(fact, ModelRecord)}
        for label in own:
            known = label if label in held else runs.get(label)  # a cost is recorded under the name of its run
            key = ("label", label) if known is None else _key(held[known])
            keys[at, label] = (*key, known or label) if key in twins else key
    for place, key in keys.items():
        if key[0] == "label":  # a mere name means what other records call so, if that is a single thing
            same = {other for (_, label), other in keys.items() if label == place[1] and other[0] != "label"}
            keys[place] = same.pop() if len(same) == 1 else key
    return keys


def _key(fact: _Fact) -> _Key:
    rows = (str(fact.rows),) if isinstance(fact, DataRecord) else ()
    return ("sha256", fact.sha256, *rows) if fact.sha256 else ("path", fact.path, *rows)


def _without_clashes(candidates: list[list[str]]) -> list[str]:
    """The first candidate that no other thing needs; all that share one move on together, in the end to a number."""
    left = [list(names) for names in candidates]
    while movable := [names for names in left if len(names) > 1 and [each[0] for each in left].count(names[0]) > 1]:
        for names in movable:
            names.pop(0)
    return _numbered([names[0] for names in left], first=False)
