"""`python -m trace_hydra.status DIR`: how a run or a sweep stands, from its files alone. It changes nothing."""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from trace_hydra import terminal
from trace_hydra.status.model import Status
from trace_hydra.status.reader import Reader
from trace_hydra.status.text import lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 shown, 2 if there is nothing to show."""
    parser = argparse.ArgumentParser(prog="python -m trace_hydra.status", description=str(__doc__))
    parser.add_argument("folder", type=Path, help="a run directory, or a folder of them, such as paths.runs")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="look again this often, until nothing runs")
    parser.add_argument("--json", action="store_true", help="everything, as one JSON object a look")
    parser.add_argument("--all", action="store_true", help="a line for each job, however many")
    options = parser.parse_args(arguments)
    terminal.soften()
    if options.watch is not None and options.watch <= 0:
        parser.error(f"--watch={options.watch:g} must be above 0")
    reader = Reader(options.folder)
    try:
        while True:
            status = reader.read()
            if not status.jobs and not status.sweeps:
                where = terminal.plain(options.folder)
                print(f"trace_hydra.status: no run in {where}; name a run directory or paths.runs.", file=sys.stderr)
                return 2
            _show(status, options)
            if options.watch is None or not status.open:
                return 0
            time.sleep(options.watch)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to flush
            return 0
        print(f"trace_hydra.status: cannot read {terminal.plain(options.folder)}: {error.strerror}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0


def _show(status: Status, options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps(asdict(status), indent=None if options.watch else 1), flush=True)
        return
    live = terminal.is_live(sys.stdout)
    text = lines(status, width=terminal.width_of() if live else None, colour=terminal.colours(sys.stdout),
                 everything=options.all)  # fmt: skip
    if options.watch is not None and live:
        print("\x1b[H\x1b[2J", end="")
    print("\n".join(text) + ("\n" if options.watch is not None and not live else ""), flush=True)


if __name__ == "__main__":
    sys.exit(main())
