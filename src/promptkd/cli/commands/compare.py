"""`promptkd compare`."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from promptkd.cli.options.compare import Options
from promptkd.cli.outputs import check_output, label_of
from promptkd.cli.parsing.parser import merged_config
from promptkd.cli.study_comparison import (
    Groups,
    compared_groups,
    groups_of,
    is_study,
    mean_costs,
    read_study,
    students_of,
)
from promptkd.cli.terminal import say
from promptkd.errors import RequestError
from promptkd.evaluation.comparison import compare
from promptkd.evaluation.pairing import Candidate
from promptkd.report.differences import compared_sentences
from promptkd.report.labels import is_teacher
from promptkd.report.metrics import metric_info
from promptkd.report.text import compared_text
from promptkd.results import BEFORE, ModelRecord, Results, Training

_COMPUTED = re.compile(r"Computed in (\w+)")
_OF_ONE_MODEL = ("distill", "sft", "evaluate")


def run(options: Options, training: dict[str, Any]) -> None:
    if options.out is not None:
        check_output(options.out, overwrite=options.overwrite)
    studies = [run for run in options.runs if is_study(_path_of(run)[1])]
    results = _of_studies(options, studies) if studies else _of_runs(options)
    print(compared_text(results))
    if options.out is not None:
        results.write(options.out)
        say(f"The record is in {options.out}.")


def _of_runs(options: Options) -> Results:
    candidates = [each for run in options.runs for each in _candidates(run)]
    comparison = compare(
        candidates,
        lambda name: metric_info(name).better,
        baseline=options.baseline,
        pairs="all" if options.all_pairs else "baseline",
        metrics=options.metrics,
        allow_different=options.allow_different,
    )
    results = Results(
        kind="compare",
        config=merged_config(options, {}),
        models={each.label: size for each in candidates if (size := each.record.models.get(each.model)) is not None},
        training={each.label: cost for each in candidates if (cost := _cost(each)) is not None},
        data=comparison.data,
        evaluations=comparison.evaluations,
        differences=comparison.differences,
    )
    results.notes = [*compared_sentences(results), *comparison.notes, *_precision_notes(candidates)]
    return results


def _precision_notes(candidates: Sequence[Candidate]) -> list[str]:
    """A warning where models were measured in several precisions, by their records' own notes."""
    by_precision: dict[str, list[str]] = {}
    for each in candidates:
        if found := next(filter(None, map(_COMPUTED.match, each.record.notes)), None):
            by_precision.setdefault(found[1], []).append(each.label)
    if len(by_precision) < 2:
        return []
    named = "; ".join(f"{precision}: {', '.join(labels)}" for precision, labels in by_precision.items())
    advice = "Rounding moves metrics and changes sampled answers; measure them alike with --dtype"
    return [f"Warning: not all were measured in one precision ({named}). {advice}."]


def _of_studies(options: Options, names: list[str]) -> Results:
    """Studies, their runs pooled by method, and beside them single runs, which with several seeds are shown alone."""
    refused = [("--all-pairs", options.all_pairs), ("--allow-different", options.allow_different)]
    if given := [flag for flag, is_given in refused if is_given]:
        told = "A study's methods are compared with one of them, over seeds and rows, measured alike"
        raise RequestError(f"{told}: leave {' and '.join(given)} out; --baseline names another.")
    labels = _study_labels(names)
    studies = {name: read_study(_path_of(name)[1]) for name in names}
    several = any(len({run.planned.seed for run in study.runs}) > 1 for study in studies.values())
    groups, training, sizes = Groups({}, {}, [], {}, several), dict[str, Training](), dict[str, ModelRecord]()
    for name, study in studies.items():
        prefix = f"{labels[name]}/" if labels[name] else ""
        own = groups_of(study, several=several, prefix=prefix)
        groups.runs.update(own.runs)
        groups.exposure.update(own.exposure)
        training |= {prefix + group: cost for group, cost in mean_costs(study.runs).items()}
        sizes |= {prefix + group: size for group, size in students_of(study).items()}
        named = f" {prefix[:-1]}".rstrip()
        groups.references.extend(replace(each, label=each.label + named) for each in study.references)
        groups.started.update({label + named: record for label, record in study.started.items()})
    for run in options.runs:
        if run not in studies:
            single = [replace(each, is_reference=several) for each in _candidates(run)]
            groups.references.extend(single)
            training |= {each.label: cost for each in single if (cost := _cost(each)) is not None}
    known = [*dict.fromkeys([*groups.runs, *groups.exposure])]
    baseline = options.baseline or known[0]
    if baseline not in known:
        raise RequestError(f"The baseline must be one of {', '.join(known)}. Got {baseline}.")
    results = compared_groups(groups, baseline=baseline, metrics=options.metrics)
    results.config, results.training = merged_config(options, {}), training
    results.models |= sizes
    return results


def _study_labels(names: list[str]) -> dict[str, str]:
    """What the methods of each study are named after: nothing for a single one, whole paths where folders are alike."""
    if len(names) == 1:
        return {names[0]: ""}
    places = {name: _path_of(name) for name in names}
    short = {name: label or path.resolve().name for name, (label, path) in places.items()}
    alike = [label for label in short.values() if list(short.values()).count(label) > 1]
    labels = {
        name: str(path) if short[name] in alike and not own else short[name] for name, (own, path) in places.items()
    }
    known = [labels[name] for name in names]
    if twice := [label for label in known if known.count(label) > 1]:
        advice = f"Got {twice[0]} twice; name a study by LABEL=FOLDER."
        raise RequestError(f"Each study must have a label of its own. {advice}")
    return labels


def _path_of(run: str) -> tuple[str | None, Path]:
    """RUN or LABEL=RUN as its label, if it has one, and its path."""
    label, _, rest = run.partition("=")
    return (label, Path(rest)) if label and rest and not Path(run).exists() else (None, Path(run))


def _candidates(run: str) -> list[Candidate]:
    """The models of RUN or LABEL=RUN. Its own words for its model, "student" and "model", give way to its folder's."""
    name, path = _path_of(run)
    file = path / "results.json" if path.is_dir() else path
    record = Results.read(file)
    models = list(dict.fromkeys(each.model for each in record.evaluations))
    if not models:
        problem = f"{path} holds no evaluation to compare: it is the record of `{record.kind}`."
        raise RequestError(f"{problem} Measure its model by `promptkd evaluate` and compare the results.")
    if record.kind in _OF_ONE_MODEL:  # whose other models are what theirs was held against
        models = [each for each in models if not is_teacher(each) and each != BEFORE] or models
    if record.kind in ("distill", "sft"):
        name = name or label_of(str(file.absolute().parent))
    if name is not None and len(models) > 1:
        raise RequestError(f"{run} gives one name to {len(models)} models: {', '.join(models)}. Leave the name out.")
    return [Candidate(name or model, record, model) for model in models]


def _cost(candidate: Candidate) -> Training | None:
    """What the model cost to train: under its label, or the only one in the record of a run of one model."""
    known, record = candidate.record.training, candidate.record
    of_one = record.kind in _OF_ONE_MODEL or len({each.model for each in record.evaluations}) == 1
    alone = len(known) == 1 and of_one
    return known.get(candidate.model, next(iter(known.values())) if alone else None)
