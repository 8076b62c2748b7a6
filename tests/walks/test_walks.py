"""The walks of the documentation, scripts for a shell: here their commands run in this process, on tiny models."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from helpers.commands import LIMITS, done, make_world
from helpers.processes import ForkedCommand
from helpers.standins import StandIn
from promptkd.results import Results

HERE = Path(__file__).parent


def walk(script: str, capsys, **settings: str) -> None:
    """Write the files of a script and run its promptkd commands, in the current folder."""
    text = (HERE / script).read_text()
    for name, quoted, content in re.findall(r"^cat > (\S+) <<('?)END'?\n(.*?)^END$", text, re.DOTALL | re.MULTILINE):
        for key, value in {}.items() if quoted else settings.items():
            content = content.replace(f"${{{key}:+, ${key}}}", f", {value}")
        Path(name).write_text(content)
    for command in re.findall(r"^\$PROMPTKD (.*)$", text, re.MULTILINE):
        done(capsys, *shlex.split(command))


@pytest.mark.slow
def test_a_method_and_a_metric_of_ones_own_become_a_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("promptkd.study.processes.subprocess", StandIn(subprocess, Popen=ForkedCommand))
    monkeypatch.chdir(tmp_path)
    make_world(tmp_path)
    limits = {str(flag)[2:]: value for flag, value in zip(LIMITS[::2], LIMITS[1::2], strict=True)}
    limits |= {"max_steps": 1, "per_device_train_batch_size": 4, "use_cpu": True}
    flags = ", ".join(f"{name}: {json.dumps(value)}" for name, value in limits.items())
    walk("own_method.sh", capsys, FLAGS=flags)
    table = (tmp_path / "table.tex").read_text()
    body = table.split("\\midrule\n")[1].split("\\bottomrule")[0]
    assert [line.split(" & ")[0] for line in body.splitlines()] == ["teacher", "kd", "own", "untrained"]
    heads = table.split("\\toprule\n")[1].split("\\\\")[0]
    assert [each.split(" ")[0] for each in heads.split(" & ")] == ["Model", "KL", "ROUGE-L", "first\\_letter"]
    assert {path.suffix for path in (tmp_path / "figures").iterdir()} == {".svg", ".pdf"}
    record = Results.read(tmp_path / "compared.json")
    assert {(each.model, each.baseline) for each in record.differences} == {("kd", "own")}
    assert {"own:first_letter", "kl_to_teacher"} <= {each.metric for each in record.differences}
