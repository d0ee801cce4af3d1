"""`python -m trace_hydra.report RUN_OR_SWEEP_DIR…`: figures, tables and a report of a run or of any set of runs."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from trace_hydra.errors import TraceHydraError
from trace_hydra.report.hostile import plain
from trace_hydra.report.tables import FORMATS as TABLES

FIGURES = ("svg", "pdf", "png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 done, 1 if a part could not be made, 2 if there is nothing to report."""
    options = _parse(arguments)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from trace_hydra.report.writing import write_report  # statistics and pictures take a while to load

    try:
        done = write_report(options.folder, options.out, figures=options.figures, tables=options.tables)
    except TraceHydraError as error:
        print(f"trace_hydra.report: {plain(error, 2000)}", file=sys.stderr)
        return 2
    for note in done.notes:
        print(f"note: {plain(note, 1000)}")
    for path in done.files:
        print(path)
    return 1 if done.failed else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m trace_hydra.report", description=str(__doc__).split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="+", help="run directories, or folders with runs at any depth")
    parser.add_argument("--out", type=Path, help="where files go (default: the first folder)")
    parser.add_argument(
        "--figures", nargs="*", choices=FIGURES, metavar="KIND", help=f"write figures as {', '.join(FIGURES)}"
    )
    parser.add_argument(
        "--tables", nargs="*", choices=list(TABLES), metavar="KIND", help=f"write tables as {', '.join(TABLES)}"
    )
    options = parser.parse_args(arguments)
    for name, every in (("figures", FIGURES), ("tables", tuple(TABLES))):
        chosen = getattr(options, name)
        setattr(options, name, every if chosen == [] else tuple(dict.fromkeys(chosen or ())))
    return options


if __name__ == "__main__":
    sys.exit(main())
