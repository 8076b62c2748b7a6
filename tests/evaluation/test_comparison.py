"""Comparisons of records: what is paired, what is refused, and how often chance is called a difference."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from promptkd.errors import RequestError
from promptkd.evaluation.comparison import compare
from promptkd.evaluation.pairing import Candidate
from promptkd.evaluation.statistics import Bootstrap
from promptkd.report.differences import compared_sentences, comparison_sentences, difference_table, verdict
from promptkd.report.text import compared_text
from promptkd.results import DataRecord, Evaluation, Metric, ModelRecord, Results, RowResult, Training

SAMPLED = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 64}
GREEDY = {"temperature": 0.0, "max_new_tokens": 64}
BETTER = {"loss": "lower", "kl_to_teacher": "lower"}


def better(metric):
    return None if metric == "response_length" else BETTER.get(metric, "higher")


def answers(scores, *, seeds=(None,), tokens=None, prompt="request {}"):
    """`scores`: by metric, an array of shape (rows,) or (seeds, rows)."""
    tables = {name: np.atleast_2d(np.asarray(values, dtype=float)) for name, values in scores.items()}
    counts = {name: np.atleast_2d(values) for name, values in (tokens or {}).items()}
    rows = next(iter(tables.values())).shape[1]
    return [
        RowResult(
            row=row,
            seed=seed,
            prompt=prompt.format(row),
            references=["yes"],
            response="no",
            scores={name: float(table[at, row]) for name, table in tables.items() if not math.isnan(table[at, row])},
            tokens={name: int(table[at, row]) for name, table in counts.items()},
        )
        for at, seed in enumerate(seeds)
        for row in range(rows)
    ]


def evaluation(samples, *, model="m", data="test", decoding=None):
    decoding = GREEDY if decoding is None else decoding
    return Evaluation(model=model, data=data, decoding=decoding, metrics={}, samples=samples)


def record(*evaluations, sha256="ab" * 32, teacher=None):
    data = {each.data: DataRecord(path="d", rows=len(each.samples), sha256=sha256) for each in evaluations}
    models = {} if teacher is None else {"teacher t": ModelRecord(path="t", parameters=9, sha256=teacher)}
    return Results(kind="evaluate", evaluations=list(evaluations), data=data, models=models, code={}, machine={})


def candidate(label, *evaluations, **settings):
    return Candidate(label, record(*evaluations, **settings), "m")


def plain(label, values, **settings):
    return candidate(label, evaluation(answers({"rouge_l": values})), **settings)


# ---- figures ----


def test_a_comparison_by_hand():
    made = compare([plain("a", [10, 20, 30, 40, 50]), plain("b", [11, 22, 36, 43, 58])], better)
    (found,) = made.differences
    assert (found.model, found.baseline, found.data, found.metric, found.better) == (
        "b",
        "a",
        "test",
        "rouge_l",
        "higher",
    )
    assert (found.difference.value, found.difference.rows) == (pytest.approx(4.0), 5)  # 1, 2, 6, 3, 8
    assert found.p_value == 2 / 32
    assert found.p_adjusted == 2 / 32
    assert found.effect_size == pytest.approx(4 / math.sqrt(34 / 4))
    assert [each.metrics["rouge_l"].value for each in made.evaluations] == pytest.approx([30, 34])
    assert made.data["test"].rows == 5
    assert verdict(found) == "tied"  # the interval excludes zero, but five rows can never tell
    assert found.difference.low > 0
    assert "On test there are too few rows to tell any two models apart on rouge_l." in made.notes


def test_rouge_of_different_tokens_is_not_mixed():
    runs = [plain("a", [10, 20, 30, 40, 50]), plain("b", [11, 22, 36, 43, 58])]
    runs[1].record.evaluations[0].rouge_tokenizer = "characters"
    with pytest.raises(RequestError, match=r"differ on test in the tokens of ROUGE \(words and characters\)"):
        compare(runs, better)
    made = compare(runs, better, allow_different=True)
    assert [each.rouge_tokenizer for each in made.evaluations] == ["words", "characters"]
    for each in runs:  # of scores without ROUGE it is no difference
        for sample in each.record.evaluations[0].samples:
            sample.scores = {"exact_match": sample.scores["rouge_l"]}
    assert len(compare(runs, better).differences) == 1


@pytest.mark.slow
def test_the_interval_is_that_of_a_plain_bootstrap_of_rows():
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, 40, (2, 2, 30))  # (models, seeds, rows)
    kls = rng.gamma(2, 0.5, (2, 2, 30))
    made = compare(
        [
            candidate(
                label,
                evaluation(
                    answers({"kl_to_teacher": kl}, seeds=(1, 2), tokens={"kl_to_teacher": count}),
                    decoding={**SAMPLED, "seeds": [1, 2]},
                ),
            )
            for label, kl, count in zip("ab", kls, tokens, strict=True)
        ],
        better,
        bootstrap=Bootstrap(resamples=4000),
    )
    draws = []
    for _ in range(4000):
        rows = rng.integers(0, 30, 30)
        a, b = (
            sum(kl[seed, row] * count[seed, row] for seed in (0, 1) for row in rows)
            / sum(count[seed, row] for seed in (0, 1) for row in rows)
            for kl, count in zip(kls, tokens, strict=True)
        )
        draws.append(b - a)
    low, high = np.quantile(draws, [0.025, 0.975])
    metric = made.differences[0].difference
    sums = (kls * tokens).sum((1, 2)) / tokens.sum((1, 2))
    assert metric.value == pytest.approx(sums[1] - sums[0])
    assert [metric.low, metric.high] == pytest.approx([low, high], abs=0.08 * (high - low))


def test_seeds_of_a_row_are_averaged_before_rows_are_compared():
    decoding = {**SAMPLED, "seeds": [1, 2]}
    pair = [
        candidate(label, evaluation(answers({"rouge_l": table}, seeds=(1, 2)), decoding=decoding))
        for label, table in (("a", [[0, 10, 20], [10, 0, 0]]), ("b", [[8, 9, 20], [8, 9, 20]]))
    ]
    (found,) = compare(pair, better).differences
    assert found.difference.rows == 3
    assert found.difference.value == pytest.approx((3 + 4 + 10) / 3)
    assert found.p_value == 2 / 8
    assert found.effect_size == pytest.approx((17 / 3) / np.std([3, 4, 10], ddof=1))


def test_p_is_adjusted_over_every_model_data_set_and_metric():
    rng = np.random.default_rng(1)

    def subject(label, shift):
        sets = [
            evaluation(answers({"rouge_l": rng.normal(shift, 1, 12), "exact_match": rng.normal(0, 1, 12)}), data=data)
            for data in ("one", "two")
        ]
        return candidate(label, *sets)

    made = compare([subject("a", 0), subject("b", 0.4), subject("c", 1)], better)
    assert [(each.model, each.baseline) for each in made.differences[:4]] == [("b", "a")] * 2 + [("c", "a")] * 2
    assert len(made.differences) == 8
    smallest = min(made.differences, key=lambda each: each.p_value)
    assert smallest.p_adjusted == pytest.approx(8 * smallest.p_value)
    assert made.notes[0].startswith("8 differences were tested together")


def test_baseline_and_all_pairs():
    runs = [plain(label, values) for label, values in (("a", [1, 2, 3]), ("b", [2, 3, 5]), ("c", [3, 3, 3]))]

    def pairs(**settings):
        return [(each.model, each.baseline) for each in compare(runs, better, **settings).differences]

    assert pairs() == [("b", "a"), ("c", "a")]
    assert pairs(baseline="c") == [("a", "c"), ("b", "c")]
    assert pairs(pairs="all") == [("b", "a"), ("c", "a"), ("c", "b")]


def test_what_does_not_depend_on_the_decoding_is_tested_once():
    def subject(label, shift):
        scores = {"loss": np.arange(6) + shift, "rouge_l": np.arange(6) * shift}
        sampled = answers(scores, seeds=(10,), tokens={"loss": [3] * 6})
        greedy = answers(scores, tokens={"loss": [3] * 6})
        return candidate(label, evaluation(sampled, decoding={**SAMPLED, "seeds": [10]}), evaluation(greedy))

    made = compare([subject("a", 0), subject("b", 1)], better)
    assert [(each.data, each.metric) for each in made.differences] == [
        ("test, sampled", "loss"),
        ("test, sampled", "rouge_l"),
        ("test, greedy", "rouge_l"),
    ]
    assert set(made.data) == {"test, sampled", "test, greedy"}


def test_the_loss_of_a_model_that_lacks_the_first_decoding_is_tested_in_the_other():
    def subject(label, shift, *decodings):
        scores = {"loss": np.arange(6) + shift, "rouge_l": np.arange(6) * shift}
        samples = answers(scores, seeds=(10,), tokens={"loss": [3] * 6})
        return candidate(label, *(evaluation(samples, decoding=each) for each in decodings))

    both = ({**SAMPLED, "seeds": [10]}, {**GREEDY, "seeds": [10]})
    runs = [subject("a", 0, *both), subject("b", 1, *both), subject("c", 2, both[1])]
    made = compare(runs, better, metrics=["loss"])
    assert [(each.data, each.model) for each in made.differences] == [("test, sampled", "b"), ("test, greedy", "c")]
    assert [each.difference.value for each in made.differences] == pytest.approx([1, 2])
    shown = {each.model for each in made.evaluations if each.data == "test, greedy" and "loss" in each.metrics}
    assert shown == {"a", "b", "c"}
    assert [(each.data, each.model) for each in compare(runs[:2], better, metrics=["loss"]).differences] == [
        ("test, sampled", "b")
    ]


def test_only_the_metrics_that_were_asked_for():
    scores = {"rouge_l": [1, 2, 3], "exact_match": [0, 0, 1], "response_length": [4, 5, 6]}
    runs = [candidate(label, evaluation(answers(scores))) for label in "ab"]
    made = compare(runs, better)
    assert [each.metric for each in made.differences] == ["rouge_l", "exact_match"]
    assert made.notes[-1] == "Not tested, for neither direction is better: response_length."
    assert made.evaluations[0].metrics["response_length"].value == 5
    assert [each.metric for each in compare(runs, better, metrics=["exact_match"]).differences] == ["exact_match"]
    with pytest.raises(RequestError, match=r"scores of: rouge_l, exact_match, response_length\. Got rouge_2"):
        compare(runs, better, metrics=["rouge_l", "rouge_2"])
    with pytest.raises(RequestError, match="Nothing to compare: the runs share 3 rows, with scores of response_length"):
        compare(runs, better, metrics=["response_length"])


def test_rows_without_a_score_are_left_out_of_that_metric_and_told():
    full = answers({"judge_score": [1, 2, 3, 4], "rouge_l": [1, 2, 3, 4]})
    holes = answers({"judge_score": [2, math.nan, 5, math.nan], "rouge_l": [1, 2, 3, 5]})
    made = compare([candidate("a", evaluation(full)), candidate("b", evaluation(holes))], better)
    judged, rouge = made.differences
    assert (judged.difference.value, judged.difference.rows) == (pytest.approx(1.5), 2)
    assert rouge.difference.rows == 4
    assert "On test not every row has every score: judge_score 2 of 4 rows." in made.notes


def test_an_infinite_loss_claims_nothing_and_leaves_the_others_their_p():
    bad = answers({"loss": [1, math.inf, 1], "rouge_l": [1, 2, 3]})
    fine = answers({"loss": [1, 1, 1], "rouge_l": [2, 4, 6]})
    loss, rouge = compare([candidate("a", evaluation(fine)), candidate("b", evaluation(bad))], better).differences
    assert (loss.p_value, loss.p_adjusted, loss.effect_size, verdict(loss)) == (None, None, None, "open")
    assert rouge.p_adjusted == rouge.p_value == 2 / 8


def test_a_kl_to_another_teacher_is_not_compared():
    samples = answers({"kl_to_teacher": [1, 2, 3], "rouge_l": [1, 2, 3]})
    runs = [candidate(label, evaluation(samples), teacher=label * 64) for label in "ab"]
    made = compare(runs, better)
    assert [each.metric for each in made.differences] == ["rouge_l"]
    told = "kl_to_teacher of b was not compared: its record names another teacher, or context, than that of a."
    assert told in made.notes
    assert not any("kl_to_teacher" in each.metrics for each in made.evaluations)
    again = compare([*runs, candidate("c", evaluation(samples), teacher="a" * 64)], better)
    assert {each.model for each in again.differences if each.metric == "kl_to_teacher"} == {"c"}
    measured = {each.model: "kl_to_teacher" in each.metrics for each in again.evaluations}
    assert measured == {"a": True, "b": False, "c": True}


# ---- what is alike ----

ALIKE = evaluation(answers({"rouge_l": [1, 2, 3]}, seeds=(10,)), decoding={**SAMPLED, "seeds": [10]})


@pytest.mark.parametrize(
    ("other", "settings", "message"),
    [
        ({"decoding": {**SAMPLED, "seeds": [10], "temperature": 0.7}}, {}, r"temperature \(1\.0 and 0\.7\)"),
        ({"decoding": {**SAMPLED, "seeds": [10], "top_p": 0.9}}, {}, r"top_p \(1\.0 and 0\.9\)"),
        ({"decoding": {**SAMPLED, "seeds": [10], "top_k": 5}}, {}, r"top_k \(0 and 5\)"),
        ({"decoding": {**SAMPLED, "seeds": [10], "max_new_tokens": 9}}, {}, r"max_new_tokens \(64 and 9\)"),
        ({"decoding": {**SAMPLED, "seeds": [10, 20]}}, {}, r"seeds \(10 and 10 20\)"),
        ({"rows": [1, 2]}, {}, r"rows \(3 and 2, 2 in both\)"),
        ({"prompt": "Q: {}"}, {}, r"prompts \(of 3 rows, row 0 first; another template\?\)"),
        ({}, {"sha256": "cd" * 32}, r"data \(sha256 abababab and cdcdcdcd\)"),
    ],
)
def test_runs_that_were_not_measured_alike_are_refused_and_told_why(other, settings, message):
    samples = answers({"rouge_l": other.pop("rows", [1, 2, 3])}, seeds=(10,), prompt=other.pop("prompt", "request {}"))
    runs = [
        candidate("a", ALIKE),
        candidate("b", evaluation(samples, **({"decoding": {**SAMPLED, "seeds": [10]}} | other)), **settings),
    ]
    with pytest.raises(RequestError, match=rf"^a and b differ on test in {message}\. .*--allow-different\.$"):
        compare(runs, better)
    made = compare(runs, better, allow_different=True)
    assert made.notes[0].startswith("Compared although a and b differ on test in ")
    assert made.differences[0].difference.rows == len(samples)


def test_what_changes_no_answer_may_differ():
    seed, greedy = {**SAMPLED, "seed": 10, "batch_size": 8}, {**GREEDY, "seed": 3, "top_p": 1.0, "top_k": 0}
    in_a_run = answers({"rouge_l": [1, 2, 3]})  # a run's own record leaves the seed to the decoding
    compare([candidate("a", ALIKE), candidate("b", evaluation(in_a_run, decoding=seed))], better)
    compare([plain("a", [1, 2, 3]), candidate("b", evaluation(in_a_run, decoding=greedy))], better)


def test_all_differing_settings_are_told_together():
    other = evaluation(answers({"rouge_l": [1, 2]}, seeds=(7,)), decoding={**SAMPLED, "seeds": [7], "top_k": 5})
    with pytest.raises(RequestError, match=r"rows \(3 and 2, 2 in both\); top_k \(0 and 5\); seeds \(10 and 7\)\."):
        compare([candidate("a", ALIKE), candidate("b", other)], better)


def test_rows_of_changed_data_are_paired_by_index_and_prompt():
    before, after = answers({"rouge_l": [1, 2, 3]}), answers({"rouge_l": [5, 6, 7, 8]})
    after[1].prompt = "another request"
    runs = [candidate("a", evaluation(before)), candidate("b", evaluation(after), sha256="cd" * 32)]
    made = compare(runs, better, allow_different=True)
    assert (made.differences[0].difference.value, made.differences[0].difference.rows) == (4, 2)
    assert "On test the 2 rows that all have were compared, of 4." in made.notes


def test_answers_that_one_run_lacks_are_a_difference():
    decoding = {**SAMPLED, "seeds": [1, 2]}
    whole = answers({"rouge_l": [[1, 2], [3, 8]]}, seeds=(1, 2))
    runs = [candidate(label, evaluation(each, decoding=decoding)) for label, each in (("a", whole), ("b", whole[:3]))]
    with pytest.raises(RequestError, match=r"answers \(4 and 3, 3 in both\)"):
        compare(runs, better)
    made = compare(runs, better, allow_different=True)
    assert made.differences[0].difference.value == 0  # row 1 by the seed that both have


def test_other_seeds_are_each_averaged_if_they_may_differ():
    one = evaluation(answers({"rouge_l": [[1, 2]]}, seeds=(1,)), decoding={**SAMPLED, "seeds": [1]})
    two = evaluation(answers({"rouge_l": [[1, 2], [3, 4]]}, seeds=(7, 8)), decoding={**SAMPLED, "seeds": [7, 8]})
    made = compare([candidate("a", one), candidate("b", two)], better, allow_different=True)
    assert made.differences[0].difference.value == 1


def test_sets_that_not_all_were_measured_on_are_told():
    sets = [evaluation(answers({"rouge_l": [1, 2, 3]}), data=data) for data in ("one", "two")]
    made = compare([candidate("a", *sets), candidate("b", *sets), candidate("c", sets[0])], better)
    assert [(each.model, each.data) for each in made.differences] == [("b", "one"), ("c", "one"), ("b", "two")]
    assert "two was not measured for c." in made.notes


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([plain("a", [1, 2])], "two models or more. Got a"),
        ([plain("a", [1, 2]), plain("a", [1, 2])], "Got a twice; name a run by LABEL=RUN"),
        (
            [plain("a", [1]), candidate("b", evaluation(answers({"rouge_l": [1]}), data="other"))],
            "share no data set: a has rows of test; b has rows of other",
        ),
        ([plain("a", [1]), candidate("b", evaluation([]))], "a has rows of test; b has rows of none"),
        ([candidate("a", ALIKE, ALIKE), candidate("b", ALIKE)], "a was measured on test twice in one record"),
        (
            [candidate("a", evaluation(2 * answers({"rouge_l": [1]}))), plain("b", [1])],
            "The evaluation of a on test holds row 0 twice",
        ),
        (
            [
                candidate("a", evaluation(answers({"loss": [1, 2]}, tokens={"loss": [3, 4]}))),
                candidate("b", evaluation(answers({"loss": [1, 2]}))),
            ],
            "loss on test is a mean over tokens in one record and a mean over rows in another",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(runs, message):
    with pytest.raises(RequestError, match=message):
        compare(runs, better)


def test_an_unknown_baseline_is_refused():
    with pytest.raises(RequestError, match=r"one of a, b\. Got c"):
        compare([plain("a", [1, 2]), plain("b", [1, 2])], better, baseline="c")


# ---- what it claims ----


def claims(draw: Callable[[np.random.Generator], dict], trials: int, *, rows=40, resamples=400) -> list[int]:
    """How many differences each trial claims: `draw` gives scores of shape (2, rows) by metric."""
    rng = np.random.default_rng(7)
    empty = {name: np.zeros(rows) for name in draw(rng)}
    pair = [plain("a", empty["rouge_l"]), plain("b", empty["rouge_l"])]
    samples = [each.record.evaluations[0].samples for each in pair]
    found = []
    for trial in range(trials):
        scores = draw(rng)
        for model, each in enumerate(samples):
            for answer in each:
                answer.scores = {name: float(table[model, answer.row]) for name, table in scores.items()}
        made = compare(pair, better, bootstrap=Bootstrap(resamples, seed=trial), draws=199)
        found.append(sum(verdict(each) in ("better", "worse") for each in made.differences))
    return found


def rouge_like(rng):
    """Scores in 0..100 around the difficulty that a row has for both."""
    difficulty = rng.beta(1.2, 3, 40)
    return {"rouge_l": 100 * rng.beta(8 * difficulty + 0.1, 8 * (1 - difficulty) + 0.1, (2, 40))}


def skewed(rng):
    """Most rows differ a little, some by much."""
    return {"rouge_l": rng.gamma(0.5, 20, (2, 40))}


def zero_inflated(rng):
    """Three rows in five are answered alike."""
    scores = rng.uniform(0, 100, (2, 40))
    scores[1] = np.where(rng.random(40) < 0.6, scores[0], scores[1])
    return {"rouge_l": scores}


@pytest.mark.slow
@pytest.mark.parametrize("draw", [rouge_like, skewed, zero_inflated])
def test_chance_is_called_a_difference_in_5_percent_of_1000_trials(draw):
    claimed = sum(claims(draw, 1000))
    assert 32 <= claimed <= 68  # 50, 2.6 standard errors either way


@pytest.mark.slow
def test_of_many_metrics_any_one_is_claimed_by_chance_in_5_percent():
    def draw(rng):
        shared = rng.normal(size=(2, 30))  # metrics of one answer depend on each other
        return {name: 0.5 * shared + rng.normal(size=(2, 30)) for name in ("rouge_l", "rouge_1", "eos_share", "loss")}

    claimed = sum(count > 0 for count in claims(draw, 600, rows=30, resamples=200))
    assert 16 <= claimed <= 44


@pytest.mark.slow
def test_a_known_effect_is_found_as_often_as_computed():
    """Power of a two-sided test at 5 %: Φ(d √n - 1.96) with d = 0.28, n = 100."""

    def draw(rng):
        a = rng.normal(30, 10, 100)
        return {"rouge_l": np.stack([a, a + rng.normal(0.28, 1, 100)])}

    power = 0.5 * (1 + math.erf((0.28 * 10 - 1.96) / math.sqrt(2)))
    claimed = sum(claims(draw, 1000, rows=100))
    assert claimed / 1000 == pytest.approx(power, abs=2.6 * math.sqrt(power * (1 - power) / 1000))


# ---- in words ----


def test_the_text_says_what_is_told_apart_and_what_is_not():
    rng = np.random.default_rng(8)
    base = rng.normal(30, 5, 40)
    runs = [
        candidate(label, evaluation(answers({"rouge_l": base + gain, "exact_match": rng.normal(50, 9, 40)})))
        for label, gain in (("kd", 0), ("promptkd\x1b[31m", rng.normal(2, 1, 40)))
    ]
    made = compare(runs, better)
    results = Results(
        kind="compare",
        models={"kd": ModelRecord(path="kd", parameters=1_234_567, sha256="")},
        training={"kd": Training(method="kd", steps=1200, seconds=4321.4, peak_memory_bytes=3 * 2**30)},
        evaluations=made.evaluations,
        differences=made.differences,
        notes=made.notes,
    )
    text = compared_text(results)
    assert "promptkd␛[31m against kd on test (40 rows)" in text
    assert "\x1b" not in text
    lines = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    rouge = lines["ROUGE-L, of 100"]
    assert rouge[-1] == "better"
    assert rouge[-4:-2] == ["<", "0.001"]
    assert lines["Exact match, of 100"][-4:] == ["cannot", "tell", "them", "apart"]
    assert "is better on ROUGE-L than kd. Cannot tell them apart on exact match." in " ".join(text.split())
    assert lines["kd"] == [*("kd", "1.23", "million", "kd", "1,200", "1", "h", "12", "min", "3.0", "GiB")]
    assert made.notes[0].split(".")[0] in text
    assert compared_sentences(results)[0].startswith("On test: promptkd")
    tied = results.model_copy(update={"differences": results.differences[1:]})
    assert compared_sentences(tied) == ["On test: Cannot tell promptkd␛[31m and kd apart on exact match."]


@pytest.mark.parametrize(
    ("p", "expected"), [(0.05, "better"), (0.0500001, "tied"), (None, "better"), (math.nan, "tied")]
)
def test_an_adjusted_p_must_speak_too(p, expected):
    (found,) = compare([plain("a", [1, 2, 3]), plain("b", [3, 4, 6])], better).differences
    found.p_adjusted, found.difference = p, Metric(value=1, low=0.5, high=1.5)
    assert verdict(found) == expected


def test_the_report_says_the_p_beside_an_interval_that_excludes_zero():
    (found,) = compare([plain("a", [10, 20, 30, 40, 50]), plain("b", [11, 22, 36, 43, 58])], better).differences
    (sentence,) = comparison_sentences(difference_table([Results(kind="compare", differences=[found])])).values()
    assert sentence.startswith("b and a cannot be told apart on ROUGE-L (+4.0 [+1.8, ")
    assert sentence.endswith("], adjusted p 0.062).")
