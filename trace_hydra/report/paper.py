"""Tables of groups of runs in the layout of TRACE's paper (arXiv:2310.06762): Tables 1, 2, 7-22, and Figure 3's."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from trace_hydra.collect import AREAS
from trace_hydra.metrics.spread import mean_and_margin
from trace_hydra.report.capability import COLUMNS
from trace_hydra.report.groups import Group, Member
from trace_hydra.report.tables import Row, Section, Table, Value
from trace_hydra.statistics import Estimate, RunScores, across_runs, delta_number, score_number

_EARLY = "not scored: the task's own round comes later"
_SYMBOLS = {"general": "ΔR^G", "instruction": "ΔR^I", "safety": "ΔR^S"}


def value_of(estimate: Estimate, *, sign: bool = False) -> Value:
    """Turn an estimate into a cell."""
    return Value(estimate.value, estimate.low, estimate.high, estimate.note, sign)


def slug(text: str) -> str:
    """Make a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text).strip("._")[:80] or "unnamed"


def with_intervals(table: Table) -> Table:
    """Give the variant of a table that shows intervals."""
    caption = f"{table.caption}, with 95 % intervals"
    return replace(table, name=f"{table.name}_intervals", caption=caption, intervals=True)


def table_1(groups: Sequence[Group], notes: Sequence[str] = ()) -> Table:
    """Lay out OP and BWT: methods in rows, models in columns, a section for each data and protocol (Table 1).

    Args:
        groups: Runs that may be averaged.
        notes: Printed below, beside what each group is a mean of.
    """
    models = list(dict.fromkeys(group.record["model"] for group in groups))
    sections: dict[str, dict[str, dict[str, Group]]] = {}
    for group in groups:
        rows = sections.setdefault(_conditions(group, groups), {})
        rows.setdefault(_row_name(group, groups), {})[group.record["model"]] = group
    none = Value(None, why="no run of this method on this model under these conditions")
    made = []
    for title, rows in sections.items():
        lines = []
        for name, by_model in rows.items():
            cells: list[Value | str] = []
            for model in models:
                group = by_model.get(model)
                cells += [none, none] if group is None else [value_of(group.estimate(key)) for key in ("op", "bwt")]
            lines.append(Row([name], cells))
        made.append(Section(title, lines))
    return Table(
        "table_1",
        "OP and BWT after the last stage, 0-100; negative BWT is forgetting",
        ["method"],
        ["OP", "BWT"] * len(models),
        made,
        [(model, 2) for model in models],
        [*(_runs(group) for group in groups), *notes],
    )


def table_2(groups: Sequence[Group]) -> Table | str:
    """Lay out the sets of general ability, start model first, with the change of each (Table 2), or say why not."""
    measured = [group for group in groups if all(_sets(member) for member in group.members)]
    present = {name for group in measured for member in group.members for name in _sets(member)}
    general = {
        name: None for group in measured for name, one in _sets(group.members[0]).items() if one["area"] == "general"
    }
    columns = [name for name in (*COLUMNS, *(name for name in general if name not in COLUMNS)) if name in present]
    if not measured:
        return "Table 2: no run measured capability sets (capability=none)"
    sections: dict[str, list[Row]] = {}
    starts: set[tuple[str, str, str]] = set()
    for group in measured:
        prints = {(member.run.results.get("capability") or {}).get("fingerprint") for member in group.members}
        title = f"capability {', '.join(sorted(map(str, prints)))}, data {group.record['data']}"
        rows = sections.setdefault(title, [])
        if len(prints) > 1:
            why = "its runs measured different capability sets, which are not averaged"
            rows.append(_whole_row(group, groups, Value(None, why=why), len(columns) + len(AREAS)))
            continue
        before = [_mean(group, name, "before") for name in columns]
        model = group.record["model"]
        if (start := (title, model, repr([one.value for one in before]))) not in starts:
            starts.add(start)
            rows.append(Row([model, "start model"], [*before, *[""] * len(AREAS)]))
        name = _row_name(group, groups)
        areas = [value_of(group.estimate(f"delta_{area}"), sign=True) for area in AREAS]
        rows.append(Row([model, name], [*(_mean(group, one, "after") for one in columns), *areas]))
        changes = [_change(group, one) for one in columns]
        rows.append(Row([model, f"{name}, change"], [*changes, *[""] * len(AREAS)]))
    return Table(
        "table_2",
        "General ability, 0-100, and the change of abilities against the start model, points",
        ["model", "method"],
        [*(COLUMNS.get(name, name) for name in columns), *_SYMBOLS.values()],
        [Section(title, rows) for title, rows in sections.items()],
        (),
        [_runs(group) for group in measured],
        decimals=2,
    )


def rounds(group: Group) -> list[Table]:
    """Lay out a group's scores by task and round, with OP after each round and BWT (Tables 7-22); a table an order."""
    orders: dict[tuple[str, ...], list[Member]] = {}
    for member in group.members:
        orders.setdefault(tuple(member.run.results["tasks"]), []).append(member)
    return [_rounds(replace(group, members=own), list(tasks)) for tasks, own in orders.items()]


def _rounds(group: Group, tasks: list[str]) -> Table:
    cells = {(row, task): _cell(group, row, task) for row in range(len(tasks) + 1) for task in tasks}
    rows = []
    for place, task in enumerate(tasks, 1):
        line = [cells[row, task] for row in range(len(tasks) + 1)]
        early = [replace(cell, why=_EARLY) if cell.value is None else cell for cell in line[:place]]
        rows.append(Row([task], [*early, *line[place:]]))
    op: list[Value | str] = [""]
    for row in range(1, len(tasks) + 1):
        values = [cells[row, task].value for task in tasks[:row]]
        known = [value for value in values if value is not None]
        mean = sum(known) / len(known) if len(known) == len(values) else None
        op.append(Value(mean, why="a score of this round is missing" if mean is None else ""))
    op[-1] = value_of(group.estimate("op"))
    rows.append(Row(["OP of the tasks so far"], op))
    bwt = value_of(group.estimate("bwt"))
    rows.append(Row(["BWT"], [*[""] * len(tasks), bwt]))
    order = group.members[0].run.results["task_order"]
    return Table(
        f"rounds_{slug(group.label)}_{slug(order)}",
        f"{group.label}: score by task and round, 0-100, order {order}; round 0 is before training",
        ["task"],
        [str(row) for row in range(len(tasks) + 1)],
        [Section("", rows)],
        (),
        [_runs(group)],
    )


def sizes_of(groups: Sequence[Group]) -> dict[str, tuple[int, int]]:
    """Give rows a task and epochs, by label, of the groups in which they are the same for every task."""
    found = {}
    for group in groups:
        own = {(stage["rows"], stage["epochs"]) for member in group.members for stage in member.run.results["stages"]}
        if len(own) == 1:
            found[group.label] = next(iter(own))
    return found


def samples_epochs(groups: Sequence[Group]) -> Table | str:
    """Lay out final scores by training rows a task and epochs (the table of Figure 3), or say why not."""
    sizes = sizes_of(groups)
    mixed = [
        f"{group.label}: left out, its tasks have different numbers of rows or epochs."
        for group in groups
        if group.label not in sizes
    ]
    chosen = [group for group in groups if group.label in sizes]
    if len(set(sizes.values())) < 2:
        return "Figure 3 needs runs with 2 or more numbers of rows or epochs, each the same for all tasks"
    tasks = list(dict.fromkeys(task for group in chosen for task in group.members[0].run.results["tasks"]))
    sections: dict[str, list[tuple[tuple[int, int], Row]]] = {}
    for group in chosen:
        title = ", ".join(str(group.record[key]) for key in ("model", "method", "tuning", "data", "protocol"))
        row = Row(
            list(map(str, sizes[group.label])),
            [*(_last(group, task) for task in tasks), value_of(group.estimate("op"))],
        )
        sections.setdefault(title, []).append((sizes[group.label], row))
    return Table(
        "figure_3",
        "Scores after the last stage by training rows a task and epochs, 0-100",
        ["rows a task", "epochs"],
        [*tasks, "mean (OP)"],
        [Section(title, [row for _, row in sorted(rows, key=lambda one: one[0])]) for title, rows in sections.items()],
        (),
        [*(_runs(group) for group in chosen), *mixed],
    )


def _conditions(group: Group, groups: Sequence[Group]) -> str:
    """Say under which data and protocol a group was scored; fingerprints that differ stand with the groups."""
    keys = ("data", "protocol")
    alike = [one for one in groups if all(one.record[key] == group.record[key] for key in keys)]
    prints = {one.record["fingerprint"] for one in alike}
    shown = f"[{group.record['fingerprint']}]" if len(prints) == 1 else f"({len(prints)} fingerprints)"
    return f"data {group.record['data']}, protocol {group.record['protocol']} {shown}"


def _row_name(group: Group, groups: Sequence[Group]) -> str:
    """Name a method, and what sets the group apart from others of the same method, model, data and protocol."""
    keys = ("method", "model", "data", "protocol")
    alike = [one for one in groups if all(one.record[key] == group.record[key] for key in keys)]
    said = [
        str(group.record[key])
        for key in ("tuning", "fingerprint", "settings")
        if len({one.record[key] for one in alike}) > 1
    ]
    if not said and len({one.record["tuning"] for one in groups if one.method == group.method}) > 1:
        said = [str(group.record["tuning"])]
    name = f"{group.method} ({', '.join(said)})" if said else group.method
    place = [one for one in alike if [one.record[key] for key in ("tuning", "fingerprint", "settings")]
             == [group.record[key] for key in ("tuning", "fingerprint", "settings")]].index(group)  # fmt: skip
    return f"{name} [{place + 1}]" if place else name


def _cell(group: Group, row: int, task: str) -> Value:
    """Average a cell over runs of one order."""
    scores = group.scores
    why = "not scored in this run" if len(group.members) == 1 else "not scored in every run"
    if not isinstance(scores, str):
        alone = [
            RunScores(run.name, run.method, (task,), run.order, run.seed, {(1, task): run.cells[row, task]})
            for run in scores
            if (row, task) in run.cells
        ]
        return value_of(across_runs(alone, score_number(task))) if len(alone) == len(scores) else Value(None, why=why)
    matrix = group.matrix()
    column = group.members[0].run.results["tasks"].index(task)
    value = None if isinstance(matrix, str) else matrix[row][column]
    return Value(value, why=why if value is None else f"no interval: {scores}")


def _last(group: Group, task: str) -> Value:
    if any(task not in member.run.results["tasks"] for member in group.members):
        return Value(None, why="not among the tasks of this run")
    scores = group.scores
    if not isinstance(scores, str):
        return value_of(across_runs(scores, score_number(task)))
    values = [dict(zip(own["tasks"], own["matrix"][-1], strict=True))[task] for own in _results(group)]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return Value(None, why="not scored after the last stage")
    return Value(sum(known) / len(known), why=f"no interval: {scores}")


def _sets(member: Member) -> Mapping[str, Mapping]:
    return (member.run.results.get("capability") or {}).get("sets") or {}


def _mean(group: Group, name: str, key: str) -> Value:
    """Average a set's score before or after training over runs."""
    values = [_sets(member).get(name, {}).get(key) for member in group.members]
    known = [float(value) for value in values if value is not None]
    if len(known) < len(values):
        return Value(None, why="not measured, or compared by a judge without a score")
    return Value(sum(known) / len(known))


def _change(group: Group, name: str) -> Value:
    scores = group.scores
    why = scores if isinstance(scores, str) else "the items of this set are not in the run's folder"
    if not isinstance(scores, str) and (found := across_runs(scores, delta_number(name))).value is not None:
        return value_of(found, sign=True)
    values = [_sets(member).get(name, {}).get("delta") for member in group.members]
    known = [float(value) for value in values if value is not None]
    if len(known) < len(values):
        return Value(None, why="not measured in every run")
    mean, margin = mean_and_margin(known)
    if mean is None or margin is None:
        return Value(mean, why=f"no interval: {why}", sign=True)
    return Value(mean, mean - margin, mean + margin, sign=True)


def _whole_row(group: Group, groups: Sequence[Group], cell: Value, count: int) -> Row:
    return Row([group.record["model"], _row_name(group, groups)], [cell] * count)


def _results(group: Group) -> list[Mapping]:
    return [member.run.results for member in group.members]


def _runs(group: Group) -> str:
    """Say what a group's numbers are means of."""
    results = _results(group)
    seeds = sorted({one["seed"]["train"] for one in results})
    orders = list(dict.fromkeys(one["task_order"] for one in results))
    if len(results) == 1:
        return f"{group.label}: one run, seed {seeds[0]}, order {orders[0]}; other trainings may give other numbers."
    shown = ", ".join(map(str, seeds[:10])) + (", …" if len(seeds) > 10 else "")
    several = "s" * (len(seeds) > 1)
    return f"{group.label}: mean of {len(results)} runs, seed{several} {shown}, order {', '.join(orders)}."
