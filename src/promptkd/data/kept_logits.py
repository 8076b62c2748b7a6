"""A teacher's log-probabilities of fixed responses, kept on the disk: the format, and reading it in training.

A folder holds `index.json` and shards of safetensors with consecutive rows. Of a shard's N response tokens:
`token_ids` (N, K), the teacher's most probable tokens, the most probable first; `log_probs` (N, K); `rest_log_mass`
(N,), the log of all others' sum, -inf where there are none. Of its R rows: `offsets` (R + 1,) of their first tokens,
and `row_keys` (R, 16), a hash of each row's tokens, by which a row is found again in any order and from any file.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from promptkd.data.batch import TokenBatch, moved
from promptkd.data.encode import EncodedExample
from promptkd.errors import RequestError
from promptkd.io.files import MIB, is_plain_name, read_regular
from promptkd.results import file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INDEX = "index.json"
LogitsDtype = Literal["float16", "bfloat16", "float32"]
DTYPES: dict[LogitsDtype, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
_MOST_BYTES = 256 * MIB  # of the index
_AGAIN = "Run the command that wrote it again, which goes on where it ended"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class KeptSettings(_Part):
    """What kept logits depend on. A run that writes them resumes only under the same."""

    teacher: str
    """Where the teacher came from."""
    teacher_sha256: str
    """Its hash, as records have it; "" for a hub name."""
    teacher_parameters: int
    precision: str
    """What it computed in."""
    kept: int
    """K, tokens that are kept of each distribution."""
    dtype: LogitsDtype
    vocabulary: int
    """V, the ids that the distributions are over; K = V where every one of them is kept."""
    masked: list[int] = Field(default_factory=list)
    """Ids below V that have no probability, since the student or the teacher does not have them."""
    vocabulary_sha256: str
    """Of the tokens and ids of the tokenizer that cut the rows."""
    ends: list[int] = Field(default_factory=list)
    """Ids that end the teacher's answers, the one that it writes first."""
    data: str
    data_sha256: str
    rows: dict[str, Any]
    """How the rows were made into tokens: template, limits, turns, columns."""
    sampling: dict[str, Any] | None = None
    """How the teacher wrote the responses; None where they were in the data."""
    student: str = ""
    """Whose tokenizer cut the rows and whose distribution the error was measured on; "" for the teacher's own."""


class Shard(_Part):
    file: str
    rows: int
    tokens: int
    bytes: int
    sha256: str


class KeptIndex(_Part):
    """`index.json`."""

    format: Literal["promptkd kept logits"] = "promptkd kept logits"
    version: Literal[1] = 1
    settings: KeptSettings
    rows: int = 0
    """Rows that are to be kept, over all shards."""
    tokens: int = 0
    shards: list[Shard] = Field(default_factory=list)
    error: dict[str, float] | None = None
    """What is lost by keeping K of V tokens in this precision, measured on `error["rows"]` rows; None: not finished."""

    @classmethod
    def read(cls, folder: Path) -> "KeptIndex":
        """`RequestError` if there is none that this version can read."""
        file = folder / INDEX
        try:
            return cls.model_validate_json(read_regular(file, most=_MOST_BYTES))
        except OSError as error:
            wanted = f"Expected kept logits in {folder}, which promptkd generate --keep-logits writes"
            raise RequestError(f"{wanted}: {file.name} cannot be read, {error.strerror or error}.") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the whole file"
            raise RequestError(f"{file} is no index of kept logits of version 1: {where}: {first['msg']}.") from error


@dataclass(frozen=True)
class CoarseTarget:
    """The teacher's distributions over the K + 1 outcomes of N response tokens."""

    ids: Tensor  # (N, K) int64
    log_probs: Tensor  # (N, K + 1), the last one of all other tokens together
    is_whole: bool  # whether no other tokens are left


class KeptLogits:
    """Kept logits opened for training, every shard checked. Only the rows that are asked for are read.

    Raises:
        RequestError: if the folder holds none, or unfinished, damaged or missing ones, with what to do.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        self.index = KeptIndex.read(self.folder)
        if self.index.error is None:
            done = sum(shard.rows for shard in self.index.shards)
            raise RequestError(f"{self.folder} holds {done} of {self.index.rows} rows so far. {_AGAIN}.")
        self._places: dict[bytes, tuple[str, int, int]] = {}  # of each row: its shard, first token and end
        for shard in self.index.shards:
            self._add(shard)

    @property
    def settings(self) -> KeptSettings:
        return self.index.settings

    @property
    def is_whole(self) -> bool:
        """Whether all V tokens are kept."""
        return self.settings.kept >= self.settings.vocabulary

    @property
    def told(self) -> str:
        """What they are, in a sentence."""
        kept, error = self.settings, self.index.error or {}
        of = f"{kept.kept} of {kept.vocabulary:,} tokens' log-probabilities in {kept.dtype}"
        lost = f"; the teacher's mass outside of them is {error['rest_mass_mean']:.2%} on average" if error else ""
        return f"{self.folder} holds {of} by the teacher {kept.teacher}{lost}."

    def target(self, batch: TokenBatch) -> CoarseTarget:
        """The teacher's distributions at the response tokens of a batch, on its device. `RequestError` if one lacks."""
        by_shard: dict[str, list[tuple[int, int, int]]] = {}  # opened once each: row, first token and end
        for row, (tokens, prompt) in enumerate(zip(batch.token_ids, batch.prompt_lengths, strict=True)):
            place = self._places.get(row_key(tokens[:prompt], tokens[prompt:]))
            if place is None:
                raise RequestError(f"{self.folder} holds no logits of a row that the method asks for.")
            by_shard.setdefault(place[0], []).append((row, *place[1:]))
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for file, wanted in by_shard.items():
            with safe_open(self.folder / file, "pt") as shard:
                names = ("token_ids", "log_probs", "rest_log_mass")
                of_ids, of_kept, of_rest = (shard.get_slice(name) for name in names)
                for row, first, end in wanted:
                    # float32 first: under autocast, torch joins no float16
                    values = torch.cat([of_kept[first:end].float(), of_rest[first:end, None].float()], -1)
                    found[row] = of_ids[first:end].long(), values
        ids, log_probs = zip(*(found[row] for row in range(len(found))), strict=True)
        device = batch.targets.device
        return CoarseTarget(moved(torch.cat(ids), device), moved(torch.cat(log_probs), device), self.is_whole)

    def missing(self, rows: Iterable[EncodedExample]) -> list[EncodedExample]:
        """The rows of which no logits are kept."""
        return [row for row in rows if row_key(row.prompt_ids, row.response_ids) not in self._places]

    def _add(self, shard: Shard) -> None:
        path = self.folder / shard.file
        if not is_plain_name(shard.file) or not path.is_file():
            raise RequestError(f"{path}, a shard of kept logits, is not there. {_AGAIN}, or copy the folder again.")
        if path.stat().st_size != shard.bytes or file_sha256(path) != shard.sha256:
            advice = f"Copy it again, or remove it and {INDEX} and keep the logits anew"
            raise RequestError(f"{path}, a shard of kept logits, is damaged: it is not what was written. {advice}.")
        try:
            with safe_open(path, "pt") as held:
                keys, offsets = held.get_tensor("row_keys").numpy(), held.get_tensor("offsets").tolist()
        except SafetensorError as error:
            raise RequestError(f"{path} is no shard of kept logits: {error}.") from error
        for index, key in enumerate(keys):
            self._places[key.tobytes()] = shard.file, offsets[index], offsets[index + 1]


def row_key(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> bytes:
    """16 bytes that stand for the tokens of a row."""
    numbers = [len(prompt_ids), *prompt_ids, *response_ids]
    return hashlib.blake2b(struct.pack(f"<{len(numbers)}I", *numbers), digest_size=16).digest()


def vocabulary_sha256(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash over the tokens of a tokenizer with their ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
