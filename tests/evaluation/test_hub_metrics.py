"""Metrics of Hugging Face's `evaluate`: from a script, by name, and what is refused before anything is decoded."""

import sys
from pathlib import Path

import pytest

from helpers.commands import LIMITS, done, json_lines, make_world, run, write_rows
from promptkd.errors import PromptKDError, RequestError
from promptkd.evaluation.hub_metrics import HubMetric
from promptkd.evaluation.statistics import mean_interval
from promptkd.report.metrics import metric_info
from promptkd.results import Results

SCRIPT = """
import datasets
import evaluate

TEXT = datasets.Value("string")


class Metric(evaluate.Metric):
    def _info(self):
        features = datasets.Features({{"predictions": TEXT, "references": {references}}})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        {body}
"""
LETTERS = """a, b = predictions[0], references[0]
        share = sum(map(a.count, "ab")) / len(a)
        return {"letters": share, "references": len(b), "precisions": [0.5, 0.25], "n": [7]}"""


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    """`evaluate` copies scripts into a cache that it finds when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("cache")))
        import evaluate  # noqa: F401

        yield


@pytest.fixture
def script(tmp_path):
    def write(body: str = LETTERS, name: str = "letters", several: bool = True) -> str:
        path = tmp_path / f"{name}.py"
        references = "datasets.Sequence(TEXT)" if several else "TEXT"
        path.write_text(SCRIPT.format(body=body, references=references))
        return str(path)

    return write


def test_of_the_librarys_common_metrics_it_is_known_what_is_better():
    known = {
        "bleu": "higher",
        "rouge:rouge2": "higher",
        "bertscore:f1": "higher",
        "ter:score": "lower",
        "wer:wer": "lower",
    }
    known |= {"bleu:length_ratio": None, "mine": None, "mine:score": None}
    assert {name: metric_info(f"evaluate:{name}").better for name in known} == known
    assert metric_info("evaluate:bleu").label == "evaluate:bleu"


def test_the_score_is_the_field_of_the_metrics_name_or_the_one_asked_for(script):
    metric = HubMetric(script())
    assert metric.label == "evaluate:letters"
    assert metric.scores(["ab", "ax", "xy"], [["r"], ["r", "s"], ["r"]]) == [1, 0.5, 0]
    counted = HubMetric(script() + ":references")
    assert counted.label == "evaluate:letters:references"
    assert counted.scores(["ab", "ab"], [["r", "s", "t"], ["r"]]) == [3, 1]
    assert HubMetric(script() + ":n").scores(["ab"], [["r"]]) == [7]  # a list of one, as for one row
    assert HubMetric(script('return {"score": 2, "other": 3}', "other_name")).scores(["a"], [["b"]]) == [2]
    assert HubMetric(script('return {"mean": 4, "hash": "x"}', "third")).scores(["a"], [["b"]]) == [4]


def test_an_empty_answer_that_the_metric_fails_on_counts_0_and_another_one_stops(script):
    metric = HubMetric(script())  # divides by the length
    assert metric.scores(["", "a", ""], [["r"]] * 3) == [0, 1, 0]
    assert metric.failed_on_empty == 2
    picky = HubMetric(script("if predictions[0] == 'no': raise KeyError('x')\n        return {'picky': 1}", "picky"))
    with pytest.raises(PromptKDError, match="failed on the answer 'no': KeyError"):
        picky.scores(["yes", "no"], [["r"], ["r"]])


def test_a_metric_of_single_references_refuses_several(script):
    metric = HubMetric(script('return {"single": float(references[0] == predictions[0])}', "single", several=False))
    assert metric.scores(["a", "b"], [["a"], ["a"]]) == [1, 0]
    metric.check([["a"], ["b"]])
    with pytest.raises(RequestError, match="takes one reference per row, and one row has 2"):
        metric.check([["a"], ["a", "b"]])


@pytest.mark.parametrize(
    ("body", "asked", "message"),
    [
        ('return {"precisions": [0.5, 0.25], "name": "x"}', "", "gives no score: .*letters.* got no number"),
        ('return {"one": 1, "two": 2}', "", "or a single number, got one, two. Pick one by NAME:FIELD"),
        (LETTERS, ":letter", "expected the field 'letter', got letters, references, n"),
        ("return None", "", "gives no score"),
        ("raise ValueError('needs sources')", "", "cannot score an answer .*: ValueError: needs sources"),
        ("syntax error", "", "Could not load the metric .*SyntaxError"),
    ],
)
def test_a_metric_that_gives_no_score_is_refused_when_it_is_loaded(script, body, asked, message):
    with pytest.raises(RequestError, match=message):
        HubMetric(script(body) + asked)


def test_a_name_that_cannot_be_had_offline_is_refused(monkeypatch):
    monkeypatch.setattr("evaluate.loading.HubEvaluationModuleFactory.get_module", _offline)
    with pytest.raises(RequestError, match=r"Could not load the metric bleu: .*or the path of a metric script"):
        HubMetric("bleu")


def _offline(factory):
    raise ConnectionError("no network")


def test_without_the_library_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(RequestError, match=r"pip install 'promptkd\[metrics\]'"):
        HubMetric("bleu")


@pytest.mark.slow
def test_evaluate_records_the_score_of_each_row(script, tmp_path, capsys):
    world = make_world(tmp_path / "world")
    request = ("evaluate", "--model", world.student, "--data", world.test, *LIMITS, "--seeds", 1, 2)
    done(capsys, *request, "--metrics", script(), script() + ":references", "--out", tmp_path / "results.json")
    metric = HubMetric(script())
    for evaluation, parts in zip(
        Results.read(tmp_path / "results.json").evaluations, (("seed1", "seed2"), ("greedy",)), strict=True
    ):
        lines = [json_lines(tmp_path / f"results-test-{part}.jsonl") for part in parts]
        scores = [metric.scores([x["response"] for x in each], [x["references"] for x in each]) for each in lines]
        assert [sample.scores["evaluate:letters"] for sample in evaluation.samples] == [
            score for each in scores for score in each
        ]
        expected = mean_interval([sum(column) / len(column) for column in zip(*scores, strict=True)])
        assert evaluation.metrics["evaluate:letters"].value == pytest.approx(expected.value)
        assert evaluation.metrics["evaluate:letters:references"].value == 1


def test_several_references_are_checked_before_a_model_is_loaded(script, tmp_path, capsys):
    world = make_world(tmp_path / "world")
    data = write_rows(tmp_path / "two.jsonl", [{"instruction": "an", "output": ["a", "b"]}])
    name = script('return {"single": 1}', "single", several=False)
    out = tmp_path / "results.json"
    (Path(world.student) / "model.safetensors").unlink()
    ran = run(capsys, "evaluate", "--model", world.student, "--data", data, "--metrics", name, "--out", out, *LIMITS)
    assert ran.status == 2
    assert "takes one reference per row" in ran.err
    assert not list(tmp_path.glob("results*"))
