"""Feed broken and hostile input to the readers for a while, and keep the inputs on which they fail.

    python -m benchmarks.reliability.fuzz --seconds 600                      # hypothesis: mutated and generated input
    python -m benchmarks.reliability.fuzz --seconds 600 --engine atheris     # libFuzzer, guided by coverage

Each target (`fuzz_targets.py`) gets an equal share of the time. A finding is any exception other than `RequestError`,
or an input that takes longer than ten seconds. It is written to --findings, and the tests replay it from there. atheris
is not a dependency of the project: install it with `pip install atheris`.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

SLOW = 10.0
"""Seconds that a target may take for one input."""
NASTY = [
    *(
        b"\xff",
        b"\0",
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"\n",
        b"\r",
        b'"',
        b"\\",
        b"\\ud800",
        b"\\u0000",
        b"\x1b]52;c;x\x07",
    ),
    *(b"{", b"}", b"[", b"]", b",", b":", b"null", b"true", b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-0", b"-1"),
    *(
        b"9" * 25,
        b"9" * 5000,
        b"[" * 2000,
        b'{"a":' * 1500,
        b"{{",
        b"}}",
        b"{% for i in range(9) %}",
        b"{{ ''.__class__ }}",
    ),
    *(b"&a", b"*a", b"<<: ", b"!!python/object:os.system ", b"--", b"--config", b"=", b"none", b"../", b"/dev/zero"),
    *(b'"row": 1e400', b'"row": []', b'"row": true', b'"__proto__": 1', b"<script>", "\u202e\u2066".encode(), b"\x85"),
    *(b"\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x09\0\0\0", b"\0\0\0\x10\0\0\0\0", "½".encode(), "𐏿".encode()),
]
KEYS = ["instruction", "input", "output", "prompt", "completion", "messages", "role", "content", "row", "references"]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from(["user", "assistant"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), inner, max_size=5)
    ),
    max_leaves=12,
)


@st.composite
def inputs(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A valid input with a few pieces replaced, duplicated or cut; or lines of JSON; or any bytes."""
    shape = draw(st.sampled_from(["mended", "mended", "mended", "json", "bytes"]))
    if shape == "bytes":
        return draw(st.binary(max_size=200))
    if shape == "json":
        return "\n".join(json.dumps(draw(JSON)) for _ in range(draw(st.integers(1, 3)))).encode()
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, 5))):
        first, length = draw(st.integers(0, len(data))), draw(st.integers(0, 20))
        piece = draw(st.sampled_from(NASTY) | st.binary(max_size=8) | st.just(data[first : first + 40]))
        data = data[:first] + piece + data[first + length :]
    return data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 9)) == 0 else data


def fuzz_by_hypothesis(name: str, seconds: float, first_seed: int, findings: Path) -> dict[str, object]:
    """Rounds of a hundred inputs until the time is over; at most one finding per round is kept, minimized."""
    from benchmarks.reliability.fuzz_targets import TARGETS, findings_of

    target, until = TARGETS[name], time.monotonic() + seconds
    executions, found, slowest = 0, set(), 0.0

    def one_round(number: int) -> None:
        @seed(number)
        @settings(
            max_examples=100,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        )
        @given(inputs(target.seeds))
        def tried(data: bytes) -> None:
            nonlocal executions, slowest, last
            started = time.monotonic()
            executions += 1
            error = findings_of(target, data)
            took = time.monotonic() - started
            slowest = max(slowest, took)
            if error is not None or took > SLOW:
                last = data
                raise error or TimeoutError(f"{took:.1f} s")

        last = b""
        try:
            tried()
        except Exception as error:
            text = "; ".join(f"{type(each).__name__}: {each}"[:200] for each in _parts(error))
            if text not in found:
                found.add(text)
                (findings / f"{name}-{number}").write_bytes(last)

    number = first_seed
    while time.monotonic() < until:
        one_round(number)
        number += 1
    return {"executions": executions, "slowest_seconds": round(slowest, 2), "findings": sorted(found)}


def _parts(error: Exception) -> list[Exception]:
    """The different findings of a round, which hypothesis groups."""
    return (
        [part for each in error.exceptions for part in _parts(each)] if isinstance(error, ExceptionGroup) else [error]
    )


def fuzz_by_atheris(name: str, seconds: float, first_seed: int, findings: Path) -> dict[str, object]:
    """libFuzzer in its own process; a finding ends it, and the next process continues with the same corpus."""
    corpus = findings / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    until, executions, found = time.monotonic() + seconds, 0, set()
    while (left := int(until - time.monotonic())) > 0:
        command = [
            sys.executable,
            "-m",
            "benchmarks.reliability.fuzz",
            "--libfuzzer",
            name,
            "--findings",
            str(findings),
        ]
        done = subprocess.run(
            [*command, "--seconds", str(left), "--seed", str(first_seed)], capture_output=True, text=True
        )
        said = done.stdout + done.stderr
        executions += sum(map(int, re.findall(r"number_of_executed_units: (\d+)", said)))
        if done.returncode == 0:
            break
        reasons = re.findall(r"^(?:\w+\.)*\w+(?:Error|Exception)\b.*|^.*ERROR: libFuzzer: .*", said, re.MULTILINE)
        found.add(reasons[0][:200] if reasons else said[-200:])
        first_seed += 1
    return {"executions": executions, "findings": sorted(found)}


def libfuzzer(name: str, seconds: int, first_seed: int, findings: Path) -> None:
    """Run libFuzzer on one target in this process."""
    import atheris

    with atheris.instrument_imports(include=["promptkd", "json", "csv", "yaml", "jinja2"]):
        from benchmarks.reliability.fuzz_targets import TARGETS, findings_of

    target, corpus = TARGETS[name], findings / "corpus" / name
    for number, data in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(data)

    def one(data: bytes) -> None:
        if error := findings_of(target, data):
            raise error

    limits = [f"-max_total_time={seconds}", f"-timeout={SLOW:.0f}", "-rss_limit_mb=3000", f"-seed={first_seed}"]
    out = [f"-artifact_prefix={findings}/{name}-", "-print_final_stats=1", "-max_len=4096"]
    atheris.Setup([sys.argv[0], *limits, *out, str(corpus)], one)
    atheris.Fuzz()


def main() -> int:
    from benchmarks.reliability.fuzz_targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600, help="for all targets together (default 600)")
    parser.add_argument("--engine", choices=["hypothesis", "atheris"], default="hypothesis")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="NAME")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--findings", type=Path, default=Path("runs/fuzz"), help="where findings go (default runs/fuzz)"
    )
    given_here = parser.parse_args()
    given_here.findings.mkdir(parents=True, exist_ok=True)
    fuzz = fuzz_by_hypothesis if given_here.engine == "hypothesis" else fuzz_by_atheris
    share, summary = given_here.seconds / len(given_here.targets), {}
    for name in given_here.targets:
        summary[name] = fuzz(name, share, given_here.seed, given_here.findings)
        print(f"{name}: {summary[name]}", flush=True)
    total = sum(int(str(each["executions"])) for each in summary.values())
    failed = sum(len(each["findings"]) for each in summary.values())  # type: ignore[arg-type]
    (given_here.findings / f"{given_here.engine}.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f"{total} inputs in {given_here.seconds} s with {given_here.engine}: {failed} findings.")
    return min(failed, 1)


if __name__ == "__main__":
    if "--libfuzzer" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--libfuzzer")
        parser.add_argument("--seconds", type=int)
        parser.add_argument("--seed", type=int)
        parser.add_argument("--findings", type=Path)
        one = parser.parse_args()
        libfuzzer(one.libfuzzer, one.seconds, one.seed, one.findings)
    else:
        sys.exit(main())
