"""A parser of pages for tests, and what holds for every page of a report."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "input", "link"}
# SVG elements that are written as <x/>.
EMPTY = {"polygon", "polyline", "line", "rect", "circle", "path", "stop", "s", "i"}


class Page(HTMLParser):
    """Tags, attributes and text; fails on tags that do not nest."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def values(self, name: str) -> list[str]:
        return [attrs[name] for _, attrs in self.tags if name in attrs]


def check(text: str) -> Page:
    """What holds for every page, whatever the figures."""
    page = Page(text)
    for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
        for value in page.values(name):
            assert value.startswith(("data:", "#")), value
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    targets = page.values("href") + [
        f"#{i}" for v in page.values("aria-labelledby") for i in v.split()
    ]
    assert {t[1:] for t in targets if t.startswith("#")} <= set(ids)
    assert not {"script", "iframe", "link", "object", "embed", "base", "img"} & {
        tag for tag, _ in page.tags
    }
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    style = text[text.index("<style>") : text.index("</style>")]
    assert "@import" not in style
    assert "url(" not in style
    # Nothing that is not a number reaches a coordinate.
    for name in ("points", "x", "y", "x1", "y1", "x2", "y2", "cx", "cy", "d", "viewbox", "width"):
        for value in page.values(name):
            assert not re.search("nan|inf|none", value, re.IGNORECASE), (name, value)
    return page
