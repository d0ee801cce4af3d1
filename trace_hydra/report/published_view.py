"""Published results on a page: beside runs of the same model and method, and in the plane of OP and BWT."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trace_hydra import published
from trace_hydra.collect import Run
from trace_hydra.report.cells import NONE, Cell, Column, Grid, figure, number, text

if TYPE_CHECKING:
    from trace_hydra.report.figures import PublishedPoint

_FORMULA = "trace"
"""By which BWT is drawn: ours is."""


@dataclass(frozen=True)
class Beside:
    """Runs, and the published rows of their model and method."""

    name: str
    grid: Grid
    details: list[tuple[str, list[str]]]
    """Of each row: what it is, and in which parts its protocol differs or is not known."""


def beside(pools: Mapping[str, Sequence[Run]]) -> tuple[list[Beside], list[str]]:
    """Put runs that differ in seeds only beside published rows; also why there is nothing beside the others.

    Args:
        pools: Name -> runs.
    """
    found, alone = [], dict[str, list[str]]()
    for name, runs in pools.items():
        rows = published.beside([run.results for run in runs], runs[0].settings)
        if rows:
            found.append(_beside(len(found) + 1, name, rows))
        else:
            alone.setdefault(published.why_none(runs[0].results), []).append(name)
    listed = {why: "these runs" if len(names) == len(pools) > 1 else _listed(names) for why, names in alone.items()}
    return found, [f"Nothing beside {listed[why]}: {why.partition(';')[0]}." for why in alone]


def points(models: Iterable[str | None]) -> "list[PublishedPoint]":
    """Give the published rows of models whose OP and BWT (by TRACE's formula) are both known.

    Args:
        models: As published tables name them; None is left out.
    """
    from trace_hydra.report.figures import PublishedPoint  # matplotlib takes a while to load

    return [
        PublishedPoint(entry.method, f"{entry.paper.paper}, {entry.model}, {entry.group}", entry.op, bwt, entry.family)
        for model in sorted({model for model in models if model})
        for entry in published.entries(model)
        if entry.op is not None and not entry.copied_from
        for bwt in [published.bwt_by(entry, _FORMULA)]
        if bwt is not None
    ]


def _beside(place: int, name: str, rows: Sequence[published.Comparison]) -> Beside:
    body = []
    for one in rows:
        entry = one.entry
        body.append(
            [
                text(entry.where),
                text(entry.method),
                text(entry.group),
                text("comparable" if one.comparable else "side by side only"),
                *_numbers(one.op, sign=False),
                text(published.FORMULAS.get(one.formula, one.formula) if one.bwt.printed else ""),
                *_numbers(one.bwt, sign=True),
            ]
        )
    columns = [
        Column("row", numeric=False),
        Column("its method", numeric=False),
        Column("group", "rows made alike", numeric=False),
        Column("verdict", numeric=False),
        *(Column("OP", "published"), Column("OP", "ours"), Column("OP", "ours − published")),
        Column("BWT formula", "of both", numeric=False),
        *(Column("BWT", "published"), Column("BWT", "ours"), Column("BWT", "ours − published")),
    ]
    details = [(f"{one.entry.where}, {one.entry.method}: {one.verdict}", _said(one)) for one in rows]
    notes = ["Published numbers were not made here. Differences are given where both answered the same test rows."]
    caption = f"{name}, beside published rows of its model and method"
    return Beside(name, Grid(f"beside-{place}", caption, columns, body, notes=notes), details)


def _numbers(one: published.Number, *, sign: bool) -> list[Cell]:
    ours = number(one.ours, one.note or "not known", sign=sign)
    if one.ours is not None and one.margin is not None:
        ours = Cell(f"{ours.text} ± {figure(one.margin)}", ours.value)
    theirs = Cell(figure(one.theirs, sign=sign), one.theirs) if one.theirs is not None else Cell(one.printed or NONE)
    if one.theirs is None:
        theirs = Cell(theirs.text, None, f"{one.printed}, {one.note}" if one.printed else "not published")
    return [theirs, ours, number(one.difference, one.note or "not known", sign=True)]


def _said(one: published.Comparison) -> list[str]:
    said = [str(part) for part in one.parts if part.status != "same"]
    said += [f"BWT: {one.entry.sign_note}"] if one.bwt.printed and one.entry.sign_note else []
    return [*said, *([one.entry.note] if one.entry.note else []), *one.entry.doubts]


def _listed(names: Sequence[Any], most: int = 3) -> str:
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
