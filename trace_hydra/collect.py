"""`python -m trace_hydra.collect FOLDER`: all runs below a folder in one table, and their means over seeds and orders.

Reads results.json and .hydra/config.yaml; loads neither torch nor pandas.
"""

import argparse
import csv
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trace_hydra.errors import StoreError
from trace_hydra.files import write_bytes, write_json
from trace_hydra.keys import digest
from trace_hydra.metrics.spread import mean_and_margin
from trace_hydra.run_folder import NUMBERS, flaw, read_run, run_folders, settings_of

AREAS = ("general", "instruction", "safety")
_LISTED_SEEDS = 8
SHOWN = ("op", "bwt", "forgetting", *(f"delta_{area}" for area in AREAS))


@dataclass(frozen=True)
class Run:
    """One finished run."""

    folder: str
    """Relative to the folder that is collected."""
    results: Mapping[str, Any]
    settings: Mapping[str, Any]
    """Leaves of its configuration, by key path, without seeds, orders and what changes no score."""

    @property
    def group(self) -> tuple[str, ...]:
        """What must be equal for runs to be averaged: names, protocol fingerprint, settings."""
        protocol = self.results["protocol"]
        names = (str(self.results[key]) for key in ("model", "method", "tuning", "data"))
        return (*names, str(protocol["name"]), str(protocol["fingerprint"]), digest(self.settings, 8))

    @property
    def comparable(self) -> str:
        """See `comparable`."""
        model, _, tuning, data, protocol, fingerprint, _ = self.group
        return comparable(model, tuning, data, protocol, fingerprint, self.settings)

    @property
    def identity(self) -> str:
        """Hash of what the run is: another with the same adds no evidence."""
        keys = [stage.get("key") for stage in self.results["stages"]]
        return digest([self.group, keys, self.results["seed"], self.results["tasks"]])

    def numbers(self) -> dict[str, float | None]:
        """OP and the others, and the change of each ability since before training."""
        capability = self.results.get("capability") or {}
        deltas = {f"delta_{area}": (capability.get(area) or {}).get("delta") for area in AREAS}
        return {**{name: self.results.get(name) for name in NUMBERS}, **deltas}


def comparable(model: str, tuning: str, data: str, protocol: str, fingerprint: str, settings: Mapping[str, Any]) -> str:
    """Write a run's group without its method: runs of one method may be averaged where this is equal."""
    return " ".join((model, tuning, data, protocol, fingerprint, digest(settings, 8)))


@dataclass
class Collected:
    """What lies below a folder."""

    runs: list[Run] = field(default_factory=list)
    partial: list[Run] = field(default_factory=list)
    """Runs whose numbers do not count, though they can be read: they are in `left_out` too."""
    left_out: list[dict[str, str]] = field(default_factory=list)
    """`folder` and `reason` of runs that do not count."""


def collect(folder: Path) -> Collected:
    """Read every run below a folder, at any depth; links to folders are not followed."""
    found, seen = Collected(), dict[str, str]()
    for path in run_folders(folder):
        name = str(path.relative_to(folder))
        results = read_run(path)
        if isinstance(results, str):
            found.left_out.append({"folder": name, "reason": results})
            continue
        run = Run(name, results, settings_of(path))
        if reason := flaw(results):
            found.left_out.append({"folder": name, "reason": f"results.json {reason}"})
            found.partial.append(run)
        elif (other := seen.setdefault(run.identity, name)) != name:
            found.left_out.append({"folder": name, "reason": f"the same run as {other}"})
        else:
            found.runs.append(run)
    return found


def summarise(runs: Sequence[Run], folder: Path | None = None) -> list[dict[str, Any]]:
    """Average the runs of each group.

    Args:
        runs: As collected.
        folder: What they were collected from; given, the test rows of each run are read too, and each number gets
            `low`, `high` and `note` of the interval over rows, seeds and orders (`statistics.across_runs`).

    Returns:
        A record a group: names, protocol, fingerprint, what sets its settings apart from those of groups with the same
        names, runs, seeds, orders, and for each number its mean, the half width of the 95 % interval and how many runs
        have it.
    """
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    records = []
    for group, members in sorted(groups.items()):
        alike = [others[0].settings for key, others in groups.items() if key[:4] == group[:4]]
        values = [member.numbers() for member in members]
        numbers = {}
        for name in values[0]:
            present = [float(number) for value in values if (number := value[name]) is not None]
            mean, margin = mean_and_margin(present)
            numbers[name] = {"mean": mean, "margin": margin, "n": len(present)}
        if folder is not None:
            _add_intervals(numbers, members, folder)
        names = dict(zip(("model", "method", "tuning", "data", "protocol", "fingerprint"), group, strict=False))
        records.append(
            names
            | {
                "settings": _apart(members[0].settings, alike),
                "runs": len(members),
                "seeds": sorted({member.results["seed"]["train"] for member in members}),
                "orders": list(dict.fromkeys(" > ".join(member.results["tasks"]) for member in members)),
                "numbers": numbers,
            }
        )
    return records


def _add_intervals(numbers: dict[str, Any], members: Sequence[Run], folder: Path) -> None:
    from trace_hydra.statistics import across_runs, read_scores

    try:
        scores = [read_scores(folder / member.folder, member.results) for member in members]
    except StoreError as error:
        for number in numbers.values():
            number |= {"low": None, "high": None, "note": str(error)}
        return
    for name, number in numbers.items():
        found = across_runs(scores, name)
        number |= {"low": found.low, "high": found.high, "note": found.note}


def row_of(run: Run) -> dict[str, Any]:
    """Flatten a run to a row of the table."""
    results = run.results
    row = {key: results[key] for key in ("model", "method", "tuning", "data", "task_order")}
    row |= {f"seed_{key}": value for key, value in results["seed"].items()}
    row |= {key: results["protocol"].get(key) for key in ("name", "fingerprint", "scoring")}
    row["protocol"] = row.pop("name")
    row |= {"settings": digest(run.settings, 8), **run.numbers()}
    return {"folder": run.folder, **row, "tasks": " > ".join(results["tasks"]), "wall_clock_s": results["wall_clock_s"]}


def cells_of(run: Run) -> Iterator[dict[str, Any]]:
    """Yield a row for each scored cell of a run; carried ones once more where they stand."""
    for cell in run.results["cells"]:
        yield {"folder": run.folder, **{key: cell[key] for key in ("row", "task", "metric", "n", "score")}}


def show(records: Sequence[Mapping[str, Any]], left_out: Sequence[Mapping[str, str]]) -> None:
    """Print the means, and what was left out."""
    same, apart = [], ["method"]
    for key in ("model", "tuning", "data", "protocol", "fingerprint"):
        values = {record[key] for record in records}
        same += [f"{key} {value}" for value in values if len(values) == 1]
        apart += [key] if len(values) > 1 else []
    by_rows = any("low" in number for record in records for number in record["numbers"].values())
    what = (
        "[95 % interval over test rows, seeds and orders]"
        if by_rows
        else "± half width of the 95 % t interval over runs"
    )
    print(f"Mean {what}: {', '.join(same) or 'no run'}")
    table = Table()
    for column in (*apart, "settings", "n", "seeds", "orders"):
        table.add_column(column, overflow="fold", no_wrap=column in apart)
    shown = [name for name in SHOWN if any(record["numbers"][name]["n"] for record in records)]
    for name in shown:
        label = name.upper() if name in ("op", "bwt") else name.replace("delta_", "Δ ")
        table.add_column(label, justify="right", no_wrap=True)
    for record in records:
        seeds = ",".join(map(str, record["seeds"][:_LISTED_SEEDS])) + (",…" * (len(record["seeds"]) > _LISTED_SEEDS))
        counts = (str(record["runs"]), seeds, str(len(record["orders"])))
        numbers = (_number(record["numbers"][name], record["runs"]) for name in shown)
        table.add_row(*(record[key] for key in apart), record["settings"], *counts, *numbers)
    Console(width=max(Console().width, 150)).print(table, markup=False)
    names = [tuple(record[key] for key in ("model", "method", "tuning", "data", "protocol")) for record in records]
    if len(set(names)) < len(names) and len({record["fingerprint"] for record in records}) > 1:
        print(
            "Runs with different fingerprints answered different questions (other test rows, say: generated or sampled "
            "rows follow seed.data) and are not averaged. To vary the training alone: seed.train=0,1,2 seed.data=0."
        )
    notes = dict.fromkeys(record["numbers"][name].get("note") for record in records for name in shown)
    for note in filter(None, notes):
        print(f"intervals: {note}")
    for one in left_out:
        print(f"left out: {one['folder']}: {one['reason']}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 done, 2 if there is nothing to collect or it cannot be written."""
    parser = argparse.ArgumentParser(prog="python -m trace_hydra.collect", description=str(__doc__).split("\n")[0])
    parser.add_argument("folder", type=Path, help="a folder with run directories at any depth, such as paths.runs")
    parser.add_argument("--out", type=Path, help="where collect.csv and collect.json go (default: the folder)")
    parser.add_argument("--rows", action="store_true", help="read the test rows too, for intervals that cover them")
    parser.add_argument("--cells", action="store_true", help="write collect_cells.csv too, a row a scored cell")
    options = parser.parse_args(arguments)
    out = options.out or options.folder
    found = collect(options.folder)
    if not found.runs and not found.left_out:
        print(f"trace_hydra.collect: no run below {options.folder}; name a folder of run directories.", file=sys.stderr)
        return 2
    records = summarise(found.runs, options.folder if options.rows else None)
    rows = [row_of(run) for run in found.runs]
    show(records, found.left_out)
    try:
        write_json({"runs": rows, "groups": records, "left_out": found.left_out}, out / "collect.json")
        write_bytes(_csv(rows), out / "collect.csv")
        if options.cells:
            write_bytes(_csv([cell for run in found.runs for cell in cells_of(run)]), out / "collect_cells.csv")
    except StoreError as error:
        print(f"trace_hydra.collect: {error} Or name another folder with --out.", file=sys.stderr)
        return 2
    print(f"{len(found.runs)} runs, {len(found.left_out)} left out: {out / 'collect.csv'}, {out / 'collect.json'}")
    return 0


def _apart(settings: Mapping[str, Any], alike: Sequence[Mapping[str, Any]]) -> str:
    """Write the settings in which groups of the same names differ."""
    missing = object()
    paths = sorted({path for other in alike for path in other})
    differ = [path for path in paths if any(other.get(path, missing) != settings.get(path, missing) for other in alike)]
    return " ".join(f"{path}={settings.get(path, '-')}" for path in differ)


def _number(number: Mapping[str, Any], runs: int) -> str:
    if number["mean"] is None:
        return "-"
    text = f"{number['mean']:.2f}"
    if "low" in number:
        text += f" [{number['low']:.2f}, {number['high']:.2f}]" if number["low"] is not None else ""
    elif number["margin"] is not None:
        text += f" ± {number['margin']:.2f}"
    return text if number["n"] == runs else f"{text} (n={number['n']})"


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
