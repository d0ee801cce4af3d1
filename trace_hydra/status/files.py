"""Reading what others write meanwhile: half-written files, files that vanish, values of any type."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from trace_hydra.heartbeat import STATUS
from trace_hydra.job import ERROR

RESULTS = "results.json"
_DEPTH = 3
_LONGEST = 1 << 26
_INSIDE_A_RUN = {"predictions", "test_rows", "capability", "rescored", "csv", "tensorboard", "wandb"}


def run_folders(folder: Path, depth: int = 0) -> Iterator[Path]:
    """Find run directories; links are not followed, and nothing inside of a run is one."""
    names: list[str] = []
    below: list[str] = []
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                if not entry.is_dir(follow_symlinks=False) or entry.name == ".hydra":
                    names.append(entry.name)
                elif not entry.name.startswith(".") and entry.name not in _INSIDE_A_RUN:
                    below.append(entry.name)
    if {STATUS, RESULTS, ERROR, ".hydra"} & set(names):
        yield folder
    elif depth < _DEPTH:
        for name in sorted(below):
            yield from run_folders(folder / name, depth + 1)


def absolute(path: Path) -> Path:
    """Make a path absolute without asking the file system."""
    return Path(os.path.abspath(path))


def read_object(path: Path, longest: int = _LONGEST) -> dict[str, Any] | None:
    """Read a JSON object; None if it is not there, not whole, too long, or something else."""
    try:
        with path.open("rb") as file:
            content = file.read(longest + 1)
        found = json.loads(content) if len(content) <= longest else None
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def first_line(path: Path) -> str:
    """Give the line of an error.txt that says what went wrong."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.readline(1000).strip()
    except OSError:
        return "no error.txt could be written"


def number(value: Any, default: Any = None) -> Any:
    """Give a finite number as float, else the default."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15
    return float(value) if good else default


def whole(value: Any) -> int | None:
    """Give a whole number, else None."""
    return value if type(value) is int else None


def text(value: Any) -> str:
    """Give a text, else an empty one."""
    return value if isinstance(value, str) else ""


def texts(value: Any) -> tuple[str, ...]:
    """Give a list's values as texts; nothing of what is no list."""
    return tuple(map(str, value)) if isinstance(value, list) else ()


def mapping(value: Any) -> dict[str, Any]:
    """Give a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}
