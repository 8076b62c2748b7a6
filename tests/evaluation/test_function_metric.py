"""Metrics of one's own: functions, tried before any model is loaded, and compared by their direction."""

import pytest

from helpers.commands import LIMITS, done, make_world, run, write_rows
from promptkd.errors import PromptKDError, RequestError
from promptkd.evaluation.function_metric import FunctionMetric, label_of_metric, load_metrics
from promptkd.report.metrics import metric_info
from promptkd.results import Results, file_sha256

FILE = """
def letters(prediction, references):
    return sum(map(prediction.count, "ab")) / 10 + len(references)

def errors(prediction, references):
    return len(prediction)

errors.better = "lower"

def odd(prediction, references):
    return 1.0
odd.better = "sideways"

def text(prediction, references):
    return "1.0"

def nothing(prediction, references):
    return float("nan")

def strict(prediction, references):
    return 1 / len(prediction)

def narrow(prediction):
    return 1.0

def picky(prediction, references):
    if references != ["a short answer to try the metric on"]:
        raise KeyError("unseen reference")
    return 1.0

def fussy(prediction, references):
    if prediction not in ("", "a short answer to try the metric on"):
        raise KeyError("unseen answer")
    return 1.0

number = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def test_a_function_scores_each_answer(file):
    metric = FunctionMetric(f"{file}:letters")
    assert metric.scores(["aab", ""], [["x"], ["x", "y"]]) == [1.3, 2.0]
    assert (metric.label, FunctionMetric(f"{file}:errors").label) == ("own:letters", "own-lower:errors")
    assert (metric_info("own:letters").better, metric_info("own:letters").label) == ("higher", "letters")
    assert metric_info("own-lower:errors").better == "lower"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("odd", r'its attribute `better` must be "higher" or "lower". Got \'sideways\''),
        ("text", r"failed on a row .* expected a finite number as the score, got '1.0'"),
        ("nothing", r"expected a finite number as the score, got nan"),
        ("strict", r"failed on a row that it was tried on \(line 21\): ZeroDivisionError"),  # on an empty answer
        ("narrow", r"failed on a row that it was tried on: TypeError: narrow\(\) takes 1"),
        ("number", r"must be a function score\(prediction, references\)"),
        ("lost", r"has no lost, which should be a function"),
    ],
)
def test_what_is_wrong_with_a_function_is_told(file, name, told):
    with pytest.raises(RequestError, match=told):
        load_metrics([f"{file}:{name}"])


def test_names_that_two_metrics_share_are_refused(file, tmp_path):
    other = tmp_path / "other.py"
    other.write_text("def letters(prediction, references):\n    return 0\n")
    with pytest.raises(RequestError, match="Got own:letters twice"):
        load_metrics([f"{file}:letters", f"{other}:letters"])
    with pytest.raises(RequestError, match="There is no such file"):
        load_metrics([f"{tmp_path}/none.py:letters"])


def test_a_function_that_fails_on_an_answer_names_it(file):
    with pytest.raises(PromptKDError, match=r"fussy failed on answer 1, 'other': KeyError: 'unseen answer'"):
        FunctionMetric(f"{file}:fussy").scores(["", "other"], [["x"], ["x"]])


def test_labels_are_those_of_the_records(file):
    assert label_of_metric(f"{file}:errors") == "own-lower:errors"
    assert label_of_metric("rouge:rouge2") == "evaluate:rouge:rouge2"
    assert label_of_metric("scripts/bleu.py") == "evaluate:bleu"


@pytest.mark.slow
def test_evaluate_records_them_and_compare_tests_them(file, tmp_path, capsys):
    world = make_world(tmp_path)
    for name in ("student", "teacher"):
        request = ("evaluate", "--model", tmp_path / name, "--data", world.test, "--no-greedy", *LIMITS)
        done(capsys, *request, "--metrics", f"{file}:letters", f"{file}:errors", "--out", tmp_path / f"{name}.json")
    record = Results.read(tmp_path / "student.json")
    assert record.code[str(file)] == f"sha256 {file_sha256(file)}"
    assert {"own:letters", "own-lower:errors"} <= record.evaluations[0].metrics.keys()
    pair = (tmp_path / "student.json", tmp_path / "teacher.json")
    done(capsys, "compare", *pair, "--metrics", "own-lower:errors", "--out", tmp_path / "c.json")
    (difference,) = Results.read(tmp_path / "c.json").differences
    assert difference.better == "lower"
    ran = run(capsys, "compare", *pair, "--metrics", "own:lost")
    assert ran.status == 2
    assert "Got own:lost" in ran.err


def test_a_function_is_tried_before_a_model_is_loaded(file, tmp_path, capsys):
    data = write_rows(tmp_path / "d.jsonl", [{"instruction": "a", "output": "b"}])
    lost = ("evaluate", "--model", tmp_path / "lost", "--data", data, "--out", tmp_path / "e.json", *LIMITS)
    ran = run(capsys, *lost, "--metrics", f"{file}:strict")
    assert ran.status == 2
    assert "ZeroDivisionError" in ran.err
    assert not (tmp_path / "e.json").exists()
