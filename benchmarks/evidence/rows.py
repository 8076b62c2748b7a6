"""Rows that two CPU cores can train on: those of a data set whose prompt and response are short.

    python -m benchmarks.evidence.rows dolly --data DATA --out runs/evidence/dolly

DATA holds the original sets, one JSON object a line. A row is taken if its prompt under the task's template and its
first response are within the task's limits, which `TASK/rows.yaml` lists; no text is cut, and the order is kept.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from promptkd.data import encode_examples, read_examples
from promptkd.data.sources import read_objects
from promptkd.demo.pipeline import teacher_file
from promptkd.models import load_tokenizer

HERE = Path(__file__).parent


def within(source: Path, most: int | None, task: dict[str, Any]) -> list[dict[str, Any]]:
    """The first `most` rows of `source` that are within the task's limits."""
    encoded = encode_examples(
        read_examples(source),
        load_tokenizer(teacher_file()),
        task["template"],
        max_prompt_length=task["max_prompt_length"],
        max_response_length=task["max_completion_length"],
    )
    objects = read_objects(source)
    return [dict(objects[each.row][1]) for each in encoded.examples[:most]]


def main() -> None:
    """Write `OUT/NAME.jsonl` for every set that the task lists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="a folder beside this file, such as dolly")
    parser.add_argument("--data", type=Path, required=True, help="folder of the original sets")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    asked = parser.parse_args()
    task = yaml.safe_load((HERE / asked.task / "rows.yaml").read_text(encoding="utf-8"))
    asked.out.mkdir(parents=True, exist_ok=True)
    for name, source in task["sets"].items():
        rows = within(asked.data / source["file"], source.get("first"), task)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (asked.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{asked.out / name}.jsonl: {len(rows)} rows of {source['file']}")


if __name__ == "__main__":
    main()
