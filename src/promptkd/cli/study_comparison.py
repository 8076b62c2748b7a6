"""The comparison of a study's finished runs, from its own process or from its folder."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Literal, NamedTuple

import promptkd.cli.options.study
from promptkd.cli.options.study import Options
from promptkd.cli.parsing.config_file import read_config
from promptkd.cli.parsing.parser import merged_config, parse_options
from promptkd.cli.study_runs import REFERENCES
from promptkd.errors import RequestError
from promptkd.evaluation.comparison import compare
from promptkd.evaluation.pairing import Candidate
from promptkd.report.differences import compared_sentences
from promptkd.report.metrics import metric_info
from promptkd.results import Results, Training
from promptkd.study.plan import Planned, plan_runs
from promptkd.study.pooling import compare_groups

_OF_A_STUDY = {"base", "methods", "seeds"}  # keys of its config.yaml


class Finished(NamedTuple):
    """A run of a study that is done."""

    planned: Planned
    trained: Results  # the record of its training
    measured: Results  # that in which its student is measured, which may be the same


class Study(NamedTuple):
    """What a study's folder holds."""

    options: Options
    runs: list[Finished]
    references: list[Candidate]  # the teacher and the students before training, where the study measured them


def is_study(folder: Path) -> bool:
    """Whether a folder is a study's, by its config.yaml."""
    file = folder / "config.yaml"
    return file.is_file() and read_config(file).keys() >= _OF_A_STUDY


def read_study(folder: Path) -> Study:
    """The finished runs in a study's folder, which may have been moved. Raises `RequestError` if there is none."""
    parsed = parse_options("study", promptkd.cli.options.study, [str(folder / "config.yaml")])
    options = replace(parsed.options, out=folder)
    runs = []
    # the files that `config` names decide no run's name
    for each in plan_runs(options.base, options.methods, options.seeds, options.grid, read_file=lambda path: {}):
        places = [folder / each.name, folder / "evaluations" / each.name if options.evaluate else folder / each.name]
        files = [place / "results.json" for place in places]
        if all(file.is_file() for file in files):
            runs.append(Finished(each, *map(Results.read, files)))
    if not runs:
        raise RequestError(f"No run of the study in {folder} is done. Run it: promptkd study {folder}/config.yaml")
    return Study(options, runs, references_in(folder))


def references_in(folder: Path) -> list[Candidate]:
    """The teacher and the untrained students that a study has measured, under their labels there."""
    found = []
    for file in sorted((folder / "evaluations").glob("*/results.json")):
        if file.parent.name.partition(".")[0] in REFERENCES.values():
            record = Results.read(file)
            if record.evaluations:
                label = file.parent.name.replace(".", " ")
                found.append(Candidate(label, record, record.evaluations[0].model, is_reference=True))
    return found


def study_records(folder: Path) -> list[Results]:
    """What a report on a study reads: the comparison, and the records of its runs without what they measured."""
    options, runs, references = read_study(folder)
    return [
        *([] if len(runs) < 2 and not references else [study_comparison(options, runs, references)]),
        *map(without_evaluations, (run.trained for run in runs)),
    ]


def without_evaluations(record: Results) -> Results:
    """A run's record for a study's page: what it measured is pooled in the comparison, its answers on its own page."""
    return record.model_copy(update={"evaluations": []})


def study_comparison(options: Options, runs: Sequence[Finished], references: Sequence[Candidate]) -> Results:
    """The record of the comparison. Raises `RequestError` if there is nothing to compare."""
    baseline = options.baseline or runs[0].planned.group
    if baseline not in {run.planned.group for run in runs}:
        raise RequestError(f"no run of the baseline, {baseline}, is done.")
    several = len({run.planned.seed for run in runs}) > 1
    groups = groups_of(runs, several=several)
    results = compared_groups(groups, references, several=several, baseline=baseline, metrics=options.metrics)
    results.config = merged_config(options, {})
    results.training = mean_costs(runs)
    for run in runs:  # the seeds of a method have students of one size
        if size := run.trained.models.get("student"):
            group = run.planned.group
            about = {"path": str(options.out / f"{group}-seed-*"), "sha256": "", "about": ""}
            results.models.setdefault(group, size.model_copy(update=about))
    return results


def mean_costs(runs: Sequence[Finished]) -> dict[str, Training]:
    """By group, what a run of it cost."""
    costs: dict[str, list[Training]] = {}
    for run in runs:
        costs.setdefault(run.planned.group, []).extend(run.trained.training.values())
    return {group: _mean_cost(of_group) for group, of_group in costs.items() if of_group}


def groups_of(runs: Sequence[Finished], *, several: bool) -> dict[str, dict[int, Candidate]]:
    """The runs by their group and seed, as candidates; `several` seeds are told apart by the runs' own names."""
    groups: dict[str, dict[int, Candidate]] = {}
    for planned, _, record in runs:
        if not record.evaluations:
            raise RequestError("the runs hold no measurement. Give `eval_data` in `base`, or `evaluate` with its data.")
        label = planned.name if several else planned.group
        groups.setdefault(planned.group, {})[planned.seed] = Candidate(label, record, _student_in(record))
    return groups


def compared_groups(
    groups: dict[str, dict[int, Candidate]],
    references: Sequence[Candidate],
    *,
    several: bool,
    baseline: str,
    metrics: Sequence[str],
) -> Results:
    """The record of groups of runs, pooled over their seeds where there are several, beside the references."""

    def better(name: str) -> Literal["higher", "lower"] | None:
        return metric_info(name).better

    every = [*(candidate for seeds in groups.values() for candidate in seeds.values()), *references]
    if several:
        found = compare_groups(groups, better, baseline=baseline, metrics=metrics, references=references)
    else:
        found = compare(every, better, baseline=baseline, metrics=metrics)
    results = Results(kind="study" if several else "compare", data=found.data)
    results.models = {
        each.label: size for each in references if (size := each.record.models.get(each.model)) is not None
    }
    results.evaluations, results.differences = found.evaluations, found.differences
    results.notes = [*compared_sentences(results), *found.notes]
    return results


def _student_in(record: Results) -> str:
    """The label of the trained model among those that a run's record measures."""
    models = list(dict.fromkeys(each.model for each in record.evaluations))
    return "student" if "student" in models else models[0]


def _mean_cost(costs: list[Training]) -> Training:
    """What a run of a group cost: means over its seeds, and the most memory."""
    speeds = [each.tokens_per_second for each in costs if each.tokens_per_second is not None]
    phases = dict.fromkeys(phase for each in costs for phase in each.peak_memory_by_phase)
    return Training(
        method=costs[0].method,
        steps=round(mean(each.steps for each in costs)),
        seconds=mean(each.seconds for each in costs),
        peak_memory_bytes=max(each.peak_memory_bytes for each in costs),
        peak_memory_by_phase={name: max(each.peak_memory_by_phase.get(name, 0) for each in costs) for name in phases},
        tokens_per_second=median(speeds) if speeds else None,
    )
