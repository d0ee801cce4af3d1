"""`python -m trace_hydra.dashboard --entity E --project P`: W&B's workspace and report of a project, made from code.

Both show runs by method and task order, means over seeds, the score matrix, answers, losses and cost. Made again, they
replace what an earlier call made.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from trace_hydra.dashboard import facts, pages
from trace_hydra.errors import TraceHydraError
from trace_hydra.files import write_bytes

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", re.ASCII)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 done, 1 if W&B or a file failed, 2 for wrong arguments."""
    options = _options(arguments)
    try:
        known = facts.from_runs(options.runs) if options.runs else facts.from_conf()
        made = pages.build(known)
        text = json.dumps(made, ensure_ascii=False, indent=1, sort_keys=True) + "\n"
        if options.spec:
            write_bytes(text.encode("utf-8", "backslashreplace"), options.spec)
            print(f"spec: {options.spec}")
        if options.offline:
            if not options.spec:
                print(text, end="")
            return 0
        from trace_hydra.dashboard.server import Server

        for kind, address in Server(options.timeout).save(options.entity, options.project, made).items():
            print(f"{kind}: {address}")
    except TraceHydraError as error:
        print(f"trace_hydra.dashboard: {error}", file=sys.stderr)
        return 1
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m trace_hydra.dashboard", description=str(__doc__).split("\n")[0])
    parser.add_argument("--entity", type=_name, help="user or team that owns the project")
    parser.add_argument("--project", type=_name, help="logger.wandb.project of the runs")
    runs = "run directories at any depth: their tasks and groups, and a table of means; else TRACE's tasks, all methods"
    parser.add_argument("--runs", type=Path, nargs="+", metavar="FOLDER", help=runs)
    parser.add_argument("--spec", type=Path, metavar="FILE", help="write both pages as JSON")
    parser.add_argument("--offline", action="store_true", help="ask no server; without --spec, print the JSON")
    parser.add_argument("--timeout", type=_seconds, default=20.0, help="seconds for each of the server's answers (20)")
    options = parser.parse_args(arguments)
    if not options.offline and not (options.entity and options.project):
        parser.error("--entity and --project say where the pages go; or add --offline")
    return options


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text[:80]!a} is no name of W&B: letters, digits, '_', '-', '.'")
    return text


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text[:80]!a} is no number of seconds in (0, 3600]")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
