"""The tables of one run's page: capability, cost, settings."""

from collections.abc import Mapping
from typing import Any

from trace_hydra.callbacks.table import row_label
from trace_hydra.report.bounds import bounds
from trace_hydra.report.cells import Column, Grid, count, mapping, number, seconds, text
from trace_hydra.report.facts import Settings
from trace_hydra.report.hostile import plain
from trace_hydra.report.run_view import DELTAS
from trace_hydra.statistics import RunScores, delta_number

Memory = Mapping[int, tuple[float, str]]
"""Stage -> 10^9 bytes at the most, and whether of the device or the host: `Curves.memory`."""


def capability(results: Mapping[str, Any], scores: RunScores | str) -> list[Grid]:
    """Give what each capability set scored before and after, and what a judge said of those it compared."""
    found = mapping(results.get("capability"))
    sets = {name: one for name, one in mapping(found.get("sets")).items() if isinstance(one, Mapping)}
    scored = {name: one for name, one in sets.items() if one.get("before") is not None}
    judged = {name: one for name, one in sets.items() if one.get("before") is None}
    grids = []
    if scored:
        columns = [
            Column("set", numeric=False),
            Column("area", numeric=False),
            Column("before", "start model"),
            Column("after"),
            Column("change"),
            Column("95 % interval"),
            Column("items"),
        ]
        rows = [
            [
                text(plain(name)),
                text(plain(one.get("area", ""))),
                number(one.get("before")),
                number(one.get("after")),
                number(one.get("delta"), sign=True),
                bounds(results, scores, delta_number(name)).cell(sign=True),
                count(one.get("n")),
            ]
            for name, one in scored.items()
        ]
        grids.append(Grid("sets", "Capability sets, scored", columns, rows, sortable=len(rows) > 1))
    if judged:
        columns = [Column("set", numeric=False), Column("area", numeric=False)]
        columns += [Column("win", "%"), Column("tie", "%"), Column("lose", "%"), Column("without verdict", "items")]
        rows = [
            [text(plain(name)), text(plain(one.get("area", "")))]
            + [number(one.get(share)) for share in ("win", "tie", "lose")]
            + [count(one.get("unscored"))]
            for name, one in judged.items()
        ]
        grids.append(Grid("judged", "Capability sets that a judge compared with the start model", columns, rows))
    return grids


def stages(results: Mapping[str, Any]) -> Grid | None:
    """Give the deltas behind each measured stage, if there were several."""
    measured = mapping(mapping(results.get("capability")).get("stages"))
    if len(measured) < 2:
        return None
    areas = tuple(DELTAS)
    rows = [
        [text(f"after stage {plain(row)}")]
        + [number(mapping(mapping(one).get(area)).get("delta"), "not measured", sign=True) for area in areas]
        for row, one in measured.items()
    ]
    columns = [Column("stage", numeric=False), *(Column(name) for name, _ in DELTAS.values())]
    return Grid("capability-stages", "Change of the abilities, stage by stage", columns, rows)


def cost(results: Mapping[str, Any], memory: Memory) -> Grid:
    """Give what each stage took: rows, tokens, time, memory, and what the method keeps."""
    tasks, tokens = results["tasks"], mapping(results.get("tokens"))
    planned = results.get("stages") or []
    rows = []
    for index in range(len(tasks) + 1):
        stage = planned[index - 1] if 0 < index <= len(planned) else {}
        effort = mapping(stage.get("effort"))
        trained = _at(tokens.get("train"), index - 1)
        speed = trained / effort["seconds"] if trained and effort.get("seconds") else None
        rows.append(
            [
                text(row_label(tasks, index)),
                count(stage.get("rows"), _no(index)),
                count(stage.get("epochs"), _no(index)),
                count(effort.get("steps"), _no(index)),
                count(trained, _no(index)),
                count(_at(tokens.get("evaluate"), index), "not recorded"),
                seconds(effort.get("seconds")) if effort.get("seconds") is not None else number(None, _no(index)),
                count(speed, "nothing trained here" if index else _no(index)),
                number(memory[index][0], digits=2) if index in memory else number(None, _no(index)),
                count(effort.get("trainable_params"), _no(index)),
                number(effort.get("state_mb"), _no(index)),
                count(effort.get("stored_examples"), _no(index)),
                number(effort.get("step_ratio"), "not measured" if index else _no(index)),
            ]
        )
    columns = [
        Column("stage", numeric=False),
        Column("rows"),
        Column("epochs"),
        Column("steps"),
        Column("trained tokens"),
        Column("scoring tokens", "prompts and answers"),
        Column("training time"),
        Column("tokens/s", "training"),
        Column("peak memory", f"GB {_whose(memory)}".strip()),
        Column("trainable weights"),
        Column("method's state", "MB kept from here on"),
        Column("stored rows"),
        Column("step / plain step", "time, 1 = plain fine-tuning"),
    ]
    return Grid("cost", "What each stage took", columns, rows)


def totals(results: Mapping[str, Any], memory: Memory) -> list[tuple[str, str]]:
    """Sum the cost up: label and text."""
    tokens = mapping(results.get("tokens"))
    efforts = [mapping(stage.get("effort")) for stage in results.get("stages") or ()]
    trained, scored = sum(tokens.get("train") or ()), sum(tokens.get("evaluate") or ())
    known = bool(efforts) and all(one.get("seconds") is not None for one in efforts)
    found = [
        ("wall clock", seconds(results.get("wall_clock_s")).text),
        ("training", seconds(sum(one["seconds"] for one in efforts)).text if known else "not recorded"),
        ("trained tokens", count(trained).text),
        ("scoring tokens", count(scored).text),
    ]
    asked = mapping(results.get("capability")).get("tokens")
    if asked is not None:
        found.append(("capability tokens", count(asked).text))
    peak = max((one for one, _ in memory.values()), default=None)
    found.append(("peak memory", "not recorded" if peak is None else f"{number(peak).text} GB {_whose(memory)}"))
    states = [one["state_mb"] for one in efforts if one.get("state_mb") is not None]
    if states:
        found.append(("method's state, most", f"{number(max(states)).text} MB"))
    return found


def settings(found: Settings) -> Grid:
    """Give every setting, those that differ from the protocol's file marked."""
    rows = []
    for leaf in found.leaves:
        style = "mark" if leaf.default is not None else ""
        rows.append(
            [
                text(plain(leaf.path), style),
                text(plain(leaf.value, 300)),
                text(plain(leaf.default, 300) if leaf.default is not None else ""),
                text("command line" if leaf.given else ""),
            ]
        )
    columns = [
        Column("setting", numeric=False),
        Column("value", numeric=False),
        Column("the protocol's default", "where it differs", numeric=False),
        Column("set by", numeric=False, filter=True),
    ]
    return Grid("settings", "Settings as composed", columns, rows, sortable=True)


def changed(found: Settings) -> Grid | None:
    """Give the settings in which the run differs from the file of its protocol."""
    if not found.changed:
        return None
    rows = [[text(plain(leaf.path)), text(plain(leaf.value)), text(plain(leaf.default))] for leaf in found.changed]
    columns = [Column("setting", numeric=False), Column("here", numeric=False), Column("default", numeric=False)]
    return Grid("changed", "Where the run differs from its protocol's file", columns, rows)


def _whose(memory: Memory) -> str:
    return next(({"device": "of the device", "host": "of the process"}[kind] for _, kind in memory.values()), "")


def _no(index: int) -> str:
    return "not recorded" if index else "nothing is trained before stage 1"


def _at(values: Any, index: int) -> float | None:
    return values[index] if isinstance(values, list) and 0 <= index < len(values) else None
