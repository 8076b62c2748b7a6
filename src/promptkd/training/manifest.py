"""The list of a folder's files, their sizes and hashes, by which a torn or altered folder is known."""

import json
from pathlib import Path
from typing import Any

from promptkd.io.atomic import fsync
from promptkd.results import file_sha256

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Write `manifest.json`, the size and SHA-256 of every other file below `folder`. The disk has all of them then."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    for path in files:
        fsync(path)
    listed = {path.relative_to(folder).as_posix(): _entry(path) for path in files}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": listed}, indent=1) + "\n", encoding="utf-8")
    for path in (manifest, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        fsync(path)


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that `write_manifest` closed, naming the file; None if every byte is as it was.

    Files that the manifest does not know are not looked at.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return f"{MANIFEST} is missing"
    try:
        listed = json.loads(manifest.read_bytes())["files"]
        sizes = {folder / name: entry["size"] for name, entry in listed.items()}
        hashes = {folder / name: entry["sha256"] for name, entry in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    for path, size in sizes.items():
        if not path.is_file():
            return f"{path.relative_to(folder)} is missing"
        if path.stat().st_size != size:
            return f"{path.relative_to(folder)} has {path.stat().st_size:,} bytes in place of {size:,}"
    for path, sha256 in hashes.items():
        try:
            same = file_sha256(path) == sha256
        except OSError as error:
            return f"{path.relative_to(folder)} cannot be read ({error.strerror})"
        if not same:
            return f"{path.relative_to(folder)} holds other bytes than were written"
    return None


def _entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": file_sha256(path)}
