"""Files of a report: report.html, report.md, and on request figures and tables."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trace_hydra import published
from trace_hydra.errors import StoreError, TraceHydraError
from trace_hydra.files import write_bytes
from trace_hydra.metrics.records import read_json
from trace_hydra.report import figures, paper, set_view, text
from trace_hydra.report.bounds import delta_intervals
from trace_hydra.report.curves import read_curves
from trace_hydra.report.groups import Group, Member, fields, group_runs
from trace_hydra.report.loading import Loaded, load
from trace_hydra.report.page import report_page, run_page
from trace_hydra.report.published_view import points
from trace_hydra.report.run_view import cell_intervals
from trace_hydra.report.style import to_bytes
from trace_hydra.report.tables import FORMATS, Table, markdown_text

log = logging.getLogger(__name__)
_MOST_RUNS = 12
"""Runs that get figures of their own; of more, groups do."""
_MOST_PAIRS = 15
"""Matrix differences of two groups; of more groups, only those with the first one are drawn."""
Draw = Callable[[], Any]


@dataclass
class Done:
    """What was written."""

    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is missing, and why."""
    failed: bool = False
    """Whether a part could not be made by a fault."""


def write_report(
    folders: Sequence[Path], out: Path | None, *, figures: Sequence[str] = (), tables: Sequence[str] = ()
) -> Done:
    """Write the report of all runs in and below some folders.

    Args:
        folders: Run directories, sweeps, or folders above.
        out: Where files go; None: the first folder.
        figures: Formats of `style.FORMATS`; none: no figures.
        tables: Formats of `tables.FORMATS`.

    Raises:
        DataError: If there is no run.
        StoreError: If a file cannot be written, or none of the runs can be read.
    """
    found, done, target = load(folders), Done(), out or folders[0]
    done.notes += [f"left out: {one['folder']}: {one['reason']}" for one in found.left_out]
    if not found.members and not found.partial:
        _lone(folders, found, target, done)
        return done
    groups = group_runs(found.members)
    if len(parts := fields(groups)) > 1:
        done.notes.append(f"{len(parts)} sets of runs differ in model, data, test rows or protocol: never averaged.")
    made = list(_tables(groups, done))
    _write(_page(found, folders, target).encode("utf-8", "backslashreplace"), target / "report.html", done)
    _write(_markdown(found, made).encode("utf-8", "backslashreplace"), target / "report.md", done)
    for table in made:
        for kind in tables:
            content = table.write(kind).encode("utf-8", "backslashreplace")
            _write(content, target / "tables" / f"{table.name}.{FORMATS[kind]}", done)
    for name, draw in _figures(found, groups, done) if figures else ():
        if (figure := _drawn(name, draw, done)) is not None:
            for kind in figures:
                _write(to_bytes(figure, kind), target / "figures" / f"{name}.{kind}", done)
    return done


def _lone(folders: Sequence[Path], found: Loaded, target: Path, done: Done) -> None:
    """Show a single run that cannot count, of another version say, as far as it goes."""
    reasons = "; ".join(f"{one['folder']}: {one['reason']}" for one in found.left_out[:5])
    if len(folders) > 1 or not (folders[0] / "results.json").is_file():
        raise StoreError(f"no run here can be reported: {reasons}")
    results = read_json(folders[0] / "results.json", StoreError)
    try:
        page = run_page(results, folders[0])
    except (TraceHydraError, AttributeError, KeyError, TypeError) as error:
        raise StoreError(f"no run here can be reported: {reasons}") from error
    _write(page.encode("utf-8", "backslashreplace"), target / "report.html", done)


def _page(found: Loaded, folders: Sequence[Path], target: Path) -> str:
    title = ", ".join(folder.resolve().name for folder in folders)[:200]
    return report_page(found.members, found.left_out, title=title, where=target, partial=found.partial)


def _markdown(found: Loaded, made: Sequence[Table]) -> str:
    """Write report.md: of one run as the run itself does, of several their tables."""
    if len(found.members) + len(found.partial) == 1:
        one = (found.members or found.partial)[0]
        return text.render(one.run.results, one.folder)
    shown = [table for table in made if table.intervals]
    parts = [f"# {len(found.members)} runs", *(table.to_markdown() for table in shown)]
    if found.left_out:
        lines = [f"- {markdown_text(one['folder'])}: {markdown_text(one['reason'], 400)}" for one in found.left_out]
        parts.append("## Left out\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _tables(groups: Sequence[Group], done: Done) -> Iterator[Table]:
    if not groups:
        return
    shown = [note for own in fields(groups).values() for note in set_view.shown_difference(own)]
    names: set[str] = set()
    made = [paper.table_1(groups, shown), paper.table_2(groups), paper.samples_epochs(groups)]
    for table in [*made, *(table for group in groups for table in paper.rounds(group))]:
        if isinstance(table, str):
            done.notes.append(f"no table: {table}.")
            continue
        apart = _named_apart(table, names)
        yield from (apart, paper.with_intervals(apart))


def _named_apart(table: Table, names: set[str]) -> Table:
    number, name = 1, table.name
    while {name, f"{name}_intervals"} & names:
        number += 1
        name = f"{table.name}_{number}"
    names |= {name, f"{name}_intervals"}
    return replace(table, name=name)


def _figures(found: Loaded, groups: Sequence[Group], done: Done) -> Iterator[tuple[str, Draw]]:
    """Name every figure and say how it is drawn."""
    runs = [*found.members, *found.partial]
    if len(runs) <= _MOST_RUNS:
        for place, member in enumerate(runs, 1):
            yield from _of_run(f"{place:02d}_{paper.slug(str(member.run.results.get('name')))}", member, done)
    else:
        done.notes.append(f"figures of single runs are drawn for up to {_MOST_RUNS} runs, not for {len(runs)}.")
    if len(groups) > 1 or any(len(group.members) > 1 for group in groups):
        yield "op_against_bwt", lambda: _plane(groups)
        for place, own in enumerate(fields(groups).values(), 1):
            yield from _of_field(f"_{place}" if len(fields(groups)) > 1 else "", own, done)
    if len(set(paper.sizes_of(groups).values())) > 1:
        yield "samples_epochs", lambda: _samples(groups)


def _of_run(name: str, member: Member, done: Done) -> Iterator[tuple[str, Draw]]:
    results = member.run.results
    if isinstance(member.scores, str):
        done.notes.append(f"{member.folder}: no intervals: {member.scores}")
    ends = cell_intervals(member.scores)
    yield f"{name}_heat_map", lambda: figures.heat_map(results)
    if ends:
        yield f"{name}_heat_map_intervals", lambda: figures.heat_map(results, ends)
    yield f"{name}_lines_over_stages", lambda: figures.lines_over_stages(results, ends)
    if all(cell is None for cell in results["matrix"][0]):
        done.notes.append(f"{member.folder}: row 0 was not scored, so nothing is said about before training.")
    if (results.get("capability") or {}).get("sets"):
        yield (
            f"{name}_capability_bars",
            lambda: figures.capability_bars(results, delta_intervals(results, member.scores)),
        )
    else:
        done.notes.append(f"{member.folder}: no figure of abilities: no capability set was measured.")
    curves = read_curves(member.folder)
    if isinstance(curves, str):
        done.notes.append(f"{member.folder}: no training curves: {curves}")
    else:
        yield f"{name}_training_curves", lambda: figures.training_curves(curves, results["tasks"])


def _of_field(ending: str, groups: Sequence[Group], done: Done) -> Iterator[tuple[str, Draw]]:
    """Name the figures of groups that may be compared."""
    methods = {group.label: group.method for group in groups}
    for number in set_view.COMPARED:
        values = {
            group.label: [
                figures.Score(float(value), one["task_order"], one["seed"]["train"])
                for member in group.members
                for one in [member.run.results]
                if (value := one[number]) is not None
            ]
            for group in groups
        }
        means = {group.label: group.estimate(number) for group in groups}
        yield (
            f"spread_{number}{ending}",
            lambda values=values, number=number, means=means: figures.spread(
                values, number, means=means, methods=methods
            ),
        )
    if len(groups) < 2:
        return
    for number, comparison in set_view.compared(groups).items():
        if isinstance(comparison, str):
            done.notes.append(f"no differences in {number}: {comparison}")
        else:
            yield f"differences_{number}{ending}", lambda comparison=comparison: figures.differences(comparison)
    ranked = set_view.ranked(groups)
    if isinstance(ranked, str):
        done.notes.append(f"no critical-difference diagram: {ranked}")
    else:
        yield f"critical_difference{ending}", lambda: figures.critical_difference(ranked, methods)
    yield from _matrix_differences(ending, groups, done)


def _matrix_differences(ending: str, groups: Sequence[Group], done: Done) -> Iterator[tuple[str, Draw]]:
    means: list[tuple[str, Mapping[str, Any]]] = []
    for group in groups:
        if isinstance(matrix := group.matrix(), str):
            done.notes.append(f"no mean matrix of {group.label}: {matrix}")
            continue
        said = {"name": group.label, "tasks": group.members[0].run.results["tasks"], "matrix": matrix}
        means.append((group.label, said))
    pairs = [(one, other) for place, one in enumerate(means) for other in means[place + 1 :]]
    if len(pairs) > _MOST_PAIRS:
        done.notes.append(f"matrix differences: those with {means[0][0]} only, {len(pairs)} pairs are too many.")
        pairs = [(means[0], other) for other in means[1:]]
    for number, (one, other) in enumerate(pairs, 1):
        name = f"matrix_difference{ending}_{number}_{paper.slug(one[0])}_{paper.slug(other[0])}"
        yield name, lambda one=one, other=other: figures.matrix_difference(one[1], other[1])


def _plane(groups: Sequence[Group]) -> Any:
    ours = [figures.RunPoint(one.label, one.method, one.estimate("op"), one.estimate("bwt")) for one in groups]
    return figures.op_against_bwt(ours, points(_published_models(groups)))


def _samples(groups: Sequence[Group]) -> Any:
    """Put our groups beside TRACE's runs of the same model and method."""
    sizes, found = paper.sizes_of(groups), []
    keys = [
        key for key in ("method", "model", "tuning", "data", "protocol") if len({g.record[key] for g in groups}) > 1
    ]
    for group in groups:
        if group.label in sizes and (op := group.estimate("op")).value is not None:
            series = ", ".join(str(group.record[key]) for key in keys or ["method"])
            found.append(figures.SamplesPoint(*sizes[group.label], op.value, op.low, op.high, series))
    for model in sorted(_published_models(groups) - {None}):
        for one in published.task_scores(model):
            if one.epochs and isinstance(one.data, str) and one.data.isdigit() and one.mean is not None:
                where = f"{one.method}, {one.paper} Table {one.table}, {model}"
                op = one.mean * 100 / one.scale
                found.append(figures.SamplesPoint(int(one.data), one.epochs, op, series=where, published=True))
    return figures.samples_epochs(found)


def _published_models(groups: Sequence[Group]) -> set[Any]:
    return {(member.run.results.get("published") or {}).get("model") for one in groups for member in one.members}


def _drawn(name: str, draw: Draw, done: Done) -> Any:
    try:
        return draw()
    except TraceHydraError as error:
        done.notes.append(f"no figure {name}: {error}")
    except Exception as error:  # one figure that fails must not take the others along
        log.exception("figure %s", name)
        done.failed = True
        done.notes.append(f"figure {name} could not be drawn: {type(error).__name__}: {error}")
    return None


def _write(content: bytes, path: Path, done: Done) -> None:
    write_bytes(content, path)
    done.files.append(path)
