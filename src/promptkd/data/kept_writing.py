"""Writing kept logits (`kept_logits.py`): shard by shard, so that a killed process loses at most one of them."""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from promptkd.data.encode import EncodedExample
from promptkd.data.kept_logits import DTYPES, INDEX, KeptIndex, KeptSettings, LogitsDtype, Shard, row_key
from promptkd.errors import RequestError, writing
from promptkd.io.atomic import atomic, remove, write_atomic
from promptkd.io.files import MIB
from promptkd.io.lock import FOLDER_LOCK
from promptkd.memory import gibibytes
from promptkd.results import file_sha256

SHARD_TOKENS, SHARD_BYTES = 32_768, 64 * MIB  # the most of a shard, of which a killed process loses one
_SHARD = re.compile(r"logits-\d{5,}\.safetensors(\.partial)?")  # what a killed process was writing, too
_PER_ROW, _PER_SHARD = 24, 1024  # bytes: a key and an offset; the names and places of the tensors


@dataclass(frozen=True)
class TopLogProbs:
    """Of N response tokens, in the order of the rows: the top K tokens and what is left."""

    ids: Tensor  # (N, K)
    log_probs: Tensor  # (N, K)
    rest: Tensor  # (N,) log-mass of all others


def predicted_bytes(rows: int, tokens: int, settings: KeptSettings) -> int:
    """What `rows` rows of `tokens` response tokens in all take on the disk, the index aside."""
    shards = tokens // _shard_tokens(settings) + 1
    return tokens * bytes_per_token(settings) + rows * _PER_ROW + shards * _PER_SHARD


def bytes_per_token(settings: KeptSettings) -> int:
    """What one response token takes: K ids and log-probabilities, and the others' mass."""
    of_number = DTYPES[settings.dtype].itemsize
    return settings.kept * (of_number + _id_dtype(settings.vocabulary).itemsize) + of_number


class KeptWriter:
    """Writes the logits of rows into a folder, or goes on with what an earlier call has written there.

    Raises:
        RequestError: if the folder holds anything else, logits under other settings (with what differs), of other
            rows, or the disk has no room.
    """

    def __init__(self, folder: Path, settings: KeptSettings, rows: Sequence[EncodedExample], *, overwrite: bool):
        self.folder, self.rows = folder, rows
        tokens = sum(len(row.response_ids) for row in rows)
        self.index = KeptIndex(settings=settings, rows=len(rows), tokens=tokens)
        held = held_index(folder, overwrite=overwrite)
        if held is not None:
            refuse_changes(folder, held.settings, settings)
            if (held.rows, held.tokens) != (self.index.rows, tokens):
                now = f"{held.rows} rows of {held.tokens} tokens were to be kept, and now {len(rows)} of {tokens}"
                raise RequestError(f"{folder} was begun on other rows: {now}. {_START_ANEW}")
            self.index = held
        self.parts = _parts(rows, _shard_tokens(settings))
        self._check_room(0 if held else sum((folder / name).stat().st_size for name in _held(folder)))
        for name in [] if held else _held(folder):
            remove(folder / name)

    @property
    def left(self) -> list[Sequence[EncodedExample]]:
        """The rows of each shard that is still to be written, in order."""
        return self.parts[len(self.index.shards) :]

    @property
    def bytes(self) -> int:
        """What all of it takes, by prediction."""
        return predicted_bytes(self.index.rows, self.index.tokens, self.index.settings)

    def begin(self) -> None:
        """Have an index, so that another call knows what was begun."""
        with writing(self.folder):
            write_atomic(self.folder / INDEX, self.index.model_dump_json(indent=1) + "\n")

    def add(self, top: TopLogProbs) -> None:
        """Write the logits of `left[0]`; it counts once the disk has it."""
        rows, settings, number = self.left[0], self.index.settings, len(self.index.shards)
        offsets = [0]
        for row in rows:
            offsets.append(offsets[-1] + len(row.response_ids))
        keys = b"".join(row_key(row.prompt_ids, row.response_ids) for row in rows)
        tensors = {
            "token_ids": top.ids.to(_id_dtype(settings.vocabulary)),
            "log_probs": rounded(top.log_probs, settings.dtype),
            "rest_log_mass": rounded(top.rest, settings.dtype),
            "offsets": torch.tensor(offsets, dtype=torch.int64),
            "row_keys": torch.frombuffer(bytearray(keys), dtype=torch.uint8).reshape(len(rows), -1),
        }
        path = self.folder / f"logits-{number:05}.safetensors"
        with writing(self.folder):
            with atomic(path) as partial:
                save_file({name: each.cpu().contiguous() for name, each in tensors.items()}, partial)
            size = path.stat().st_size
        shard = Shard(file=path.name, rows=len(rows), tokens=offsets[-1], bytes=size, sha256=file_sha256(path))
        self.index.shards.append(shard)
        self.begin()

    def finish(self, error: dict[str, float]) -> None:
        """Say what is lost, with which the folder is whole."""
        self.index.error = error
        self.begin()

    def _check_room(self, freed: int) -> None:
        left = self.bytes - sum(shard.bytes for shard in self.index.shards)
        place = self.folder
        while not place.exists():
            place = place.parent
        if self.left and left > (free := shutil.disk_usage(place).free + freed):
            told = f"The logits take {gibibytes(left)}, and the disk of {self.folder} has {gibibytes(free)} left"
            less = f"Keep fewer tokens than {self.index.settings.kept}, give --limit, or another --out"
            raise RequestError(f"{told}. {less}.")


_START_ANEW = "Go on with its own settings, give another --out, or start from scratch with --overwrite."


def refuse_changes(folder: Path, before: KeptSettings, now: KeptSettings) -> None:
    """`RequestError` if logits were begun under other settings, with what differs."""
    was, is_now = before.model_dump(), now.model_dump()
    was |= was.pop("rows")
    is_now |= is_now.pop("rows")
    changed = [name for name in sorted(was.keys() | is_now.keys()) if was.get(name) != is_now.get(name)]
    if changed:
        listed = [f"{name} was {was.get(name)!r} and is now {is_now.get(name)!r}" for name in changed]
        raise RequestError(f"{folder} was begun with other settings: {'; '.join(listed)}. {_START_ANEW}")


def held_index(folder: Path, *, overwrite: bool) -> KeptIndex | None:
    """What was begun in `folder`; None if nothing was, or it is to be replaced. `RequestError` if it holds anything
    else."""
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"Logits are kept in a folder. {folder} is a file.")
    held = _held(folder)
    foreign = [name for name in held if name != INDEX and not _SHARD.fullmatch(name)]
    if foreign or (held and INDEX not in held and not overwrite):
        told = f"{folder} holds {', '.join((foreign or held)[:5])}, which are no kept logits that could be resumed"
        replaced = "" if foreign else ", or replace them by --overwrite"
        raise RequestError(f"{told}. Move it away or give another --out{replaced}.")
    return KeptIndex.read(folder) if held and not overwrite else None


def _held(folder: Path) -> list[str]:
    passing = {FOLDER_LOCK, f"{INDEX}.partial"}  # what a process killed in `write_atomic` leaves goes with the next
    return sorted({each.name for each in folder.iterdir()} - passing) if folder.is_dir() else []


def rounded(log_probs: Tensor, dtype: LogitsDtype) -> Tensor:
    """In the precision that is kept: finite ones stay finite."""
    least = torch.finfo(DTYPES[dtype]).min
    return torch.where(log_probs == -torch.inf, log_probs, log_probs.clamp(min=least)).to(DTYPES[dtype])


def _shard_tokens(settings: KeptSettings) -> int:
    return max(1, min(SHARD_TOKENS, SHARD_BYTES // bytes_per_token(settings)))


def _parts(rows: Sequence[EncodedExample], most: int) -> list[Sequence[EncodedExample]]:
    """Consecutive rows of at most `most` response tokens, or one row."""
    parts: list[list[EncodedExample]] = []
    room = 0
    for row in rows:
        if not parts or len(row.response_ids) > room:
            parts.append([])
            room = most
        parts[-1].append(row)
        room -= len(row.response_ids)
    return list(parts)


def _id_dtype(vocabulary: int) -> torch.dtype:
    return torch.uint16 if vocabulary <= 1 << 16 else torch.int32
