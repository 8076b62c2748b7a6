"""Makes text from elsewhere safe to show: no terminal obeys it, and nothing in it hides."""

_PICTURES = (
    {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
    | {0x7F: 0x2421}
    | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
    | dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)
)
_REORDERING = dict.fromkeys([0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)


def visible(text: str) -> str:
    """Control characters as their pictures (␛ for ESC); C1 controls and lone surrogates as U+FFFD.

    A terminal would obey the former, and neither may occur in an HTML file.
    """
    return text.translate(_PICTURES)


def shown(text: str) -> str:
    """`visible` for a terminal, where the marks of one text could reorder the next.

    Marks that reorder or break lines (bidirectional overrides, line and paragraph separators) become U+FFFD.
    """
    return visible(text).translate(_REORDERING)
