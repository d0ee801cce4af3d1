"""Figures of several runs or methods, and of published results beside them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from trace_hydra.colours import colour_of
from trace_hydra.report.style import (
    FAINT,
    INK,
    MARKERS,
    QUIET,
    TASK_COLOURS,
    Label,
    drawn,
    error_ends,
    label_rows,
    new_figure,
    place_labels,
    short,
    signed,
)
from trace_hydra.statistics import Comparison, CriticalDifference, Estimate

NAME, SHORT = 40, 26
"""Characters of a name in a list, and beside a point."""
NAMES = {
    "op": "OP, 0-100",
    "bwt": "BWT, points (negative: forgetting)",
    "bwt_over_t": "BWT over T, points",
    "bwt_clipped": "BWT clipped, points",
    "forgetting": "forgetting, points",
    "fwt": "FWT, points",
    "delta_general": "ΔR^G, points",
    "delta_instruction": "ΔR^I, points",
    "delta_safety": "ΔR^S, points",
}
"""Numbers with their unit."""


@dataclass(frozen=True)
class RunPoint:
    """A group of our runs in the plane of OP and BWT."""

    label: str
    method: str
    op: Estimate
    bwt: Estimate


@dataclass(frozen=True)
class PublishedPoint:
    """A published result, 0-100."""

    label: str
    """Method as its paper calls it."""
    group: str
    """Paper and conditions, as the legend says them."""
    op: float
    bwt: float
    """Negative is forgetting."""
    family: str = ""
    """Our name of the method, which decides the colour; empty: none of ours."""


@dataclass(frozen=True)
class Score:
    """One run's number in `spread`."""

    value: float
    order: str
    seed: int


@dataclass(frozen=True)
class SamplesPoint:
    """OP of runs with so many training rows a task and epochs."""

    samples: int
    epochs: int
    op: float
    low: float | None = None
    high: float | None = None
    series: str = ""
    """Method, or paper and table: points of one series and number of rows make a line."""
    published: bool = False


@drawn
def op_against_bwt(points: Sequence[RunPoint], published: Sequence[PublishedPoint] = ()) -> Figure:
    """Draw OP against BWT: our groups filled, with 95 % intervals; published results hollow, a shape each group."""
    groups = list(dict.fromkeys(point.group for point in published))
    figure = new_figure(6.6, 4.3 + 0.18 * len(groups))
    axes = figure.add_subplot()
    labels: list[Label] = []
    for point in published:
        shape = MARKERS[(1 + groups.index(point.group)) % len(MARKERS)]
        colour = colour_of(point.family) if point.family else QUIET
        axes.plot(point.bwt, point.op, marker=shape, color=colour, fillstyle="none", markersize=7, linestyle="")
        labels.append((point.bwt, point.op, short(point.label, SHORT), QUIET))
    lacking = []
    for point in points:
        if point.op.value is None or point.bwt.value is None:
            note = point.op.note if point.op.value is None else point.bwt.note
            lacking.append(f"{short(point.label, NAME)}: {short(note, 90)}")
            continue
        axes.errorbar(
            point.bwt.value, point.op.value, xerr=error_ends(point.bwt.value, point.bwt.low, point.bwt.high),
            yerr=error_ends(point.op.value, point.op.low, point.op.high), fmt="o", color=colour_of(point.method),
            markersize=7, linewidth=1.1, capsize=2,
        )  # fmt: skip
        labels.append((point.bwt.value, point.op.value, short(point.label, SHORT), INK))
    if any(point.op.value is not None for point in points):
        axes.plot([], [], "o", color=INK, label="ours, line: 95 % interval")
    for index, group in enumerate(groups):
        shape = MARKERS[(1 + index) % len(MARKERS)]
        axes.plot([], [], shape, color=QUIET, fillstyle="none", label=f"published: {short(group, 60)}")
    axes.axvline(0, color=FAINT, linewidth=1, zorder=0)
    axes.margins(0.14)
    axes.grid()
    axes.set_xlabel(NAMES["bwt"])
    axes.set_ylabel(NAMES["op"])
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=1)
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        axes.set_title("not shown: " + "\n".join(lacking[:3]) + more, fontsize=7, color=QUIET, loc="left")
    place_labels(figure, axes, labels)
    return figure


@drawn
def differences(comparison: Comparison) -> Figure:
    """Draw a forest plot: each pair of methods in one number, with 95 % interval and Holm-adjusted p."""
    found = comparison.differences
    labels = [f"{short(one.one, NAME)} − {short(one.other, NAME)}" for one in found]
    longest = max(map(len, labels), default=0)
    figure = new_figure(8.2 + 0.065 * max(0, longest - 24), 1.3 + 0.3 * max(1, len(found)))
    axes = figure.add_subplot()
    ends = [0.0]
    for place, one in enumerate(found):
        if one.difference is None:
            axes.text(0, place, f" {short(one.note, 90)}", va="center", fontsize=7, color=QUIET)
            continue
        bars = error_ends(one.difference, one.low, one.high)
        sure = one.low is not None and one.high is not None and (one.low > 0 or one.high < 0)
        axes.errorbar(
            one.difference, place, xerr=bars, fmt="o", color=INK, markerfacecolor=INK if sure else "white",
            markersize=5, linewidth=1.2, capsize=2,
        )  # fmt: skip
        ends += [end for end in (one.difference, one.low, one.high) if end is not None]
        axes.annotate(
            _said(one), (1, place), xycoords=("axes fraction", "data"), xytext=(8, 0), textcoords="offset points",
            va="center", fontsize=8,
        )  # fmt: skip
    label_rows(axes, labels)
    room = 0.06 * (max(ends) - min(ends)) or 1.0
    axes.set_xlim(min(ends) - room, max(ends) + room)
    axes.axvline(0, color=INK, linewidth=0.9)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    name = NAMES.get(comparison.number, short(comparison.number, NAME)).partition(",")[0]
    axes.set_xlabel(f"difference in {name}, points; line: 95 % interval, filled where it leaves 0 out")
    if any(one.p_adjusted is not None for one in found):
        said = "p: after Holm's correction" + "; d: Cohen's" * any(one.effect is not None for one in found)
        axes.annotate(
            said, (1, 1), xycoords="axes fraction", xytext=(8, 4), textcoords="offset points", fontsize=7, color=QUIET
        )
    return figure


def _said(one: Any) -> str:
    text = signed(one.difference)
    if one.low is not None and one.high is not None:
        text += f" [{signed(one.low)}, {signed(one.high)}]"
    if one.p_adjusted is not None:
        text += f"  p = {one.p_adjusted:.3f}" if one.p_adjusted >= 0.001 else "  p < 0.001"
    return text + (f"  d = {signed(one.effect, 2)}" if one.effect is not None else "")


@drawn
def critical_difference(found: CriticalDifference, methods: Mapping[str, str] | None = None) -> Figure:
    """Draw mean ranks on a line; bars join methods closer than the critical difference (Demšar 2006, figure 1).

    Args:
        found: What is drawn.
        methods: Label -> method, which decides the colour; default: the label.
    """
    ranks = sorted(found.ranks.items(), key=lambda item: (item[1], item[0]))
    half = (len(ranks) + 1) // 2
    longest = max((len(short(name, NAME)) for name in found.ranks), default=0)
    figure = new_figure(6.6 + 0.15 * max(0, longest - 10), 1.5 + 0.24 * half + 0.1 * len(found.cliques))
    axes = figure.add_subplot()
    axes.set_axis_off()
    if not ranks:
        axes.text(0.5, 0.5, short(found.note, 160), transform=axes.transAxes, ha="center", color=QUIET, wrap=True)
        return figure
    count = len(ranks)
    axes.set_xlim(0.4, count + 0.6)
    axes.plot([1, count], [0, 0], color=INK, linewidth=1)
    for rank in range(1, count + 1):
        axes.plot([rank, rank], [0, 0.25], color=INK, linewidth=1)
        axes.text(rank, 0.35, str(rank), ha="center", va="bottom", fontsize=8)
    if found.distance is not None:
        axes.plot([1, 1 + found.distance], [1.5, 1.5], color=INK, linewidth=1.4, marker="|")
        axes.text(1, 1.75, f"critical difference {found.distance:.2f}", ha="left", va="bottom", fontsize=8)
    for index, clique in enumerate(found.cliques):
        own = [found.ranks[name] for name in clique]
        axes.plot([min(own) - 0.04, max(own) + 0.04], [-0.35 - 0.3 * index] * 2, color=INK, linewidth=3)
    below = -0.9 - 0.3 * len(found.cliques)
    for index, (name, rank) in enumerate(ranks):
        left = index < half
        depth = below - 0.6 * (index if left else count - 1 - index)
        side = 0.75 if left else count + 0.25
        colour = colour_of((methods or {}).get(name, name))
        axes.plot([rank, rank, side], [0, depth, depth], color=colour, linewidth=1.2)
        text = f"{short(name, NAME)}  {rank:.2f}" if left else f"{rank:.2f}  {short(name, NAME)}"
        axes.text(side, depth, f" {text} ", ha="right" if left else "left", va="center", fontsize=8)
    axes.set_ylim(below - 0.6 * half, 2.6)
    p = "" if found.p is None else f", Friedman p = {found.p:.3f}" if found.p >= 0.001 else ", Friedman p < 0.001"
    axes.set_title(f"Mean rank over {found.blocks} tasks, 1 is best{p}", fontsize=9)
    return figure


@drawn
def spread(
    groups: Mapping[str, Sequence[Score]],
    number: str,
    *,
    means: Mapping[str, Estimate] | None = None,
    methods: Mapping[str, str] | None = None,
) -> Figure:
    """Draw every run's number, a column a group: a shape each order, seeds side by side, and the mean with interval.

    Args:
        groups: Label -> runs.
        number: Its name in results.json.
        means: Label -> mean over the group's runs.
        methods: Label -> method, which decides the colour; default: the label.
    """
    orders = list(dict.fromkeys(score.order for own in groups.values() for score in own))
    seeds = sorted({score.seed for own in groups.values() for score in own})
    figure = new_figure(1.8 + 1.1 * max(2, len(groups)), 3.6)
    axes = figure.add_subplot()
    for column, (label, own) in enumerate(groups.items()):
        colour = colour_of((methods or {}).get(label, label))
        for score in own:
            shift = (seeds.index(score.seed) - (len(seeds) - 1) / 2) * 0.4 / max(1, len(seeds) - 1)
            shape = MARKERS[orders.index(score.order) % len(MARKERS)]
            axes.plot(column + shift, score.value, shape, color=colour, markersize=5, alpha=0.75)
        mean = (means or {}).get(label)
        if mean is not None and mean.value is not None:
            bars = error_ends(mean.value, mean.low, mean.high)
            axes.errorbar(column + 0.34, mean.value, yerr=bars, fmt="_", color=INK, capsize=3, linewidth=1.3)
            axes.text(column + 0.38, mean.value, f" {mean.value:.1f}".replace("-", "−"), va="center", fontsize=8)
        if not own:
            style: dict[str, Any] = {"ha": "center", "color": QUIET, "backgroundcolor": "white"}
            axes.text(column, 0.5, "no value", transform=axes.get_xaxis_transform(), **style)
    for index, order in enumerate(orders):
        axes.plot([], [], MARKERS[index % len(MARKERS)], color=QUIET, label=f"order {short(order, NAME)}")
    axes.plot([], [], "_", color=INK, label="mean, 95 % interval")
    axes.set_xticks(
        range(len(groups)),
        [f"{short(label, 24)}\n{len(own)} run{'s' * (len(own) != 1)}" for label, own in groups.items()],
        rotation=0 if len(groups) < 7 and max(map(len, groups), default=0) < 15 else 30,
    )
    axes.set_xlim(-0.5, len(groups) - 0.2)
    axes.grid(axis="y")
    axes.set_ylabel(NAMES.get(number, short(number)))
    shown = ", ".join(map(str, seeds[:8])) + (", …" if len(seeds) > 8 else "")
    axes.set_title(f"A point a run; seeds {shown} from left to right" if len(seeds) > 1 else f"One seed: {shown}")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


@drawn
def samples_epochs(points: Sequence[SamplesPoint]) -> Figure:
    """Draw OP over epochs, a line each number of training rows a task; published points hollow (TRACE, Figure 3)."""
    figure = new_figure(5.8, 3.2 + 0.2 * len({(one.published, one.series, one.samples) for one in points}))
    axes = figure.add_subplot()
    sizes = sorted({point.samples for point in points})
    lines: dict[tuple[bool, str, int], list[SamplesPoint]] = {}
    for point in sorted(points, key=lambda one: (one.published, one.series, one.samples, one.epochs)):
        lines.setdefault((point.published, point.series, point.samples), []).append(point)
    ours = list(dict.fromkeys(series for published, series, _ in lines if not published))
    labels: list[Label] = []
    for (published, series, samples), own in lines.items():
        index = sizes.index(samples)
        colour = TASK_COLOURS[index % len(TASK_COLOURS)]
        style: dict[str, Any] = {"color": colour, "marker": MARKERS[index % len(MARKERS)]}
        style |= {"fillstyle": "none", "linestyle": ":"} if published else {"fillstyle": "full"}
        style |= {} if published else {"linestyle": ("-", "--", "-.")[ours.index(series) % 3]}
        label = ", ".join(filter(None, [f"{samples:,} rows a task", short(series, NAME)]))
        axes.plot([one.epochs for one in own], [one.op for one in own], label=label, markersize=6, **style)
        for one in own:
            labels.append((one.epochs, one.op, f"{one.op:.1f}", INK))
            if (bars := error_ends(one.op, one.low, one.high)) is not None:
                axes.errorbar(one.epochs, one.op, yerr=bars, color=colour, capsize=2, linewidth=1)
    axes.set_xticks(sorted({point.epochs for point in points}))
    axes.margins(0.1)
    axes.grid(axis="y")
    axes.set_xlabel("epochs of every task")
    axes.set_ylabel(NAMES["op"])
    if points:
        figure.legend(loc="outside lower center")
    place_labels(figure, axes, labels)
    return figure
