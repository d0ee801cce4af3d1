"""The page of several runs."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from trace_hydra.colours import colour_of
from trace_hydra.leaderboard import pooled
from trace_hydra.report import set_view
from trace_hydra.report.cells import Column, Grid, text
from trace_hydra.report.groups import Group, Member, fields, group_runs, order_names
from trace_hydra.report.hostile import plain
from trace_hydra.report.published_view import beside, points
from trace_hydra.report.template import drawn, render
from trace_hydra.statistics import Comparison, Difference, Estimate

_MOST_PAIRS = 28
"""Differences in a figure; of more, only those with the group that scores best are drawn."""
_MOST_DRAWN = 6
"""Fields of comparable groups that get figures."""


def set_page(
    members: Sequence[Member],
    left_out: Sequence[Mapping[str, str]],
    *,
    title: str,
    where: Path,
) -> str:
    """Write the page of several runs.

    Args:
        members: Finished runs, in any order.
        left_out: `folder` and `reason` of those that do not count.
        title: Of the page.
        where: Folder that it will lie in; a run whose folder has a report.html is linked to it from there.
    """
    groups = group_runs(members)
    found = set_view.estimates(groups)
    parts = fields(groups)
    blocks = [_field(index, own, found) for index, own in enumerate(parts.values(), start=1)]
    sections = [("verdict", "Methods"), *_SECTIONS[bool(len(groups) > 1)]]
    rows, alone = beside(pooled([member.run for member in members]))
    sections += [("published", "Published")] if rows or alone else []
    sections += [("runs-heading", "Runs"), *([("left-out", "Left out")] if left_out else [])]
    return render(
        "set.html",
        kind="Runs of TRACE",
        title=title,
        sections=sections if groups else [("left-out", "Left out")],
        footer="Every number rests on the results.json and the answers of the runs listed here, rounded here.",
        sentence=set_view.sentence(groups, left_out),
        notices=set_view.notices(groups, parts),
        methods=set_view.methods(groups, found) if groups else None,
        colours=[(group.label, colour_of(group.method)) for group in groups],
        plane=_plane(groups, found) if groups else None,
        fields=blocks,
        beside=rows,
        alone=alone,
        runs=set_view.runs(members, [_address(member, where) for member in members]) if members else None,
        left_out=_left_out(left_out) if left_out else None,
    )


_SECTIONS = (
    [("fields", "Spread and matrices")],
    [("fields", "Differences, spread, matrices")],
)


def _plane(groups: Sequence[Group], found: Mapping[str, Mapping[str, Estimate]]) -> Markup:
    from trace_hydra.report.figures import RunPoint

    runs = [member.run.results for group in groups for member in group.members]
    theirs = points((one.get("published") or {}).get("model") for one in runs)
    ours = [RunPoint(one.label, one.method, found[one.label]["op"], found[one.label]["bwt"]) for one in groups]
    said = "A point a group; the numbers stand in the table of groups."
    return drawn("op_against_bwt", ours, theirs, title="OP against BWT", described=said)


def _field(index: int, groups: Sequence[Group], found: Mapping[str, Mapping[str, Estimate]]) -> dict[str, Any]:
    """Give what is shown of groups that may be compared."""
    record = groups[0].record
    draws = index <= _MOST_DRAWN
    name = f"{record['model']}, data {record['data']}, protocol {record['protocol']} [{record['fingerprint']}]"
    tasks = groups[0].members[0].run.results["tasks"]
    block: dict[str, Any] = {
        "id": f"field-{index}",
        "name": plain(f"{name}, {len(tasks)} task{'s' * (len(tasks) != 1)}", 200),
        "power": set_view.shown_difference(groups),
        "spread": _spread(index, groups, found) if draws else None,
        "comparisons": [],
        "why": [],
        "ranks": None,
        "not_drawn": "" if draws else f"Figures are drawn for the first {_MOST_DRAWN} of these only.",
    }
    block["matrices"], block["matrices_note"] = set_view.matrices(groups)
    if len(groups) == 1:
        block["why"] = ["There is one group here, nothing to compare it with."]
        return block
    for number, comparison in set_view.compared(groups).items():
        if isinstance(comparison, str):
            block["why"].append(f"{set_view.SHOWN[number]} is not compared: {comparison}.")
            continue
        name = f"pairs-{index}-{number}"
        chosen = _chosen(comparison, found)
        said = f"Differences in {set_view.SHOWN[number]} with 95 % intervals; the numbers stand in the table below."
        if len(chosen.differences) < len(comparison.differences):
            said = f"Those with {chosen.differences[0].one}, which scores best. {said}"
        svg = (
            drawn("differences", chosen, name=f"forest-{index}-{number}", title=said, described=said) if draws else None
        )
        block["comparisons"].append({"svg": svg, "said": said, "grid": set_view.pairwise(comparison, name)})
    ranks = set_view.ranked(groups) if len(groups) > 2 else "ranks need three groups or more"
    if isinstance(ranks, str):
        block["why"].append(f"No mean ranks: {ranks}.")
    elif draws:
        said = "Mean rank over tasks, orders and seeds, with the critical difference (Friedman, Nemenyi)."
        block["ranks"] = drawn("critical_difference", ranks, name=f"ranks-{index}", title="Mean ranks", described=said)
        block["ranks_said"] = f"{said} Rests on {ranks.note}."
    return block


def _chosen(comparison: Comparison, found: Mapping[str, Mapping[str, Estimate]]) -> Comparison:
    """Keep what a figure has room for: all differences, or those with the group of the highest OP, it first."""
    if len(comparison.differences) <= _MOST_PAIRS:
        return comparison
    known = {label: own["op"].value for label, own in found.items() if own["op"].value is not None}
    labels = {one.one for one in comparison.differences} | {one.other for one in comparison.differences}
    best = max((label for label in known if label in labels), key=lambda label: known[label] or 0.0, default="")
    kept = [_turned(one, best) for one in comparison.differences if best in (one.one, one.other)]
    return Comparison(comparison.number, tuple(kept[:_MOST_PAIRS]), comparison.note)


def _turned(one: Difference, first: str) -> Difference:
    if one.one == first:
        return one
    low, high = (None if end is None else -end for end in (one.high, one.low))
    value, effect = (None if number is None else -number for number in (one.difference, one.effect))
    return Difference(
        first, one.one, one.number, value, low, high, one.p, one.p_adjusted, effect, one.rows, one.pairs, one.note
    )  # fmt: skip


def _spread(index: int, groups: Sequence[Group], found: Mapping[str, Mapping[str, Estimate]]) -> list[dict[str, Any]]:
    """Draw every run of the groups that have several, in OP and BWT."""
    from trace_hydra.report.figures import Score

    several = [group for group in groups if len(group.members) > 1]
    if not several:
        return []
    charts, names = [], order_names([member for group in several for member in group.members])
    for number in set_view.COMPARED:
        values = {
            group.label: [
                Score(float(value), names[tuple(member.run.results["tasks"])], member.run.results["seed"]["train"])
                for member in group.members
                if (value := member.run.numbers()[number]) is not None
            ]
            for group in several
        }
        label = set_view.SHOWN[number]
        said = f"{label} of every run by order and seed; the numbers stand in the table of runs."
        svg = drawn(
            "spread",
            values,
            number,
            means={group.label: found[group.label][number] for group in several},
            methods={group.label: group.method for group in several},
            name=f"spread-{index}-{number}",
            title=f"Spread of {label}",
            described=said,
        )
        charts.append({"svg": svg, "said": said})
    return charts


def _address(member: Member, where: Path) -> str:
    """Give the address of a run's own page as a browser takes it, nothing where there is none."""
    page = member.folder / "report.html"
    return quote(Path(os.path.relpath(page, where)).as_posix()) if page.is_file() else ""


def _left_out(left_out: Sequence[Mapping[str, str]]) -> Grid:
    rows = [[text(plain(one["folder"], 200)), text(plain(one["reason"], 500))] for one in left_out]
    columns = [Column("folder", numeric=False), Column("why it does not count", numeric=False)]
    return Grid("left-out-table", "Folders that do not count", columns, rows)
