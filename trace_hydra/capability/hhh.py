"""The prompts of instruction following and safety in TRACE's layout: <root>/<axis>/<set>/test.json."""

import json
from collections.abc import Sequence
from pathlib import Path

from trace_hydra.errors import CapabilityError

AXES = ("helpful", "harmless")
ROOT_ADVICE = "Set paths.hhh to the folder that holds helpful/ and harmless/ (inference/HHH of the TRACE repository)."


def known_sets(root: str, axis: str) -> list[str]:
    """List the sets that a root has."""
    folder = Path(root).expanduser() / axis
    return sorted(path.parent.name for path in folder.glob("*/test.json")) if folder.is_dir() else []


def set_problems(root: str | None, axis: str, sets: Sequence[str]) -> list[str]:
    """Say what keeps the sets from being read; reads them."""
    if root is None:
        return [f"capability: the {axis} prompts need a folder. {ROOT_ADVICE}"]
    if not (Path(root).expanduser() / axis).is_dir():
        return [f"paths.hhh={root} has no folder {axis}. {ROOT_ADVICE}"]
    if not sets:
        return [f"capability: sets=[] names no prompts; {root}/{axis} has {', '.join(known_sets(root, axis))}."]
    problems = []
    for name in sets:
        try:
            prompts_of(root, axis, name, None)
        except CapabilityError as error:
            problems.append(str(error))
    return problems


def prompts_of(root: str | None, axis: str, name: str, limit: int | None) -> list[tuple[int, str]]:
    """Read a set's prompts with their rows, from 1.

    A limit takes evenly spaced rows, because files are sorted by topic.

    Raises:
        CapabilityError: If the set is unknown, or its file is no list of objects with a `prompt`.
    """
    known = known_sets(root, axis) if root else []
    if not root or name not in known:
        have = f"{root}/{axis} has {', '.join(known) or 'none'}"
        raise CapabilityError(f"capability: the set {name!r} is unknown; {have}. {ROOT_ADVICE}")
    folder = (Path(root).expanduser() / axis).resolve()
    path = (folder / name / "test.json").resolve()
    if not path.is_relative_to(folder):
        raise CapabilityError(f"capability: {folder / name} leads out of paths.hhh; put the file itself there.")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CapabilityError(f"{path} cannot be read: {error}.") from error
    if not isinstance(rows, list) or not rows:
        raise CapabilityError(f"{path} is no list of prompts; each row is an object with a 'prompt'.")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            raise CapabilityError(f"{path} row {number}: 'prompt' is missing, empty or no text.")
    count = len(rows) if limit is None else min(limit, len(rows))
    chosen = [at * len(rows) // count for at in range(count)]
    return [(at + 1, rows[at]["prompt"]) for at in chosen]
