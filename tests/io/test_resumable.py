"""Files that a killed process leaves are read as far as they are whole, and gone on with under the same settings."""

import json

import pytest

from promptkd.errors import RequestError
from promptkd.io.jsonl import ResumableLines, settle_settings


def written(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_lines_are_appended_and_read_back(tmp_path):
    path = tmp_path / "new" / "lines.jsonl"
    first = ResumableLines(path)
    assert first.lines == {}
    assert not path.exists()
    first.append([{"row": 3, "text": "é\n\u2028"}, {"row": 1, "text": ""}])
    assert path.read_bytes().count(b"\n") == 2
    again = ResumableLines(path)
    assert again.lines == first.lines == {(3,): {"row": 3, "text": "é\n\u2028"}, (1,): {"row": 1, "text": ""}}
    again.append([{"row": 2}])
    assert list(ResumableLines(path).lines) == [(3,), (1,), (2,)]


def test_a_file_cut_at_any_byte_gives_its_whole_lines_and_goes_on(tmp_path):
    path = tmp_path / "lines.jsonl"
    rows = [{"row": index, "text": "naïve 猫" * index} for index in range(3)]
    ResumableLines(path).append(rows)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        found = ResumableLines(path)
        count = whole[:size].count(b"\n")
        assert list(found.lines.values()) == rows[:count]
        found.append(rows[count:])
        assert path.read_bytes() == whole


def test_the_last_line_of_a_key_counts_and_replacing_leaves_one(tmp_path):
    path = tmp_path / "lines.jsonl"
    lines = ResumableLines(path, key=("row", "order"))
    lines.append([{"row": 1, "order": "ab", "n": 1}, {"row": 0, "order": "ab", "n": 2}])
    lines.append([{"row": 1, "order": "ab", "n": 3}, {"row": 1, "order": "ba", "n": 4}])
    again = ResumableLines(path, key=("row", "order"))
    assert again.lines[1, "ab"]["n"] == 3
    again.replace([again.lines[key] for key in sorted(again.lines)])
    assert [line["n"] for line in written(path)] == [2, 3, 4]
    again.append([{"row": 2, "order": "ab", "n": 5}])
    assert [line["n"] for line in written(path)] == [2, 3, 4, 5]
    assert [each.name for each in tmp_path.iterdir()] == ["lines.jsonl"]


@pytest.mark.parametrize("wrong", [b"{", b"[]", b'{"rows": 1}', b"", b'{"row": "\xff"}', b'{"row": 1}{"row": 2}'])
def test_a_whole_line_that_is_none_of_the_jobs_is_refused(tmp_path, wrong):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"row": 0}\n' + wrong + b"\n")
    with pytest.raises(RequestError, match=r"lines\.jsonl, line 2: expected a JSON object with row"):
        ResumableLines(path)


def test_a_file_that_holds_the_lines_already_is_left_alone(tmp_path):
    path = tmp_path / "lines.jsonl"
    lines = ResumableLines(path)
    lines.append([{"row": 1}, {"row": 0}])
    before = path.stat()
    lines.replace([{"row": 1}, {"row": 0}])
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_ino == before.st_ino


# ---- settings ----


def settle(folder, settings, *names, overwrite=False):
    files = [folder / name for name in names]
    held = settle_settings(folder / "settings.json", settings, files, overwrite=overwrite)
    return [file.name for file in held]


def test_settings_and_files_may_be_added_and_what_is_there_is_told(tmp_path):
    assert settle(tmp_path, {"temperature": 1.0, "data a": "1"}, "a.jsonl") == []
    (tmp_path / "a.jsonl").write_text("")
    assert settle(tmp_path, {"temperature": 1.0, "data b": "2"}, "a.jsonl", "b.jsonl") == ["a.jsonl"]
    assert json.loads((tmp_path / "settings.json").read_text()) == {
        "settings": {"temperature": 1.0, "data a": "1", "data b": "2"},
        "files": ["a.jsonl", "b.jsonl"],
    }


def test_a_setting_that_an_older_file_lacks_does_not_join_what_was_made_without_it(tmp_path):
    def grown(masked):
        settings, files = {"temperature": 1.0, "masked": masked}, [tmp_path / "a.jsonl"]
        return settle_settings(tmp_path / "settings.json", settings, files, overwrite=False, absent={"masked": []})

    settle(tmp_path, {"temperature": 1.0}, "a.jsonl")
    with pytest.raises(RequestError, match=r"masked was \[\] and is now \[5\]"):
        grown([5])
    assert grown([]) == []
    assert json.loads((tmp_path / "settings.json").read_text())["settings"] == {"temperature": 1.0, "masked": []}


def test_every_setting_that_differs_is_named_and_nothing_changes(tmp_path):
    settle(tmp_path, {"temperature": 1.0, "model": "x", "limit": None}, "a.jsonl")
    before = (tmp_path / "settings.json").read_bytes()
    with pytest.raises(RequestError) as caught:
        settle(tmp_path, {"temperature": 0.5, "model": "y", "limit": None}, "a.jsonl", "b.jsonl")
    assert "model was 'x' and is now 'y'; temperature was 1.0 and is now 0.5." in str(caught.value)
    assert "limit" not in str(caught.value)
    assert (tmp_path / "settings.json").read_bytes() == before


def test_overwriting_removes_what_was_begun_and_nothing_else(tmp_path):
    settle(tmp_path, {"temperature": 1.0}, "a.jsonl", "b.jsonl")
    for name in ("a.jsonl", "b.jsonl", "mine.jsonl"):
        (tmp_path / name).write_text("")
    assert settle(tmp_path, {"temperature": 0.5}, "a.jsonl", overwrite=True) == []
    assert {each.name for each in tmp_path.iterdir()} == {"settings.json", "mine.jsonl"}
    assert json.loads((tmp_path / "settings.json").read_text())["files"] == ["a.jsonl"]


def test_a_file_of_unknown_settings_is_not_gone_on_with(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(RequestError, match=r"a\.jsonl exists, and .*settings\.json does not say how it was made"):
        settle(tmp_path, {}, "a.jsonl")
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(RequestError, match="does not hold the settings of a job"):
        settle(tmp_path, {}, "a.jsonl")


# ---- settings in the file's first line ----


def judged(path, settings, **options):
    return ResumableLines(path, settings=settings, check=lambda line: float(line["score"]), **options)


def test_settings_are_the_first_line_and_others_are_refused_by_name(tmp_path):
    path = tmp_path / "v.jsonl"
    lines = judged(path, {"judge": "a", "prompt": "x" * 100})
    assert not path.exists()
    lines.append([{"row": 1, "score": 2}])
    lines.append([{"row": 0, "score": 3}])
    lines.replace([lines.lines[key] for key in sorted(lines.lines)])
    assert written(path)[0] == {"settings": {"judge": "a", "prompt": "x" * 100}}
    assert [line["row"] for line in written(path)[1:]] == [0, 1]
    assert judged(path, {"judge": "a", "prompt": "x" * 100}).lines == lines.lines
    with pytest.raises(
        RequestError, match="judge was 'a' and is now 'b'; prompt is another; seed was None and is now 1"
    ):
        judged(path, {"judge": "b", "prompt": "y" * 100, "seed": 1})
    before = path.read_bytes()
    again = judged(path, {"judge": "b"}, overwrite=True)
    assert (again.lines, path.read_bytes()) == ({}, before)
    again.append([{"row": 5, "score": 1}])
    assert written(path) == [{"settings": {"judge": "b"}}, {"row": 5, "score": 1}]


def test_a_file_with_settings_cut_at_any_byte_resumes(tmp_path):
    path, settings = tmp_path / "v.jsonl", {"judge": "naïve"}
    rows = [{"row": index, "score": index} for index in range(3)]
    judged(path, settings).append(rows)
    complete = path.read_bytes()
    for size in range(len(complete)):
        path.write_bytes(complete[:size])
        found = judged(path, settings)
        found.append([row for row in rows if (row["row"],) not in found.lines])
        assert path.read_bytes() == complete


def test_a_line_that_the_job_does_not_know_is_refused(tmp_path):
    path = tmp_path / "v.jsonl"
    judged(path, {}).append([{"row": 0, "score": 1}, {"row": 1, "score": "much"}])
    with pytest.raises(RequestError, match=r"v\.jsonl, line 3: expected a JSON object with row .* this job writes"):
        judged(path, {})
