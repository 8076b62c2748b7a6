"""`promptkd recipe`."""

from typing import Any

from promptkd.cli.options.recipe import Options
from promptkd.cli.parsing.fields import nearest
from promptkd.cli.recipes import recipes, summary_of
from promptkd.errors import RequestError


def run(options: Options, training: dict[str, Any]) -> None:
    known = recipes()
    if options.name is None:
        width = max(map(len, known))
        for name, file in known.items():
            print(f"{name:<{width}}  {summary_of(file)}")
        return
    name = options.name.removesuffix(".yaml").removesuffix(".py")
    if name not in known:
        guess = nearest(name, known)
        advice = f"Did you mean {guess}?" if guess else "`promptkd recipe` lists them."
        raise RequestError(f"There is no recipe {options.name!r}. {advice}")
    print(known[name].read_text(encoding="utf-8"), end="")
