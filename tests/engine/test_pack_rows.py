"""Rows side by side, their common beginnings once: every row can be read back, and nothing stands there twice."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptkd.engine.packed import pack_rows

rows_of_tokens = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=6)


@given(rows_of_tokens, st.booleans())
def test_every_row_is_found_again_at_its_places_and_positions(rows, share):
    pack = pack_rows(rows, share=share)
    for row, path in zip(rows, pack.row_indices, strict=True):
        assert [pack.tokens[place] for place in path] == row
        assert [pack.positions[place] for place in path] == list(range(len(row)))
        assert path == sorted(path)


@pytest.mark.slow
@given(rows_of_tokens, st.booleans())
def test_runs_are_the_places_of_a_row(rows, share):
    pack = pack_rows(rows, share=share)
    for row, path in enumerate(pack.row_indices):
        runs = pack.row_slices[row]
        assert [place for run in runs for place in range(run.start, run.stop)] == path
        assert all(run.stop < following.start for run, following in itertools.pairwise(runs))


@given(rows_of_tokens)
def test_each_beginning_stands_there_once_if_shared(rows):
    beginnings = {tuple(row[: end + 1]) for row in rows for end in range(len(row))}
    pack = pack_rows(rows, share=True)
    assert len(pack.tokens) == sum(pack.own_lengths) == len(beginnings)


@given(rows_of_tokens)
def test_rows_stand_whole_if_not_shared(rows):
    pack = pack_rows(rows, share=False)
    assert pack.own_lengths == [len(row) for row in rows]
    assert pack.tokens == [token for row in rows for token in row]


def test_a_row_owns_what_follows_the_longest_beginning_that_came_before():
    pack = pack_rows([[5, 6, 7], [5, 6, 8, 9], [5], [5, 6, 8, 1]], share=True)
    assert pack.tokens == [5, 6, 7, 8, 9, 1]
    assert pack.own_lengths == [3, 2, 0, 1]
    assert pack.row_slices[3] == [slice(0, 2), slice(3, 4), slice(5, 6)]
