"""`python -m trace_hydra.leaderboard [DIR...]`: published TRACE results by group, and runs of ours beside them.

Loads neither torch nor pandas.
"""

import argparse
import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trace_hydra import published
from trace_hydra.collect import Run, collect
from trace_hydra.errors import DataError, TraceHydraError
from trace_hydra.published import listing
from trace_hydra.published.beside import model_of
from trace_hydra.published.listing import Listing
from trace_hydra.report.hostile import plain

SHOWS = ("results", "tasks", "matrices", "abilities", "judged", "subsets", "papers", "doubts")
FORMATS = ("table", "csv", "md", "json")
_LONGEST = 100_000
"""Characters of a cell."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 done, 2 if a name or a folder is wrong."""
    parser = argparse.ArgumentParser(prog="python -m trace_hydra.leaderboard", description=str(__doc__).split("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR", help="runs, or folders of runs at any depth")
    parser.add_argument("--model", help="rows of this model; with DIR: instead of the runs' own")
    parser.add_argument("--method", help="rows of this method; with DIR: instead of the runs' own")
    parser.add_argument("--group", help="rows of this group, which may be compared with each other")
    parser.add_argument("--show", choices=SHOWS, default=SHOWS[0], help="results: OP and BWT (default)")
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="table (default), csv, md, json")
    options = parser.parse_args(arguments)
    try:
        return show(options)
    except TraceHydraError as error:
        print(f"trace_hydra.leaderboard: {_plain(str(error))}", file=sys.stderr)
        return 2


def show(options: argparse.Namespace) -> int:
    """Write what the options ask for; 2 if there is no finished run in the folders that they name."""
    check_names(options.model, options.method, options.group)
    runs, left_out = find(options.folders)
    for one in left_out:
        print(f"left out: {_plain(one)}", file=sys.stderr)
    if options.folders and not runs:
        where = ", ".join(map(str, options.folders))
        print(f"trace_hydra.leaderboard: no finished run below {where}; name run directories.", file=sys.stderr)
        return 2
    if options.show == "results" and runs:
        show_beside(runs, options)
    elif options.show == "results":
        show_entries(options)
    else:
        write(listings(options, runs), options.format)
    return 0


def check_names(model: str | None, method: str | None, group: str | None) -> None:
    """Refuse names that no row has.

    Raises:
        DataError: Lists those there are.
    """
    rows = published.entries()
    known = {
        "model": {name for entry in rows for name in (entry.model, *model_of(entry).values())}
        | {one.model for one in (*published.abilities(), *published.judged(), *published.task_scores())},
        "method": {name for entry in rows for name in (entry.method, entry.family)}
        | {one.method for one in (*published.abilities(), *published.judged(), *published.task_scores())},
        "group": set(published.groups()),
    }
    for key, name in (("model", model), ("method", method), ("group", group)):
        if name is not None and name not in known[key]:
            raise DataError(f"--{key} {name} is in no published row; there is {', '.join(sorted(known[key]))}.")


def find(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Collect the runs of several folders, each run once.

    Raises:
        DataError: If a folder is not there.
    """
    runs, left_out, seen = [], [], set()
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"{folder} is no folder; name run directories or folders of them.")
        found = collect(folder)
        left_out += [f"{folder / one['folder']}: {one['reason']}" for one in found.left_out]
        for run in found.runs:
            if run.identity in seen:
                left_out.append(f"{folder / run.folder}: the same run again")
            else:
                seen.add(run.identity)
                runs.append(run)
    return runs, left_out


def pooled(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Put together runs that differ in seeds only: name -> runs. Other orders have other published rows."""
    found: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        found.setdefault((run.group, tuple(run.results["tasks"])), []).append(run)
    named: dict[str, list[Run]] = {}
    for members in found.values():
        first = members[0].results
        seeds = ", ".join(str(member.results["seed"]["train"]) for member in members)
        parts = (first["model"], first["method"], first["tuning"], first["data"], f"order {first['task_order']}")
        name = f"{' '.join(map(str, parts))}, protocol {first['protocol']['name']}, seed {seeds}"
        while name in named:  # other settings
            name += " (other settings)"
        named[name] = members
    return named


def show_entries(options: argparse.Namespace) -> None:
    """Write published rows alone."""
    rows = published.entries(options.model, options.method, options.group)
    if options.format == "json":
        print(json.dumps({"published": [entry_record(entry) for entry in rows]}, indent=1, ensure_ascii=False))
    elif options.format == "csv":
        sys.stdout.write(csv_text([flat(entry_record(entry)) for entry in rows]))
    else:
        write(listing.by_group(rows), options.format)


def show_beside(runs: Sequence[Run], options: argparse.Namespace) -> None:
    """Write runs beside the rows of the same model and method."""
    tables, records = [], []
    for name, members in pooled(runs).items():
        results = [member.results for member in members]
        chosen = {"model": options.model, "method": options.method}
        found = published.beside(results, members[0].settings, **chosen, group=options.group)
        why = "" if found else published.why_none(results[0], **chosen)
        if not found and options.group and published.beside(results, members[0].settings, **chosen):
            why = f"no row of group {options.group} with its model and method"
        tables.append(
            listing.beside_listing(name, found) if found else Listing(name, (), (), (f"nothing beside it: {why}",))
        )
        folders = [member.folder for member in members]
        rows = [comparison_record(one) for one in found]
        records.append({"name": name, "folders": folders, "rows": rows, "why_none": why or None})
    if options.format == "json":
        print(json.dumps({"runs": records}, indent=1, ensure_ascii=False))
    elif options.format == "csv":
        rows = [{"ours": one["name"], **flat(row)} for one in records for row in one["rows"]]
        sys.stdout.write(csv_text(rows))
        for one in records:
            if one["why_none"]:
                print(f"{_plain(one['name'])}: nothing beside it: {_plain(one['why_none'])}", file=sys.stderr)
    else:
        write(tables, options.format)


def listings(options: argparse.Namespace, runs: Sequence[Run]) -> list[Listing]:
    """Build the tables of `--show`, with rows of ours where there are any."""
    results = [run.results for run in runs]
    models = (
        {options.model} if options.model else {(one.get("published") or {}).get("model") for one in results} - {None}
    )

    def keep(rows: Sequence[Any]) -> list[Any]:
        names = (options.method, "base")
        return [
            one
            for one in rows
            if (not models or one.model in models)
            and (options.method is None or one.method in names or getattr(one, "family", "") == options.method)
        ]

    built = {
        "tasks": lambda: [listing.task_listing(keep(published.task_scores()), results)],
        "matrices": lambda: listing.matrix_listings(keep(published.matrices()), published.papers(), results),
        "abilities": lambda: [listing.ability_listing(keep(published.abilities()), results)],
        "judged": lambda: [listing.judged_listing(keep(published.judged()), results)],
        "subsets": lambda: listing.subset_listing(published.subsets()),
        "papers": lambda: [listing.paper_listing(published.papers())],
        "doubts": lambda: [listing.doubt_listing(published.papers())],
    }
    return built[options.show]()


def entry_record(entry: published.Entry) -> dict[str, Any]:
    """Turn a row into JSON values."""
    keys = ("group", "table", "model", "method", "family", "op", "op_std", "bwt", "bwt_std", "bwt_signed", "sign_note")
    return {
        "paper": entry.paper.paper,
        "arxiv": entry.paper.arxiv,
        **{key: getattr(entry, key) for key in keys},
        "conditions": {part: str(stated) for part, stated in entry.conditions.items()},
        "runs": entry.paper.runs,
        "copied_from": entry.copied_from,
        "note": entry.note,
        "doubts": list(entry.doubts),
    }


def comparison_record(one: published.Comparison) -> dict[str, Any]:
    """Turn a comparison into JSON values."""
    return {
        **entry_record(one.entry),
        "ours": {"op": asdict(one.op), "bwt": asdict(one.bwt), "formula": one.formula},
        "parts": [asdict(part) for part in one.parts],
        "comparable": one.comparable,
        "verdict": one.verdict,
    }


def flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """Spread nested values over columns: a mapping's by key, a part's by its name, texts joined."""
    found: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            found |= {f"{key}_{inner}": one for inner, one in flat(value).items()}
        elif key == "parts":
            found[key] = "; ".join(f"{one['name']}: {one['theirs']} / {one['ours']} ({one['status']})" for one in value)
        else:
            found[key] = "; ".join(value) if isinstance(value, list) else value
    return found


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write CSV; a text that a spreadsheet would compute gets an apostrophe."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = list(dict.fromkeys(key for row in rows for key in row))
    writer.writerow(head)
    writer.writerows([_cell(row.get(key)) for key in head] for row in rows)
    return text.getvalue()


def write(tables: Sequence[Listing], form: str) -> None:
    """Print tables in one of `FORMATS`."""
    if form == "json":
        records = [{"title": one.title, "rows": _records(one), "notes": one.notes} for one in tables]
        print(json.dumps(records, indent=1, ensure_ascii=False))
    elif form == "csv":
        sys.stdout.write(csv_text([{"table": one.title, **row} for one in tables for row in _records(one)]))
    elif form == "md":
        print("\n\n".join(markdown(one) for one in tables))
    else:
        console = Console(width=max(Console().width, 160))
        for one in tables:
            _print(one, console)


def markdown(one: Listing) -> str:
    """Write a table in Markdown, its notes as a list."""
    lines = [f"## {_escaped(one.title)}", ""]
    if one.rows:
        rules = ["---" if name in one.texts else "---:" for name in one.head]
        cells = [[_escaped(cell) for cell in row] for row in one.rows]
        lines += [f"| {' | '.join(line)} |" for line in ([_escaped(name) for name in one.head], rules, *cells)]
        lines.append("")
    depths = [(len(note) - len(note.lstrip()), note.strip()) for note in one.notes]
    return "\n".join([*lines, *(f"{'  ' if depth else ''}- {_escaped(note)}" for depth, note in depths)]).rstrip()


def _records(one: Listing) -> list[dict[str, str]]:
    return [dict(zip(one.head, row, strict=True)) for row in one.rows]


def _print(one: Listing, console: Console) -> None:
    console.print(Text(_plain(one.title), style="bold"))
    if one.rows:
        table = Table()
        for name in one.head:
            table.add_column(Text(name), justify="left" if name in one.texts else "right", overflow="fold")
        for row in one.rows:
            table.add_row(*(Text(_plain(cell)) for cell in row))
        console.print(table)
    for note in one.notes:
        console.print(Text(_plain(note)), soft_wrap=True)
    console.print()


def _plain(text: str) -> str:
    """Spell out what a terminal would act upon."""
    return plain(text, _LONGEST)


def _escaped(text: str) -> str:
    found = _plain(text).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    for letter in "|`*_[]":
        found = found.replace(letter, f"\\{letter}")
    return found


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        float(value)
    except ValueError:
        text = _plain(value)
        return f"'{text}" if text[:1] in "=+-@\t" and text else text
    return value


if __name__ == "__main__":
    sys.exit(main())
