"""Secrets out of what is written down: flags, settings, addresses and answers that carry a key or a password."""

import os
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

STARS = "***"
_SECRET = r"(?:[\w.-]*[_.-])?(?:token|api[_-]?key|key|secret|password|passwd|credentials?|authorization)"
_SECRET_NAME = re.compile(_SECRET, re.IGNORECASE)
_VOCABULARY = re.compile(r"(?:.*_)?(?:eos|bos|pad|unk|sep|cls|mask|image|video|audio|end|start)_token")  # no secrets
_USER_INFO = re.compile(r"(?<=://)[^/\s@'\"]+@")
_QUERY = re.compile(rf"([?&]{_SECRET}=)[^&\s#'\"]+", re.IGNORECASE)
_ENTRY = re.compile(rf"""(["']?\b{_SECRET}["']?\s*:\s*)("[^"]*"|'[^']*'|[^\s,}}\]"']+)""", re.IGNORECASE)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b")
_SHORTEST_SECRET = 8  # a local server's key may be a word such as "EMPTY", which a judge may say as well


def is_secret(name: str) -> bool:
    """Whether a flag or a key of this name holds a secret: hub_token, api-key, password; not eos_token."""
    return _SECRET_NAME.fullmatch(name) is not None and _VOCABULARY.fullmatch(name.replace("-", "_")) is None


def starred(text: str, secret: str | None) -> str:
    """`text` with stars in place of a secret that is known."""
    return text.replace(secret, STARS) if secret and len(secret) >= _SHORTEST_SECRET else text


def redacted(text: str) -> str:
    """`text` with stars in place of the user and password of every address, of secrets in its query, and of tokens.

    Tokens are those of the Hugging Face hub by their form, and all that the environment holds under a secret's name.
    """
    text = _QUERY.sub(rf"\g<1>{STARS}", _USER_INFO.sub(f"{STARS}@", _HUB_TOKEN.sub(STARS, text)))
    for secret in environment_secrets():
        text = starred(text, secret)
    return text


def environment_secrets() -> list[str]:
    """The values of the environment's variables that are named as secrets are and long enough to be one."""
    return [value for name, value in os.environ.items() if is_secret(name) and len(value) >= _SHORTEST_SECRET]


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """Arguments with stars in place of the values of flags such as --hub_token, in addresses and in mappings too."""
    shown: list[str] = []
    for before, argument in pairwise(["", *arguments]):
        flag, equals, _ = argument.partition("=")
        if before.startswith("--") and is_secret(before[2:]):
            shown.append(STARS)
        elif equals and flag.startswith("--") and is_secret(flag[2:]):
            shown.append(f"{flag}={STARS}")
        else:
            text = redacted(argument)
            shown.append(_ENTRY.sub(rf"\g<1>{STARS}", text) if "{" in text else text)
    return shown


def without_secret_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without those that hold secrets, at any depth, and with their addresses `redacted`."""
    return {name: _cleared(value) for name, value in settings.items() if not is_secret(str(name))}


def _cleared(value: Any) -> Any:
    if isinstance(value, Mapping):
        return without_secret_values(value)
    if isinstance(value, list | tuple):
        return [_cleared(part) for part in value]
    return redacted(value) if isinstance(value, str) else value
