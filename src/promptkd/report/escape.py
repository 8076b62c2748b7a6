"""Hostile text stays text: in a page, in a script, in a terminal, in Markdown and in a spreadsheet."""

import base64
import json
import zlib
from typing import Any

from markupsafe import Markup

from promptkd.visible import visible

_IN_MARKDOWN = {ord(character): f"\\{character}" for character in "\\`*_{}[]#|~$"} | {
    ord("<"): "&lt;",
    ord(">"): "&gt;",
    ord("&"): "&amp;",
}
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠", "\t", "\n")


def packed_json(value: Any) -> Markup:
    """JSON for the page's script, as `packed_text`. Raises ValueError for NaN."""
    return packed_text(json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":")))


def packed_text(text: str) -> Markup:
    """zlib-compressed UTF-8 in base64, whose alphabet holds nothing that could end a <script> or open a tag."""
    return Markup(base64.b64encode(zlib.compress(text.encode(), 9)).decode("ascii"))


def markdown_text(text: str) -> str:
    """One line that Markdown shows as it is: no markup, no table cell, no HTML."""
    return visible(" ".join(text.split())).translate(_IN_MARKDOWN)


def csv_text(text: str) -> str:
    """A cell that no spreadsheet reads as a formula: an apostrophe stands before one that begins like one."""
    shown = visible(text)
    return f"'{shown}" if shown.startswith(_FORMULA) else shown
