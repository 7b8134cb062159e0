"""Pages of HTML, read as a browser would: what they show, and that they run and load nothing."""

from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "img"}


class Page(HTMLParser):
    """A page's text, elements and attributes; raises where an element is not closed in its place."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def check_self_contained(path: Path) -> None:
    """Nothing runs, and nothing is loaded: every reference is inside the page."""
    page = read(path)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "audio", "video"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "xlink:href", "srcset", "data", "action", "background"):
            assert value.startswith(("data:image/png;base64,", "#")), (tag, name, value)
        if name == "style":
            assert "url(" not in value or "url(#" in value, value
        if "://" in value:
            assert name.startswith("xmlns"), (tag, name, value)
    text = path.read_text(encoding="utf-8")
    assert "@import" not in text and "<!DOCTYPE svg" not in text and "<?xml" not in text
    policy = [value for tag, name, value in page.attributes if tag == "meta" and name == "content"]
    assert any(value.startswith("default-src 'none'") for value in policy)
