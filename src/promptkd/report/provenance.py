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
    record: Results

    @property
    def created(self) -> str:
        """ "2026-03-01 09:30 UTC"; a text that is no such time is shown as it is."""
        try:
            moment = datetime.fromisoformat(self.record.created)
        except ValueError:
            return self.record.created
        return f"{moment:%Y-%m-%d %H:%M} {moment.tzname() or ''}".strip()

    @property
    def command(self) -> str:
        return shlex.join(self.record.command)

    @property
    def config(self) -> str:
        """Indented JSON; empty where the record holds none."""
        plain = self.record.model_dump(mode="json", include={"config"})["config"]
        return json.dumps(plain, indent=2, ensure_ascii=False) if plain else ""

    @property
    def facts(self) -> dict[str, list[tuple[str, str]]]:
        """By title: the run's own metrics, its timings, code and machine."""
        record, machine = self.record, self.record.model_dump(mode="json", include={"machine"})["machine"]
        versions = [(name, version or "not installed") for name, version in record.code.items() if name != "git_commit"]
        return {
            "Metrics of the run": [_metric(name, record.metrics[name]) for name in in_order(record.metrics)],
            "Time": [(name, duration(seconds)) for name, seconds in record.timings.items()],
            "Code": [*versions, ("git commit", record.code.get("git_commit") or "not a checkout")],
            "Machine": [_machine_fact(name, value) for name, value in machine.items()],
        }


def provenance(records: Sequence[Results]) -> list[Provenance]:
    """One entry per `unified` record."""
    return [Provenance(run, record) for run, record in zip(run_labels(records), records, strict=True)]


def _machine_fact(name: str, value: Any) -> tuple[str, str]:
    if name == "memory_bytes" and isinstance(value, int):
        return "memory", f"{value / 2**30:.1f} GiB"
    return name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _metric(name: str, measured: Metric) -> tuple[str, str]:
    info = metric_info(name)
    return info.label, " ".join(part for part in (*estimate(info, measured), info.unit) if part)
