"""Pages as tests read them: a tree of elements that must be well nested, and its tables."""

from collections.abc import Iterator
from html.parser import HTMLParser
from xml.etree.ElementTree import Element, TreeBuilder

VOID = {"meta", "br", "input", "link", "img", "hr"}


class Page(HTMLParser):
    """A page; fails where an element is not closed, or closed out of turn."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self._builder, self._open = TreeBuilder(), list[str]()
        self._builder.start("document", {})
        self.feed(html)
        self.close()
        assert not self._open, self._open
        self._builder.end("document")
        self.root = self._builder.close()

    def handle_starttag(self, tag, attrs):
        self._builder.start(tag, {name: value or "" for name, value in attrs})
        if tag in VOID:
            self._builder.end(tag)
        else:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self._open and self._open[-1] == tag, (tag, self._open)
        self._builder.end(self._open.pop())

    def handle_data(self, data):
        self._builder.data(data)

    @property
    def elements(self) -> Iterator[Element]:
        return self.root.iter()

    def all(self, tag: str, **attributes: str) -> list[Element]:
        wanted = {name.replace("_", "-"): value for name, value in attributes.items()}
        return [one for one in self.root.iter(tag) if wanted.items() <= one.attrib.items()]

    def one(self, tag: str, **attributes: str) -> Element:
        found = self.all(tag, **attributes)
        assert len(found) == 1, (tag, attributes, len(found))
        return found[0]

    def rows(self, name: str) -> list[list[Element]]:
        """Give the cells of the body of a table by its id."""
        return [list(row) for row in self.one("table", id=name).iterfind("tbody/tr")]

    def heads(self, name: str) -> list[str]:
        """Give the labels of a table's columns."""
        cells = self.one("table", id=name).iterfind("thead/tr/th")
        return [
            text(label) if (label := cell.find("span[@class='label']")) is not None else text(cell) for cell in cells
        ]

    def cells(self, name: str) -> list[dict[str, Element]]:
        """Give the rows of a table by the labels of its columns."""
        return [dict(zip(self.heads(name), row, strict=True)) for row in self.rows(name)]

    @property
    def text(self) -> str:
        return text(self.one("body"))


def text(element: Element) -> str:
    """Give the text of an element and all in it."""
    return "".join(element.itertext())


def value(cell: Element) -> float | None:
    """Give the full value of a cell, None where it has none."""
    return float(cell.attrib["data-value"]) if "data-value" in cell.attrib else None
