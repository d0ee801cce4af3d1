"""What the pages are about: from runs on disk, or, without any, from conf/."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trace_hydra import colours
from trace_hydra.collect import SHOWN, Collected, Run, collect, summarise
from trace_hydra.errors import StoreError
from trace_hydra.wandb_labels import known_id, order_label, orders

NAMES = {
    "op": "OP",
    "bwt": "BWT",
    "forgetting": "Forgetting",
    "delta_general": "Δ general",
    "delta_instruction": "Δ instruction",
    "delta_safety": "Δ safety",
}


@dataclass(frozen=True)
class Facts:
    """What the pages show; the same facts give the same pages, byte for byte."""

    tasks: tuple[str, ...]
    """A chart each, in this order."""
    methods: tuple[str, ...]
    orders: tuple[str, ...]
    """Names of task orders."""
    groups: tuple[tuple[str, str, str], ...] = ()
    """Method, order and `comparable` of groups that exist."""
    run_colours: Mapping[str, str] = field(default_factory=dict)
    """W&B's id -> `#rrggbb` of its method."""
    table: tuple[tuple[str, ...], ...] = ()
    """Lines of cells, the header first; nothing without runs."""
    left_out: int = 0
    """Runs on disk that do not count."""


def from_conf() -> Facts:
    """Take TRACE's tasks, the fixed orders of conf/task_order, and every method that has a colour."""
    known = orders()
    return Facts(known["trace"], colours.listed(), tuple(known))


def from_runs(folders: Sequence[Path]) -> Facts:
    """Read finished runs.

    Raises:
        StoreError: If a folder holds none.
    """
    found: list[tuple[Path, Run]] = []
    left_out = 0
    for folder in folders:
        collected: Collected = collect(folder)
        if not collected.runs:
            raise StoreError(
                f"--runs {folder}: no finished run below it{_why(collected)}. Name a folder of run directories."
            )
        found += [(folder / run.folder, run) for run in collected.runs]
        left_out += len(collected.left_out)
    once = {run.identity: (path, run) for path, run in reversed(found)}
    paths, runs = zip(*sorted(once.values(), key=lambda one: (one[1].group, one[1].identity)), strict=True)
    groups = [(run.results["method"], _order(run), run.comparable) for run in runs]
    ids = [(known_id(path), colours.colour_of(group[0])) for path, group in zip(paths, groups, strict=True)]
    return Facts(
        tasks=tuple(dict.fromkeys(str(task) for run in runs for task in run.results["tasks"])),
        methods=tuple(sorted({method for method, _, _ in groups})),
        orders=tuple(sorted({order for _, order, _ in groups})),
        groups=tuple(sorted(set(groups))),
        run_colours=dict(sorted((one, colour) for one, colour in ids if one is not None)),
        table=_table(summarise(runs)),
        left_out=left_out,
    )


def _order(run: Run) -> str:
    return order_label(run.results["task_order"], run.results["tasks"])


def _why(collected: Collected) -> str:
    return "".join(f"; {one['folder']}: {one['reason']}" for one in collected.left_out[:1])


def _table(records: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], ...]:
    """Write means and 95 % intervals over the runs of each group."""
    header = ("method", "model", "tuning", "data", "protocol", "runs", "seeds", "orders", *NAMES.values())
    lines: list[tuple[str, ...]] = [header]
    for one in records:
        names = [str(one[key]) for key in ("method", "model", "tuning", "data")]
        names[0] += f" ({one['settings']})" if one["settings"] else ""
        counts = [str(one["runs"]), str(len(one["seeds"])), str(len(one["orders"]))]
        numbers = [_number(one["numbers"][name], one["runs"]) for name in SHOWN]
        lines.append((*names, f"{one['protocol']} {one['fingerprint']}", *counts, *numbers))
    return tuple(lines)


def _number(number: Mapping[str, Any], runs: int) -> str:
    """Write a mean with half its interval; what is not known is a dash."""
    if number["mean"] is None:
        return "—"
    text = f"{number['mean']:.2f}" + ("" if number["margin"] is None else f" ± {number['margin']:.2f}")
    return text if number["n"] == runs else f"{text} (n={number['n']})"
