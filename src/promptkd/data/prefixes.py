"""Rows of tokens side by side in one sequence, what several of them begin with standing there once.

A token sees itself and what stands before it in its row, so rows that begin alike have the same states as long as they
do: under a template, after a system turn, or for several responses to one request. Those are computed once.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

__all__ = ["Pack", "pack_rows"]


@dataclass(frozen=True)
class Pack:
    """A sequence of S tokens, and where in it the tokens of each row stand."""

    tokens: list[Hashable]
    """S tokens."""
    positions: list[int]
    """S positions, each counted from the beginning of its rows."""
    paths: list[list[int]]
    """A row's tokens, as places in the sequence, in rising order."""
    owned: list[int]
    """How many tokens at its end a row adds to the sequence; those before them stand there for an earlier row."""

    @cached_property
    def runs(self) -> list[list[slice]]:
        """The places of each row, as stretches of places that follow each other."""
        return [_runs(path) for path in self.paths]


def _runs(path: Sequence[int]) -> list[slice]:
    starts = [0, *(index for index in range(1, len(path)) if path[index] != path[index - 1] + 1)]
    ends = [*starts[1:], len(path)]
    return [slice(path[start], path[end - 1] + 1) for start, end in zip(starts, ends, strict=True)]


def pack_rows(rows: Sequence[Sequence[Hashable]], *, share: bool) -> Pack:
    """Put rows side by side, in their order.

    Args:
        rows: tokens, at least one a row.
        share: whether rows that begin alike have their beginning in common.
    """
    pack = Pack([], [], [], [])
    if not share:
        for row in rows:
            pack.paths.append(list(range(len(pack.tokens), len(pack.tokens) + len(row))))
            pack.tokens.extend(row)
            pack.positions.extend(range(len(row)))
            pack.owned.append(len(row))
        return pack
    following: dict[tuple[int, Hashable], int] = {}  # the place of a token behind that of the token before it
    for row in rows:
        place, path, first_own = -1, [], len(pack.tokens)
        for position, token in enumerate(row):
            known = following.get((place, token))
            if known is None:
                known = len(pack.tokens)
                pack.tokens.append(token)
                pack.positions.append(position)
                following[place, token] = known
            place = known
            path.append(place)
        pack.paths.append(path)
        pack.owned.append(len(pack.tokens) - first_own)
    return pack
