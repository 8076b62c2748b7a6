"""What the test rows of a task share with the rows that its runs train on, counted into the records.

    python -m benchmarks.evidence.leaks dolly --rows runs/evidence/dolly

The rows are those of `benchmarks.evidence.rows`. Requests and responses are compared as their words, in lower case and
without punctuation, with all rows of train.jsonl, of which teacher, student and every run see a part.
"""

import argparse
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

from promptkd.data import Example, read_examples
from promptkd.data.rows import asked_text
from promptkd.io.atomic import write_atomic

HERE = Path(__file__).parent
RUN = 8  # words in a row that two texts hardly share by chance
_WORD = re.compile(r"\w+")


def counted(test: Collection[Example], train: Collection[Example]) -> dict[str, int]:
    """Test rows: all, those whose request is one of the training rows', and those that share a run of words."""
    requests = {_words(asked_text(row.request)) for row in train}
    held = {
        "request": {run for row in train for run in _runs(asked_text(row.request))},
        "response": {run for row in train for text in row.references for run in _runs(text)},
    }
    return {
        "test rows": len(test),
        "training rows": len(train),
        "same request": sum(_words(asked_text(row.request)) in requests for row in test),
        "request shares words": sum(not held["request"].isdisjoint(_runs(asked_text(row.request))) for row in test),
        "response shares words": sum(
            any(not held["response"].isdisjoint(_runs(text)) for text in row.references) for row in test
        ),
    }


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.lower()))


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    words = _words(text)
    return (words[at : at + RUN] for at in range(len(words) - RUN + 1))


def main() -> None:
    """Write `records/leaks-TASK.json`: the counts of every test set of the task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="a folder beside this file, such as dolly")
    parser.add_argument("--rows", type=Path, required=True, help="folder of the task's rows")
    asked = parser.parse_args()
    sets: dict[str, Any] = yaml.safe_load((HERE / asked.task / "rows.yaml").read_text(encoding="utf-8"))["sets"]
    train = read_examples(asked.rows / "train.jsonl")
    found = {
        name: counted(read_examples(asked.rows / f"{name}.jsonl"), train)
        for name in sets
        if name not in ("train", "valid")
    }
    target = HERE / "records" / f"leaks-{asked.task}.json"
    write_atomic(target, json.dumps(found, indent=1) + "\n")
    print(f"Written: {target}")


if __name__ == "__main__":
    main()
