"""Checks of options that several commands have, made before anything is loaded."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from promptkd.errors import RequestError, check_all

MOST_TOKENS = 1_000_000
"""Of a response. Buffers have room for as many."""


def check_writable(folder: Path, target: Path) -> None:
    """Refuse a `target` whose folder, or the nearest one above it that exists, cannot be written to."""
    while not os.path.exists(folder):  # Path.exists would raise where a folder above may not be entered
        folder = folder.parent
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise RequestError(f"Cannot write {target}: {folder} is not a folder that can be written to.")


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuse a folder, a file that exists already, or a place that cannot be written to, before any work."""
    if path.is_dir():
        raise RequestError(f"--out must be a file. {path} is a folder.")
    if path.exists() and not overwrite:
        raise RequestError(f"{path} exists. Replace it by --overwrite or give another --out.")
    check_writable(path.parent, path)


def check_decoding(options: Any, seeds: Sequence[int]) -> None:
    """Refuse settings with which nothing can be decoded, all at once and before any model is loaded."""
    checks = [
        (options.temperature < 0, f"--temperature must be 0 (greedy) or more, got {options.temperature}"),
        (not 0 < options.top_p <= 1, f"--top-p must lie above 0 and at most at 1, got {options.top_p}"),
        (options.top_k < 0, f"--top-k must be 0 (off) or more, got {options.top_k}"),
        (
            options.max_completion_length < 1,
            f"--max-completion-length must be at least 1 token, got {options.max_completion_length}",
        ),
        (
            options.max_completion_length > MOST_TOKENS,
            f"--max-completion-length must be at most {MOST_TOKENS}, got {options.max_completion_length}",
        ),
        wrong_batch_size(options),
        (any(seed < 0 for seed in seeds), f"seeds must be 0 or more, got {_listed(seeds)}"),
        (len(set(seeds)) < len(seeds), f"each seed must be given once, got {_listed(seeds)}"),
    ]
    check_all("Cannot decode", checks)


def _listed(seeds: Sequence[int]) -> str:
    return " ".join(map(str, seeds))


def wrong_batch_size(options: Any) -> tuple[bool, str]:
    """Whether --batch-size is wrong, and the words for it."""
    size = vars(options).get("batch_size")
    return size is not None and size < 1, f"--batch-size must be at least 1, got {size}"
