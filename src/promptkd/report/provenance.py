"""What ran, on which code, data and machine, as text."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from promptkd.report.formatting import duration, estimate
from promptkd.report.labels import run_labels
from promptkd.report.metrics import in_order, metric_info
from promptkd.results import Metric, Results


@dataclass(frozen=True, slots=True)
class Provenance:
    run: str
    created: str
    command: str
    config: str
    """Indented JSON; empty where the record holds none."""
    facts: dict[str, list[tuple[str, str]]]
    """By title: the run's own metrics, its timings, code and machine."""
    record: Results


def provenance(records: Sequence[Results]) -> list[Provenance]:
    """One entry per `unified` record."""
    return [_entry(run, record) for run, record in zip(run_labels(records), records, strict=True)]


def _entry(run: str, record: Results) -> Provenance:
    plain = record.model_dump(mode="json", include={"config", "machine"})
    versions = [(name, version or "not installed") for name, version in record.code.items() if name != "git_commit"]
    return Provenance(
        run=run,
        created=_moment(record.created),
        command=shlex.join(record.command),
        config=json.dumps(plain["config"], indent=2, ensure_ascii=False) if record.config else "",
        facts={
            "Metrics of the run": [_metric(name, record.metrics[name]) for name in in_order(record.metrics)],
            "Time": [(name, duration(seconds)) for name, seconds in record.timings.items()],
            "Code": [*versions, ("git commit", record.code.get("git_commit") or "not a checkout")],
            "Machine": [_machine_fact(name, value) for name, value in plain["machine"].items()],
        },
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


def _metric(name: str, measured: Metric) -> tuple[str, str]:
    info = metric_info(name)
    return info.label, " ".join(part for part in (*estimate(info, measured), info.unit) if part)
