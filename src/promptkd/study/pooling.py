"""What the runs of a study say of its methods: metrics and paired differences over seeds of training and rows at once.

Seeds of training and rows are both samples: another seed gives another student, other rows another value. With v_s
the metric of seed s over all rows, and t_i row i's part in the mean over the S seeds (linearized for means over
tokens; over the R rows the t_i add up to 0),

    SE² = V / S + R / (R - 1) Σ t_i²,    df = SE⁴ / (SE_seeds⁴ / D + SE_rows⁴ / (R - 1)),

and difference / SE is compared with Student's t. This is the quasi-F, min F', of Clark (1973, "The
language-as-fixed-effect fallacy"), with seeds for subjects and rows for items. With two or three seeds V may be
small by chance, so a t-test over seeds alone, with the same V and D degrees, must agree: p is the larger, the interval
the wider of both.

Of a method alone, and where there are fewer than four, V = Var(v_s), D = S - 1. Three values tell a variance badly, so
a difference between two of M methods borrows from the others (a moderated t-test, Smyth 2004, "Linear models and
empirical Bayes methods for assessing differential expression"):

    V = (D0 V0 + (S - 1) Var(v_s)) / D,    D = D0 + S - 1,    D0 = min(2, S - 1, (M - 3) (S - 1) / 2).

V0 is the larger of two medians: of the variances of all pairs with the one method, and of those with the other. So it
grows where a method of the pair spreads far, and not where any other does. Smyth estimates D0 from thousands of
variances; here it is set, so that a pair's own seeds have at least half of the weight.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy.special import gammaincinv, stdtr, stdtrit

from promptkd.errors import RequestError
from promptkd.evaluation.comparison import TO_TEACHER, Comparison, evaluations_of, known_metrics, other_teachers
from promptkd.evaluation.measure import OF_REFERENCES
from promptkd.evaluation.pairing import Candidate, Column, settings_of
from promptkd.evaluation.statistics import Floats, holm
from promptkd.results import LEVEL, Better, Difference, Metric, ToldApart

Pooled = dict[str, dict[int, tuple[float, Floats]]]  # by metric and seed: the value, and each row's part in it
_MOST_DEGREES = 2.0  # of D0; docs/studies.md has the simulations


class Spread(NamedTuple):
    """V0 and D0 of a pair of methods."""

    variance: float
    degrees: float


def t_two_sided(t: float, df: float) -> float:
    """P(|T| >= |t|) of Student's t with `df` > 0 degrees of freedom."""
    return float(2 * stdtr(df, -abs(t)))


def t_quantile(df: float, level: float = 0.95) -> float:
    """The t with P(|T| <= t) = `level`."""
    return float(stdtrit(df, (1 + level) / 2))


class Spreads:
    """What the methods of a study, with these values by method and seed, tell of how far seeds move a difference.

    Pairs that share fewer than two seeds, have a value that is not finite, or differ by the same under every seed tell
    nothing and are left out.
    """

    def __init__(self, values: Mapping[str, Mapping[int, float]]):
        variances: dict[str, list[float]] = {}
        fewest = 0  # degrees of freedom of a pair
        for one, other in combinations(values, 2):
            between = np.array(
                [values[one][seed] - values[other][seed] for seed in values[one] if seed in values[other]]
            )
            if (own := len(between) - 1) < 1 or not 0 < (found := _variance(between)) < np.inf:
                continue
            # the median of a sample's variance is below the variance: by that of chi² to its degrees
            for method in (one, other):
                variances.setdefault(method, []).append(found / (2 * gammaincinv(own / 2, 0.5) / own))
            fewest = min(fewest or own, own)
        self._medians = {method: float(np.median(held)) for method, held in variances.items()}
        self.degrees = min(_MOST_DEGREES, fewest, (len(variances) - 3) * fewest / 2)

    def of(self, one: str, other: str) -> Spread | None:
        """Of the difference between two methods; None if their own seeds are all that tells of it."""
        medians = [self._medians[method] for method in (one, other) if method in self._medians]
        return Spread(max(medians), self.degrees) if medians and self.degrees > 0 else None


def _variance(values: Floats) -> float:
    """Of a sample; inf where it, or one of the values, is not finite."""
    with np.errstate(over="ignore"):
        return float(values.var(ddof=1)) if np.isfinite(values).all() else np.inf


def both_ways(by_seed: Floats, by_row: Floats, spread: Spread | None = None) -> tuple[Metric, float | None]:
    """The mean over seeds with its 95 % interval, and p of the hypothesis that it is 0 (None without an interval).

    `by_seed`, (S,), is v, the metric of each seed; `by_row`, (R,), is t, each row's part in their mean; `spread` is
    what the other methods of the study tell of V.
    """
    value, seeds, rows = float(by_seed.mean()), len(by_seed), len(by_row)
    if seeds < 2:
        return Metric(value=value, rows=rows), None
    own_variance = _variance(by_seed)
    deviation = own_variance**0.5
    if rows < 2 or not (np.isfinite(own_variance) and np.isfinite(by_row).all()):
        return Metric(value=value, rows=rows, deviation=deviation if np.isfinite(deviation) else None), None
    own, more = seeds - 1, spread or Spread(0.0, 0.0)
    known = own + more.degrees
    seed_part = (more.degrees * more.variance + own * own_variance) / known / seeds
    row_part = rows / (rows - 1) * float(((by_row - by_row.mean()) ** 2).sum())
    error = np.sqrt(seed_part + row_part)
    if error <= 1e-12 * max(1.0, abs(value)):  # every run and row says the same, which says nothing of others
        return Metric(value=value, rows=rows), None if value else 1.0
    of_seeds = seed_part / error**2
    degrees = 1 / (of_seeds**2 / known + (1 - of_seeds) ** 2 / (rows - 1))
    reach, p = t_quantile(degrees) * error, t_two_sided(value / error, degrees)
    if seed_part > 0:
        by_seeds = np.sqrt(seed_part)
        reach = max(reach, t_quantile(known) * by_seeds)
        p = max(p, t_two_sided(value / by_seeds, known))
    return Metric(value=value, low=value - reach, high=value + reach, rows=rows, deviation=deviation), p


def compare_groups(
    groups: Mapping[str, Mapping[int, Candidate]],
    better: Callable[[str], Better | None],
    *,
    baseline: str,
    metrics: Sequence[str] = (),
    references: Sequence[Candidate] = (),
    beside: Comparison | None = None,
) -> Comparison:
    """Every group's metrics over its seeds, and its difference from the baseline over the seeds that both have.

    `groups` holds the run of each seed, all measured alike. A metric of which neither direction is `better` is shown
    and not tested. `metrics` are those to be compared, by default all. `references` are models of which there is one,
    such as the teacher: they are shown with intervals over rows, and not tested. `beside` was measured elsewhere of the
    same groups: its differences are tested together with the others. Raises `RequestError` for a metric that was not
    measured, and where nothing is left to compare.
    """
    candidates = [each for seeds in groups.values() for each in seeds.values()]
    taken, beside_them = {*groups, *(each.label for each in candidates)}, [each.label for each in references]
    if twice := [label for label in beside_them if label in taken or beside_them.count(label) > 1]:
        told = f"Got {twice[0]} twice; name a run by LABEL=RUN."
        raise RequestError(f"Each method and model must have a label of its own. {told}")
    settings = settings_of([*candidates, *references])
    if not settings and beside is None:
        raise RequestError("The runs share no data set on which they were measured.")
    if differing := [sentence for setting in settings for sentence in setting.differing()]:
        raise RequestError(" ".join(differing[:3]))
    asked = [name for name in metrics if beside is None or name not in beside.metrics]
    known = known_metrics(settings, asked) if asked or not metrics else []
    shared = next((each.teachers for each in (*groups.get(baseline, {}).values(), *candidates)), frozenset())
    left_out = [group for group, seeds in groups.items() if {each.teachers for each in seeds.values()} != {shared}]
    strange = {each.label for group in left_out for each in groups[group].values()}  # whose KL is to another teacher
    told_others = other_teachers(left_out, next((g for g in groups if g not in left_out), baseline)) if left_out else ""
    made = Comparison()
    done: set[tuple[str, str, str]] = set()  # groups on what is measured on a data set's references, however decoded
    for setting in settings:
        columns = {name: setting.columns(name) for name in setting.metrics() if name in known}
        if TO_TEACHER in columns:
            kept = {at: held for at, held in columns[TO_TEACHER].items() if at not in strange}
            columns[TO_TEACHER] = kept if len(left_out) < len(groups) - 1 else {}  # of one method, nothing is compared
        columns = {name: held for name, held in columns.items() if any(len(each.sums) for each in held.values())}
        if not columns:
            continue
        pooled = {
            group: {
                name: {seed: _value_and_parts(held[run.label]) for seed, run in seeds.items() if run.label in held}
                for name, held in columns.items()
                if any(run.label in held for run in seeds.values())
            }
            for group, seeds in groups.items()
        }
        first, spreads = next(iter(setting.measured.values())), {name: _spreads(pooled, name) for name in columns}
        for group, of_group in pooled.items():
            measured = {name: _pooled(held.values())[0] for name, held in of_group.items() if held}
            about = {"model": group, "data": setting.data, "metrics": measured, "samples": []}
            made.evaluations.append(first.evaluation.model_copy(update=about))
            if group != baseline:
                asked = [name for name in of_group if (setting.source, name, group) not in done]
                own = list(_differences(setting.data, asked, (group, baseline), pooled, spreads, better))
                made.differences += own
                done |= {(setting.source, each.metric, group) for each in own if each.metric in OF_REFERENCES}
        made.told_apart += told_apart(setting.data, pooled, better)
        made.evaluations += evaluations_of(setting, columns, [each.label for each in references])
        if first.data is not None:
            made.data[setting.data] = first.data
    if beside is None and not made.evaluations:
        reason = told_others or "The runs share no row that has the metrics."
        raise RequestError(f"Nothing to compare: {', '.join(metrics) or 'all metrics'}. {reason}")
    if beside is not None:
        made.evaluations += beside.evaluations
        made.differences += beside.differences
        made.told_apart += beside.told_apart
        made.data |= beside.data
    tested = [(found, found.p_value) for found in made.differences if found.p_value is not None]
    for (found, _), adjusted in zip(tested, holm([p for _, p in tested]), strict=True):
        found.p_adjusted = adjusted
    made.notes = _notes(groups, baseline, len(made.differences))
    if told_others and TO_TEACHER in known:
        made.notes.append(told_others)
    if groups and baseline not in groups:
        made.notes.append(f"{baseline}, the baseline, has nothing but exposure bias: nothing else is compared with it.")
    return made


def _differences(
    data: str,
    metrics: Sequence[str],
    between: tuple[str, str],
    pooled: Mapping[str, Pooled],
    spreads: Mapping[str, Spreads],
    better: Callable[[str], Better | None],
) -> Iterator[Difference]:
    """A group's less the baseline's of each metric with a better direction, over the seeds that both have."""
    model, baseline = between
    for name in metrics:
        mine, others, way = pooled[model][name], pooled.get(baseline, {}).get(name, {}), better(name)
        pairs = [(mine[seed], others[seed]) for seed in mine if seed in others]
        if way is not None and len(pairs) > 1:
            spread = spreads[name].of(model, baseline)
            found, p = _pooled([(value - other, part - rest) for (value, part), (other, rest) in pairs], spread)
            yield Difference(
                model=model, baseline=baseline, metric=name, difference=found, better=way, data=data, p_value=p
            )


def told_apart(data: str, pooled: Mapping[str, Pooled], better: Callable[[str], Better | None]) -> Iterator[ToldApart]:
    """Of each metric with a better direction, all pairs of groups over the seeds that both have, by Holm among them."""
    for name in dict.fromkeys(name for of_group in pooled.values() for name in of_group):
        way, held = better(name), dict[str, dict[int, tuple[float, Floats]]]()
        for group, of_group in pooled.items():  # of an unfinished study, the groups that share two seeds
            own = of_group.get(name, {})
            if len(own) > 1 and all(len(own.keys() & other.keys()) > 1 for other in held.values()):
                held[group] = own
        if way is None or len(held) < 2:
            continue
        tested: list[tuple[tuple[str, str], float]] = []  # the better first, and p
        spreads = _spreads(pooled, name)
        for one, other in combinations(held, 2):
            pairs = [(held[one][seed], held[other][seed]) for seed in held[one] if seed in held[other]]
            found, p = _pooled(
                [(value - against, part - rest) for (value, part), (against, rest) in pairs], spreads.of(one, other)
            )
            is_better = (found.value > 0) == (way == "higher")
            tested.append(((one, other) if is_better else (other, one), 1.0 if p is None else p))
        adjusted = holm([p for _, p in tested])
        apart = [pair for (pair, _), p in zip(tested, adjusted, strict=True) if p <= LEVEL]
        yield ToldApart(metric=name, data=data, models=list(held), pairs=apart)


def _value_and_parts(column: Column) -> tuple[float, Floats]:
    """A column's metric v, and each row's part in it, about 0: (s_i - v c_i) / C."""
    total, value = column.counts.sum(), float(column.sums.sum() / column.counts.sum())
    return value, (column.sums - value * column.counts) / total


def _pooled(seeds: Collection[tuple[float, Floats]], spread: Spread | None = None) -> tuple[Metric, float | None]:
    values, parts = zip(*seeds, strict=True)
    return both_ways(np.array(values), np.mean(parts, axis=0), spread)


def _spreads(pooled: Mapping[str, Pooled], name: str) -> Spreads:
    return Spreads({g: {seed: v for seed, (v, _) in held[name].items()} for g, held in pooled.items() if name in held})


def _notes(groups: Mapping[str, Mapping[int, Candidate]], baseline: str, tested: int) -> list[str]:
    every = list(dict.fromkeys(seed for seeds in groups.values() for seed in seeds))
    means = f"Each metric is a mean over seeds of training ({', '.join(map(str, every))})"
    notes = [
        f"{means}; ± is the standard deviation between them. Intervals and p speak for other seeds of training and "
        "other rows at once (min F', Clark 1973, and a t-test over seeds alone; with four methods or more, what a "
        "difference varies between seeds is moderated by all pairs, Smyth 2004)."
    ]
    if tested:
        rule = "One is claimed where p is at most 0.05 and the interval excludes zero."
        pairs = f"{tested} differences from {baseline}, paired by seed and row"
        notes.append(f"{pairs}, were tested together and p is adjusted for that. {rule}")
    for group, seeds in groups.items():
        if missing := [seed for seed in every if seed not in seeds]:
            notes.append(f"{group} has no finished run of seed {', '.join(map(str, missing))}.")
    return notes
