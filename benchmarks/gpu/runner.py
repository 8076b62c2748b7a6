"""Starts workers, ends a part whose time is up, prints their messages and keeps the record."""

import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.targets import verdicts
from benchmarks.gpu.worker import work

__all__ = ["NoDeviceError", "Record", "run_parts"]

_START = 90.0
"""Seconds that a worker has for its imports."""
_GRACE = 5.0
"""Seconds that a part has to end by itself after its time is up, before its process is killed."""


class Record:
    """The results, written to the disk after every part.

    Args:
        file: path of the JSON file; its folder must exist.
        about: command, date, device and shapes.
    """

    def __init__(self, file: Path, about: dict[str, Any], parts: Sequence[Part]):
        self._file = file
        self._about = about
        asked = {part.name for part in parts}
        self._measured: dict[str, float] = {}
        self.machine: dict[str, Any] | None = None
        self.parts: dict[str, dict[str, Any]] = {
            part.name: {
                "number": part.number,
                "title": part.title,
                "limit_seconds": part.seconds,
                "status": "not run" if part.name in asked else "not asked for",
                "seconds": None,
                "error": None,
                "results": {},
                "checks": [],
                "skipped": {},
            }
            for part in PARTS
        }

    def take(self, name: str, message: dict[str, Any]) -> None:
        """Process a message of the running part."""
        part = self.parts[name]
        if message["kind"] == "line":
            print(f"  {message['text']}", flush=True)
        elif message["kind"] == "result":
            part["results"][message["name"]] = message["value"]
        elif message["kind"] == "check":
            part["checks"].append({key: message[key] for key in ("name", "passed", "detail")})
        elif message["kind"] == "skipped":
            part["skipped"][message["name"]] = message["reason"]
        elif message["kind"] == "target":
            self._measured[message["name"]] = message["value"]

    def end(self, name: str, status: str, seconds: float, error: str | None, traceback: str | None = None) -> None:
        self.parts[name] |= {"status": status, "seconds": round(seconds, 2), "error": error}
        print(f"  {status} after {seconds:.1f} s{f': {error}' if error else ''}", flush=True)
        if traceback:
            self.parts[name]["traceback"] = traceback
            print(traceback, flush=True)
        self.write()

    @property
    def targets(self) -> list[dict[str, Any]]:
        return verdicts(self._measured, on_card=self._about["device"] == "cuda" and not self._about["tiny"])

    @property
    def is_right(self) -> bool:
        """Whether every requested part ran to its end, and every check passed. Targets may be missed."""
        asked = [part for part in self.parts.values() if part["status"] != "not asked for"]
        return all(part["status"] == "done" and all(each["passed"] for each in part["checks"]) for part in asked)

    def write(self) -> None:
        whole = {**self._about, "machine": self.machine, "targets": self.targets, "parts": self.parts}
        partial = self._file.with_name(self._file.name + ".partial")
        partial.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self._file)


class NoDeviceError(Exception):
    """The device does not exist."""


def run_parts(
    parts: Sequence[Part], record: Record, *, device: str, tiny: bool, seconds: float, patience: float
) -> None:
    """Run all `parts` within `seconds`; each ends at the latest at its own limit times `patience`.

    Raises:
        NoDeviceError: if the device does not exist.
    """
    ends = time.monotonic() + seconds
    waiting = list(parts)
    while waiting and time.monotonic() < ends:
        done = _run_worker(waiting, record, device, tiny, ends, patience)
        if done == 0:
            break
        waiting = waiting[done:]
    for part in waiting:
        if record.parts[part.name]["status"] == "not run":
            print(f"{part.number} {part.name}: not run", flush=True)
    record.write()


def _run_worker(parts: Sequence[Part], record: Record, device: str, tiny: bool, ends: float, patience: float) -> int:
    """Run one process until it has run all parts or one of them failed. Returns how many it has started."""
    context = multiprocessing.get_context("spawn")  # a process that has used CUDA cannot be forked
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(theirs, parts, device, tiny, ends, patience))
    process.start()
    theirs.close()
    begun = 0
    try:
        message = _next(ours, min(time.monotonic() + _START, ends))
        while message is not None and message["kind"] != "over":
            if message["kind"] == "machine":
                record.machine = message["value"]
                print(", ".join(f"{name} {value}" for name, value in record.machine.items() if value), flush=True)
                message = _next(ours, ends)
                continue
            if message["kind"] == "impossible":
                raise NoDeviceError(message["text"])
            part = parts[begun]
            begun += 1
            limit = min(part.seconds * patience, ends - time.monotonic())
            print(f"{part.number} {part.name}: {part.title}, at most {limit:.0f} s", flush=True)
            message = _follow(ours, part, record, limit, ends)
        if message is None and begun == 0:
            print("The process that runs the parts did not start in time.", flush=True)
    finally:
        process.kill()
        process.join()
    return begun


def _follow(connection: Any, part: Part, record: Record, limit: float, ends: float) -> dict[str, Any] | None:
    """Process the messages of a part until its end. Returns the next message; None to end the process."""
    started = time.monotonic()
    while True:
        message = _next(connection, started + limit + _GRACE)
        spent = time.monotonic() - started
        if message is None:
            record.end(part.name, "out of time", spent, f"killed {_GRACE:.0f} s after its limit")
            return None
        if message["kind"] == "over":
            record.end(part.name, "failed", spent, "the process that ran it died")
            return message
        if message["kind"] == "end":
            error = message["error"] or {"status": "done", "text": None}
            record.end(part.name, error["status"], spent, error["text"], error.get("traceback"))
            return _next(connection, ends)
        record.take(part.name, message)


def _next(connection: Any, until: float) -> dict[str, Any] | None:
    """The worker's next message; None if there was none by `until`, "over" if the worker has ended."""
    if not connection.poll(max(until - time.monotonic(), 0)):
        return None
    try:
        return connection.recv()
    except EOFError:
        return {"kind": "over"}
