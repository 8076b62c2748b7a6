"""The tables of docs/methods.md say what the settings' dataclasses say."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from promptkd.methods import METHODS, AdaptedMethod, MethodSettings, TokenMethod
from promptkd.methods.token_objectives import OBJECTIVES
from promptkd.models.adapters import ADAPTERS, PromptLossSettings
from promptkd.settings import Reader
from promptkd.training.config import TunerSettings

PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
FLAG = re.compile(r"`--(\w+)`")


def rows(title: str) -> dict[str, list[str]]:
    """The cells of each row of the table whose first column has that title, by the name in the first one."""
    table = PAGE[PAGE.index(f"| {title} |") :].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]
    return {first.split("`")[1]: rest for first, *rest in cells}


def names(*owners: type) -> set[str]:
    return {field.name for owner in owners for field in fields(owner)}


def test_each_method_has_a_row():
    assert rows("method").keys() == METHODS.keys()


@pytest.mark.parametrize("name", METHODS)
def test_flags_and_defaults_of_a_method(name):
    defaults = MethodSettings()
    take = Reader(defaults)
    METHODS[name]().build(take)
    take(METHODS[name])
    own = {each: getattr(defaults, each) for each in take.read - names(TokenMethod)}
    if "student_share" in own:
        own["student_share"] = METHODS[name].own_share
    stated = re.findall(r"`--(\w+)` \(([^)]+)\)", rows("method")[name][-1])
    assert dict(stated) == {each: str(value).lower() if value is True else str(value) for each, value in own.items()}


def test_which_methods_take_the_shared_flags():
    text = PAGE[PAGE.index("All but `seqkd`") : PAGE.index("`--language_data` works")]
    sentences = " ".join(text.split()).split(". ")
    without, tuned = sentences[0], " ".join(sentences[2:])
    assert set(re.findall(r"`(\w+)`", without.partition(" have ")[0])) == {
        name for name, method in METHODS.items() if not issubclass(method, TokenMethod)
    }
    coefficients = names(*(owner for _, owner in OBJECTIVES.values() if owner is not None))
    assert set(FLAG.findall(without)) == names(TokenMethod) - names(AdaptedMethod) | coefficients
    every, but_okd = tuned.split("; all of them but `okd` also")
    assert set(FLAG.findall(every)) == names(TunerSettings)
    assert set(FLAG.findall(but_okd)) == names(PromptLossSettings)
    adapters = [METHODS[name].own_adapter for name in METHODS if issubclass(METHODS[name], AdaptedMethod)]
    assert {each for each in adapters if each and not each.adapter_class.has_regularizer} == {
        METHODS["okd"].own_adapter
    }


def test_the_tables_of_objectives_and_adapters():
    assert rows("name").keys() == OBJECTIVES.keys()
    assert {name.split("`")[0] for name in rows("`--teacher_adapter`")} == ADAPTERS.keys() - {"none"}
