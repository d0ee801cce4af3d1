"""`python -m trace_hydra.store ls|show|verify|gc|export`: what a store holds, whether it is sound, what can go.

`export` writes a stage as a Hugging Face folder; the others load no torch.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trace_hydra.errors import StoreError, TraceHydraError
from trace_hydra.store import cleaning
from trace_hydra.store.entries import KINDS, Store
from trace_hydra.store.survey import (
    OTHERS,
    Item,
    Survey,
    folder_size,
    model_problems,
    other_folders,
    survey,
)

_SHORT = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 done, 1 if `verify` found something, 2 what a user can mend."""
    options = _parser().parse_args(arguments)
    if options.store is None and options.run is not _export:  # a run directory knows its own
        options.store = default_root()
    try:
        return options.run(options)
    except TraceHydraError as error:
        print(f"trace_hydra.store: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has seen enough; nothing else may be written at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def default_root() -> Path:
    """Where `paths.store` is unless it was set: as in conf/paths/default.yaml."""
    given = os.environ.get("TRACE_HYDRA_STORE")
    return Path(given) if given else Path(os.environ.get("HOME", "."), ".cache", "trace_hydra")


def size_text(size: float) -> str:
    """Write bytes with a decimal unit: 1.2 kB, 538 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.2f} TB"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trace_hydra.store", description=str(__doc__).split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text)
        one.add_argument("--store", type=Path, metavar="DIR", help="paths.store of the runs")
        one.set_defaults(run=run)
        return one

    ls = command("ls", _ls, "list entries by kind, with their sizes and who uses them")
    ls.add_argument("--json", action="store_true", help="as JSON")
    show = command("show", _show, "show all that is known about an entry")
    show.add_argument("key", help="a key, kind/key, or the beginning of one")
    verify = command("verify", _verify, "hash every file and compare with the manifests; exit code 1 if one differs")
    verify.add_argument("keys", nargs="*", metavar="KEY", help="entries to check (default: all, and base models)")
    verify.add_argument("--set-aside", action="store_true", help="move damaged entries to damaged/, to be made again")
    gc = command("gc", _gc, "show what can go: leftovers, damaged entries, superseded checkpoints; --yes removes it")
    gc.add_argument("--yes", action="store_true", help="remove it")
    gc.add_argument("--unused", action="store_true", help="also entries that no run directory stands on")
    gc.add_argument(
        "--keep", choices=("last", "adapters", "none"), help="also drop weights of finished runs' stages, but for these"
    )
    gc.add_argument(
        "--older-than", type=float, default=7.0, metavar="DAYS", help="leave younger ones that may be at work (7)"
    )
    gc.add_argument(
        "--ignore-host", action="append", default=[], metavar="NAME", help="run directories noted there are gone"
    )
    export = command("export", _export, "write a stage as a folder that plain transformers and peft load")
    export.add_argument("source", metavar="RUN_DIR|KEY", help="a run directory, or a stage's key with --run")
    export.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    export.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="where things lie now, such as model.path=...")
    export.add_argument("--run", type=Path, metavar="RUN_DIR", dest="run_directory", help="a run with the stage KEY")
    export.add_argument("--stage", type=int, metavar="N", help="1 to the last (default); 0: the start model")
    export.add_argument("--merge", action="store_true", help="merge adapters into the weights: a whole model")
    export.add_argument("--base", metavar="ID|DIR", help="what an adapter names as its base model")
    export.add_argument("--trust", action="append", default=[], metavar="NAME", help="as trust.targets of the run")
    return parser


def _ls(options: argparse.Namespace) -> int:
    found = survey(options.store)
    totals = {kind: sum(item.size for item in found.items.values() if item.kind == kind) for kind in KINDS}
    totals |= {which: sum(map(folder_size, other_folders(found.root, which))) for which in OTHERS}
    records = [_record(found, item) for item in found.items.values()]
    free = shutil.disk_usage(found.root).free
    if options.json:
        held = {name: dict(record) for name, record in found.locked.items()}
        print(json.dumps({"entries": records, "bytes": totals, "free": free, "locked": held}, indent=1))
        return 0
    for kind in KINDS:
        _print_kind(kind, [one for one in records if one["kind"] == kind])
    print("  ".join(f"{name} {size_text(size)}" for name, size in totals.items()), f" free {size_text(free)}")
    for name, record in found.locked.items():
        print(f"locked: {name} by {record.get('host', 'unknown')} process {record.get('pid', '?')}")
    if found.gone:
        print(f"{len(found.gone)} run directories are gone; gc --unused takes what only they used")
    return 0


def _record(found: Survey, item: Item) -> dict[str, Any]:
    return {
        "kind": item.kind,
        "key": item.key,
        "what": item.what(),
        "bytes": item.size,
        "runs": len(found.runs_of(item.name)),
        "uses": list(item.uses),
        "dropped": list(item.dropped),
        "problem": item.problem,
    }


def _print_kind(kind: str, records: Sequence[dict[str, Any]]) -> None:
    if not records:
        return
    table = Table(title=f"{kind}: {len(records)}", title_justify="left")
    for column in ("key", "what", "size", "runs", "made from", ""):
        table.add_column(column, justify="right" if column in ("size", "runs") else "left", no_wrap=column != "what")
    for one in records:
        parents = ", ".join(name.rpartition("/")[2][:_SHORT] for name in one["uses"])
        state = "damaged" if one["problem"] else "weights dropped" if one["dropped"] else ""
        table.add_row(one["key"], one["what"], size_text(one["bytes"]), str(one["runs"]), parents, state)
    Console(width=max(Console().width, 110)).print(table, markup=False)


def _show(options: argparse.Namespace) -> int:
    found = survey(options.store)
    item = found.resolve(options.key)
    lines = [f"{item.name}: {item.what()}", f"folder: {item.folder}", f"size: {size_text(item.size)}"]
    lines += [f"damaged: {item.problem}"] if item.problem else []
    lines += [f"locked by {found.locked[item.name]}"] if item.name in found.locked else []
    lines += [f"made from: {name}" for name in item.uses]
    lines += [f"used for: {name}" for name in found.users_of(item.name)]
    for note in found.runs_of(item.name):
        lines.append(f"used by: {note.directory} ({note.host}, {'finished' if note.finished else 'not finished'})")
    lines += [
        f"file: {name}  {one['size']:,} bytes  {one['sha256']}" for name, one in item.manifest.get("files", {}).items()
    ]
    lines += [f"dropped: {name}" for name in item.dropped]
    print("\n".join(lines))
    print(json.dumps({key: item.manifest.get(key) for key in ("inputs", "facts", "versions")}, indent=1))
    return 0


def _verify(options: argparse.Namespace) -> int:
    found = survey(options.store)
    items = [found.resolve(key) for key in options.keys] or list(found.items.values())
    store = Store(found.root) if options.set_aside else None
    bad = 0
    for item in items:
        if problems := item.problems():
            bad += 1
            print("\n".join(f"{item.name}: {problem}" for problem in problems))
            if store is not None:
                store.set_aside(item.kind, item.key, problems[0])
    models = [] if options.keys else [one for one in other_folders(found.root, "models") if ".tmp-" not in one.name]
    for folder in models:
        problems = model_problems(folder)
        bad += bool(problems)
        for problem in problems:
            print(f"models/{folder.name}: {problem}; it is made again when next used")
    print(f"{len(items) + len(models)} checked, {bad} damaged{' and set aside' if bad and store else ''}")
    return 1 if bad else 0


def _gc(options: argparse.Namespace) -> int:
    found = survey(options.store, options.ignore_host)
    actions = cleaning.plan(found, older_than=options.older_than, unused=options.unused, keep=options.keep)
    free = shutil.disk_usage(found.root).free
    store = Store(found.root) if options.yes else None
    if store is not None and not store.writable:
        raise StoreError(f"{found.root} cannot be written; nothing was removed.")
    total = 0
    for action in actions:
        done = store is None or action.do(store)
        total += action.size if done else 0
        left = "" if done else "; in use, left"
        print(f"{action.what}: {action.name}  {size_text(action.size)}  ({action.reason}{left})")
    if store is None:
        print(f"{len(actions)} could go, {size_text(total)}; {size_text(free)} are free. To do it: --yes")
    else:
        after = shutil.disk_usage(found.root).free
        print(f"{size_text(total)} removed; {size_text(free)} were free, {size_text(after)} are now.")
    return 0


def _export(options: argparse.Namespace) -> int:
    from trace_hydra.export import export
    from trace_hydra.run import quiet

    with quiet():
        folder = export(
            options.run_directory or Path(options.source),
            options.out,
            store=options.store,
            stage=options.source if options.run_directory else options.stage,
            merge=options.merge,
            base=options.base,
            settings=options.settings,
            trust=options.trust,
        )
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
