"""What the model of a run was trained on, for commands that run or write it."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from promptkd.cli.outputs import OF_A_RUN
from promptkd.cli.parsing.config_file import read_config
from promptkd.data.chat_form import tokenizer_as_trained
from promptkd.data.templates import TRAINED_ON, resolve_template
from promptkd.errors import RequestError, at


def as_trained(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the model `name`, which says what the model was trained on.

    Where its files do not (earlier versions saved the tokenizer as it came), the run's config.yaml does.
    """
    file, template, kwargs = _settings_of_run(name)
    if TRAINED_ON in tokenizer.init_kwargs or (template == "auto" and not kwargs):
        return tokenizer
    with at(str(file)):
        return tokenizer_as_trained(tokenizer, resolve_template(template, tokenizer, kwargs))


def _settings_of_run(name: str) -> tuple[Path, str, dict[str, Any]]:
    """Of the run in whose folder a model lies: config.yaml, template (else "auto"), chat template's variables."""
    folder = Path(name).expanduser().absolute()
    inside = {"student": 1, "model": 1, "checkpoints": 2}
    depth = inside.get(folder.name, inside.get(folder.parent.name, 0) if folder.name.startswith("checkpoint-") else 0)
    file = [folder, *folder.parents][depth] / "config.yaml"
    try:
        config = read_config(file) if file.is_file() else {}
    except RequestError:  # somebody else's file of that name
        config = {}
    if not config.keys() >= OF_A_RUN:
        return file, "auto", {}
    given, kwargs = config.get("template"), config.get("chat_template_kwargs")
    own = given if isinstance(given, str) and (given in ("alpaca", "chat") or "{" in given) else "auto"
    return file, own, kwargs if isinstance(kwargs, dict) else {}
