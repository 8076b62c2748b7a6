"""A file or folder is the old one or the new one, whatever happens while it is written."""

import os

import pytest

from promptkd.io import atomic as module
from promptkd.io.atomic import atomic, write_atomic


def test_text_and_bytes_are_written_with_their_folder(tmp_path):
    write_atomic(tmp_path / "new" / "a.txt", "é\n")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "é\n".encode()
    write_atomic(tmp_path / "new" / "a.txt", b"\xff")
    assert (tmp_path / "new" / "a.txt").read_bytes() == b"\xff"
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("folder", [False, True])
def test_a_body_that_fails_leaves_what_was_there_and_nothing_else(tmp_path, error, folder):
    target = tmp_path / "target"
    write_atomic(target / "old" if folder else target, "old")

    def fail():
        with atomic(target) as partial:
            write_atomic(partial / "new" if folder else partial, "half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert [each.name for each in tmp_path.iterdir()] == ["target"]
    assert (target / "old" if folder else target).read_text() == "old"


def test_a_folder_replaces_another_as_one(tmp_path):
    target = tmp_path / "model"
    for name in ("first", "second"):
        with atomic(target) as partial:
            write_atomic(partial / "deep" / name, name)
    assert [each.relative_to(target).as_posix() for each in target.rglob("*")] == ["deep", "deep/second"]
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


def test_a_folder_whose_new_name_is_refused_keeps_the_old_content(tmp_path, monkeypatch):
    target = tmp_path / "model"
    write_atomic(target / "config.json", "old")
    rename = os.replace

    def refuse(source, place):
        if (source.name, place.name) == ("model.partial", "model"):
            raise OSError(5, "Input/output error")
        rename(source, place)

    monkeypatch.setattr(module.os, "replace", refuse)

    def write():
        with atomic(target) as partial:
            write_atomic(partial / "config.json", "new")

    with pytest.raises(OSError, match="Input/output"):
        write()
    assert (target / "config.json").read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_process_left_is_not_part_of_the_next_try(tmp_path):
    write_atomic(tmp_path / "model.partial" / "torn", "")
    write_atomic(tmp_path / "model.partial.replaced" / "old", "")
    with atomic(tmp_path / "model") as partial:
        write_atomic(partial / "config.json", "new")
    assert {each.relative_to(tmp_path).as_posix() for each in tmp_path.rglob("*")} == {"model", "model/config.json"}


def test_other_ranks_of_a_launch_learn_the_place_and_touch_nothing(tmp_path):
    write_atomic(tmp_path / "model.partial" / "of the first rank", "")
    with atomic(tmp_path / "model", writes=False) as partial:
        assert partial == tmp_path / "model.partial"
    assert (partial / "of the first rank").exists()


def test_content_reaches_the_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    order, rename = [], os.replace
    monkeypatch.setattr(module, "fsync", lambda path: order.append(path.name))
    monkeypatch.setattr(module.os, "replace", lambda source, place: (order.append("rename"), rename(source, place)))
    with atomic(tmp_path / "model") as partial:
        partial.mkdir()
        (partial / "weights").write_text("")
    assert order == ["weights", "model.partial", "rename", tmp_path.name]
