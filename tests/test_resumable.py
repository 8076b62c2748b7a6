"""A file that a killed process leaves is read as far as it is whole, and gone on with."""

import json

import pytest

from promptkd.errors import RequestError
from promptkd.evaluation.resumable import ResumableLines


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
        assert found.has_half_line == (not whole[:size].endswith(b"\n") and size > 0)
        found.append(rows[count:])
        assert path.read_bytes() == whole


def test_the_last_line_of_a_key_counts_and_sorting_leaves_one(tmp_path):
    path = tmp_path / "lines.jsonl"
    lines = ResumableLines(path, key=("row", "order"))
    lines.append([{"row": 1, "order": "ab", "n": 1}, {"row": 0, "order": "ab", "n": 2}])
    lines.append([{"row": 1, "order": "ab", "n": 3}, {"row": 1, "order": "ba", "n": 4}])
    again = ResumableLines(path, key=("row", "order"))
    assert again.lines[1, "ab"]["n"] == 3
    again.sort(sorted(again.lines))
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
