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
from promptkd.cli.study_measurements import EVALUATION, EXPOSURE_BIAS
from promptkd.cli.terminal import say
from promptkd.errors import RequestError
from promptkd.evaluation.comparison import compare
from promptkd.evaluation.pairing import Candidate, teachers_of
from promptkd.report.differences import compared_sentences
from promptkd.report.metrics import metric_info
from promptkd.report.overview import INTERIM
from promptkd.results import ModelRecord, Results, Training
from promptkd.study.bias_pooling import METRIC, PooledBias, pool_bias
from promptkd.study.plan import REFERENCES, Planned, plan_runs
from promptkd.study.pooling import compare_groups

_OF_A_STUDY = {"base", "methods", "seeds"}  # keys of its config.yaml


class Finished(NamedTuple):
    """A run of a study that is done."""

    planned: Planned
    trained: Results  # the record of its training
    measured: Results  # that in which its student is measured, which may be the same
    exposure: Results | None = None  # that of its exposure bias, where the study has measured it


class Groups(NamedTuple):
    """What is compared: the runs by their group and seed, and beside them models of which there is one."""

    runs: dict[str, dict[int, Candidate]]
    exposure: dict[str, dict[int, Results]]  # the records of exposure bias of those that have one
    references: list[Candidate]
    started: dict[str, Results]  # of exposure bias, those of the students before training by their labels
    several: bool  # whether there are several seeds


class Study(NamedTuple):
    """What a study's folder holds."""

    options: Options
    runs: list[Finished]
    references: list[Candidate]  # the teacher and the students before training, where the study measured them
    started: dict[str, Results]  # the records of exposure bias of the latter


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
        measured = folder / EVALUATION.folder if options.evaluate else folder
        files = [place / each.name / "results.json" for place in (folder, measured)]
        if all(file.is_file() for file in files):
            trained, own = map(Results.read, files)
            runs.append(Finished(each, trained, own, exposure_of(folder, each.name)))
    if not runs:
        raise RequestError(f"No run of the study in {folder} is done. Run it: promptkd study {folder}/config.yaml")
    return Study(options, runs, references_in(folder), started_in(folder))


def exposure_of(folder: Path, name: str) -> Results | None:
    """The record of the exposure bias of a run or reference of a study; None if it is not measured."""
    file = folder / EXPOSURE_BIAS.folder / name / "results.json"
    return Results.read(file) if file.is_file() else None


def started_in(folder: Path) -> dict[str, Results]:
    """The records of exposure bias of the students before training, by their labels."""
    found = sorted((folder / EXPOSURE_BIAS.folder).glob("*/results.json"))
    found = [file for file in found if file.parent.name.partition(".")[0] == REFERENCES["student"]]
    return {file.parent.name.replace(".", " "): Results.read(file) for file in found}


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
    """What a report on a study's folder reads."""
    records, told = page_records(read_study(folder))
    if told:
        say(told)
    return records


def page_records(study: Study) -> tuple[list[Results], str]:
    """What a study's page is made of: the comparison, first, and the training of the runs.

    Where there is nothing to compare, the runs with all that was measured of them; the text then says why.
    """
    trained = [run.trained for run in study.runs]
    try:
        return [study_comparison(study), *map(without_evaluations, trained)], ""
    except RequestError as error:
        told = f"The methods were not compared: {error}"
    measured = [run.measured for run in study.runs if run.measured != run.trained]  # else by its training alone
    measured += [run.exposure for run in study.runs if run.exposure is not None]
    measured += [*(each.record for each in study.references), *study.started.values()]
    notes = [*_interim(study.options, study.runs), told, *trained[0].notes]
    return [trained[0].model_copy(update={"notes": notes}), *trained[1:], *measured], told


def without_evaluations(record: Results) -> Results:
    """A run's record for a study's page: what it measured is pooled in the comparison, its answers on its own page."""
    return record.model_copy(update={"evaluations": []})


def study_comparison(study: Study) -> Results:
    """The record of the comparison. Raises `RequestError` if there is nothing to compare."""
    options, runs = study.options, study.runs
    done = list(dict.fromkeys(run.planned.group for run in runs))
    baseline = options.baseline if options.baseline in done else done[0]
    results = compared_groups(groups_of(study), baseline=baseline, metrics=options.metrics)
    results.config = merged_config(options, {})
    results.training = mean_costs(runs)
    if options.baseline not in (None, baseline):
        told = f"The baseline, {options.baseline}, has no finished run: until then, differences are from {baseline}."
        results.notes.insert(0, INTERIM + told)
    results.notes = [*_interim(options, runs), *results.notes, *_context_notes(study)]
    results.models |= students_of(study)
    return results


def _context_notes(study: Study) -> list[str]:
    """Which teacher was measured, where one read a context in training or in a measurement."""
    runs, notes = study.runs, []
    trained = [run.planned.group for run in runs if any(model.context for model in run.trained.models.values())]
    groups = ", ".join(dict.fromkeys(trained))
    evaluated = [run.measured for run in runs if teachers_of(run.measured)] if study.options.evaluate else []
    exposed = [run.exposure for run in runs if run.exposure is not None]
    for what, records in (("KL to the teacher", evaluated), ("exposure bias", exposed)):
        if any(model.context for record in records for model in record.models.values()):
            notes.append(f"The {what} is against the teacher with a context that the students do not read.")
        elif records and groups:
            notes.append(f"The {what} is against the teacher without the context that it read in training ({groups}).")
    if notes and any(each.label.partition(" ")[0] == REFERENCES["teacher"] for each in study.references):
        notes.append("The answers and the loss of the teacher itself are those without a context.")
    return notes


def students_of(study: Study) -> dict[str, ModelRecord]:
    """By group, the students of its runs, which are of one size."""
    found: dict[str, ModelRecord] = {}
    for run in study.runs:
        if size := run.trained.models.get("student"):
            group = run.planned.group
            about = {"path": str(study.options.out / f"{group}-seed-*"), "sha256": "", "about": ""}
            found.setdefault(group, size.model_copy(update=about))
    return found


def _interim(options: Options, runs: Sequence[Finished]) -> list[str]:
    """What of the study is not done yet, if anything."""
    every = plan_runs(options.base, options.methods, options.seeds, options.grid, read_file=lambda path: {})
    done = {run.planned.name for run in runs}
    left = [each for each in every if each.name not in done]
    if not left:
        return []
    begun = {run.planned.group for run in runs}
    seeds: dict[str, int] = {}
    for each in every:
        seeds[each.group] = seeds.get(each.group, 0) + (each.name in done)
    fewer = [f"{group} ({count})" for group, count in seeds.items() if group in begun and count < len(options.seeds)]
    none = [group for group in seeds if group not in begun]
    told = [f"{len(done)} of {len(every)} runs are done."]
    told += [f"Methods with fewer than {len(options.seeds)} seeds: {', '.join(fewer)}."] if fewer else []
    told += [f"Without a run: {', '.join(none)}."] if none else []
    return [INTERIM + " ".join(told)]


def mean_costs(runs: Sequence[Finished]) -> dict[str, Training]:
    """By group, what a run of it cost."""
    costs: dict[str, list[Training]] = {}
    for run in runs:
        costs.setdefault(run.planned.group, []).extend(run.trained.training.values())
    return {group: _mean_cost(of_group) for group, of_group in costs.items() if of_group}


def groups_of(study: Study, *, several: bool | None = None, prefix: str = "") -> Groups:
    """The runs of a study by their group and seed; `several` seeds are told apart by the runs' own names."""
    _check_trained_alike(study.runs)
    if several is None:
        several = len({run.planned.seed for run in study.runs}) > 1
    groups = Groups({}, {}, study.references, study.started, several)
    for planned, _, record, exposure in study.runs:
        if exposure is not None:
            groups.exposure.setdefault(prefix + planned.group, {})[planned.seed] = exposure
        if record.evaluations:
            label = prefix + (planned.name if several else planned.group)
            candidate = Candidate(label, record, _student_in(record))
            groups.runs.setdefault(prefix + planned.group, {})[planned.seed] = candidate
        elif exposure is None:
            told = "Give `eval_data` in `base`, or `evaluate` with its data, or `exposure_bias`"
            raise RequestError(f"the runs hold no measurement. {told}.")
    return groups


def _check_trained_alike(runs: Sequence[Finished]) -> None:
    """Refuse to pool the seeds of a method if the records of their training name other data, teachers or starts."""
    first: dict[tuple[str, str], tuple[str, str]] = {}
    for run in runs:
        held = {f"{label} data": each.sha256 for label, each in run.trained.data.items()}
        held |= {label: each.sha256 for label, each in run.trained.models.items() if label != "student"}
        for what, sha256 in held.items():
            if not sha256:  # of a folder of data, or the hub's
                continue
            name, known = first.setdefault((run.planned.group, what), (run.planned.name, sha256))
            if sha256 != known:
                both = f"{name} and {run.planned.name} were not trained alike: the {what} changed between them"
                told = f"{both} (sha256 {known[:8]} and {sha256[:8]})"
                raise RequestError(
                    f"{told}. Train one of them again: delete its folder, and those of what it measured."
                )


def compared_groups(groups: Groups, *, baseline: str, metrics: Sequence[str]) -> Results:
    """The record of groups of runs, pooled over their seeds where there are several, beside the references."""

    def better(name: str) -> Literal["higher", "lower"] | None:
        return metric_info(name).better

    every = [*(candidate for seeds in groups.runs.values() for candidate in seeds.values()), *groups.references]
    bias = _bias(groups, baseline, metrics)
    if groups.several:
        beside = bias if bias.curves else None
        found = compare_groups(
            groups.runs, better, baseline=baseline, metrics=metrics, references=groups.references, beside=beside
        )
    elif bias.curves and (len(every) < 2 or list(metrics) == [METRIC]):
        found = bias
    else:
        asked = [name for name in metrics if name != METRIC or not bias.curves]
        found = compare(every, better, baseline=baseline, metrics=asked)
        found.evaluations += bias.evaluations
        found.data |= bias.data
    results = Results(kind="study" if groups.several else "compare", data=found.data, curves=bias.curves)
    results.models = {
        each.label: size for each in groups.references if (size := each.record.models.get(each.model)) is not None
    }
    for label, record in groups.started.items():
        results.models.setdefault(label, record.models[record.curves[0].model])
    results.evaluations, results.differences = found.evaluations, found.differences
    results.told_apart = found.told_apart
    results.notes = [*compared_sentences(results), *found.notes]
    return results


def _bias(groups: Groups, baseline: str, metrics: Sequence[str]) -> PooledBias:
    """The exposure bias of the groups; only its curves where other `metrics` are asked for."""
    taken = {each.data for seeds in groups.runs.values() for run in seeds.values() for each in run.record.evaluations}

    def label(data: str) -> str:
        return f"{data}, exposure bias" if data in taken else data

    bias = pool_bias(groups.exposure, groups.started, baseline=baseline, label=label)
    if metrics and METRIC not in metrics:
        bias.evaluations, bias.differences, bias.told_apart = [], [], []
    return bias


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
