"""What the model of a run was trained on, for commands that run or write it."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from promptkd.cli.parsing.config_file import read_config
from promptkd.data.chat_form import tokenizer_as_trained
from promptkd.data.templates import TRAINED_ON, resolve_template
from promptkd.errors import RequestError


def as_trained(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the model `name`, which says what the model was trained on.

    Where its files do not (earlier versions saved the tokenizer as it came), the run's config.yaml does.
    """
    template, kwargs = _settings_of_run(name)
    if TRAINED_ON in tokenizer.init_kwargs or (template == "auto" and not kwargs):
        return tokenizer
    return tokenizer_as_trained(tokenizer, resolve_template(template, tokenizer, kwargs), kwargs)


def _settings_of_run(name: str) -> tuple[str, dict[str, Any]]:
    """Template (else "auto") and chat template's variables of the run in whose folder a model lies."""
    folder = Path(name).expanduser()
    inside = {"student": 1, "model": 1, "checkpoints": 2}
    depth = inside.get(folder.name, inside.get(folder.parent.name, 0) if folder.name.startswith("checkpoint-") else 0)
    file = [folder, *folder.absolute().parents][depth] / "config.yaml"
    try:
        config = read_config(file) if file.is_file() else {}
    except RequestError:  # somebody else's file of that name
        return "auto", {}
    given, kwargs = config.get("template"), config.get("chat_template_kwargs")
    own = given if isinstance(given, str) and (given in ("alpaca", "chat") or "{" in given) else "auto"
    return own, kwargs if isinstance(kwargs, dict) else {}
