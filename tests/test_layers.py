"""The direction of imports: a part of the package may import itself and what stands below it, and nothing in a circle.

Imports inside functions and under `TYPE_CHECKING` count as imports.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import promptkd

ROOT = Path(promptkd.__file__).parent
ROWS = (
    ("cli",),
    ("demo",),
    ("study", "publish"),
    ("judge", "report"),
    ("training",),
    ("evaluation",),
    ("generation",),
    ("methods",),
    ("responses",),
    ("models",),
    ("precision",),
    ("engine",),
    ("data",),
    ("objectives",),
    ("results",),
    ("record_parts",),
    ("memory",),
    ("io",),
    ("settings",),
    ("errors", "visible", "recipes"),
)
DEPTH = {part: depth for depth, row in enumerate(ROWS) for part in row}
FACES = {"__init__", "__main__"}  # the package's own, which stand above everything
NARROWER = {
    "report": {"results", "record_parts", "errors", "visible"},
    "engine": {"data", "objectives", "errors"},
    "objectives": {"errors"},
}
"""Parts that may import less than what stands below them: a report reads records, an engine runs models on batches of
tokens, objectives know tensors."""


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def modules_in(root: Path) -> dict[str, Path]:
    """Every module of the package in `root`, by its dotted name."""
    paths = {path: path.relative_to(root.parent).with_suffix("") for path in sorted(root.rglob("*.py"))}
    return {".".join(name.parts).removesuffix(".__init__"): path for path, name in paths.items()}


def imports_of(module: str, modules: dict[str, Path]) -> dict[str, int]:
    """What a module imports of the package, wherever in its file, with the line."""
    is_package = modules[module].name == "__init__.py"
    package = module.split(".") if is_package else module.split(".")[:-1]
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(modules[module].read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            inside = [f"{origin}.{alias.name}" for alias in node.names]
            names = [each if each in modules else origin for each in inside]
        found |= {name: node.lineno for name in names if name.split(".")[0] == "promptkd" and name not in found}
    return {name: line for name, line in found.items() if name != module}


MODULES = modules_in(ROOT)


def violations(part: str, modules: dict[str, Path]) -> list[str]:
    """The imports of a part that do not point down."""
    below = {each for each in DEPTH if DEPTH[each] > DEPTH[part]} & NARROWER.get(part, set(DEPTH))
    return [
        f"{module}:{line}: {part} may not import {name}"
        for module in modules
        if part_of(module) == part
        for name, line in sorted(imports_of(module, modules).items(), key=lambda each: each[1])
        if part_of(name) not in {part, *below}
    ]


def circle(modules: dict[str, Path]) -> list[str]:
    """Modules that import each other in a circle, the first of them at both ends; none if there is no circle."""
    try:
        TopologicalSorter({module: imports_of(module, modules).keys() for module in modules}).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_every_part_has_its_place():
    assert {part_of(module) for module in MODULES if part_of(module) not in {"", *FACES}} == set(DEPTH)


@pytest.mark.parametrize("part", sorted(DEPTH))
def test_imports_point_down(part):
    wrong = violations(part, MODULES)
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_no_module_imports_itself_by_way_of_others():
    assert not circle(MODULES)


@pytest.mark.slow
def test_no_module_needs_a_unix_to_be_imported():
    unix = {"fcntl", "grp", "pwd", "readline", "resource", "termios"}
    for module, path in MODULES.items():
        imports = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.Import)]
        assert not unix & {alias.name for node in imports for alias in node.names}, module


def package(tmp_path: Path, **texts: tuple[str, ...]) -> dict[str, Path]:
    for name, lines in texts.items():
        file = tmp_path / "promptkd" / f"{name.replace('__', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines))
    return modules_in(tmp_path / "promptkd")


def test_the_test_sees_imports_that_point_up(tmp_path):
    lines = (
        "import os",
        "import promptkd.models.load",
        "from promptkd import DistillConfig",
        "from promptkd.results import Results",
        "def late():",
        "    from ..evaluation import rouge",
        "    from . import html",
        "    from promptkd.data.rows import Example",
    )
    modules = package(tmp_path, report__page=lines, report__html=())
    found = [each.split(": ")[0] for each in violations("report", modules)]
    assert found == [f"promptkd.report.page:{line}" for line in (2, 3, 6, 8)]


@pytest.mark.parametrize(
    "lines",
    [
        ("from promptkd.data import a",),
        ("def late():", "    from . import a"),
        ("from typing import TYPE_CHECKING", "if TYPE_CHECKING:", "    from promptkd.data.a import A"),
    ],
)
def test_the_test_sees_circles(tmp_path, lines):
    modules = package(tmp_path, data__a=("import promptkd.data.b",), data__b=("from .c import C",), data__c=lines)
    assert set(circle(modules)) == {f"promptkd.data.{name}" for name in "abc"}
    modules = package(tmp_path, data__c=("import os",))
    assert not circle(modules)
