"""One label for every model and data set, across all records that name it.

The hash of a model's weights or of a data file decides what is the same; where none was recorded, the path; where there
is no path, the label itself. Two models of one record stay two, whatever their hashes.
"""

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from pathlib import PurePath
from typing import TypeVar

from promptkd.report.formatting import decoding_words
from promptkd.results import Curve, DataRecord, Evaluation, ModelRecord, Results

TEACHER = "teacher"
"""The label of the model that students are compared with."""
Place = tuple[int, str]
"""A record's index among the records, and a label in it."""
_TEACHER_OF = "teacher "
"""Prefix of the label of one of several teachers, and of the teacher in a student's record."""
_MODEL_ROLES = {"student", "model", TEACHER}
_DATA_ROLES = {"train", "validation"}
_MOST_NAMED = 3
_OF_ONE_MODEL = ("prune", "sft", "distill", "generate", "evaluate", "exposure-bias")
_Key = tuple[str, ...]
_Fact = ModelRecord | DataRecord
_Measured = TypeVar("_Measured", Evaluation, Curve)


def is_teacher(label: str) -> bool:
    """Whether a model of this label is a reference for students; it is never the best of a column."""
    return label == TEACHER or label.startswith(_TEACHER_OF)


def unified(records: Sequence[Results]) -> list[Results]:
    """The same records, with one label for a model or data set in all of them.

    A difference without a data set is given the only one that its record measures. One on a data set that was decoded
    in two ways names the decoding.
    """
    models, data = model_names(records), data_names(records)
    return [
        _relabeled(
            record,
            {label: name for (place, label), name in models.items() if place == at},
            {label: name for (place, label), name in data.items() if place == at},
        )
        for at, record in enumerate(records)
    ]


def _relabeled(record: Results, models: dict[str, str], data: dict[str, str]) -> Results:
    sets = list(dict.fromkeys(each.data for each in record.evaluations)) or list(record.data)
    only = sets[0] if len(sets) == 1 else ""
    settings = {label: _setting(record, label, data) for label in data}

    def renamed(measured: list[_Measured]) -> list[_Measured]:
        return [each.model_copy(update={"model": models[each.model], "data": data[each.data]}) for each in measured]

    def renamed_difference(model: str, baseline: str, label: str) -> dict[str, str]:
        return {"model": models[model], "baseline": models[baseline], "data": settings.get(label or only, "")}

    return record.model_copy(
        update={
            "models": {models[label]: value for label, value in record.models.items()},
            "data": {data[label]: value for label, value in record.data.items()},
            "training": {models[label]: value for label, value in record.training.items()},
            "evaluations": renamed(record.evaluations),
            "curves": renamed(record.curves),
            "differences": [
                each.model_copy(update=renamed_difference(each.model, each.baseline, each.data))
                for each in record.differences
            ],
        }
    )


def _setting(record: Results, label: str, data: dict[str, str]) -> str:
    """The data set's name, with the decoding where the record has a label for each decoding of it."""
    decodings = {decoding_words(each.decoding) for each in record.evaluations if each.data == label}
    alone = list(data.values()).count(data[label]) == 1
    return data[label] if alone or len(decodings) != 1 else f"{data[label]}, {decodings.pop()}"


def run_labels(records: Sequence[Results]) -> list[str]:
    """ "evaluate · promptkd · dolly_test" for each of the `unified` records; empty for a single one.

    Equal labels are told apart by their times, and if need be by numbers.
    """
    if len(records) < 2:
        return [""] * len(records)
    words = [_run_words(record) for record in records]
    timed = [
        f"{label} · {record.created}" if words.count(label) > 1 else label
        for label, record in zip(words, records, strict=True)
    ]
    return [
        f"{label} ({timed[: at + 1].count(label)})" if timed.count(label) > 1 else label
        for at, label in enumerate(timed)
    ]


def _run_words(record: Results) -> str:
    measured = list(dict.fromkeys(evaluation.model for evaluation in record.evaluations))
    models = [label for label in record.models if not is_teacher(label)] or list(record.models) or measured
    data = list(dict.fromkeys(evaluation.data for evaluation in record.evaluations))
    parts = [record.kind, _few(models[:1] if record.kind in _OF_ONE_MODEL else models)]
    parts += [_few(data)] if record.kind in ("evaluate", "judge") else []
    return " · ".join(part for part in parts if part)


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def model_names(records: Sequence[Results]) -> dict[Place, str]:
    """The label that all records share, for every label of a model in them.

    A run's own words for its models ("student", "model") give way to the label in an evaluation, and to the name of the
    run's folder where several models bear the same word. A model that was a teacher and never a student is "teacher",
    or "teacher NAME" beside others.
    """

    def labels(record: Results) -> list[str]:
        compared = [label for each in record.differences for label in (each.model, each.baseline)]
        measured = [each.model for each in record.evaluations] + [each.model for each in record.curves]
        return [*record.models, *measured, *compared, *record.training]

    def candidates(labels: list[str], fact: _Fact | None) -> list[str]:
        own = [label.removeprefix(_TEACHER_OF) for label in labels]
        names = _candidates(own, _MODEL_ROLES, _run_folder(fact.path) if fact else "", fact)
        if not any(map(is_teacher, labels)) or "student" in labels:
            return names
        return [TEACHER, *(_TEACHER_OF + name for name in names if name != TEACHER)]

    return _shared_names(records, labels, attrgetter("models"), candidates)


def data_names(records: Sequence[Results]) -> dict[Place, str]:
    """The same for data sets. A file of which fewer rows were read is another data set: "dolly_test (200 rows)"."""
    most: dict[_Key, int] = {}
    for found in (found for record in records for found in record.data.values()):
        most[_key(found)[:2]] = max(found.rows, most.get(_key(found)[:2], 0))

    def labels(record: Results) -> list[str]:
        measured = [each.data for each in record.evaluations] + [each.data for each in record.curves]
        return [*record.data, *measured, *(each.data for each in record.differences if each.data)]

    def candidates(labels: list[str], fact: _Fact | None) -> list[str]:
        stems = {label.rsplit(", ", 1)[0] for label in labels}
        if len(stems) == 1 and len(set(labels)) > 1:  # "test, sampled" and "test, greedy", as a comparison calls them
            labels = [stems.pop()]
        first, *longer = _candidates(labels, _DATA_ROLES, PurePath(fact.path).name if fact else "", fact)
        if not isinstance(fact, DataRecord):
            return [first, *longer]
        counted = [f"{first} ({fact.rows} rows)", *longer]
        return counted if fact.rows < most[_key(fact)[:2]] else [first, *counted]

    return _shared_names(records, labels, attrgetter("data"), candidates)


def _candidates(labels: list[str], roles: set[str], short: str, fact: _Fact | None) -> list[str]:
    """Names for one thing, from the plainest to one that nothing else bears."""
    path, sha256 = (fact.path, fact.sha256) if fact else ("", "")
    plainest = next((label for label in labels if label not in roles), labels[0])
    hashed = f"{plainest} ({sha256[:8]})" if sha256 else ""
    return list(dict.fromkeys(name for name in (plainest, short, path, hashed) if name))


def _run_folder(path: str) -> str:
    """ "runs/promptkd/student" -> "promptkd": a run keeps its model in a folder of a fixed name."""
    parts = PurePath(path).parts
    inside_run = len(parts) > 1 and parts[-1] in _MODEL_ROLES
    return parts[-2] if inside_run else parts[-1] if parts else ""


def _shared_names(
    records: Sequence[Results],
    labels_of: Callable[[Results], list[str]],
    facts_of: Callable[[Results], Mapping[str, _Fact]],
    candidates_of: Callable[[list[str], _Fact | None], list[str]],
) -> dict[Place, str]:
    groups = _groups(records, labels_of, facts_of)
    candidates: dict[_Key, list[str]] = {}
    for key, places in groups.items():
        facts = [facts_of(records[at])[label] for at, label in places if label in facts_of(records[at])]
        candidates[key] = candidates_of([label for _, label in places], facts[0] if facts else None)
    names = _without_clashes(candidates)
    return {place: names[key] for key, places in groups.items() for place in places}


def _groups(
    records: Sequence[Results],
    labels_of: Callable[[Results], list[str]],
    facts_of: Callable[[Results], Mapping[str, _Fact]],
) -> dict[_Key, list[Place]]:
    """Every model or data set with the places that name it, in the order of first appearance."""
    twins = set()  # models of one record with one hash
    for record in records:
        found = [_key(fact) for fact in facts_of(record).values() if isinstance(fact, ModelRecord)]
        twins |= {key for key in found if found.count(key) > 1}
    keys: dict[Place, _Key] = {}
    for at, record in enumerate(records):
        facts = facts_of(record)
        runs = {_run_folder(fact.path): label for label, fact in facts.items() if isinstance(fact, ModelRecord)}
        for label in labels_of(record):
            own = label if label in facts else runs.get(label)  # a cost is recorded under the name of its run
            key = ("label", label) if own is None else _key(facts[own])
            keys[at, label] = (*key, own or label) if key in twins else key
    known = {place: key for place, key in keys.items() if key[0] != "label"}
    groups: dict[_Key, list[Place]] = {}
    for place, key in keys.items():
        if place not in known:  # a mere name means what other records call so, if that is a single thing
            same = {other for (_, label), other in known.items() if label == place[1]}
            key = same.pop() if len(same) == 1 else key
        groups.setdefault(key, []).append(place)
    return groups


def _key(fact: _Fact) -> _Key:
    rows = (str(fact.rows),) if isinstance(fact, DataRecord) else ()
    return ("sha256", fact.sha256, *rows) if fact.sha256 else ("path", fact.path, *rows)


def _without_clashes(candidates: dict[_Key, list[str]]) -> dict[_Key, str]:
    """The first candidate that no other thing needs; all that share one move on together, in the end to a number."""
    level = dict.fromkeys(candidates, 0)
    while True:
        names = {key: candidates[key][level[key]] for key in candidates}
        taken = list(names.values())
        movable = [
            key for key, name in names.items() if taken.count(name) > 1 and level[key] + 1 < len(candidates[key])
        ]
        if not movable:
            break
        for key in movable:
            level[key] += 1
    given: dict[_Key, str] = {}
    for key, name in names.items():
        same = sum(names[other] == name for other in given)
        given[key] = f"{name} ({same + 1})" if same else name
    return given
