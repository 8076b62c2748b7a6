"""Checks of options that several commands have, made before anything is loaded."""

import os
from pathlib import Path

from promptkd.errors import RequestError


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
