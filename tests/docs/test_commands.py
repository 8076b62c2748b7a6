"""The command lines of the README and the pages are understood, and the first runs of one's own model work."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from helpers.commands import done, make_world, write_rows
from helpers.tiny import save_model, tiny_model, tiny_tokenizer
from promptkd.cli import COMMANDS
from promptkd.cli.parsing.parser import parse_options
from promptkd.errors import RequestError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"])
CODE = re.compile(r"^```\w*\n(.*?)^```$|((?:^ {4}.*\n)+)", re.DOTALL | re.MULTILINE)
LEFT_OUT = {"…", "..."}
TOLERATED = (
    "--sharpness is unknown",  # extending.md: the field of a method that the page adds
    "config.yaml is not there",  # a run that is resumed
    "No such file",  # a settings file of the reader's
)


def command_lines(page: Path) -> list[list[str]]:
    """The arguments of every command line that stands as code of its own."""
    text = "\n".join(first or second for first, second in CODE.findall(page.read_text(encoding="utf-8")))
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    found = [
        re.match(rf"\s*(?:accelerate launch .*-m )?promptkd ((?:{'|'.join(COMMANDS)}) [^#&|>]*)", x) for x in lines
    ]
    return [shlex.split(each[1]) for each in found if each]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_command_lines_of_a_page_are_understood(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, *arguments in command_lines(page):
        options = importlib.import_module(f"promptkd.cli.options.{name.replace('-', '_')}")
        given = [each for each in arguments if each not in LEFT_OUT]
        try:
            parse_options(name, options, given)
        except RequestError as error:
            told = [line for line in str(error).splitlines() if line.startswith("  - ")] or [str(error)]
            wrong = [line for line in told if given == arguments or "is missing" not in line]
            wrong = [line for line in wrong if not any(part in line for part in TOLERATED)]
            assert not wrong, (name, *arguments)


def test_the_first_runs_of_ones_own_model_take_rows_of_messages(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("teacher", 2), ("pruned", 1)):
        save_model(Path("runs", name), tiny_model("llama", layers=2, hidden=16, seed=seed), tiny_tokenizer(chat=True))
    turns = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "an"}]
    for name in ("train.jsonl", "valid.jsonl"):
        write_rows(Path(name), [{"messages": turns}] * 8)
    few = ["--max_steps", "1", "--max_completion_length", "4", "--measure", "student", "--use_cpu"]
    first = [each for each in command_lines(ROOT / "docs" / "your-model.md") if each[:1] == ["distill"]][:2]
    assert [each[each.index("--out") + 1] for each in first] == ["runs/kd", "runs/promptkd"]
    for each in first:
        done(capsys, *each, *few)
        record = json.loads(Path(each[each.index("--out") + 1], "results.json").read_text(encoding="utf-8"))
        assert record["data"]["train"]["rows"] == 8


def test_the_study_of_the_page_is_ready_to_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs" / "studies.md").read_text(), re.DOTALL | re.MULTILINE)[0]
    Path("study.yaml").write_text(text)
    made = make_world(tmp_path)
    Path("runs").mkdir()
    for name in ("student", "teacher"):
        Path(made.folder, name).rename(Path("runs", name))
    Path(made.test).rename("dolly_test.jsonl")
    ran = done(capsys, "study", "study.yaml", "--dry-run")
    assert "36 of 36 runs to do" in ran.out
