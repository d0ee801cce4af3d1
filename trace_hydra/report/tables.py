"""Tables that become CSV, Markdown and LaTeX: rounded when they are written, with a reason for what is missing."""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from trace_hydra.report.hostile import plain

FORMATS = {"csv": "csv", "md": "md", "latex": "tex"}
"""Name on the command line -> suffix of the file."""
_LONGEST = 120
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "|", "%")
_NUMBER = re.compile(r"[+-]?\d[\d.,]*")
_LATEX = {
    **{one: f"\\{one}" for one in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "`": r"\textasciigrave{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}"},
    **{"[": "{[}", "]": "{]}", "*": "{*}", "⟦": "{[}", "⟧": "{]}"},  # \\ would take [ and * as its own
    **{"Δ": r"$\Delta$", "−": "$-$", "→": r"$\rightarrow$", "—": "---", "–": "--", "…": r"\ldots{}", "⏎": " "},
}


@dataclass(frozen=True)
class Value:
    """A cell with a number."""

    value: float | None
    low: float | None = None
    high: float | None = None
    why: str = ""
    """Why the number, or its interval, is missing."""
    sign: bool = False
    """Whether a plus is written."""


@dataclass(frozen=True)
class Row:
    """A line: its labels, then a cell for each column; a text cell is written as it is, "" is left blank."""

    labels: Sequence[str]
    cells: Sequence[Value | str]


@dataclass(frozen=True)
class Section:
    """Lines whose numbers may be compared, below a title that says under which conditions they were made."""

    title: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class Table:
    """A table as a paper prints it."""

    name: str
    """Of its file."""
    caption: str
    labels: Sequence[str]
    """Heads of the label columns."""
    columns: Sequence[str]
    sections: Sequence[Section]
    spans: Sequence[tuple[str, int]] = ()
    """Heads above the columns, each over so many."""
    notes: Sequence[str] = field(default_factory=tuple)
    decimals: int = 1
    intervals: bool = False
    """Whether Markdown and LaTeX show intervals; CSV always has them."""

    def write(self, kind: str) -> str:
        """Write the table in one of `FORMATS`."""
        return {"csv": self.to_csv, "md": self.to_markdown, "latex": self.to_latex}[kind]()

    def to_csv(self) -> str:
        """Write full numbers and the ends of their intervals; what is missing is empty, with its reason in `notes`."""
        heads = self._flat_heads()
        several = [f"{head}{end}" for head in heads for end in ("", " low", " high")]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([csv_text(one) for one in ("section", *self.labels, *several, "notes")])
        for section in self.sections:
            for row in section.rows:
                cells, notes = [], []
                for head, cell in zip(heads, row.cells, strict=True):
                    cells += _csv_cells(cell)
                    if isinstance(cell, Value) and cell.why and None in (cell.value, cell.low):
                        notes.append(f"{head}: {cell.why}")
                writer.writerow(
                    [csv_text(section.title), *map(csv_text, row.labels), *cells, csv_text("; ".join(notes))]
                )
        return text.getvalue()

    def to_markdown(self) -> str:
        """Write a pipe table with its caption above and footnotes below."""
        notes = _Notes()
        heads = [*self.labels, *self._flat_heads()]
        rules = ["---"] * len(self.labels) + ["---:"] * len(self.columns)
        lines = [[markdown_text(head) for head in heads], rules]
        for section in self.sections:
            if section.title:
                lines.append([f"*{markdown_text(section.title)}*", *[""] * (len(heads) - 1)])
            for row in section.rows:
                cells = [self._cell(cell, notes, latex=False) for cell in row.cells]
                lines.append([*map(markdown_text, row.labels), *cells])
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        below = [f"{mark}) {markdown_text(note, 400)}" for mark, note in notes.items()]
        below += [markdown_text(note, 400) for note in self.notes]
        return f"**{markdown_text(self.caption, 400)}**\n\n{body}\n" + "".join(f"\n{line}\n" for line in below)

    def to_latex(self) -> str:
        """Write a table float with rules of booktabs."""
        notes = _Notes()
        width = len(self.labels) + len(self.columns)
        lines = []
        if self.spans:
            over = " & ".join(rf"\multicolumn{{{count}}}{{c}}{{{latex_text(head)}}}" for head, count in self.spans)
            lines += [f"{' & ' * (len(self.labels) - 1)} & {over} \\\\", self._rules()]
        lines.append(" & ".join(map(latex_text, (*self.labels, *self.columns))) + r" \\")
        for section in self.sections:
            lines.append(r"\midrule")
            if section.title:
                lines.append(rf"\multicolumn{{{width}}}{{l}}{{\emph{{{latex_text(section.title)}}}}} \\")
            for row in section.rows:
                cells = [self._cell(cell, notes, latex=True) for cell in row.cells]
                lines.append(" & ".join([*map(latex_text, row.labels), *cells]) + r" \\")
        below = [rf"\textsuperscript{{{mark}}} {latex_text(note, 400)}" for mark, note in notes.items()]
        below += [latex_text(note, 400) for note in self.notes]
        return "\n".join(
            [
                r"% needs \usepackage{booktabs}",
                r"\begin{table}[t]",
                r"\centering\small",
                rf"\caption{{{latex_text(self.caption, 400)}}}",
                rf"\label{{tab:{re.sub('[^A-Za-z0-9-]', '-', self.name)}}}",
                rf"\begin{{tabular}}{{{'l' * len(self.labels)}{'r' * len(self.columns)}}}",
                r"\toprule",
                *lines,
                r"\bottomrule",
                r"\end{tabular}",
                *(rf"\par\smallskip\footnotesize {line}" for line in below),
                r"\end{table}",
                "",
            ]
        )

    def _flat_heads(self) -> list[str]:
        over = [head for head, count in self.spans for _ in range(count)] or [""] * len(self.columns)
        return [f"{above} {head}".strip() for above, head in zip(over, self.columns, strict=True)]

    def _rules(self) -> str:
        rules, start = [], len(self.labels) + 1
        for _, count in self.spans:
            rules.append(rf"\cmidrule(lr){{{start}-{start + count - 1}}}")
            start += count
        return "".join(rules)

    def _cell(self, cell: Value | str, notes: "_Notes", *, latex: bool) -> str:
        if isinstance(cell, str):
            return latex_text(cell) if latex else markdown_text(cell)
        if cell.value is None:
            return ("---" if latex else "—") + notes.mark(cell.why or "not known", latex=latex)
        shown = _rounded(cell.value, self.decimals, cell.sign, latex=latex)
        if not self.intervals:
            return shown
        if cell.low is None or cell.high is None:
            return shown + (notes.mark(cell.why, latex=latex) if cell.why else "")
        low, high = (_rounded(end, self.decimals, cell.sign, latex=latex) for end in (cell.low, cell.high))
        return rf"{shown} {{\scriptsize {{[}}{low}, {high}{{]}}}}" if latex else rf"{shown} \[{low}, {high}\]"


class _Notes:
    """Footnotes of one table, numbered as they come."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def mark(self, text: str, *, latex: bool) -> str:
        """Refer to a note."""
        if text not in self._texts:
            self._texts.append(text)
        number = self._texts.index(text) + 1
        return rf"\textsuperscript{{{number}}}" if latex else f" {number})"

    def items(self) -> list[tuple[int, str]]:
        """List number and text."""
        return list(enumerate(self._texts, 1))


def csv_text(text: object) -> str:
    """Make text that no spreadsheet takes for a formula."""
    shown = plain(text, 1000)
    return f"'{shown}" if shown.startswith(_FORMULA) and not _NUMBER.fullmatch(shown) else shown


def markdown_text(text: object, most: int = _LONGEST) -> str:
    """Make text that Markdown and the HTML in it leave alone."""
    shown = re.sub(r"([\\`*_\[\]#|~$])", r"\\\1", plain(text, most).replace("&", "&amp;").replace("<", "&lt;"))
    return shown.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")  # no links of others


def latex_text(text: object, most: int = _LONGEST) -> str:
    """Make text that LaTeX sets as it is."""
    shown = "".join(_LATEX.get(one, one) for one in plain(text, most))
    return re.sub(r"-(?=-)", "-{}", shown) if "--" in plain(text, most) else shown


def _csv_cells(cell: Value | str) -> list[str]:
    if isinstance(cell, str):
        return [csv_text(cell), "", ""]
    return ["" if number is None else repr(float(number)) for number in (cell.value, cell.low, cell.high)]


def _rounded(value: float, decimals: int, sign: bool, *, latex: bool) -> str:
    text = f"{value:+.{decimals}f}" if sign else f"{value:.{decimals}f}"
    if not float(text):
        text = f"{0:.{decimals}f}"
    return f"$-${text[1:]}" if latex and text.startswith("-") else text
