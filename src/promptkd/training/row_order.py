"""The order of the training rows in each epoch: the same on every process, and after any resume."""

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler


class EpochOrder(Sampler[int]):
    """Every row once per epoch, in an order that seed and epoch decide.

    Args:
        epoch: tells the running epoch. accelerate does not call a `set_epoch` in a resumed epoch of several processes.
        window: rows of one optimizer step; what does not fill one is left out.
        repeats: how often in a row a window is given: once per micro-batch where each of them gets the whole window.
    """

    def __init__(
        self, rows: int, seed: int, epoch: Callable[[], int], *, window: int = 1, repeats: int = 1, shuffle: bool = True
    ):
        self._rows, self._seed, self._epoch = rows, seed, epoch
        self._window, self._repeats, self._shuffle = window, repeats, shuffle

    def __len__(self) -> int:
        return self._rows // self._window * self._window * self._repeats

    def __iter__(self) -> Iterator[int]:
        order = list(range(self._rows))
        if self._shuffle:
            # A hash: with seed + epoch, a run with the next seed would repeat this one's orders.
            digest = hashlib.blake2b(f"{self._seed} {self._epoch()}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
            order = torch.randperm(self._rows, generator=generator).tolist()
        for start in range(0, self._rows - self._window + 1, self._window):
            for _ in range(self._repeats):
                yield from order[start : start + self._window]
