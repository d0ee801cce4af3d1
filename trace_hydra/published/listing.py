"""Published numbers, and ours beside them, as tables of text."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from trace_hydra.metrics.continual import ScoreMatrix, summary
from trace_hydra.published.beside import Comparison, Number
from trace_hydra.published.conditions import ORDERS
from trace_hydra.published.read import groups
from trace_hydra.published.records import (
    FORMULAS,
    PARTS,
    Ability,
    Entry,
    Judged,
    Matrix,
    Paper,
    TaskScores,
    condition,
    table_name,
)

SETS = ("MMLU", "GSM8K", "BBH", "TyDiQA", "BoolQ", "PIQA")
"""Of general ability, in the order of TRACE's Table 2; in our results they are lower case."""
NONE = "–"
_OURS = "ours"


@dataclass(frozen=True)
class Listing:
    """A table; every cell is text, numbers as they were printed."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    texts: tuple[str, ...] = field(default=("row", "table", "model", "method"))
    """Columns that hold words."""


def by_group(entries: Sequence[Entry]) -> list[Listing]:
    """List rows, a table a group; what all of a group share stands in its notes."""
    found = []
    for name in dict.fromkeys(entry.group for entry in entries):
        own = [entry for entry in entries if entry.group == name]
        group = groups()[name]
        shared, apart = _shared(own)
        head = ("row", "model", "method", *(PARTS[part] for part in apart), "OP", "BWT", "notes")
        footnotes = list(dict.fromkeys(note for entry in own for note in _notes(entry)))
        rows = [
            (
                entry.where,
                entry.model,
                entry.method,
                *(str(entry.conditions.get(part, condition(None))) for part in apart),
                _printed(entry, "op"),
                _printed(entry, "bwt"),
                ", ".join(str(footnotes.index(note) + 1) for note in _notes(entry)),
            )
            for entry in own
        ]
        notes = [f"{PARTS[part]}: {text}" for part, text in shared.items()]
        notes += [f"sign of BWT: {group.sign_note}"] if any(entry.bwt is not None for entry in own) else []
        notes += [f"[{number}] {note}" for number, note in enumerate(footnotes, 1)]
        texts = ("row", "model", "method", "notes", *PARTS.values())
        found.append(Listing(f"{name}: {group.about}", head, tuple(rows), tuple(notes), texts))
    return found


def beside_listing(name: str, comparisons: Sequence[Comparison]) -> Listing:
    """List the rows that runs stand beside, and for each of them how the protocols differ."""
    head = ("#", "row", "group", "method", "OP", _OURS, "Δ OP", "BWT", "formula", f"{_OURS} by it", "Δ BWT", "verdict")
    rows: list[tuple[str, ...]] = []
    notes = []
    for number, one in enumerate(comparisons, 1):
        entry = one.entry
        op, bwt = one.op, one.bwt
        rows.append(
            (
                str(number), entry.where, entry.group, entry.method, op.printed or NONE, _ours(op), _signed(op),
                _signed_bwt(entry), one.formula if entry.bwt is not None else NONE,
                _ours(bwt) if entry.bwt is not None else NONE, _signed(bwt),
                "comparable" if one.comparable else "side by side only",
            )
        )  # fmt: skip
        notes.append(f"[{number}] {entry.where}, {entry.model}, {entry.group}: {one.verdict}")
        notes += [f"    {part}" for part in one.parts if part.status != "same"]
        for label, value in (("OP", op), ("BWT", bwt)):
            notes += [f"    no Δ {label}: {value.note}"] if value.note and value.printed else []
        if one.formula in FORMULAS and one.bwt.printed:
            notes.append(f"    BWT: {FORMULAS[one.formula]}; printed {one.bwt.printed}; {entry.sign_note}")
        notes += [f"    {note}" for note in _notes(entry)]
    return Listing(name, head, tuple(rows), tuple(notes), ("#", "row", "group", "method", "formula", "verdict"))


def ability_listing(rows: Iterable[Ability], runs: Sequence[Mapping[str, Any]] = ()) -> Listing:
    """List general ability in the layout of TRACE's Table 2, ours below."""
    rows = list(rows)
    bases = {(one.paper, one.table, one.model): one for one in rows if one.method == "base"}
    body: list[tuple[str, ...]] = []
    notes = []
    for one in rows:
        base = bases.get((one.paper, one.table, one.model))
        body.append(
            (
                f"{one.paper} {table_name(one.table)}" if one.table != "unknown" else one.paper,
                one.model,
                one.method,
                *(_text(one.scores.get(name)) for name in SETS),
                _text(mean_of(one)),
                _text(one.delta),
                _text(change_of(one, base)),
            )
        )
        notes += [f"{one.paper} {one.model} {one.method}: {one.note}"] if one.note else []
    for results in runs:
        sets = (results.get("capability") or {}).get("sets") or {}
        for when in ("before", "after") if any(name.lower() in sets for name in SETS) else ():
            scores = {name: sets[name.lower()][when] for name in SETS if name.lower() in sets}
            whole = len(scores) == len(SETS) and None not in scores.values()
            delta = ((results["capability"].get("general") or {}).get("delta")) if when == "after" else None
            mean = sum(scores.values()) / len(SETS) if whole else None
            cells = (*(_text(scores.get(name)) for name in SETS), _text(mean), NONE, _text(delta))
            body.append((f"{_OURS}: {results['name']}", results["model"], f"{results['method']}, {when}", *cells))
    notes.append("ours: lm-evaluation-harness; TRACE: OpenCompass, version and chat template unknown")
    head = ("row", "model", "method", *SETS, "mean", "Δ printed", "Δ of the cells")
    return Listing("General ability, 0-100", head, tuple(body), tuple(dict.fromkeys(notes)))


def judged_listing(rows: Iterable[Judged], runs: Sequence[Mapping[str, Any]] = ()) -> Listing:
    """List shares of prompts won, tied and lost against the start model, ours below."""
    rows = list(rows)
    body: list[tuple[str, ...]] = [
        (f"{one.paper} {table_name(one.table)}" if one.table != "unknown" else one.paper, one.model, one.method,
         one.area, f"{one.win:g}", f"{one.tie:g}", f"{one.lose:g}")
        for one in rows
    ]  # fmt: skip
    for results in runs:
        for name, one in ((results.get("capability") or {}).get("sets") or {}).items():
            if one["before"] is None and one.get("win") is not None:
                shares = (_text(one[share]) for share in ("win", "tie", "lose"))
                own = (f"{_OURS}: {results['name']}, {name}", results["model"], results["method"], one["area"])
                body.append((*own, *shares))
    notes = [f"{one.paper} {one.model} {one.method}: {one.note}" for one in rows if one.note]
    notes.append("TRACE: GPT-4-0613, two calls with the order turned; how they are merged is unknown")
    head = ("row", "model", "method", "area", "win %", "tie %", "lose %")
    texts = ("row", "model", "method", "area")
    return Listing("Judged against the start model", head, tuple(body), tuple(dict.fromkeys(notes)), texts)


def task_listing(rows: Iterable[TaskScores], runs: Sequence[Mapping[str, Any]] = ()) -> Listing:
    """List scores by task, 0-100; ours, those of the last row, below."""
    rows, tasks = list(rows), ORDERS["1"]
    body: list[tuple[str, ...]] = []
    for one in rows:
        points = one.points()
        epochs = "" if one.epochs is None else f"{one.epochs} for every task"
        mean = None if one.mean is None else one.mean * 100 / one.scale
        where = f"{one.paper} {table_name(one.table)}" if one.table != "unknown" else one.paper
        cells = (*(_text(points.get(task)) for task in tasks), _text(mean_of_tasks(one)), _text(mean))
        body.append((where, one.model, f"{one.method}, {one.when}", str(condition(one.data)), epochs, *cells))
    for results in runs:
        last = dict(zip(results["tasks"], (results.get("matrix") or [[]])[-1], strict=False))
        epochs = ",".join(str(stage.get("epochs")) for stage in results["stages"])
        own = (f"{_OURS}: {results['name']}", results["model"], results["method"], results["data"], epochs)
        body.append((*own, *(_text(last.get(task)) for task in tasks), _text(results.get("op")), NONE))
    head = ("row", "model", "method", "data", "epochs", *tasks, "mean", "mean printed")
    notes = [f"{one.paper} {table_name(one.table)} {one.method}: {one.note}" for one in rows if one.note]
    texts = ("row", "model", "method", "data", "epochs")
    return Listing("Scores by task, 0-100", head, tuple(body), tuple(dict.fromkeys(notes)), texts)


def matrix_listing(name: str, scores: ScoreMatrix, notes: tuple[str, ...] = ()) -> Listing:
    """List a run's scores as TRACE's Tables 7-22 do, 0-100: a row a task, a column a stage, OP after each below."""
    size = len(scores.tasks)
    body = [
        (task, *(_text(scores.get(stage, task)) if stage > place else "" for stage in range(1, size + 1)))
        for place, task in enumerate(scores.tasks)
    ]
    means = []
    for stage in range(1, size + 1):
        own = [value for value in scores.rows[stage][:stage] if value is not None]
        means.append(_text(sum(own) / stage if len(own) == stage else None))
    found = summary(scores)
    numbers = f"OP {_text(found['op'])}, BWT {_text(found['bwt'])}, {_text(found['bwt_over_t'])} over T"
    head = ("task", *(f"after {stage}" for stage in range(1, size + 1)))
    return Listing(name, head, (*body, ("OP", *means)), (f"from the cells: {numbers}", *notes), ("task",))


def matrix_listings(
    matrices: Iterable[Matrix], papers: Sequence[Paper], runs: Sequence[Mapping[str, Any]]
) -> list[Listing]:
    """List published matrices with what is printed and doubted of them, then those of runs."""
    found = []
    for one in matrices:
        doubts = [doubt.what for paper in papers for doubt in paper.doubts if one.table in doubt.matrices]
        printed = f"printed, 0-1: OP {one.op}, BWT {one.bwt}"
        name = f"TRACE Table {one.table}: {one.model}, {one.method}, data {one.data}, order {one.order}"
        found.append(matrix_listing(name, one.scores(), (printed, *doubts)))
    for results in runs:
        found.append(
            matrix_listing(f"{_OURS}: {results['name']}", ScoreMatrix(results["tasks"], results.get("matrix")))
        )
    return found


def subset_listing(rows: Sequence[Mapping[str, str]]) -> list[Listing]:
    """List TRACE's Tables 28-31, a table a suite."""
    return [
        Listing(
            f"TRACE Tables 28-31, LLaMA-2-13B-Chat: {suite}",
            tuple(own[0]),
            tuple(tuple(row.values()) for row in own),
            texts=("suite", "subset", "metric"),
        )
        for suite, own in ((suite, list(members)) for suite, members in groupby(rows, lambda row: row["suite"]))
    ]


def paper_listing(papers: Sequence[Paper]) -> Listing:
    """List sources, with what is to be known of them."""
    rows = tuple(
        (one.paper, one.arxiv or NONE, str(one.year or NONE), one.venue or NONE, one.code or NONE, str(len(one.rows)),
         str(one.runs or NONE))
        for one in papers
    )  # fmt: skip
    notes = tuple(f"{one.paper}: {remark}" for one in papers for remark in one.remarks)
    head = ("paper", "arXiv", "year", "venue", "code", "rows", "runs")
    return Listing("Sources", head, rows, notes, ("paper", "arXiv", "venue", "code"))


def doubt_listing(papers: Sequence[Paper]) -> Listing:
    """List what is known to be wrong or uncertain in published tables."""
    rows = tuple((one.paper, doubt.where, doubt.what) for one in papers for doubt in one.doubts)
    return Listing("Known typos and doubts", ("paper", "where", "what"), rows, (), ("paper", "where", "what"))


def mean_of(one: Ability) -> float | None:
    """Average the six sets, or take the printed mean where they are not printed."""
    if set(one.scores) == set(SETS):
        return sum(one.scores.values()) / len(SETS)
    return one.mean


def change_of(one: Ability, base: Ability | None) -> float | None:
    """Compute the change of the mean since the start model of the same table."""
    own, before = mean_of(one), mean_of(base) if base else None
    return own - before if own is not None and before is not None and one is not base else None


def mean_of_tasks(one: TaskScores) -> float | None:
    """Average all eight tasks, 0-100."""
    return sum(one.points().values()) / len(ORDERS["1"]) if set(one.scores) == set(ORDERS["1"]) else None


def _shared(entries: Sequence[Entry]) -> tuple[dict[str, str], list[str]]:
    """Split conditions into those that all rows share, and the parts in which they differ."""
    texts = {part: {str(entry.conditions.get(part, condition(None))) for entry in entries} for part in PARTS}
    named = {part for entry in entries for part in entry.conditions}
    shared = {part: next(iter(found)) for part, found in texts.items() if part in named and len(found) == 1}
    return shared, [part for part in PARTS if part in named and part not in shared]


def _notes(entry: Entry) -> list[str]:
    copied = [f"repeats {entry.copied_from}"] if entry.copied_from else []
    return [*copied, *([entry.note] if entry.note else []), *entry.doubts]


def _printed(entry: Entry, key: str) -> str:
    text = _signed_bwt(entry) if key == "bwt" else entry.printed.get(key, NONE)
    deviation = entry.printed.get(f"{key}_std")
    return f"{text} ± {deviation}" if deviation else text


def _signed_bwt(entry: Entry) -> str:
    """Write BWT with the printed digits and negative as forgetting; a doubtful one as printed, with a question mark."""
    printed = entry.printed.get("bwt", NONE)
    if entry.bwt is None or entry.bwt_signed == entry.bwt:
        return printed
    return f"{printed} ?" if entry.bwt_signed is None else f"{entry.bwt_signed:.{_decimals(printed)}f}"


def _decimals(printed: str) -> int:
    return len(printed.partition(".")[2])


def _ours(number: Number) -> str:
    if number.ours is None:
        return NONE
    return f"{number.ours:.2f}" + (f" ± {number.margin:.2f}" if number.margin is not None else "")


def _signed(number: Number) -> str:
    return NONE if number.difference is None else f"{number.difference:+.2f}"


def _text(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"
