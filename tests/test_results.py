"""The record: written whole, read back equal, refused when it is none, and free of secrets."""

import hashlib
import json

import pytest

from promptkd.errors import RequestError
from promptkd.io.redact import without_secrets
from promptkd.results import Evaluation, Metric, Results, file_sha256, metric_named


def record():
    return Results(
        kind="evaluate",
        command=["promptkd", "evaluate"],
        evaluations=[Evaluation(model="m", data="d", metrics={"loss": Metric(value=1.5, low=1.0, high=2.0, rows=3)})],
    )


def test_written_and_read_back_equal(tmp_path):
    record().write(tmp_path / "deep" / "results.json")
    read = Results.read(tmp_path / "deep" / "results.json")
    assert read.evaluations[0].metrics["loss"] == Metric(value=1.5, low=1.0, high=2.0, rows=3)
    assert read.machine["cores"] >= 1
    assert isinstance(read.machine["processor"], str)
    assert read.code["promptkd"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["results.json"]


def test_numbers_that_are_not_finite_survive(tmp_path):
    made = record()
    made.metrics = {"diverged": Metric(value=float("inf"))}
    made.write(tmp_path / "results.json")
    assert Results.read(tmp_path / "results.json").metrics["diverged"].value == float("inf")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda content: content.update(schema_version=2), "schema_version"),
        (lambda content: content.update(surprise=1), "surprise"),
        (lambda content: content.pop("kind"), "kind"),
        (lambda content: content["evaluations"][0]["metrics"]["loss"].update(value="high"), "value"),
    ],
)
def test_other_files_are_refused(tmp_path, change, told):
    file = tmp_path / "results.json"
    record().write(file)
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(RequestError, match=told):
        Results.read(file)


def test_missing_and_broken_files_are_refused(tmp_path):
    with pytest.raises(RequestError, match="Expected a results file"):
        Results.read(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text('{"kind": ')
    with pytest.raises(RequestError, match="not a results record"):
        Results.read(tmp_path / "broken.json")


def test_secrets_are_starred_out():
    given = ["distill", "--hub_token", "hf_abc", "--hub-token=hf_abc", "--api-key", "k", "--max_new_tokens", "5"]
    assert without_secrets(given) == [
        "distill",
        "--hub_token",
        "***",
        "--hub-token=***",
        "--api-key",
        "***",
        "--max_new_tokens",
        "5",
    ]


def test_hashes_are_over_all_bytes_in_order(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"one")
    second.write_bytes(b"two")
    assert file_sha256(first, second) == hashlib.sha256(b"onetwo").hexdigest()
    assert file_sha256(second, first) == hashlib.sha256(b"twoone").hexdigest()


@pytest.mark.parametrize("asked", ["share", "own:share", "mine.py:share", "own-lower:share", "../my dir/mine.py:share"])
def test_a_metric_of_ones_own_is_known_by_each_of_its_names(asked):
    if asked != "own-lower:share":
        assert metric_named(asked, ["loss", "own:share"]) == "own:share"
    assert metric_named(asked, ["loss", "own-lower:share"]) == "own-lower:share"
    assert metric_named(asked, ["loss", "evaluate:share", "shares"]) is None
