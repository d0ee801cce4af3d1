"""Tables in a terminal of any width, and in what is no terminal."""

import sys
import textwrap

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from trace_hydra.terminal import is_live, plain, width_of

_NO_TERMINAL = 160
_ENDLESS = 100_000


def print_table(table: Table) -> None:
    """Print a table, no number of which is ever cut: where its columns have no room, a line of words for each row.

    Args:
        table: Columns of numbers must be `no_wrap`; others may fold. Cells are texts without control characters.
    """
    limit = width_of() if is_live(sys.stdout) else _NO_TERMINAL
    endless = Console(width=_ENDLESS)
    needed = Measurement.get(endless, endless.options, table)
    if needed.minimum <= limit:
        Console(width=min(needed.maximum, limit)).print(table, markup=False, highlight=False)
        return
    heads = [str(column.header) for column in table.columns]
    lines = [str(table.title)] if table.title else []
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        lines.append(", ".join(f"{head} {cell}".strip() for head, cell in zip(heads, cells, strict=True) if str(cell)))
    for line in lines:
        print(textwrap.fill(line, width=limit, subsequent_indent="    "))


def say(text: str) -> None:
    """Print a text without control characters; lines may be longer than the terminal."""
    Console().print(plain(text, "\n"), highlight=False, markup=False, soft_wrap=True)
