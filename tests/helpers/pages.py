"""A report's page as a parser reads it, and chromium to open it in."""

import base64
import json
import shutil
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's chromium, driven by Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on PATH; on Debian: apt-get install chromium")
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu", *quiet])
        yield started
        started.close()


class Page(HTMLParser):
    """What a browser would make of the page: tags, attributes, and text outside scripts and styles."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self.title = self.style = ""
        self.scripts: list[str] = []
        self._open: list[str] = []
        self._words: list[str] = []
        self.feed(source)
        self.text = " ".join(" ".join(self._words).split()).replace(" .", ".").replace(" ,", ",")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        for name, value in attrs:
            if name == "href" and (value or "").startswith("javascript"):
                self.tags["a href=javascript:"] = 1
        if tag not in ("meta", "link", "line", "circle", "input"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes another element"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside == "title":
            self.title += data
        elif inside == "style":
            self.style += data
        elif inside == "script":
            self.scripts.append(data)
        else:
            self._words.append(data)

    @property
    def data(self) -> Any:
        """What the page's script reads."""
        return json.loads(unpacked(self.scripts[0]))


def unpacked(text: str) -> str:
    return zlib.decompress(base64.b64decode(text, validate=True)).decode()
