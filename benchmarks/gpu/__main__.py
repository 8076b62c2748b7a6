"""`python -m benchmarks.gpu`; see the package."""

import argparse
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

import benchmarks.gpu
from benchmarks.gpu.parts import PARTS, chosen_parts
from benchmarks.gpu.runner import NoDeviceError, Record, run_parts


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=benchmarks.gpu.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="parts:\n" + "\n".join(f"  {part.number} {part.name}: {part.title}" for part in PARTS),
    )
    parser.add_argument("--parts", nargs="+", metavar="PART", help="numbers or names; all by default")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes that take seconds on a CPU")
    parser.add_argument("--seconds", type=float, default=480, help="time limit for all parts together (default 480)")
    parser.add_argument(
        "--patience",
        type=float,
        default=1,
        help="factor for the time limit of every part, for a busy machine (default 1)",
    )
    default = Path(os.environ.get("OUT", ".")) / "gpu.json"
    parser.add_argument("--json", type=Path, default=default, help="file for the record (default $OUT/gpu.json)")
    given = parser.parse_args()
    try:
        parts = chosen_parts(given.parts)
    except ValueError as error:
        parser.error(str(error))
    given.json.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "command": [Path(sys.executable).name, "-m", "benchmarks.gpu", *sys.argv[1:]],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": given.device,
        "tiny": given.tiny,
        "seconds": given.seconds,
        "patience": given.patience,
    }
    record = Record(given.json, about, parts)
    limits = {"seconds": given.seconds, "patience": given.patience}
    try:
        run_parts(parts, record, device=given.device, tiny=given.tiny, **limits)
    except NoDeviceError as error:
        parser.error(str(error))
    for each in record.targets:
        value = "" if each["value"] is None else f": {each['value']:.4g}"
        print(f"{each['verdict']}: {each['text']} ({each['target']}){value}", flush=True)
    print(f"The record is {given.json}.", flush=True)
    return 0 if record.is_right else 1


if __name__ == "__main__":
    sys.exit(main())
