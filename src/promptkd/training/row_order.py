"""The order of the training rows in each epoch: the same on every process, and after any resume."""

import hashlib
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


def epoch_seed(seed: int, epoch: int) -> int:
    """A seed for the order of one epoch. A hash, since with `seed + epoch` a run with the next seed repeats its orders.

    Args:
        seed: of the run.
        epoch: counted from 0.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8).digest(), "big") >> 1


class ShuffledRows(Sampler[int]):
    """Every row once per epoch, shuffled by `epoch_seed`. Accelerate and transformers call `set_epoch`."""

    def __init__(self, rows: int, seed: int):
        self._rows, self._seed, self._epoch = rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(epoch_seed(self._seed, self._epoch))
        return iter(torch.randperm(self._rows, generator=generator).tolist())
