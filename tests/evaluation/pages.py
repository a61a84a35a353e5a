"""What every page that a command writes for a browser holds to."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_WITHOUT_END = {"meta"}


class Page(HTMLParser):
    """A page as read: that every element is closed in order is checked on the way."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.titles: list[str] = []
        """What is seen on hover."""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in _WITHOUT_END:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())
        if self.open[-1:] == ["title"]:
            self.titles.append(data)

    @property
    def text(self) -> str:
        """All that it says."""
        return " ".join(self.texts)

    def names_beside_points(self) -> set[str]:
        """The texts beside the points of its plots."""
        found = re.findall(r'<text class="name".*?</text>', self.source, re.DOTALL)
        return {re.sub(r"<[^>]*>", "", line) for name in found for line in re.findall(r"<tspan.*?</tspan>", name)}


def read_page(text: str) -> Page:
    """A page that is well formed, fits any screen, and asks nothing of the network."""
    page = Page(text)
    assert not {name for name, _ in page.attributes} & {"src", "href", "srcset", "data", "onload", "onclick"}
    assert not re.search(r"https?://|url\(|@import|<script", text)
    assert ("name", "viewport") in page.attributes
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    return page
