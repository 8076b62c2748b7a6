"""Which labels of which records mean the same model or data set, and the one label that it gets.

The hash of a model's weights or of a data file decides; where none was recorded, the path; where no path was, the label
itself. Two models of one record stay two, whatever their hashes.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath

from promptkd.results import DataRecord, ModelRecord, Results

__all__ = ["TEACHER", "Place", "data_names", "is_teacher", "model_names"]

TEACHER = "teacher"
"""The label of the model that students are measured against."""
Place = tuple[int, str]
"""A record's place among the records, and a label in it."""
_TEACHER_OF = "teacher "
"""Stands before the label of one of several teachers, and of the teacher in a student's record."""
_MODEL_ROLES = {"student", "model", TEACHER}
_DATA_ROLES = {"train", "validation"}
_Key = tuple[str, ...]
_Fact = ModelRecord | DataRecord


def is_teacher(label: str) -> bool:
    """Whether a model of this label is what students are measured against; it is never the best of a column."""
    return label == TEACHER or label.startswith(_TEACHER_OF)


def model_names(records: Sequence[Results]) -> dict[Place, str]:
    """The label that all records share, for every label of a model in them.

    The words that training writes for its own models ("student", "model") give way to the label that an evaluation
    gave, and to the name of the run's folder where several models bear the same word. A model that was a teacher and
    never a student is "teacher", or "teacher NAME" beside others.
    """
    groups = _groups(records, _model_labels, lambda record: record.models)
    candidates: dict[_Key, list[str]] = {}
    for key, places in groups.items():
        labels = [label for _, label in places]
        fact = next((records[at].models[label] for at, label in places if label in records[at].models), None)
        path, sha256 = (fact.path, fact.sha256) if fact else ("", "")
        own = [label.removeprefix(_TEACHER_OF) for label in labels]
        names = _candidates(own, _MODEL_ROLES, _run_folder(path), path, sha256)
        taught = any(map(is_teacher, labels)) and "student" not in labels
        candidates[key] = [TEACHER, *(_TEACHER_OF + name for name in names if name != TEACHER)] if taught else names
    return _spread(groups, _without_clashes(candidates))


def data_names(records: Sequence[Results]) -> dict[Place, str]:
    """The same for data sets. A file of which fewer rows were read is another data set: "dolly_test (200 rows)"."""
    groups = _groups(records, _data_labels, lambda record: record.data)
    most: dict[_Key, int] = {}
    for found in (found for record in records for found in record.data.values()):
        most[_key(found)[:2]] = max(found.rows, most.get(_key(found)[:2], 0))
    candidates: dict[_Key, list[str]] = {}
    for key, places in groups.items():
        labels = _without_manner([label for _, label in places])
        fact = next((records[at].data[label] for at, label in places if label in records[at].data), None)
        path, sha256 = (fact.path, fact.sha256) if fact else ("", "")
        first, *longer = _candidates(labels, _DATA_ROLES, PurePath(path).name, path, sha256)
        fewer = isinstance(fact, DataRecord) and fact.rows < most[key[:2]]
        counted = [f"{first} ({fact.rows} rows)"] if isinstance(fact, DataRecord) else []
        candidates[key] = [*([] if fewer else [first]), *counted, *longer]
    return _spread(groups, _without_clashes(candidates))


def _without_manner(labels: list[str]) -> list[str]:
    """A comparison of one data set under two decodings calls it "test, sampled" and "test, greedy": that is "test"."""
    stems = {label.rsplit(", ", 1)[0] for label in labels}
    return [stems.pop()] if len(stems) == 1 and len(set(labels)) > 1 else labels


def _model_labels(record: Results) -> list[str]:
    compared = [label for each in record.differences for label in (each.model, each.baseline)]
    measured = [each.model for each in record.evaluations] + [each.model for each in record.curves]
    return list(dict.fromkeys([*record.models, *measured, *compared, *record.training]))


def _data_labels(record: Results) -> list[str]:
    measured = [each.data for each in record.evaluations] + [each.data for each in record.curves]
    compared = [each.data for each in record.differences if each.data]
    return list(dict.fromkeys([*record.data, *measured, *compared]))


def _groups(
    records: Sequence[Results],
    labels_of: Callable[[Results], list[str]],
    facts_of: Callable[[Results], Mapping[str, _Fact]],
) -> dict[_Key, list[Place]]:
    """What is one thing -> where it is spoken of, in the order of first appearance."""
    twins = set()
    for record in records:
        found = [_key(fact) for fact in facts_of(record).values() if isinstance(fact, ModelRecord)]
        twins |= {key for key in found if found.count(key) > 1}
    keys: dict[Place, _Key] = {}
    for at, record in enumerate(records):
        facts = facts_of(record)
        runs = {_run_folder(fact.path): label for label, fact in facts.items() if isinstance(fact, ModelRecord)}
        for label in labels_of(record):
            own = label if label in facts else runs.get(label)  # a cost stands under the name of its run
            key = ("label", label) if own is None else _key(facts[own])
            keys[at, label] = (*key, own or label) if key in twins else key
    known = {place: key for place, key in keys.items() if key[0] != "label"}
    groups: dict[_Key, list[Place]] = {}
    for place, key in keys.items():
        if place not in known:  # a mere name means the thing that other records call so, if that is one alone
            same = {other for (_, label), other in known.items() if label == place[1]}
            key = same.pop() if len(same) == 1 else key
        groups.setdefault(key, []).append(place)
    return groups


def _key(fact: _Fact) -> _Key:
    rows = (str(fact.rows),) if isinstance(fact, DataRecord) else ()
    return ("sha256", fact.sha256, *rows) if fact.sha256 else ("path", fact.path, *rows)


def _run_folder(path: str) -> str:
    """ "runs/promptkd/student" -> "promptkd": a run keeps its model in a folder of a fixed name."""
    parts = PurePath(path).parts
    inside_run = len(parts) > 1 and parts[-1] in _MODEL_ROLES
    return parts[-2] if inside_run else parts[-1] if parts else ""


def _candidates(labels: list[str], roles: set[str], short: str, path: str, sha256: str) -> list[str]:
    """Names for one thing, from the plainest to one that nothing else bears."""
    plainest = next((label for label in labels if label not in roles), labels[0])
    hashed = f"{plainest} ({sha256[:8]})" if sha256 else ""
    return list(dict.fromkeys(name for name in (plainest, short, path, hashed) if name))


def _without_clashes(candidates: dict[_Key, list[str]]) -> dict[_Key, str]:
    """The first candidate that no other thing needs; all who share one move on together, at last to a number."""
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


def _spread(groups: dict[_Key, list[Place]], names: dict[_Key, str]) -> dict[Place, str]:
    return {place: names[key] for key, places in groups.items() for place in places}
