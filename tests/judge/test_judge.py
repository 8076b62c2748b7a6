"""`promptkd judge` against servers on loopback, well-behaved and not."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path

import numpy as np
import pytest

from helpers.commands import done, held, json_lines, run, write_rows
from helpers.judge_server import JudgeServer, answer_rows, by_length, judge_server, parts
from helpers.processes import forked_command, killed
from helpers.tiny import save_model, tiny_model, tiny_tokenizer
from promptkd.evaluation.statistics import token_mean_interval
from promptkd.io.lock import locked
from promptkd.judge.endpoint import _retry_after
from promptkd.results import Results, file_sha256

KEY = "sk-planted/0123456789"
QUICK = {"--backoff": 0.01, "--timeout": 5}
VERDICT = {
    "row",
    "model_first",
    "model",
    "other",
    "text",
    "refused",
    "finish_reason",
    "served_model",
    "prompt_tokens",
    "completion_tokens",
}


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OPENAI_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "student.jsonl", answer_rows(12))


def request(server: JudgeServer | str, responses: Path, *arguments: object, out: str = "judged.json") -> list[object]:
    url = server if isinstance(server, str) else server.url
    where = ("--endpoint", url, "--judge-model", "judge", "--out", responses.parent / "out" / out)
    quick = [part for flag, value in QUICK.items() if flag not in arguments for part in (flag, value)]
    return ["judge", "--responses", responses, *where, *quick, *arguments]


def record(responses: Path, out: str = "judged.json") -> Results:
    return Results.read(responses.parent / "out" / out)


def verdict_lines(responses: Path) -> list[dict]:
    return json_lines(responses.parent / "out" / "judged-verdicts.jsonl")[1:]


def same(first: Path, second: Path) -> bool:
    """Whether two folders hold the same record, but for clock, command line and port, and the same verdicts."""
    found = []
    for folder in (first, second):
        results = json.loads(re.sub(r"127.0.0.1:\d+", "HOST", (folder / "judged.json").read_text()))
        for name in ("created", "command", "config"):
            results.pop(name)
        found.append((results, (folder / "judged-verdicts.jsonl").read_text().split("\n", 1)[1]))
    return found[0] == found[1]


# ---- what is asked and what is made of it ----


@pytest.mark.slow
@pytest.mark.parametrize("form", ["response", "completion"])
def test_scores(tmp_path, capsys, form):
    student = write_rows(tmp_path / "student.jsonl", answer_rows(12, form=form))
    with judge_server() as server:
        ran = done(capsys, *request(server, student))
    assert held(tmp_path / "out") == {"judged.json", "judged-verdicts.jsonl"}
    assert [set(line) for line in verdict_lines(student)] == [VERDICT] * 12
    assert [line["row"] for line in verdict_lines(student)] == list(range(12))

    mine = np.array([1 + (row + 1) % 10 for row in range(12)], dtype=float)
    reference = np.array([1 + (2 * row + 3) % 10 for row in range(12)], dtype=float)
    results = record(student)
    (evaluation,) = results.evaluations
    assert (results.kind, evaluation.model, evaluation.data) == ("judge", "student", "requests")
    assert evaluation.metrics.keys() == {"judge_ratio", "judge_score", "judge_reference_score", "unparsable_share"}
    assert evaluation.metrics["judge_score"].value == pytest.approx(mine.mean())
    assert evaluation.metrics["judge_reference_score"].value == pytest.approx(reference.mean())
    ratio, expected = evaluation.metrics["judge_ratio"], token_mean_interval(mine, reference)
    assert (ratio.value, ratio.rows) == (pytest.approx(100 * mine.sum() / reference.sum()), 12)
    assert (ratio.low, ratio.high) == (pytest.approx(100 * expected.low), pytest.approx(100 * expected.high))
    assert evaluation.metrics["unparsable_share"].value == 0
    assert [sample.scores["judge_score"] for sample in evaluation.samples] == mine.tolist()
    assert [sample.scores["judge_reference_score"] for sample in evaluation.samples] == reference.tolist()
    assert [sample.response for sample in evaluation.samples] == ["a" * (row + 1) for row in range(12)]

    asked = sum(map(len, server.questions))
    cost = {name: (metric.value, metric.rows) for name, metric in results.metrics.items()}
    assert cost == {"judge_prompt_tokens": (asked, 12), "judge_completion_tokens": (84, 12)}
    assert f"0 of 12 verdicts could not be read; {asked} prompt and 84 completion tokens" in ran.err
    assert "Judge's ratio" in ran.out
    assert results.data["answers of student"].sha256 == file_sha256(student)
    assert results.notes == [f"Judged by judge at {server.url}, which answered as judge-of-tests."]


@pytest.mark.slow
def test_the_question(tmp_path, capsys, student):
    with judge_server() as server:
        done(capsys, *request(server, student, "--extra-body", '{"top_k": 1}', "--seed", 7, "--max-tokens", 99))
    row = sorted((parts(question) for question in server.questions), key=lambda found: int(found[0][4:-1]))
    first = [verdict["model_first"] for verdict in verdict_lines(student)]
    assert {True, False} == set(first)
    for index, (said, one, two) in enumerate(row):
        answers = ("a" * (index + 1), "r" * (2 * index + 3))
        assert (said, one, two) == (f"Say {index}.", *(answers if first[index] else answers[::-1]))
    for body in server.bodies:
        body.pop("messages")
        assert body == {"model": "judge", "temperature": 0.0, "seed": 7, "max_tokens": 99, "top_k": 1}
    assert set(server.keys) == {"Bearer none"}


@pytest.mark.slow
def test_settings_that_the_endpoint_does_not_know_are_left_out(capsys, student):
    with judge_server() as server:
        done(capsys, *request(server, student, "--temperature", "none", "--seed", "none", "--max-tokens", "none"))
    assert all(body.keys() == {"model", "messages"} for body in server.bodies)


def preferences(question: str, number: int) -> str:
    """By row: the model wins, loses, ties in both orders, depends on the order twice, or says nothing once or twice."""
    said, one, _ = parts(question)
    row, model_first = int(re.findall(r"Say (\d+)", said)[0]), one.startswith("a")
    mine, others = ("1", "2") if model_first else ("2", "1")
    return {
        0: mine,
        1: others,
        2: "tie",
        3: "1",
        4: mine if model_first else "tie",
        5: mine if model_first else "who knows",
        6: "",
    }.get(row, mine)


@pytest.mark.slow
def test_pairwise(tmp_path, capsys, student):
    other = write_rows(tmp_path / "teacher.jsonl", answer_rows(12, form="completion", letter="b"))
    with judge_server(preferences) as server:
        ran = done(capsys, *request(server, student, "--against", other))
    assert len(server.questions) == 24
    orders = [(line["row"], line["model_first"]) for line in verdict_lines(student)]
    assert orders == [(row, first) for row in range(12) for first in (False, True)]

    results = record(student)
    mine, theirs = results.evaluations
    assert (mine.model, theirs.model) == ("student", "teacher")
    assert mine.decoding == theirs.decoding
    values = [{name: round(metric.value, 9) for name, metric in each.metrics.items()} for each in (mine, theirs)]
    common = {"tie_rate": 0.3, "flip_rate": 0.2, "unparsable_share": 0.125}  # rows 2, 3, 4; rows 3, 4; 3 of 24
    assert values == [{"win_rate": 0.6} | common, {"win_rate": 0.1} | common]
    assert mine.metrics["win_rate"].rows == 10
    assert mine.samples[3].scores == {"win_rate": 0, "tie_rate": 1, "flip_rate": 1, "unparsable_share": 0}
    assert [mine.samples[row].scores for row in (5, 6)] == [{"unparsable_share": 0.5}, {"unparsable_share": 1}]
    assert theirs.samples[1].response == "bb"
    (difference,) = results.differences
    assert (difference.model, difference.baseline, difference.metric) == ("student", "teacher", "win_rate")
    assert difference.difference.value == pytest.approx(0.5)
    assert "3 of 24 verdicts could not be read" in ran.err
    assert "3 of 24 verdicts could not be read; their rows enter no other metric." in results.notes


def test_labels_limit_and_a_prompt_file(tmp_path, capsys, student):
    prompt = tmp_path / "mine.txt"
    prompt.write_text(
        "[Request]\n{{ request }}\n[End]\n[Answer 1]\n{{ first }}\n[End]\n[Answer 2]\n{{ second }}\n[End]"
    )
    names = ("--label", "mine", "--data-label", "dolly", "--limit", 3, "--prompt-file", prompt)
    with judge_server() as server:
        done(capsys, *request(server, student, *names))
    (evaluation,) = record(student).evaluations
    assert (evaluation.model, evaluation.data, len(evaluation.samples)) == ("mine", "dolly", 3)
    assert all(question.startswith("[Request]") for question in server.questions)


@pytest.mark.slow
def test_requests_from_the_data_stand_without_their_template(tmp_path, capsys, student):
    lines = [{"instruction": f"Say {row}.", "input": "Loud." * (row % 2), "output": "r"} for row in range(14)]
    lines[3] = {"messages": [{"role": "user", "content": "Say 3."}, {"role": "assistant", "content": "r"}]}
    lines[4] = {"prompt": "Say 4.", "completion": "r"}
    talk = [{"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Ho"), ("user", "Say 5."))]
    lines[5] = {"prompt": talk, "completion": [{"role": "assistant", "content": "r"}]}
    data = write_rows(tmp_path / "dolly.jsonl", lines)
    rendered = [{**each, "prompt": f"<|user|>{each['prompt']}\n\nLoud.<|end|>HiHo"} for each in answer_rows(12)]
    write_rows(student, rendered)
    other = [{**each, "prompt": f"### {each['prompt']} Loud. HiHo"} for each in answer_rows(12, letter="b")]
    other = write_rows(tmp_path / "teacher.jsonl", other)
    with judge_server(preferences) as server:
        assert "12 rows have another prompt there" in run(capsys, *request(server, student, "--against", other)).err
        done(capsys, *request(server, student, "--against", other, "--data", data))
    asked = {parts(question)[0] for question in server.questions}
    one_line = {"Say 3.", "Say 4.", *(f"Say {row}." for row in range(0, 12, 2))}
    talked = {"user: Hi\n\nassistant: Ho\n\nuser: Say 5."}
    assert asked == one_line | talked | {f"Say {row}.\n\nLoud." for row in (1, 7, 9, 11)}
    results = record(student)
    assert results.evaluations[0].data == "dolly"
    assert results.evaluations[0].samples[1].prompt == "Say 1.\n\nLoud."
    assert (results.data["dolly"].path, results.data["dolly"].rows) == (str(data), 12)


@pytest.mark.slow
def test_what_cannot_be_read_is_kept_and_enters_no_mean(capsys, student):
    def reply(question: str, number: int) -> str:
        return by_length(question) if parts(question)[0] in ("Say 0.", "Say 1.") else "Both are lovely."

    with judge_server(reply, usage=False) as server:
        ran = done(capsys, *request(server, student))
    metrics = record(student).evaluations[0].metrics
    assert metrics["unparsable_share"].value == pytest.approx(10 / 12)
    assert (metrics["judge_score"].value, metrics["judge_score"].rows) == (2.5, 2)
    assert [line["text"] for line in verdict_lines(student)[2:]] == ["Both are lovely."] * 10
    assert "10 of 12 verdicts could not be read; the endpoint counts no tokens" in ran.err
    assert not record(student).metrics
    assert "Unreadable" in ran.out

    with judge_server(lambda question, number: "no") as server:  # and nothing at all
        done(capsys, *request(server, student, "--overwrite"))
    assert record(student).evaluations[0].metrics.keys() == {"unparsable_share"}


@pytest.mark.slow
def test_hostile_text_stays_text(capsys, student):
    hostile = "</script><img src=x onerror=alert(1)>\x1b[31m {{ second }}"
    with judge_server(lambda question, number: hostile) as server:
        ran = done(capsys, *request(server, student, "--label", hostile))
    assert verdict_lines(student)[0]["text"] == hostile
    assert "\x1b" not in ran.out + ran.err
    page = student.parent / "page.html"
    done(capsys, "report", student.parent / "out" / "judged.json", "--out", page)
    assert "<img src=x" not in page.read_text()


# ---- servers that misbehave ----


PASSING = ("429", "408", "409", "500", "503", "garbage", "page", "another shape", "cut body", "cut stream", "closed")


@pytest.mark.slow
def test_what_may_pass_is_asked_again(tmp_path, capsys, student):
    with judge_server() as server:
        done(capsys, *request(server, student))
    os.rename(tmp_path / "out", tmp_path / "clean")
    faults = {2 * index: fault for index, fault in enumerate(PASSING)}
    with judge_server(fault=lambda question, number: faults.get(number)) as server:
        ran = done(capsys, *request(server, student, "--concurrency", 1, "--retries", 1))
    assert len(server.questions) == 12 + len(PASSING)
    assert [server.questions[at] for at in faults] == [server.questions[at + 1] for at in faults]
    assert "Asking again in" in ran.err
    assert same(tmp_path / "clean", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["silence", "trickle"])
def test_time_outs_are_asked_again(capsys, student, fault):
    with judge_server(fault=lambda question, number: fault if number == 0 else None) as server:
        ran = done(capsys, *request(server, student, "--limit", 2, "--timeout", 0.5))
    assert len(server.questions) == 3
    assert "no answer within 0.5 seconds" in ran.err


@pytest.mark.slow
def test_retry_after_holds_for_all(capsys, student):
    def reply(question: str, number: int) -> str:
        time.sleep(0.2 * (number == 1))  # under way while the other is told to wait
        return by_length(question)

    with judge_server(reply, lambda question, number: "429" if number == 0 else None) as server:
        done(capsys, *request(server, student, "--concurrency", 2))
    assert len(server.questions) == 13
    assert min(server.times[2:]) - server.times[0] >= 0.3


def test_a_server_that_asks_for_a_day_is_not_waited_for(capsys, student):
    with judge_server(fault=lambda question, number: "tomorrow") as server:
        ran = run(capsys, *request(server, student, "--limit", 3))
    assert ran.status == 1
    assert len(server.questions) == 3
    assert "to ask again in 86400 s, which is too long" in ran.err


def test_the_forms_of_retry_after():
    assert [_retry_after(each) for each in (None, "2", "0.5", "-3", "soon", "nan", "")] == [0, 2, 0.5, 0, 0, 0, 0]
    assert _retry_after(formatdate(time.time() + 30, usegmt=True)) == pytest.approx(30, abs=2)
    assert _retry_after("inf") == float("inf")


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("401", "answered 401. The key was not accepted"),
        ("403", "answered 403. The key has no right to this"),
        ("404", "answered 404. Check --judge-model, and --endpoint"),
        ("redirection", "answered 307, a redirection"),
    ],
)
def test_what_cannot_pass_stops_at_once(tmp_path, capsys, monkeypatch, student, fault, told):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with judge_server(fault=lambda question, number: fault) as server:
        for further in ((), ("--debug",)):
            ran = run(capsys, *request(server, student, "--concurrency", 1), *further)
            assert ran.status == 1
            assert told in ran.err.splitlines()[-1]
            assert KEY not in ran.err + ran.out
    assert server.keys == [f"Bearer {KEY}"] * 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", ["500", "garbage", "400", "closed"])
def test_a_server_that_fails_always_is_left_early(tmp_path, capsys, student, fault):
    with judge_server(fault=lambda question, number: fault) as server:
        ran = run(capsys, *request(server, student, "--retries", 1))
    assert ran.status == 1
    assert f"None of the last 5 requests to {server.url} was answered" in ran.err
    assert len(server.questions) <= 16  # of 24
    assert not (tmp_path / "out").exists()


def test_nobody_listens(capsys, student):
    ran = run(capsys, *request("http://127.0.0.1:9/v1", student, "--retries", 0, "--limit", 2))
    assert ran.status == 1
    assert "None of the last 2 requests to http://127.0.0.1:9/v1 was answered: no connection" in ran.err


@pytest.mark.slow
def test_a_server_that_dies_leaves_what_is_done(tmp_path, capsys, student):
    with judge_server() as server:
        done(capsys, *request(server, student))
    os.rename(tmp_path / "out", tmp_path / "clean")
    with judge_server() as server:
        server.fault = lambda question, number: "500" if number >= 4 else None
        ran = run(capsys, *request(server, student, "--retries", 0, "--concurrency", 1))
        assert ran.status == 1
        assert "4 verdicts are kept in" in ran.err
        assert "; the same command asks for the others" in ran.err
        assert held(tmp_path / "out") == {"judged-verdicts.jsonl"}
        server.fault = lambda question, number: None
        ran = done(capsys, *request(server, student))
        assert "4 of 12 verdicts are in" in ran.err
        assert len(server.questions) == 4 + 5 + 8
    assert same(tmp_path / "clean", tmp_path / "out")


@pytest.mark.slow
def test_after_a_failure_nobody_is_sent_to_erase_what_was_had(capsys, student):
    with judge_server(fault=lambda question, number: "500" if number >= 4 else None) as server:
        ran = run(capsys, *request(server, student, "--retries", 0, "--concurrency", 1, "--overwrite"))
        assert "; the same command without --overwrite asks for the others" in ran.err


@pytest.mark.slow
def test_single_failures_are_asked_for_by_the_next_run(tmp_path, capsys, student):
    broken = {"Say 3.", "Say 7."}
    with judge_server(fault=lambda question, number: "500" if parts(question)[0] in broken else None) as server:
        ran = run(capsys, *request(server, student, "--retries", 1))
        assert ran.status == 1
        assert "2 of 12 requests were not answered, the last for: status 500" in ran.err
        broken.clear()
        before = len(server.questions)
        done(capsys, *request(server, student))
        assert {parts(question)[0] for question in server.questions[before:]} == {"Say 3.", "Say 7."}
        assert len(server.questions) == before + 2
    assert record(student).evaluations[0].metrics["judge_score"].rows == 12


@pytest.mark.slow
def test_refused_requests_are_counted(capsys, student):
    long = {"Say 0.", "Say 11."}
    with judge_server(fault=lambda question, number: "400" if parts(question)[0] in long else None) as server:
        ran = done(capsys, *request(server, student, "--concurrency", 1))
        assert len(server.questions) == 12
        done(capsys, *request(server, student))
        assert len(server.questions) == 12
    assert record(student).evaluations[0].metrics["unparsable_share"].value == pytest.approx(2 / 12)
    assert verdict_lines(student)[0]["refused"].startswith("status 400: ")
    assert any("refused 2 of 12 requests" in note for note in record(student).notes)
    assert "2 of 12 verdicts could not be read" in ran.err


@pytest.mark.slow
def test_concurrency(capsys, student):
    with judge_server(delay=0.1) as server:
        done(capsys, *request(server, student, "--concurrency", 3))
    assert server.busiest == 3


# ---- the key ----


@pytest.mark.slow
@pytest.mark.parametrize("variable", [None, "MY_JUDGE"])
def test_the_key_is_written_nowhere(tmp_path, capsys, monkeypatch, student, variable):
    monkeypatch.setenv(variable or "OPENAI_API_KEY", KEY)
    if variable:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-server")
    named = ("--key-variable", variable) if variable else ()
    echoes = {1: "429", 2: "500", 4: "400"}
    with judge_server(
        lambda question, number: f"7 9\nYour key is {KEY}.", lambda question, number: echoes.get(number)
    ) as server:
        server.model = f"judge-{KEY}"
        ran = done(capsys, *request(server, student, *named), "--debug")
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert verdict_lines(student)[-1]["text"] == "7 9\nYour key is ***."
    assert verdict_lines(student)[-1]["served_model"] == "judge-***"
    told = [ran.out, ran.err, *(path.read_text() for path in (tmp_path / "out").iterdir())]
    assert not [text for text in told if KEY in text or KEY.replace("/", r"\/") in text or "0123456789" in text]
    assert any("Bearer ***" in text for text in told)


def test_a_key_that_is_given_as_the_name_of_its_variable(capsys, student):
    for wrong in (KEY, "sk_planted_0123456789"):
        ran = run(capsys, *request("http://127.0.0.1:9/v1", student, "--key-variable", wrong))
        assert ran.status == 2
        assert "--key-variable must name an environment variable" in ran.err
        assert wrong not in ran.err + ran.out


def test_a_key_that_no_header_carries(capsys, monkeypatch, student):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-pl\nanted")
    ran = run(capsys, *request("http://127.0.0.1:9/v1", student))
    assert ran.status == 2
    assert "characters that no header can carry" in ran.err
    assert "anted" not in ran.err


# ---- interrupted and taken up again ----


@pytest.mark.slow
def test_killed_and_taken_up_again(tmp_path, capsys, student):
    with judge_server(delay=0.05) as server:
        done(capsys, *request(server, student))
        os.rename(tmp_path / "out", tmp_path / "clean")
        before = len(server.questions)
        child = forked_command(request(server, student, "--concurrency", 2), tmp_path / "said")
        log = tmp_path / "out" / "judged-verdicts.jsonl"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and (not log.exists() or len(log.read_bytes().splitlines()) < 6):
            time.sleep(0.01)
        killed(child)
        kept = len(verdict_lines(student))
        assert 5 <= kept < 12
        assert server.questions[before:]
        time.sleep(0.2)  # what was under way has reached the server by now
        before = len(server.questions)
        done(capsys, *request(server, student))
        assert len(server.questions) - before == 12 - kept
    assert held(tmp_path / "out") == {"judged.json", "judged-verdicts.jsonl"}
    assert same(tmp_path / "clean", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("left", [0, 10, -1, -30])
def test_a_torn_last_line(tmp_path, capsys, student, left):
    log = tmp_path / "out" / "judged-verdicts.jsonl"
    with judge_server() as server:
        done(capsys, *request(server, student))
        whole = log.read_bytes()
        (tmp_path / "out" / "judged.json").unlink()
        log.write_bytes(whole[:left])
        done(capsys, *request(server, student))
        assert len(server.questions) == (24 if left >= 0 else 13)
    assert log.read_bytes() == whole


@pytest.mark.slow
def test_a_torn_line_is_gone_before_the_next_is_written(tmp_path, capsys, student):
    log = tmp_path / "out" / "judged-verdicts.jsonl"
    with judge_server() as server:
        done(capsys, *request(server, student))
        lines = log.read_bytes().splitlines(keepends=True)
        log.write_bytes(b"".join(lines[:8]) + lines[8][:40] + b"x" * 1000)  # longer than what comes in its place
        server.fault = lambda question, number: "401" if number > 12 else None
        assert run(capsys, *request(server, student, "--concurrency", 1)).status == 1
    found = json_lines(log)[1:]
    assert [line["row"] for line in found] == list(range(8))


@pytest.mark.slow
def test_a_finished_run_asks_nothing(tmp_path, capsys, student):
    with judge_server() as server:
        done(capsys, *request(server, student, "--limit", 5))
        done(capsys, *request(server, student))
        assert len(server.questions) == 12
        done(capsys, *request(server, student, "--limit", 5, "--concurrency", 9, "--label", "other"))
        assert len(server.questions) == 12
        assert len(verdict_lines(student)) == 12
        done(capsys, *request(server, student, "--overwrite"))
        assert len(server.questions) == 24


@pytest.mark.slow
def test_other_settings_are_refused_by_name(tmp_path, capsys, student):
    with judge_server() as server:
        done(capsys, *request(server, student))
        before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        prompt = tmp_path / "mine.txt"
        prompt.write_text("{{ request }} {{ first }} {{ second }}")
        for change, told in (
            (("--temperature", 0.5), "temperature was 0.0 and is now 0.5"),
            (("--seed", "none"), "seed was 0 and is now None"),
            (("--max-tokens", 9, "--seed", 3), "max_tokens was 512 and is now 9; seed was 0 and is now 3"),
            (("--extra-body", '{"top_k": 1}'), "top_k was None and is now 1"),
            (("--prompt-file", prompt), "prompt is another"),
            (("--against", write_rows(tmp_path / "b.jsonl", answer_rows(12, letter="b"))), "task was 'score' and is"),
        ):
            ran = run(capsys, *request(server, student, *change))
            assert ran.status == 2
            assert told in ran.err
        write_rows(student, answer_rows(12, letter="c"))
        assert "responses_sha256 was" in run(capsys, *request(server, student)).err
        assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
        assert len(server.questions) == 12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "content", "told"),
    [
        (1, "{}", "line 1: expected the settings of the lines below"),
        (1, "[1]", "line 1: expected the settings of the lines below"),
        (3, '{"row": 1', "line 3: expected a JSON object with row, model_first"),
        (3, '{"row": 1}', "line 3: expected a JSON object with row, model_first"),
        (3, '{"row": 1, "model_first": true, "model": "x"}', "line 3: expected a JSON object with row, model_first"),
        (3, "", "line 3: expected a JSON object with row, model_first"),
    ],
)
def test_a_damaged_log(tmp_path, capsys, student, line, content, told):
    log = tmp_path / "out" / "judged-verdicts.jsonl"
    with judge_server() as server:
        done(capsys, *request(server, student))
        lines = log.read_text().splitlines()
        lines[line - 1] = content
        log.write_text("\n".join(lines) + "\n")
        ran = run(capsys, *request(server, student))
    assert ran.status == 2
    assert told in ran.err


@pytest.mark.slow
def test_a_judge_at_work_on_the_same_file_is_named(tmp_path, capsys, student):
    with judge_server() as server:
        with locked(tmp_path / "out" / "judged.json"):
            ran = run(capsys, *request(server, student))
        assert ran.status == 2
        assert f"judged.json can be written by one process at a time, and process {os.getpid()} on " in ran.err
        assert not server.questions
        done(capsys, *request(server, student))
    assert held(tmp_path / "out") == {"judged.json", "judged-verdicts.jsonl"}


# ---- wrong requests ----


WRONG = {
    "no address": (("--endpoint", "localhost:8000"), "--endpoint must be an address such as"),
    "another scheme": (("--endpoint", "file:///etc/passwd"), "--endpoint must be an address such as"),
    "no host": (("--endpoint", "http:///v1"), "--endpoint must be an address such as"),
    "a port beyond all": (("--endpoint", "http://localhost:99999/v1"), "--endpoint must be an address such as"),
    "half an address": (("--endpoint", "http://[::1/v1"), "--endpoint must be an address such as"),
    "a password": (("--endpoint", f"http://me:{KEY}@localhost/v1"), "no user name, password, query or fragment"),
    "a key in the query": (("--endpoint", f"http://localhost/v1?key={KEY}"), "no user name, password, query"),
    "no patience": (("--timeout", 0), "--timeout must be above 0. Got 0."),
    "fewer than no retries": (("--retries=-1",), "--retries must be 0 or more. Got -1."),
    "no request": (("--concurrency", 0), "--concurrency must be at least 1. Got 0"),
    "no tokens": (("--max-tokens", 0), "--max-tokens must be at least 1. Got 0"),
    "a stream": (("--extra-body", '{"stream": true}'), "--extra-body must not hold stream"),
    "a label for nothing": (("--against-label", "b"), "--against-label needs --against"),
    "the same name": (("--against", "W/student.jsonl"), "both models have the same name"),
    "no answers": (("--responses", "W/none.jsonl"), "Expected a file of answers at W/none.jsonl"),
    "rows of data": (("--responses", "W/rows.jsonl"), "rows.jsonl, line 1: expected row, prompt, references"),
    "two answers": (("--responses", "W/both.jsonl"), "it holds both"),
    "a row twice": (("--responses", "W/twice.jsonl"), "row 0 is there twice"),
    "numbers alone": (("--responses", "W/numbers.jsonl"), "numbers.jsonl, line 1: expected row, prompt"),
    "no references": (("--responses", "W/bare.jsonl"), "2 of 3 rows hold no reference"),
    "other rows": (("--against", "W/fewer.jsonl"), ": 3 of its 12 rows are missing there; 1 rows have another"),
    "more rows": (("--responses", "W/three.jsonl", "--against", "W/student.jsonl"), "9 further rows are there"),
    "data that is too short": (("--data", "W/two.jsonl"), "10 of 12 rows are not in"),
    "other data": (("--data", "W/other.jsonl"), "12 of 12 rows hold another request than their prompt"),
    "no prompt": (("--prompt-file", "W/none.txt"), "Expected the judge's prompt in W/none.txt"),
    "a file that exists": (("--out", "W/rows.jsonl"), "W/rows.jsonl exists. Replace it by --overwrite"),
    "a folder": (("--out", "W"), "--out must be a file, and W is a folder"),
    "below a file": (("--out", "W/rows.jsonl/judged.json"), "is not a folder that can be written to"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests(tmp_path, capsys, name):
    rows = answer_rows(12)
    write_rows(tmp_path / "student.jsonl", rows)
    write_rows(tmp_path / "rows.jsonl", [{"instruction": "the", "output": "a"}])
    write_rows(tmp_path / "both.jsonl", [rows[0] | {"completion": "a"}])
    write_rows(tmp_path / "twice.jsonl", [rows[0], rows[0]])
    write_rows(tmp_path / "bare.jsonl", [rows[0], *({**each, "references": []} for each in rows[1:3])])
    write_rows(tmp_path / "fewer.jsonl", [{**rows[0], "prompt": "?"}, *rows[1:9]])
    write_rows(tmp_path / "three.jsonl", rows[:3])
    write_rows(tmp_path / "two.jsonl", [{"instruction": f"Say {row}."} for row in range(2)])
    write_rows(tmp_path / "other.jsonl", [{"instruction": "Sing."}] * 12)
    (tmp_path / "numbers.jsonl").write_text("1\n2\n")
    arguments = [
        str(each).replace("W", str(tmp_path), 1) if str(each).startswith("W") else each for each in WRONG[name][0]
    ]
    given = {"--responses": tmp_path / "student.jsonl", "--endpoint": "http://127.0.0.1:9/v1", "--judge-model": "j"}
    given |= {"--out": tmp_path / "new" / "judged.json"}
    base = [part for flag, value in given.items() if flag not in arguments for part in (flag, value)]
    before = held(tmp_path)
    ran = run(capsys, "judge", *base, *arguments)
    assert ran.status == 2, ran.err
    assert WRONG[name][1].replace("W", str(tmp_path)) in ran.err
    assert KEY not in ran.err
    assert len(ran.err.splitlines()) == 1
    assert held(tmp_path) == before
    assert not (tmp_path / "new").exists()


def test_without_the_client(capsys, monkeypatch, student):
    monkeypatch.setitem(sys.modules, "openai", None)
    ran = run(capsys, *request("http://127.0.0.1:9/v1", student))
    assert ran.status == 2
    assert "pip install 'promptkd[judge]'" in ran.err


# ---- a real server ----


@pytest.mark.slow
def test_transformers_serve(tmp_path, capsys):
    model = tiny_judge(tmp_path / "judge")
    student = write_rows(tmp_path / "student.jsonl", answer_rows(2))
    other = write_rows(tmp_path / "teacher.jsonl", answer_rows(2, letter="b"))
    asked = ("--max-tokens", 6, "--timeout", 60)
    with transformers_serve(model, tmp_path / "serve.log") as url:
        common = ("judge", "--responses", student, "--endpoint", url, *asked)
        named = (*common, "--judge-model", model)
        done(capsys, *named, "--out", tmp_path / "out" / "scores.json")
        done(capsys, *named, "--against", other, "--out", tmp_path / "out" / "wins.json")
        wrong = run(capsys, *common, "--judge-model", "other", "--out", tmp_path / "no.json")
    assert held(tmp_path / "out") == {
        f"{name}{end}" for name in ("scores", "wins") for end in (".json", "-verdicts.jsonl")
    }
    for name, count in (("scores", 2), ("wins", 4)):
        results = Results.read(tmp_path / "out" / f"{name}.json")
        assert results.metrics["judge_completion_tokens"].rows == count
        assert results.metrics["judge_prompt_tokens"].value > 200 * count
        assert 0 <= results.evaluations[0].metrics["unparsable_share"].value <= 1
    assert wrong.status == 1
    assert "requested 'other'" in wrong.err


def tiny_judge(folder: Path) -> str:
    model = tiny_model("llama", max_position_embeddings=4096)
    return str(save_model(folder, model, tiny_tokenizer(chat=True)))


@contextmanager
def transformers_serve(model: str, log: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    command = [str(program), "serve", model, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        assert process.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)
