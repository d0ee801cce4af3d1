"""Runs of ours beside published rows of the same model and method."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trace_hydra.metrics.spread import mean_and_margin
from trace_hydra.published.conditions import ORDERS, Part, compare_parts, named, own_conditions
from trace_hydra.published.read import entries_of, groups, papers
from trace_hydra.published.records import FORMULAS, UNKNOWN, Condition, Entry

_KEYS = {"trace": "bwt", "div_t": "bwt_over_t", "clipped_div_t": "bwt_clipped", "forgetting": "bwt"}
"""Formula -> where results.json has it, with negative as forgetting."""


@dataclass(frozen=True)
class Number:
    """One number, ours and theirs; BWT with negative as forgetting, by the row's formula."""

    ours: float | None
    margin: float | None
    """Half width of the 95 % t interval over `runs`, None for one run."""
    runs: int
    theirs: float | None
    printed: str
    """Theirs with the digits and the sign that were printed; "" for not published."""
    difference: float | None
    """Ours - theirs; None where it says nothing, see `note`."""
    note: str


@dataclass(frozen=True)
class Comparison:
    """A published row, and how runs of ours stand to it."""

    entry: Entry
    parts: tuple[Part, ...]
    op: Number
    bwt: Number
    formula: str
    """By which BWT of both is given."""
    comparable: bool
    """Whether no part of the protocol is known to differ and none is unknown."""
    verdict: str

    def parts_with(self, *statuses: str) -> list[Part]:
        """List the parts of some statuses."""
        return [part for part in self.parts if part.status in statuses]


def entries(model: str | None = None, method: str | None = None, group: str | None = None) -> list[Entry]:
    """List published rows, TRACE's first.

    Args:
        model: As the paper names it, or what it is taken to be; None for all, likewise the others.
        method: As the paper names it, or as `Method.published` does.
        group: Rows that may be compared with each other.
    """
    found = [entry for paper in papers() for entry in entries_of(paper, groups(), f"papers of {paper.paper}")]
    return [
        entry
        for entry in found
        if model in (None, entry.model, *model_of(entry).values())
        and method in (None, entry.method, entry.family)
        and group in (None, entry.group)
    ]


def model_of(entry: Entry) -> dict[str, str]:
    """Give what a row's model is taken to be: source -> name here; empty where its name is ours."""
    return dict(entry.paper.models.get(entry.model, {}))


def bwt_by(entry: Entry, formula: str) -> float | None:
    """Express a row's BWT by another formula, negative as forgetting.

    Only factors of T and the sign are turned; None where more than the printed number is needed, where formula, sign
    or number of tasks is not known, or where the number is a mix of two runs.
    """
    own = entry.conditions.get("formula", Condition()).value
    if entry.bwt_signed is None or own is None or entry.conditions["order"].value not in ORDERS:
        return entry.bwt_signed if own == formula else None
    tasks = len(ORDERS["1"])
    divisors = {"trace": tasks - 1, "forgetting": tasks - 1, "div_t": tasks}
    if own == formula:
        return entry.bwt_signed
    if own in divisors and formula in divisors:
        return entry.bwt_signed * divisors[own] / divisors[formula]
    return None


def beside(
    runs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any] | None = None,
    *,
    model: str | None = None,
    method: str | None = None,
    group: str | None = None,
) -> list[Comparison]:
    """Put runs beside every published row of the same model and method.

    Args:
        runs: results.json of a run, or of several that differ in seeds only and are averaged.
        settings: Leaves of their configuration by key path (`collect.Run.settings`); without, parts are unknown.
        model: Take rows of this model instead of the runs' own, as published tables name it; likewise `method`.
        method: As `Method.published` or the paper names it.
        group: Only rows of this group.

    Returns:
        Those that are comparable first, then in the order of the papers. Empty if the runs have no name in published
        tables, see `why_none`.
    """
    several = [runs] if isinstance(runs, Mapping) else list(runs)
    names = several[0].get("published") or {}
    chosen = (model or names.get("model"), method or names.get("method"))
    if None in chosen:
        return []
    ours = own_conditions(several[0], settings or {})
    found = []
    for entry in entries(*chosen, group):
        taken = model_of(entry)
        parts = (
            named(
                "model",
                names.get("model"),
                several[0]["model"],
                Condition(tuple(taken.items()) or (("", entry.model),)),
            ),
            named("method", names.get("method"), several[0]["method"], Condition((("", entry.family),))),
            *compare_parts(several[0], ours, entry.conditions),
        )
        found.append(_comparison(several, entry, parts))
    return sorted(found, key=lambda one: not one.comparable)


def why_none(results: Mapping[str, Any], model: str | None = None, method: str | None = None) -> str:
    """Say why `beside` finds no row for a run."""
    names = results.get("published") or {}
    model, method = model or names.get("model"), method or names.get("method")
    if model is None:
        return f"model={results['model']} has no name in published tables (model.published); --model takes others"
    if method is None:
        own = f"method={results['method']} with tuning={results['tuning']}"
        return f"{own} has no name in published tables; --method takes others"
    others = sorted({entry.family for entry in entries(model)})
    return f"no published row of {model} with {method}; of that model there is {', '.join(others) or 'nothing'}"


def _comparison(runs: Sequence[Mapping[str, Any]], entry: Entry, parts: tuple[Part, ...]) -> Comparison:
    other_rows = [part for part in parts if part.name == "data variant" and part.status == "differs"]
    why = "other test rows" if other_rows else ""
    if set(runs[0]["tasks"]) != set(ORDERS["1"]):
        why = "other tasks"
    stated = entry.conditions.get("formula", Condition())
    formula = stated.value or "trace"
    note = why
    if entry.bwt is not None and entry.bwt_signed is None:
        note = f"sign in doubt: {entry.note or entry.sign_note}"
    elif entry.bwt is not None and stated.value is None:
        note = f"formula unknown, ours: {FORMULAS['trace']}"
    op = _number([run.get("op") for run in runs], entry.op, entry.printed.get("op", ""), why)
    bwt = _number([run.get(_KEYS[formula]) for run in runs], entry.bwt_signed, entry.printed.get("bwt", ""), note)
    differ, unknown, unclear = (
        [part.name for part in parts if part.status == status] for status in ("differs", "unknown", "unclear")
    )
    comparable = not (differ or unknown or entry.copied_from)
    said = [f"repeats {entry.copied_from}"] if entry.copied_from else []
    said += [f"differ: {', '.join(differ)}"] if differ else []
    said += [f"unknown: {', '.join(unknown)}"] if unknown else []
    said += [f"unclear: {', '.join(unclear)}"] if unclear else []
    verdict = "; ".join(["comparable" if comparable else "side by side only", *said])
    return Comparison(entry, parts, op, bwt, formula if stated.value else UNKNOWN, comparable, verdict)


def _number(values: Sequence[float | None], theirs: float | None, printed: str, note: str) -> Number:
    present = [value for value in values if value is not None]
    mean, margin = mean_and_margin(present)
    if mean is None:
        note = note or "ours is missing: cells were not scored"
    elif not printed:
        note = "not published"
    both = mean is not None and theirs is not None and not note
    difference = mean - theirs if both else None  # type: ignore[operator]  # not None here
    return Number(mean, margin, len(present), theirs, printed, difference, note)
