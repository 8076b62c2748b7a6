"""What ran, on which code, data and machine, as text."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from promptkd.report.metrics import estimate, in_order, metric
from promptkd.report.story import run_labels
from promptkd.results import Metric, Results

__all__ = ["Provenance", "duration", "provenance"]


@dataclass(frozen=True, slots=True)
class Provenance:
    run: str
    kind: str
    created: str
    command: str
    config: str
    """Indented JSON; empty where the record holds none."""
    code: list[tuple[str, str]]
    machine: list[tuple[str, str]]
    figures: list[tuple[str, str]]
    """Figures of the run as a whole."""
    timings: list[tuple[str, str]]
    record: Results


def provenance(records: Sequence[Results]) -> list[Provenance]:
    """One entry per `unified` record."""
    return [_entry(run, record) for run, record in zip(run_labels(records), records, strict=True)]


def _entry(run: str, record: Results) -> Provenance:
    plain = record.model_dump(mode="json", include={"config", "machine"})
    return Provenance(
        run=run,
        kind=record.kind,
        created=_moment(record.created),
        command=shlex.join(record.command),
        config=json.dumps(plain["config"], indent=2, ensure_ascii=False) if record.config else "",
        code=[(name, version or "not installed") for name, version in record.code.items() if name != "git_commit"]
        + [("git commit", record.code.get("git_commit") or "not a checkout")],
        machine=[_machine_fact(name, value) for name, value in plain["machine"].items()],
        figures=_figures(record.metrics),
        timings=[(name, duration(seconds)) for name, seconds in record.timings.items()],
        record=record,
    )


def _moment(created: str) -> str:
    """ "2026-03-01T09:30:00+00:00" -> "2026-03-01 09:30 UTC"; a text that is no such time is shown as it is."""
    try:
        moment = datetime.fromisoformat(created)
    except ValueError:
        return created
    return f"{moment:%Y-%m-%d %H:%M} {moment.tzname() or ''}".strip()


def _machine_fact(name: str, value: Any) -> tuple[str, str]:
    if name == "memory_bytes" and isinstance(value, int):
        return "memory", f"{value / 2**30:.1f} GiB"
    return name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _figures(metrics: dict[str, Metric]) -> list[tuple[str, str]]:
    rows = []
    for name in in_order(metrics):
        value, interval = estimate(metric(name), metrics[name])
        rows.append((metric(name).label, " ".join(part for part in (value, interval, metric(name).unit) if part)))
    return rows


def duration(seconds: float) -> str:
    """95.3 -> "1 min 35 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
