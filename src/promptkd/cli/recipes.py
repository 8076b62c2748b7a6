"""The recipes that the package carries: settings of papers for `--config`, a study, launch files, the flat example."""

from pathlib import Path

_FOLDER = Path(__file__).parents[1] / "recipes"


def recipes() -> dict[str, Path]:
    """The file of each recipe, by the name that `--config` and `promptkd recipe` take: "kd", "launch/fsdp2"."""
    files = [*_FOLDER.glob("*.yaml"), *_FOLDER.glob("*.py"), *_FOLDER.glob("*/*.yaml")]
    return {file.relative_to(_FOLDER).with_suffix("").as_posix(): file for file in sorted(files)}


def summary_of(recipe: Path) -> str:
    """What a recipe is for, in one line: its first comment, or the first line of its docstring."""
    return recipe.read_text(encoding="utf-8").splitlines()[0].lstrip('#" ')
