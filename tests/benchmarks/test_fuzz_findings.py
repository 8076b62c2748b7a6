"""What `benchmarks/reliability/fuzz.py` once stumbled over, `findings/TARGET-what`, and what it starts from."""

from pathlib import Path

import pytest
from benchmarks.reliability.fuzz_targets import TARGETS, findings_of

FINDINGS = sorted((Path(__file__).parent / "findings").iterdir())


def target_of(file: Path) -> str:
    return max((name for name in TARGETS if file.name.startswith(f"{name}-")), key=len)


@pytest.mark.parametrize("file", FINDINGS, ids=lambda file: file.name)
def test_a_finding_is_mended(file):
    error = findings_of(TARGETS[target_of(file)], file.read_bytes())
    if error is not None:
        raise error


@pytest.mark.parametrize("name", TARGETS)
def test_whole_inputs_are_taken(name):
    for data in TARGETS[name].seeds:
        TARGETS[name].run(data)


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_sees_what_a_reader_lets_through(name, monkeypatch):
    def fails(_: bytes) -> None:
        raise KeyError("row")

    assert isinstance(findings_of(TARGETS[name]._replace(run=fails), b""), KeyError)
