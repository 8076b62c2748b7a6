"""`promptkd evaluate`: several sets and seeds, greedy beside them, what a stopped run leaves, and what is refused."""

import contextlib
import json
import os
import shutil
import statistics
import time
from pathlib import Path

import pytest

import promptkd.cli.options.evaluate
import promptkd.evaluation.dataset_evaluation
from helpers.commands import (
    LIMITS,
    METRICS,
    TEMPLATE,
    TRAINING,
    World,
    done,
    held,
    json_lines,
    make_world,
    rows,
    run,
    write_rows,
)
from helpers.processes import forked_command, killed
from helpers.tiny import token_id
from promptkd.cli.commands.evaluate import check
from promptkd.cli.parsing.parser import parse_options
from promptkd.evaluation import distinct, rouge_1_scores, rouge_l_scores
from promptkd.evaluation.rouge_tokenizer import rouge_tokens
from promptkd.evaluation.statistics import mean_interval, token_mean_interval
from promptkd.io.lock import locked
from promptkd.results import Evaluation, Results, Training

pytestmark = pytest.mark.slow

FIELDS = {"row", "prompt", "references", "response", "ended", "token_ids", "rouge_l", "exact_match"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def evaluate(world: World, out: Path, *arguments: object, data: tuple[object, ...] = ()) -> list[object]:
    """Without the teacher's own answers (tests/cli/test_baselines.py has those)."""
    alone = ("--measure", "student")
    request = ["evaluate", "--model", world.student, "--data", *(data or [world.test]), "--out", out, *LIMITS]
    return [*request, *alone, *arguments]


def files(*parts: str, stem: str = "results") -> set[str]:
    return {f"{stem}.json", f"{stem}-settings.json"} | {f"{stem}-{part}.jsonl" for part in parts}


def of_seed(evaluation: Evaluation, seed: int | None) -> list:
    return [sample for sample in evaluation.samples if sample.seed == seed]


# ---- the tokens of ROUGE ----


def test_rouge_in_other_scripts_takes_tokens_of_their_own(world, tmp_path, capsys):
    lines = [{"instruction": f"第{n}题", "output": f"答{n}"} for n in "一二三四"]
    data, out = write_rows(tmp_path / "chinese.jsonl", lines), tmp_path / "results.json"
    ran = done(capsys, *evaluate(world, out, "--no-greedy", data=(data,)))
    unread = "chinese: ROUGE cannot score 4 of 4 rows by words"
    assert unread in ran.err
    assert any(note.startswith(unread) for note in Results.read(out).notes)
    before = json_lines(tmp_path / "results-chinese-seed10.jsonl")
    ran = done(capsys, *evaluate(world, out, "--no-greedy", "--rouge-tokenizer", "characters", data=(data,)))
    assert "Resuming from 2 of 2 files" in ran.err  # the same answers, scored anew
    assert "ROUGE cannot" not in ran.err
    (evaluation,) = Results.read(out).evaluations
    assert evaluation.rouge_tokenizer == "characters"
    texts, references = [row["response"] for row in before], [row["references"] for row in before]
    scores = [sample.scores["rouge_l"] for sample in evaluation.samples]
    tokenize = rouge_tokens("characters").tokenize
    assert scores == pytest.approx(rouge_l_scores(texts, references, tokenize=tokenize))


# ---- what is written ----


def test_one_seed_and_greedy_beside_it(world, tmp_path, capsys):
    out = tmp_path / "new" / "results.json"
    ran = done(capsys, *evaluate(world, out))
    assert held(out.parent) == files("test-seed10", "test-greedy", "test-references")
    results = Results.read(out)
    sampled, greedy = results.evaluations
    assert {(each.model, each.data) for each in results.evaluations} == {("student", "test")}
    assert sampled.decoding == {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 8, "seeds": [10]}
    assert greedy.decoding == {"temperature": 0.0, "max_new_tokens": 8}
    assert [sample.seed for sample in sampled.samples] == [10] * 5
    assert [sample.seed for sample in greedy.samples] == [None] * 5
    for evaluation, part in ((sampled, "seed10"), (greedy, "greedy")):
        assert set(evaluation.metrics) == METRICS
        assert all(metric.low <= metric.value <= metric.high for metric in evaluation.metrics.values())
        assert all(metric.deviation is None for metric in evaluation.metrics.values())
        answers = json_lines(out.parent / f"results-test-{part}.jsonl")
        assert set(answers[0]) == FIELDS
        assert [each["row"] for each in answers] == [0, 1, 2, 3, 4]
        assert [each["response"] for each in answers] == [each.response for each in evaluation.samples]
        assert [each["rouge_l"] for each in answers] == [each.scores["rouge_l"] for each in evaluation.samples]
    assert sampled.metrics["loss"] == greedy.metrics["loss"]
    assert not results.metrics
    assert [note.split(" ")[0] for note in results.notes] == ["Template:", "Computed"]
    assert set(results.models) == {"student"}
    assert results.data["test"].rows == 5
    assert "student" in ran.out


def test_every_metric_is_what_its_formula_says_of_the_answers(world, tmp_path, capsys):
    """Each figure anew from the answers on the disk, with the mean over seeds taken before that over rows."""
    out, seeds = tmp_path / "scores.json", (1, 2, 3)
    sets = (world.test, world.valid)
    done(capsys, *evaluate(world, out, "--teacher", world.teacher, "--seeds", *seeds, "--no-greedy", data=sets))
    parts = [f"{name}-seed{seed}" for name in ("test", "valid") for seed in seeds]
    assert held(tmp_path) == files(*parts, "test-references", "valid-references", stem="scores")
    results = Results.read(out)
    assert [each.data for each in results.evaluations] == ["test", "valid"]
    assert set(results.models) == {"student", "teacher teacher"}
    for evaluation in results.evaluations:
        assert set(evaluation.metrics) == METRICS | {"kl_to_teacher"}
        answers = [json_lines(tmp_path / f"scores-{evaluation.data}-seed{seed}.jsonl") for seed in seeds]
        losses = json_lines(tmp_path / f"scores-{evaluation.data}-references.jsonl")
        assert len({tuple(each["response"] for each in lines) for lines in answers}) == 3
        wanted = [sample.tokens["loss"] for sample in of_seed(evaluation, 1)]
        content = [[x["token_ids"][: -1 if x["ended"] else None] for x in lines] for lines in answers]
        by_hand = {
            "rouge_l": [rouge_l_scores([x["response"] for x in s], [x["references"] for x in s]) for s in answers],
            "rouge_1": [rouge_1_scores([x["response"] for x in s], [x["references"] for x in s]) for s in answers],
            "exact_match": [[x["exact_match"] for x in s] for s in answers],
            "eos_share": [[float(x["ended"]) for x in s] for s in answers],
            "cut_share": [[float(len(x["token_ids"]) == 8 and not x["ended"]) for x in s] for s in answers],
            "response_length": [[float(len(x["token_ids"])) for x in s] for s in answers],
            "distinct_1": [[len(set(ids)) / len(ids) if ids else 1.0 for ids in s] for s in content],
            "distinct_2": [[distinct(ids, 2) for ids in s] for s in content],
        }
        for name, table in by_hand.items():
            expected = mean_interval([sum(column) / 3 for column in zip(*table, strict=True)])
            expected.deviation = statistics.stdev(statistics.fmean(row) for row in table)
            assert evaluation.metrics[name].model_dump() == pytest.approx(expected.model_dump()), name
        lengths = [[len(x["token_ids"]) for x in s] for s in answers]
        ratio = token_mean_interval([sum(column) for column in zip(*lengths, strict=True)], [3 * n for n in wanted])
        ratio.deviation = statistics.stdev(sum(s) / sum(wanted) for s in lengths)
        assert evaluation.metrics["length_ratio"].model_dump() == pytest.approx(ratio.model_dump())
        nats = [[x["kl_nats"] for x in s] for s in answers]
        kl = evaluation.metrics["kl_to_teacher"]
        assert kl.value == pytest.approx(sum(map(sum, nats)) / sum(map(sum, lengths)))
        assert kl.deviation == pytest.approx(
            statistics.stdev(sum(a) / sum(b) for a, b in zip(nats, lengths, strict=True))
        )
        loss = evaluation.metrics["loss"]
        assert loss.model_dump() == pytest.approx(token_mean_interval([x["nats"] for x in losses], wanted).model_dump())


def test_temperature_0_decodes_greedily_alone(world, tmp_path, capsys):
    out = tmp_path / "results.json"
    done(capsys, *evaluate(world, out, "--teacher", world.teacher, "--temperature", 0, "--seeds", 1, 2))
    assert held(tmp_path) == files("test-greedy", "test-references", "test-seed1-kl", "test-seed2-kl")
    (evaluation,) = Results.read(out).evaluations
    lines = [line for seed in (1, 2) for line in json_lines(tmp_path / f"results-test-seed{seed}-kl.jsonl")]
    expected = sum(line["kl_nats"] for line in lines) / sum(len(line["token_ids"]) for line in lines)
    assert evaluation.metrics["kl_to_teacher"].value == pytest.approx(expected)
    assert [sample.seed for sample in evaluation.samples] == [None] * 5


def test_the_kl_is_taken_on_the_models_own_distribution_however_answers_are_sampled(world, tmp_path, capsys):
    teacher = ("--teacher", world.teacher, "--no-greedy")
    done(capsys, *evaluate(world, tmp_path / "plain.json", *teacher))
    done(capsys, *evaluate(world, tmp_path / "cut.json", *teacher, "--top-k", 2, "--temperature", 0.5))
    (plain,), (cut,) = (Results.read(tmp_path / f"{name}.json").evaluations for name in ("plain", "cut"))
    assert plain.metrics["kl_to_teacher"].value == pytest.approx(cut.metrics["kl_to_teacher"].value)
    answers = tmp_path / "answers.jsonl"
    request = ("generate", "--model", world.student, "--data", world.test, "--out", answers, *LIMITS)
    for evaluation, decoding in ((plain, ()), (cut, ("--top-k", 2, "--temperature", 0.5))):
        done(capsys, *request, *decoding, "--overwrite")
        assert [line["completion"] for line in json_lines(answers)] == [each.response for each in evaluation.samples]


def test_the_kl_of_the_first_seeds_alone(world, tmp_path, capsys):
    teacher = ("--teacher", world.teacher, "--no-greedy")
    done(capsys, *evaluate(world, tmp_path / "all.json", *teacher, "--seeds", 1, 2))
    done(capsys, *evaluate(world, tmp_path / "first.json", *teacher, "--seeds", 1, 2, "--kl-seeds", 1))
    done(capsys, *evaluate(world, tmp_path / "one.json", *teacher, "--seeds", 1))
    (every,), (first,), (one,) = (
        Results.read(tmp_path / f"{each}.json").evaluations for each in ("all", "first", "one")
    )
    assert first.metrics["kl_to_teacher"] == one.metrics["kl_to_teacher"] != every.metrics["kl_to_teacher"]
    others = METRICS - {"kl_to_teacher"}
    assert {name: first.metrics[name] for name in others} == {name: every.metrics[name] for name in others}
    assert ["kl_to_teacher" in each.scores for each in first.samples] == [each.seed == 1 for each in first.samples]
    done(capsys, "compare", f"a={tmp_path}/all.json", f"b={tmp_path}/first.json", "--out", tmp_path / "both.json")
    found = {each.metric: each.difference.value for each in Results.read(tmp_path / "both.json").differences}
    assert found["kl_to_teacher"] == found["rouge_l"] == 0  # over the samples that both have


def test_a_model_keeps_its_name_and_alike_data_sets_are_told_apart(world, tmp_path, capsys):
    model = tmp_path / "Tiny2.5-0.5B"
    model.symlink_to(world.student)
    (tmp_path / "other").mkdir()
    again = write_rows(tmp_path / "other" / "test.jsonl", rows(2))
    out = tmp_path / "results" / "r.json"
    done(capsys, "evaluate", "--model", model, "--data", world.test, again, "--out", out, *LIMITS)
    results = Results.read(out)
    assert set(results.models) == {"Tiny2.5-0.5B"}
    assert set(results.data) == {world.test, str(again)}
    assert len(held(out.parent)) == 8


def test_rows_over_a_limit_are_dropped_and_counted(world, tmp_path, capsys):
    long = {"instruction": "the " * 40, "output": "ab"}
    data = write_rows(tmp_path / "some.jsonl", [long, *rows(3), {"instruction": "an", "output": "ab" * 30}, *rows(1)])
    limit = ("--max-reference-length", 60)  # far above that of a response
    ran = done(capsys, *evaluate(world, tmp_path / "results.json", *limit, data=(data,)))
    assert "some.jsonl: 4 rows; 2 over a length limit were dropped." in ran.err
    results = Results.read(tmp_path / "results.json")
    assert (results.data["some"].rows, results.data["some"].dropped) == (4, 2)
    assert [sample.row for sample in results.evaluations[0].samples] == [1, 2, 3, 5]


def test_several_references_and_an_empty_one(world, tmp_path, capsys):
    data = write_rows(tmp_path / "refs.jsonl", [{"instruction": "an", "output": ["", "the an"]}])
    done(capsys, *evaluate(world, tmp_path / "results.json", data=(data,)))
    (sample,) = Results.read(tmp_path / "results.json").evaluations[0].samples
    assert sample.references == ["", "the an"]
    assert sample.tokens["loss"] == 1  # the end of the empty first reference


def test_what_the_training_cost_is_copied_from_the_runs_record(world, tmp_path, capsys):
    run_folder = tmp_path / "run"
    done(capsys, "sft", "--model", world.student, "--data", world.train, "--out", run_folder, *TRAINING)
    record = Results.read(run_folder / "results.json")
    cost = Training(method="sft", steps=3, seconds=1.5, peak_memory_bytes=10)
    record.training = {"as it was called": cost}
    record.write(run_folder / "results.json")
    done(capsys, "evaluate", "--model", run_folder, "--data", world.test, "--out", tmp_path / "r.json", *LIMITS)
    assert Results.read(tmp_path / "r.json").training == {"run": cost}


# ---- going on ----


def comparable(path: Path) -> dict:
    record = json.loads(path.read_text())
    del record["created"], record["timings"]
    return record


def contents(folder: Path) -> dict[str, bytes | dict]:
    """Every file's bytes; of the record, all but times."""
    return {
        path.name: comparable(path) if path.name == "results.json" else path.read_bytes() for path in folder.iterdir()
    }


def count_decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each batch that is decoded from now on."""
    counts, decode = [], promptkd.evaluation.dataset_evaluation.decode_rows

    def counted(model, tokenizer, batch, *arguments, **settings):
        counts.append(len(batch))
        return decode(model, tokenizer, batch, *arguments, **settings)

    monkeypatch.setattr(promptkd.evaluation.dataset_evaluation, "decode_rows", counted)
    return counts


def test_a_second_run_decodes_nothing_and_added_sets_and_seeds_alone_are_decoded(world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    counts = count_decoded(monkeypatch)
    request = evaluate(world, "results.json", "--seeds", 1, 2)
    done(capsys, *request)
    assert counts == [5, 5, 5]
    first = contents(tmp_path)
    done(capsys, *request)
    assert counts == [5, 5, 5]
    assert contents(tmp_path) == first
    more = ("--seeds", 1, 2, 3, "--teacher", world.teacher)
    ran = done(capsys, *evaluate(world, "results.json", *more, data=(world.test, world.valid)))
    assert "Resuming from 4 of 10 files" in ran.err
    assert counts[3:] == [5, 4, 4, 4, 4]
    grown = Results.read(tmp_path / "results.json")
    monkeypatch.chdir(tmp_path_in(tmp_path, "fresh"))
    done(capsys, *evaluate(world, "results.json", *more, data=(world.test, world.valid)))
    assert Results.read(Path("results.json")).evaluations == grown.evaluations


def tmp_path_in(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


def test_whatever_bytes_a_killed_run_left_the_finished_files_are_the_same(world, tmp_path, capsys, monkeypatch):
    """Every kind of file cut in the middle of a line, and between the lines of one batch."""
    monkeypatch.chdir(tmp_path)
    request = evaluate(world, "results.json", "--teacher", world.teacher, "--batch-size", 2, "--top-p", 0.9)
    done(capsys, *request)
    whole = contents(tmp_path)
    parts = ("test-seed10", "test-greedy", "test-references", "test-seed10-kl")
    assert whole.keys() == files(*parts)
    counts = count_decoded(monkeypatch)
    for position, part in enumerate(parts):
        file = tmp_path / f"results-{part}.jsonl"
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join(lines[:position]) + lines[position][:-7])
        (tmp_path / "results.json").unlink()
        done(capsys, *request)
        assert contents(tmp_path) == whole, part
    assert 0 < len(counts) < 9


def test_killed_in_the_middle_and_run_again_equals_undisturbed(world, tmp_path, capsys, monkeypatch):
    """SIGKILL while the sampled answers are written, then while the greedy ones are; a third run ends it."""
    data = write_rows(tmp_path / "many.jsonl", rows(12))
    limits = ("--max_prompt_length", 40, "--max_completion_length", 30, "--template", TEMPLATE, "--batch-size", 2)
    sets = ("--model", world.student, "--teacher", world.teacher, "--data", data, "--seeds", 1, "--measure", "student")
    request = ["evaluate", *map(str, (*sets, "--out", "results.json", *limits))]
    disturbed, written = tmp_path_in(tmp_path, "disturbed"), 0
    for part in ("seed1", "greedy"):
        lines = killed_at(disturbed / f"results-many-{part}.jsonl", request, cwd=disturbed)
        assert written < lines < 3 * 12
        assert not (disturbed / "results.json").exists()
        written = lines
    monkeypatch.chdir(disturbed)
    done(capsys, *request)
    monkeypatch.chdir(tmp_path_in(tmp_path, "undisturbed"))
    done(capsys, *request)
    assert contents(disturbed) == contents(tmp_path / "undisturbed")


def killed_at(file: Path, request: list[str], *, cwd: Path) -> int:
    """Start a command and kill it once `file` has four lines; return the lines of all files."""
    with contextlib.chdir(cwd):
        child = forked_command(request, cwd.with_suffix(".log"))
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not (file.exists() and file.read_bytes().count(b"\n") >= 4):
        time.sleep(0.002)
    killed(child)
    return sum(each.read_bytes().count(b"\n") for each in cwd.glob("*.jsonl"))


# ---- what is refused ----


def test_other_settings_are_refused_by_name_and_overwriting_begins_anew(world, tmp_path, capsys):
    out = tmp_path / "results.json"
    data = write_rows(tmp_path / "data.jsonl", rows(2))
    done(capsys, *evaluate(world, out, "--seeds", 1, 2, data=(data,)))
    before = contents(tmp_path)
    write_rows(data, rows(3))
    changed = ("--temperature", 0.5, "--limit", 2)
    ran = run(capsys, "evaluate", "--model", world.teacher, "--data", data, "--out", out, *changed, *LIMITS)
    assert ran.status == 2
    for name in ("--limit was None and is now 2", "--temperature was 1.0 and is now 0.5", "data data", "model was"):
        assert name in ran.err
    assert "--top-p" not in ran.err
    data.write_bytes(before["data.jsonl"])
    assert contents(tmp_path) == before
    done(capsys, *evaluate(world, out, *changed, "--overwrite", "--seeds", 2, data=(data,)))
    assert held(tmp_path) == files("data-seed2", "data-greedy", "data-references") | {"data.jsonl"}
    assert Results.read(out).evaluations[0].decoding["temperature"] == 0.5


def test_answers_in_which_another_token_could_stand_are_refused(world, tmp_path, capsys):
    """A teacher whose vocabulary differs in one token, which from then on is never written."""
    teacher, out = tmp_path / "teacher", tmp_path / "results.json"
    shutil.copytree(world.teacher, teacher)
    tokenizer = teacher / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<spare1>", "<other1>"))
    done(capsys, *evaluate(world, out))
    settings = tmp_path / "results-settings.json"
    job = json.loads(settings.read_text())
    assert job["settings"].pop("ids that are never written") == []
    for older in (False, True):
        if older:
            settings.write_text(json.dumps(job))
        ran = run(capsys, *evaluate(world, out, "--teacher", teacher))
        assert ran.status == 2
        assert f"ids that are never written was [] and is now [{token_id('<spare1>')}]" in ran.err
        assert "start from scratch with --overwrite" in ran.err
    done(capsys, *evaluate(world, out, "--teacher", teacher, "--overwrite"))
    assert run(capsys, *evaluate(world, out)).status == 2


def test_the_teachers_answers_need_a_file_of_their_own(world, tmp_path, capsys):
    data = [tmp_path / "test.jsonl", tmp_path / "test-teacher.jsonl"]
    for each in data:
        shutil.copy(world.test, each)
    request = ["evaluate", "--model", world.student, "--data", *data, "--out", tmp_path / "r.json", *LIMITS]
    ran = run(capsys, *request, "--teacher", world.teacher)
    assert ran.status == 2
    assert (
        "two names are alike but for punctuation, or for the -teacher of the teacher's answers; rename a file"
        in ran.err
    )
    assert held(tmp_path) == {"test.jsonl", "test-teacher.jsonl"}
    check(parse_options("evaluate", promptkd.cli.options.evaluate, [*map(str, request[1:])]).options)


def test_answers_of_unknown_settings_are_refused(world, tmp_path, capsys):
    out = tmp_path / "results.json"
    done(capsys, *evaluate(world, out))
    (tmp_path / "results-settings.json").unlink()
    ran = run(capsys, *evaluate(world, out))
    assert ran.status == 2
    assert "results.json exists. Replace it by --overwrite" in ran.err
    out.unlink()
    ran = run(capsys, *evaluate(world, out))
    assert ran.status == 2
    assert "does not say how it was made" in ran.err


def test_a_line_made_for_another_row_is_refused(world, tmp_path, capsys):
    out = tmp_path / "results.json"
    done(capsys, *evaluate(world, out))
    file = tmp_path / "results-test-greedy.jsonl"
    file.write_text(file.read_text().replace("the 31", "the 13"))
    ran = run(capsys, *evaluate(world, out))
    assert ran.status == 2
    assert "another prompt or other references for row 1" in ran.err


def test_an_evaluation_at_work_on_the_same_files_is_named(world, tmp_path, capsys):
    out = tmp_path / "results.json"
    with locked(out):
        ran = run(capsys, *evaluate(world, out))
    assert ran.status == 2
    assert f"results.json can be written by one process at a time, and process {os.getpid()} on " in ran.err
    assert list(tmp_path.iterdir()) == []
