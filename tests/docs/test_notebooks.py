"""The notebooks were run as they stand, and use what there is. `make notebook` runs them again."""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in FOLDER.glob("*.ipynb")}


def code(name: str) -> list[dict]:
    return [cell for cell in NOTEBOOKS[name]["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_cell_was_run_in_order_and_none_failed(name):
    assert [cell["execution_count"] for cell in code(name)] == list(range(1, len(code(name)) + 1))
    kinds = {output["output_type"] for cell in code(name) for output in cell["outputs"]}
    assert kinds <= {"stream", "display_data", "execute_result"}
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 300_000
    outputs = [output for cell in code(name) for output in cell["outputs"]]
    texts = [output.get("text") or output["data"].get("text/plain", []) for output in outputs]
    shown = "".join(part for text in texts for part in text)
    assert re.findall(r"(?<![\w.:/~-])/[a-z]\w*/[\w.-]+", shown) == []  # folders of a machine


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_it_imports_and_sets_exists(name):
    tree = ast.parse("\n".join("".join(cell["source"]) for cell in code(name)))
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    used = {}
    for node in imported:
        if node.module.split(".")[0] == "promptkd":
            module = importlib.import_module(node.module)
            used |= {alias.name: getattr(module, alias.name) for alias in node.names}
    assert used
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id.endswith("Config"):
            fields = used[call.func.id].__dataclass_fields__
            assert {each.arg for each in call.keywords if each.arg} <= fields.keys()
