"""Figures of runs, each a function that returns a matplotlib Figure; `style.to_bytes` makes files of them.

Numbers come as results.json and `trace_hydra.statistics` have them and are rounded where they are written. What is not
there is said in the figure. Those of several runs are in `comparing`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from matplotlib.figure import Figure

from trace_hydra.callbacks.picture import heat_map_figure, heat_map_title
from trace_hydra.errors import DataError
from trace_hydra.report.comparing import (
    PublishedPoint,
    RunPoint,
    SamplesPoint,
    Score,
    critical_difference,
    differences,
    op_against_bwt,
    samples_epochs,
    spread,
)
from trace_hydra.report.style import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    QUIET,
    TASK_COLOURS,
    drawn,
    label_rows,
    new_figure,
    short,
    signed,
)

__all__ = [
    "CurvesLike",
    "PublishedPoint",
    "RunPoint",
    "SamplesPoint",
    "Score",
    "capability_bars",
    "critical_difference",
    "differences",
    "heat_map",
    "lines_over_stages",
    "matrix_difference",
    "op_against_bwt",
    "samples_epochs",
    "spread",
    "training_curves",
]
NAME = 28
"""Characters of a name in a figure; what is longer ends in an ellipsis."""
AREAS = {"general": "ΔR^G general", "instruction": "ΔR^I instructions", "safety": "ΔR^S safety"}
_AREA_COLOURS = {"general": BLUE, "instruction": ORANGE, "safety": GREEN}
Intervals = Mapping[tuple[int, str], Sequence[float]]
"""(row, task) -> low and high of the cell's score."""


class CurvesLike(Protocol):
    """What `training_curves` draws; `report.curves.Curves` is one."""

    @property
    def steps(self) -> Sequence[float]:
        """Optimizer step of each point."""
        ...

    @property
    def stages(self) -> Sequence[int]:
        """Stage of each point, from 1."""
        ...

    @property
    def terms(self) -> Mapping[str, Sequence[float]]:
        """Term -> value of each point, NaN where it was not logged."""
        ...


@drawn
def heat_map(results: Mapping[str, Any], intervals: Intervals | None = None) -> Figure:
    """Draw the score matrix with its values, row 0 first; unscored cells are hatched."""
    tasks = _names(results["tasks"])
    protocol = results["protocol"]
    said = (results["model"], results["method"], results["task_order"], protocol["name"], protocol["fingerprint"])
    title = heat_map_title(*(short(one, NAME) for one in said))
    names = dict(zip(results["tasks"], tasks, strict=True))
    ends = {(row, names[task]): pair for (row, task), pair in (intervals or {}).items()}
    return heat_map_figure(tasks, results["matrix"], title, intervals=ends)


@drawn
def matrix_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> Figure:
    """Draw the scores of `one` minus those of `other`, cell by cell; hatched where either lacks it.

    Raises:
        DataError: If they have other tasks or another order: their rows then mean different stages.
    """
    if one["tasks"] != other["tasks"]:
        raise DataError(
            f"matrices of {short(one['name'])} and {short(other['name'])} cannot be subtracted: their task orders are "
            f"{short(' > '.join(one['tasks']))} and {short(' > '.join(other['tasks']))}."
        )
    rows = [
        [None if None in pair else pair[0] - pair[1] for pair in zip(*both, strict=True)]
        for both in zip(one["matrix"], other["matrix"], strict=True)
    ]
    title = f"{short(one['name'], 60)}\nminus {short(other['name'], 60)}"
    return heat_map_figure(_names(one["tasks"]), rows, title, difference=True)


@drawn
def lines_over_stages(results: Mapping[str, Any], intervals: Intervals | None = None) -> Figure:
    """Draw each task's score over the stages in a panel of its own: dashed before its stage, full from there on."""
    tasks, matrix = results["tasks"], results["matrix"]
    across = min(4, len(tasks))
    down = math.ceil(len(tasks) / across)
    figure = new_figure(1.0 + 2.1 * across, 0.9 + 1.7 * down)
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for column, axes in enumerate(grid.flat):
        if column >= len(tasks):
            axes.set_visible(False)
            continue
        ends = {row: pair for (row, task), pair in (intervals or {}).items() if task == tasks[column]}
        _line(axes, column + 1, [row[column] for row in matrix], ends)
        axes.set_title(f"{column + 1} {short(tasks[column], NAME)}", fontsize=9, loc="left")
        axes.set_ylim(-4, 112)
        axes.set_yticks(range(0, 101, 25))
        axes.set_xlim(-0.35, len(tasks) + 0.35)
        axes.set_xticks(range(len(tasks) + 1))
        axes.grid(axis="y")
        axes.tick_params(labelbottom=column + across >= len(tasks))
    figure.supxlabel("after stage (0: before training)", fontsize=9)
    figure.supylabel("score, 0-100", fontsize=9)
    said = "; band: 95 % interval" if intervals else ""
    figure.suptitle(f"Score by stage, ring: the task's own stage{said}", fontsize=10)
    return figure


def _line(axes: Any, own: int, scores: Sequence[float | None], ends: Mapping[int, Sequence[float]]) -> None:
    """Draw one task; a cell that was not scored breaks the line."""
    values = [math.nan if score is None else score for score in scores]
    stages = list(range(len(values)))
    axes.axvline(own, color=FAINT, linewidth=5, zorder=0)
    if ends:
        low = [ends[stage][0] if stage in ends else math.nan for stage in stages]
        high = [ends[stage][1] if stage in ends else math.nan for stage in stages]
        axes.fill_between(stages, low, high, color=BLUE, alpha=0.18, linewidth=0)
        axes.vlines(stages, low, high, color=BLUE, alpha=0.35, linewidth=1)  # a score without neighbours has no band
    axes.plot(stages[: own + 1], values[: own + 1], color=QUIET, linestyle=(0, (3, 2)), linewidth=1, marker="o", ms=3)
    axes.plot(stages[own:], values[own:], color=BLUE, linewidth=1.6, marker="o", markersize=3.5)
    axes.plot(own, values[own], marker="o", markersize=7, color=BLUE, fillstyle="none")
    if all(score is None for score in scores):
        axes.text(0.5, 0.5, "not scored", transform=axes.transAxes, ha="center", color=QUIET)
    written = {own, len(scores) - 1} if len(scores) > 2 else {own}
    for stage in sorted(stage for stage in written if scores[stage] is not None):
        above = 106 if values[stage] > 88 else values[stage] + 8
        axes.text(stage, above, f"{scores[stage]:.1f}", ha="center", va="center", fontsize=7, color=INK)


@drawn
def capability_bars(results: Mapping[str, Any], intervals: Mapping[str, Sequence[float]] | None = None) -> Figure:
    """Draw what became of each ability since before training: areas first, then their sets, with 95 % intervals.

    Args:
        results: Of the run.
        intervals: Area or set -> low and high, in place of those of results.json.
    """
    found = results.get("capability") or {}
    bars: list[tuple[str, Mapping[str, Any], str]] = []
    known = intervals or {}
    for area, title in AREAS.items():
        if area in found:
            bars.append((title, {**found[area], "interval": known.get(area, found[area]["interval"])}, area))
        bars += [
            (f"   {short(name, NAME)}", {**one, "interval": known.get(name, one["interval"])}, area)
            for name, one in (found.get("sets") or {}).items()
            if one["area"] == area
        ]
    figure = new_figure(6.6, 1.3 + 0.34 * max(1, len(bars)))
    axes = figure.add_subplot()
    if not bars:
        _say(axes, "no capability set was measured (capability=none)")
        return figure
    for place, (label, one, area) in enumerate(bars):
        _bar(axes, place, one, _AREA_COLOURS[area], whole=not label.startswith(" "))
    label_rows(axes, [label for label, *_ in bars])
    for (label, *_), tick in zip(bars, axes.get_yticklabels(), strict=True):
        tick.set_fontweight("normal" if label.startswith(" ") else "bold")
    ends = [abs(end) for _, one, _ in bars for end in (one["delta"], *(one["interval"] or ())) if end is not None]
    far = max([*ends, 1.0]) * 1.08
    axes.set_xlim(-far, far)
    axes.axvline(0, color=INK, linewidth=0.9)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("change against the start model, points (line: 95 % interval over items)")
    axes.set_title(f"Abilities after stage {found['row']}", loc="left")
    return figure


def _bar(axes: Any, place: int, one: Mapping[str, Any], colour: str, *, whole: bool) -> None:
    if one["delta"] is None:
        axes.text(0, place, "  nothing was scored", va="center", fontsize=7, color=QUIET)
        return
    axes.barh(place, one["delta"], height=0.62 if whole else 0.4, color=colour if whole else _paler(colour))
    if one["interval"]:
        axes.plot(one["interval"], [place, place], color=INK, linewidth=1.1, marker="|", markersize=6)
    text = signed(one["delta"])
    if one.get("before") is not None and one.get("after") is not None:
        text += f"  ({one['before']:.1f} → {one['after']:.1f})"
    elif one.get("win") is not None:
        text += f"  (win {one['win']:.0f} %, lose {one['lose']:.0f} %)"
    axes.annotate(
        text, (1, place), xycoords=("axes fraction", "data"), xytext=(6, 0), textcoords="offset points", va="center",
        fontsize=8, fontweight="bold" if whole else "normal",
    )  # fmt: skip


@drawn
def training_curves(curves: CurvesLike, tasks: Sequence[str]) -> Figure:
    """Draw loss terms over what was trained on so far: tokens where `curves` has them (`tokens`), else steps."""
    tokens = getattr(curves, "tokens", None)
    places = [one / 1e6 for one in tokens] if tokens else list(curves.steps)
    figure = new_figure(7.0, 3.2)
    axes = figure.add_subplot()
    colours = (INK, *TASK_COLOURS)
    for index, (term, values) in enumerate(curves.terms.items()):
        style: dict[str, Any] = {"color": colours[index % len(colours)], "linestyle": ("-", "--", ":", "-.")[index % 4]}
        parts = [[at for at, stage in enumerate(curves.stages) if stage == one] for one in sorted(set(curves.stages))]
        for number, part in enumerate(parts):  # a stage is a line of its own: a new optimizer on new rows
            label = short(term, NAME) if not number else None
            line = [values[at] for at in part]
            axes.plot([places[at] for at in part], line, label=label, linewidth=1.7 - 0.5 * bool(index), **style)
            if len(part) == 1:
                axes.plot(places[part[0]], line[0], ".", color=style["color"])
    for stage in sorted(set(curves.stages)):
        start = min(place for place, one in zip(places, curves.stages, strict=True) if one == stage)
        axes.axvline(start, color=FAINT, linewidth=0.9, zorder=0)
        name = short(tasks[stage - 1], NAME) if 0 < stage <= len(tasks) else ""
        axes.annotate(
            f"{stage} {name}", (start, 1), xycoords=("data", "axes fraction"), xytext=(2, 2),
            textcoords="offset points", rotation=30, fontsize=7, color=QUIET, annotation_clip=False,
        )  # fmt: skip
    axes.set_xlabel("trained tokens so far, millions" if tokens else "optimizer step")
    axes.set_ylabel("loss, nats a label token")
    axes.grid(axis="y")
    if len(curves.terms) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _paler(colour: str) -> str:
    """Mix a colour with as much white."""
    return "#" + "".join(f"{(int(colour[at : at + 2], 16) + 255) // 2:02x}" for at in (1, 3, 5))


def _say(axes: Any, text: str) -> None:
    """Write why there is nothing to see."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=QUIET, wrap=True)


def _names(tasks: Sequence[str]) -> list[str]:
    """Shorten names and keep them apart."""
    names = [short(task, NAME) for task in tasks]
    return [name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names, 1)]
