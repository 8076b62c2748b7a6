"""docs/evidence.md: keep the records of studies, and rebuild the page of the committed ones, and README's main result.

python -m benchmarks.evidence collect runs/evidence/STUDY
python -m benchmarks.evidence
python -m benchmarks.evidence --check
"""

import argparse
import sys
from pathlib import Path

from benchmarks.evidence.page import HERE, PLOTS, ROOT, build, build_readme
from benchmarks.evidence.records import collect
from promptkd.errors import RequestError
from promptkd.io.atomic import write_atomic

RECORDS, DOCS, README = HERE / "records", ROOT / "docs", ROOT / "README.md"


def outdated(docs: Path, records: Path, readme: Path) -> dict[Path, str | None]:
    """The files of the page that differ from what the records make, with their new text; None of those to delete."""
    made = {docs / place: text for place, text in build(records).items()}
    made[readme] = build_readme(records, readme.read_text(encoding="utf-8"))
    left = {file: None for file in (docs / PLOTS).glob("*.svg") if file not in made}
    return left | {f: t for f, t in made.items() if not f.is_file() or f.read_text(encoding="utf-8") != t}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.evidence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if the page is not up to date")
    commands = parser.add_subparsers(dest="command")
    collecting = commands.add_parser("collect", help="keep the records of a study's finished runs")
    collecting.add_argument("study", type=Path, nargs="+", help="folder of the study")
    asked = parser.parse_args(arguments)
    try:
        if asked.command == "collect":
            for study in asked.study:
                written = collect(study, RECORDS / study.resolve().name)
                print(f"{study}: {len(written)} files are new, changed or gone in {RECORDS / study.resolve().name}.")
            return 0
        changed = outdated(DOCS, RECORDS, README)
    except RequestError as error:
        print(error, file=sys.stderr)
        return 2
    for file, text in changed.items():
        print(f"{'Not up to date' if asked.check else 'Deleted' if text is None else 'Written'}: {file}")
        if not asked.check:
            file.unlink() if text is None else write_atomic(file, text)
    return int(asked.check and bool(changed))


if __name__ == "__main__":
    raise SystemExit(main())
