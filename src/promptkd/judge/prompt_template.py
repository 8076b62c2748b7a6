"""The text that a judge is asked with: files in `prompts/`, each of which a user's own file can replace.

Placeholders are `{{ request }}`, `{{ first }}` and `{{ second }}`. They are filled in one pass, so that a placeholder
inside an answer stays text.
"""

import re
from importlib import resources
from pathlib import Path
from typing import Literal

from promptkd.errors import RequestError
from promptkd.io.files import MIB, read_regular

Task = Literal["score", "pairwise"]
PLACEHOLDERS = ("request", "first", "second")
_PLACEHOLDER = re.compile(r"\{\{\s*(.*?)\s*\}\}")


def load_prompt(task: Task, path: Path | None = None) -> str:
    """The prompt of `task`: the one that ships, or the text of `path`.

    Raises:
        RequestError: the file cannot be read, lacks a placeholder, or holds one that is not known.
    """
    if path is None:
        return (resources.files("promptkd.judge") / "prompts" / f"{task}.txt").read_text(encoding="utf-8")
    try:
        text = read_regular(path, most=MIB).decode("utf-8-sig")
    except OSError as error:
        raise RequestError(f"Expected the judge's prompt in {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"Expected the judge's prompt in {path} as UTF-8: {error}.") from error
    found = set(_PLACEHOLDER.findall(text))
    problems = [f"lacks {{{{ {name} }}}}" for name in PLACEHOLDERS if name not in found]
    problems += [f"holds {{{{ {name} }}}}, which is unknown" for name in sorted(found - set(PLACEHOLDERS))]
    if problems:
        known = ", ".join(f"{{{{ {name} }}}}" for name in PLACEHOLDERS)
        raise RequestError(f"The judge's prompt {path} {'; '.join(problems)}. It must hold {known} and no other.")
    return text


def fill_prompt(prompt: str, *, request: str, first: str, second: str) -> str:
    """`prompt` with its placeholders replaced."""
    values = {"request": request, "first": first, "second": second}
    return _PLACEHOLDER.sub(lambda found: values[found[1]], prompt)
