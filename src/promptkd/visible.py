"""Makes text from elsewhere safe to show: no terminal obeys it, and nothing in it hides."""

_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], 0xFFFD)
_REORDERING = dict.fromkeys([0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)


def visible(text: str) -> str:
    """Control characters as their pictures (␛ for ESC); C1 controls and lone surrogates, invalid in HTML, as U+FFFD."""
    return text.translate(_PICTURES)


def shown(text: str) -> str:
    """`visible` for a terminal: marks that reorder text or break lines (bidirectional, U+2028) become U+FFFD, too."""
    return visible(text).translate(_REORDERING)
