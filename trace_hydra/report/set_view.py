"""What the page of several runs shows: tables of groups and runs, differences, matrices."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from trace_hydra.errors import TraceHydraError
from trace_hydra.report.cells import Cell, Column, Grid, between, count, number, seconds, text
from trace_hydra.report.groups import Group, Member, mean_matrix, order_names
from trace_hydra.report.heat import change_rows, heat_rows
from trace_hydra.report.hostile import plain
from trace_hydra.report.run_view import DELTAS, SIGNED
from trace_hydra.statistics import Comparison, CriticalDifference, Estimate, compare, critical_difference
from trace_hydra.statistics import smallest_difference as smallest

SHOWN = {
    "op": "OP",
    "bwt": "BWT",
    "forgetting": "Forgetting",
    **{f"delta_{area}": name for area, (name, _) in DELTAS.items()},
}
COMPARED = ("op", "bwt")
_SEEDS = 8
_MATRICES = 40


def sentence(groups: Sequence[Group], left_out: Sequence[Mapping[str, str]]) -> str:
    """Say what the page is about."""
    runs = sum(len(group.members) for group in groups)
    if not runs:
        return "No finished run was found."
    said = [f"{_many(runs, 'run')} in {_many(len(groups), 'group')} of equal settings"]
    for key in ("model", "tuning", "data", "protocol"):
        values = sorted({plain(group.record[key], 40) for group in groups})
        said.append(f"{key} {values[0]}" if len(values) == 1 else f"{len(values)} of {key}: {', '.join(values[:6])}")
    rest = f" {_many(len(left_out), 'folder')} left out, see the end." if left_out else ""
    return f"{'; '.join(said)}.{rest}"


def notices(groups: Sequence[Group], fields: Mapping[tuple[str, ...], Sequence[Group]]) -> list[str]:
    """Say what keeps numbers from being compared, or from being there at all."""
    found = []
    prints = {group.record["fingerprint"] for group in groups}
    if len(prints) > 1:
        found.append(
            f"{len(prints)} protocols (fingerprints) are mixed here. Their runs answered different questions; they "
            "stand side by side and are neither averaged nor compared."
        )
    if len(fields) > 1:
        found.append(
            f"{len(fields)} sets of groups differ in model, data, tasks or protocol; differences are within each."
        )
    alone = [group.label for group in groups if len(group.record["seeds"]) == 1]
    if alone:
        found.append(
            f"One seed only: {_listed(alone)}. Their intervals say what other test rows would change, not what another "
            "training would."
        )
    members = [member for group in groups for member in group.members]
    start = [one.run.folder for one in members if all(cell is None for cell in one.run.results["matrix"][0])]
    if start:
        found.append(f"Without row 0, so that nothing is known of the start model: {_listed(start)}.")
    unread = [(one.run.folder, one.scores) for one in members if isinstance(one.scores, str)]
    if unread:
        found.append(
            f"Answers of {_many(len(unread), 'run')} could not be read; their groups have intervals over runs only and "
            f"are not compared. The first: {plain(unread[0][1], 300)}"
        )
    return found


def estimates(groups: Sequence[Group]) -> dict[str, dict[str, Estimate]]:
    """Estimate every shown number of every group: label -> number -> estimate."""
    return {group.label: {name: group.estimate(name) for name in SHOWN} for group in groups}


def methods(groups: Sequence[Group], found: Mapping[str, Mapping[str, Estimate]]) -> Grid:
    """Put the groups side by side."""
    rows = []
    for group in groups:
        record = group.record
        seeds = ", ".join(map(str, record["seeds"][:_SEEDS])) + (", …" if len(record["seeds"]) > _SEEDS else "")
        rows.append(
            [
                text(group.label),
                text(plain(record["method"], 60)),
                text(plain(record["model"], 60)),
                text(plain(record["tuning"], 40)),
                text(plain(record["data"], 40)),
                text(f"{plain(record['protocol'], 40)} [{plain(record['fingerprint'], 12)}]"),
                text(plain(record["settings"], 120)),
                count(record["runs"]),
                text(seeds),
                count(len(record["orders"])),
                *(estimated(found[group.label][name], sign=name in SIGNED) for name in SHOWN),
            ]
        )
    names = ("group", "method", "model", "tuning", "data", "protocol", "settings apart")
    columns = [Column(name, numeric=False, filter=name in names[1:6]) for name in names]
    columns += [Column("runs"), Column("seeds", numeric=False), Column("orders")]
    columns += [Column(label, "mean [95 % interval]") for label in SHOWN.values()]
    columns, rows = _without_constant(columns, rows)
    return Grid("methods", "Groups of runs with equal settings, mean over their runs", columns, rows, sortable=True)


def estimated(found: Estimate, *, sign: bool) -> Cell:
    """Show an estimate with its interval."""
    cell = number(found.value, found.note, sign=sign)
    if found.value is None or not (ends := between((found.low, found.high), sign=sign)):
        return cell
    return replace(cell, more=f"[{ends}]")


def runs(members: Sequence[Member], addresses: Sequence[str]) -> Grid:
    """List the runs, each with the address of its own page, empty where it has none."""
    rows = []
    for member, address in zip(members, addresses, strict=True):
        results, numbers = member.run.results, member.run.numbers()
        seed = results["seed"].get("train")
        rows.append(
            [
                Cell(plain(member.run.folder, 120), href=address),
                text(plain(results["method"], 60)),
                text(plain(results["model"], 60)),
                text(plain(results["tuning"], 40)),
                text(plain(results["data"], 40)),
                text(plain(results["task_order"], 40)),
                number(seed, digits=0) if isinstance(seed, int) else text(plain(seed, 20)),
                text(plain(results["protocol"]["name"], 40)),
                *(number(numbers.get(name), _why(results, name), sign=name in SIGNED) for name in SHOWN),
                seconds(results["wall_clock_s"]),
            ]
        )
    names = ("run", "method", "model", "tuning", "data", "order", "seed", "protocol")
    columns = [Column(name, numeric=name == "seed", filter=name not in ("run",)) for name in names]
    columns += [*(Column(label) for label in SHOWN.values()), Column("wall clock")]
    columns, rows = _without_constant(columns, rows)
    return Grid("runs", "All runs", columns, rows, sortable=True)


def compared(groups: Sequence[Group]) -> dict[str, Comparison | str]:
    """Compare the groups of a field, each two of them, or say why that cannot be done."""
    found: dict[str, Comparison | str] = {}
    readable = {group.label: group.scores for group in groups if not isinstance(group.scores, str)}
    for name in COMPARED:
        try:
            scores = {label: own for label, own in readable.items() if not isinstance(own, str)}
            found[name] = compare(scores, name) if len(scores) > 1 else "fewer than two groups have readable answers"
        except TraceHydraError as error:
            found[name] = str(error)
    return found


def pairwise(found: Comparison, name: str) -> Grid:
    """Give the differences of each two groups."""
    rows = [
        [
            text(f"{one.one} − {one.other}"),
            number(one.difference, one.note, sign=True),
            _interval(one.low, one.high, one.note),
            _p(one.p, one.note),
            _p(one.p_adjusted, one.note),
            number(one.effect, "needs two pairs of runs", sign=True),
            count(one.rows),
            count(one.pairs),
            text(plain(one.note, 300)),
        ]
        for one in found.differences
    ]
    columns = [
        Column("groups", numeric=False),
        Column("difference", "points"),
        Column("95 % interval"),
        Column("p"),
        Column("p, Holm", "over this table"),
        Column("effect", "Cohen's d"),
        Column("test rows", "of both"),
        Column("pairs", "order and seed; 0: unpaired"),
        Column("note", numeric=False),
    ]
    notes = [found.note] if found.note else []
    if len(rows) > 1 and len({one.note for one in found.differences}) == 1:
        columns, rows = columns[:-1], [row[:-1] for row in rows]
        notes.append(f"Each difference: {plain(found.differences[0].note, 300)}.")
    caption = f"Differences in {SHOWN.get(found.number, found.number)}"
    return Grid(name, caption, columns, rows, sortable=len(rows) > 1, notes=notes)


def ranked(groups: Sequence[Group]) -> CriticalDifference | str:
    """Rank the groups of a field over tasks, orders and seeds, or say why that cannot be done."""
    readable = {group.label: group.scores for group in groups if not isinstance(group.scores, str)}
    try:
        found = critical_difference({label: own for label, own in readable.items() if not isinstance(own, str)})
    except TraceHydraError as error:
        return str(error)
    return found if found.ranks else found.note


def shown_difference(groups: Sequence[Group]) -> list[str]:
    """Say which differences the test rows and runs of a field can show."""
    readable = {group.label: group.scores for group in groups if not isinstance(group.scores, str)}
    said = []
    for name in COMPARED:
        try:
            found = smallest({label: own for label, own in readable.items() if not isinstance(own, str)}, name)
        except TraceHydraError as error:
            said.append(f"{SHOWN[name]}: {error}")
            continue
        if found.points is None:
            said.append(f"Smallest difference in {SHOWN[name]} that could be shown: not known, {found.note}.")
            continue
        trained = ""
        if found.with_training is not None:
            trained = f"; {found.with_training:.2f} with the noise of training that these runs show"
        said.append(
            f"Smallest true difference in {SHOWN[name]} that is found 4 times out of 5: {found.points:.2f} points on "
            f"its {found.rows:,} test rows{trained}." + (f" ({found.note})" if found.note else "")
        )
    return said


def matrices(groups: Sequence[Group]) -> tuple[list[dict[str, Any]], str]:
    """Give the mean matrix of each group and task order of a field, and how it differs from that of the first group.

    Returns:
        The matrices, orders together; and what is said where there are too many of them.
    """
    orders: dict[tuple[str, ...], list[tuple[str, list[Member]]]] = {}
    for group in groups:
        for order, members in group.orders().items():
            orders.setdefault(order, []).append((group.label, members))
    names = order_names([member for group in groups for member in group.members])
    found: list[dict[str, Any]] = []
    for order, parts in orders.items():
        first = mean_matrix(parts[0][1])
        called = f", order {names[order]}" if len(orders) > 1 else ""
        for label, members in parts:
            mean = mean_matrix(members)
            entry = {"label": f"{label}{called}", "tasks": order, "against": parts[0][0], "changes": []}
            entry["rows"] = heat_rows(order, mean, "not scored in every run", digits=1)
            if label != parts[0][0]:
                entry["changes"] = change_rows(order, mean, first)
            found.append(entry)
    note = f"{len(found) - _MATRICES} more are not shown." if len(found) > _MATRICES else ""
    return found[:_MATRICES], note


def _interval(low: float | None, high: float | None, why: str) -> Cell:
    found = between((low, high), sign=True)
    return text(found) if found else number(None, why or "not known")


def _p(value: float | None, why: str) -> Cell:
    if value is None:
        return number(None, why or "not known")
    return Cell("< 0.001", value) if value < 0.001 else number(value, digits=3)


def _why(results: Mapping[str, Any], name: str) -> str:
    if name.startswith("delta_"):
        return "not measured"
    lacking = (results.get("missing") or {}).get(name)
    return f"not known: {', '.join(map(str, lacking))}" if lacking else "not in results.json"


def _without_constant(
    columns: Sequence[Column], rows: Sequence[Sequence[Cell]]
) -> tuple[list[Column], list[list[Cell]]]:
    """Leave out columns of text that say the same in every row, as the page's first sentence does, or as the first."""
    kept = [
        place
        for place, column in enumerate(columns)
        if not place
        or column.numeric
        or (len({row[place].text for row in rows}) > 1 and any(row[place].text != row[0].text for row in rows))
    ]
    return [columns[place] for place in kept], [[row[place] for place in kept] for row in rows]


def _many(many: int, what: str) -> str:
    return f"{many:,} {what}{'s' * (many != 1)}"


def _listed(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(plain(name, 80) for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
