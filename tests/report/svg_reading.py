"""Figures as tests read them: the texts of an SVG, and what is drawn in which colour."""

import re
from xml.etree import ElementTree

from matplotlib.figure import Figure

from trace_hydra.report.style import to_bytes

_SVG = "{http://www.w3.org/2000/svg}"


class Drawing:
    """An SVG, which must be well-formed XML."""

    def __init__(self, figure: Figure):
        self.source = to_bytes(figure, "svg").decode("utf-8")
        self.root = ElementTree.fromstring(self.source)

    @property
    def texts(self) -> list[str]:
        """Every text, in the order of drawing."""
        return ["".join(one.itertext()).strip() for one in self.root.iter(f"{_SVG}text")]

    @property
    def said(self) -> str:
        return "\n".join(self.texts)

    def numbers(self) -> list[str]:
        """Texts that are one number with a decimal."""
        return [text for text in self.texts if re.fullmatch(r"[+−]?\d+\.\d", text)]

    def styles(self) -> list[str]:
        return [style for one in self.root.iter() if (style := one.get("style"))]
