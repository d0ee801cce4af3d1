"""What the page of one run shows, as plain values for its template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from trace_hydra.errors import TraceHydraError
from trace_hydra.report.bounds import bounds
from trace_hydra.report.cells import Cell, Column, Grid, between, mapping, number, text
from trace_hydra.report.hostile import plain
from trace_hydra.statistics import ItemDeltas, RunScores, delta_number, of_run, read_scores, score_number

HEADLINE = {
    "op": ("OP", "mean score over all tasks after the last stage"),
    "bwt": ("BWT", "mean change of the earlier tasks since their own stage; negative is forgetting"),
    "forgetting": ("Forgetting", "mean loss of the earlier tasks against their best earlier score"),
}
SIGNED = {"bwt", "bwt_over_t", "bwt_clipped", "fwt", "delta_general", "delta_instruction", "delta_safety"}
"""Numbers that are changes; they are shown with their sign."""
MORE = {
    "bwt_over_t": ("BWT over T", "the sum of BWT divided by all T tasks"),
    "bwt_clipped": ("BWT clipped", "over T, with gains counted as 0"),
    "fwt": ("FWT", "mean gain on a task before its own stage, over the untouched model"),
}
DELTAS = {
    "general": (Markup("ΔR<sup>G</sup>"), "change of general ability"),
    "instruction": (Markup("ΔR<sup>I</sup>"), "change of instruction following"),
    "safety": (Markup("ΔR<sup>S</sup>"), "change of safety"),
}
_ANY_AREA = "general"


@dataclass(frozen=True)
class Verdict:
    """One of the numbers that sum a run up."""

    key: str
    name: str
    meaning: str
    number: Cell
    interval: str
    """In words, or why there is none."""
    start: str
    """The change against the start model, in words."""
    unit: str


def sentence(results: Mapping[str, Any]) -> str:
    """Say what was run and under which protocol."""
    tasks, protocol = results["tasks"], mapping(results.get("protocol"))
    seed = mapping(results.get("seed")).get("train")
    what = f"{len(tasks)} tasks one after the other" if len(tasks) > 1 else f"the task {tasks[0]}"
    engine = mapping(protocol.get("engine")).get("name")
    answered = f", with answers by engine {plain(engine)}" if engine else ""
    return (
        f"Model {_said(results, 'model')} learned {what} (data {_said(results, 'data')}, order "
        f"{_said(results, 'task_order')}, seed {'not known' if seed is None else seed}) with method "
        f"{_said(results, 'method')} and tuning {_said(results, 'tuning')}, and was scored under protocol "
        f"{plain(protocol.get('name', 'not known'))} [{plain(protocol.get('fingerprint', 'not known'))}], scoring "
        f"{plain(protocol.get('scoring', 'not known'))}{answered}."
    )


def notices(results: Mapping[str, Any], scores: RunScores | str) -> list[str]:
    """Say what is missing or wrong, before any number is shown."""
    found = []
    tasks, matrix = results["tasks"], results["matrix"]
    if results.get("complete") is not True:
        found.append("Incomplete: not every planned cell of the matrix was scored.")
    if all(cell is None for cell in matrix[0]):
        found.append("Row 0 was not scored (evaluation.row0=false): no change against the start model can be given.")
    if results.get("non_finite"):
        found.append(f"Not finite, and left empty: {', '.join(map(plain, results['non_finite'][:10]))}.")
    if isinstance(scores, str):
        found.append(f"Answers could not be read, so that what rests on them is left out: {scores}")
    if len(tasks) == 1:
        found.append("With one task there is nothing to forget: BWT, forgetting and FWT have no value.")
    found.append(
        "One run, one seed: intervals say what other test rows would change, not what another seed or order would."
    )
    return found


def scores_of(results: Mapping[str, Any], directory: Path) -> RunScores | str:
    """Read the scores of every answer, or say why that cannot be done."""
    try:
        return read_scores(directory, results)
    except TraceHydraError as error:
        return str(error)


def verdicts(results: Mapping[str, Any], scores: RunScores | str) -> list[Verdict]:
    """Give OP, BWT, forgetting and the three deltas, each with its interval and what the start model says to it."""
    found = []
    for key, (name, meaning) in HEADLINE.items():
        cell = number(results.get(key), why_missing(results, key), sign=key in SIGNED)
        ends = bounds(results, scores, key).said(sign=key in SIGNED)
        found.append(Verdict(key, name, meaning, cell, ends, _against_start(key, results, scores), "points of 100"))
    for area, (name, meaning) in DELTAS.items():
        found.append(_delta_verdict(results, scores, area, name, meaning))
    return found


def more_numbers(results: Mapping[str, Any], scores: RunScores | str) -> Grid:
    """Give the other formulas."""
    rows = []
    for key, (name, meaning) in MORE.items():
        cell = number(results.get(key), why_missing(results, key), sign=True)
        rows.append([text(name), cell, bounds(results, scores, key).cell(sign=True), text(meaning)])
    columns = [
        Column("number", numeric=False),
        Column("points"),
        Column("95 % interval"),
        Column("meaning", numeric=False),
    ]
    return Grid("more", "Other formulas over the same matrix", columns, rows)


def why_missing(results: Mapping[str, Any], key: str) -> str:
    """Say which cells a formula lacks."""
    lacking = mapping(results.get("missing")).get(key)
    return f"not known: {', '.join(map(str, lacking))}" if lacking else "not in results.json"


def last_row(results: Mapping[str, Any], scores: RunScores | str) -> Grid:
    """Give each task's last score with its interval, metric, and the way it came there."""
    tasks, matrix = results["tasks"], results["matrix"]
    last = len(tasks)
    cells = {cell["task"]: cell for cell in results.get("cells") or () if cell.get("row") == last}
    rows = []
    for column, task in enumerate(tasks):
        start, own, now = matrix[0][column], matrix[column + 1][column], matrix[last][column]
        cell = cells.get(task, {})
        metrics = ", ".join(f"{name} {number(value).text}" for name, value in mapping(cell.get("metrics")).items())
        rows.append(
            [
                text(task),
                number(start, "row 0 was not scored"),
                number(own, "not scored after its own stage"),
                number(now, "not scored after the last stage"),
                bounds(results, scores, score_number(task)).cell(),
                number(_minus(now, own), "a score is missing", sign=True),
                number(_minus(now, start), "row 0 was not scored", sign=True),
                text(cell.get("metric", "not known")),
                number(cell.get("n"), digits=0),
                text(metrics),
            ]
        )
    columns = [
        Column("task", numeric=False),
        Column("start", "row 0"),
        Column("own stage", "just learned"),
        Column("last", "after all stages"),
        Column("95 % interval", "of last"),
        Column("since own stage"),
        Column("since start"),
        Column("metric", numeric=False),
        Column("answers"),
        Column("all metrics of last", numeric=False),
    ]
    caption = "Scores of each task: before training, just learned, and at the end"
    return Grid("tasks", caption, columns, rows, sortable=True)


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _said(results: Mapping[str, Any], key: str) -> str:
    return plain(results.get(key, "not known"))


def _against_start(key: str, results: Mapping[str, Any], scores: RunScores | str) -> str:
    """Say how the tasks that a number is about stand against the untouched model."""
    tasks, matrix = results["tasks"], results["matrix"]
    about = list(enumerate(tasks))[: None if key == "op" else -1]
    changes = [_minus(matrix[-1][column], matrix[0][column]) for column, _ in about]
    known = [change for change in changes if change is not None]
    if not about or len(known) < len(about):
        return "against the start model: not known, cells of row 0 or of the last row are missing"
    mean = sum(known) / len(known)
    ends = ""
    if not isinstance(scores, str):
        found = of_run(_since_start(scores, [task for _, task in about]), delta_number(_ANY_AREA))
        ends = between((found.low, found.high), sign=True)
    ends = f" [{ends}]" if ends else ""
    whose = "" if key == "op" else "earlier tasks "
    return f"{whose}against the start model: {number(mean, sign=True).text}{ends}"


def _since_start(scores: RunScores, tasks: Sequence[str]) -> RunScores:
    """Give what each test row gained since before training as a run whose capability sets are its tasks."""
    last = len(scores.tasks)
    sets = {}
    for task in tasks:
        first, now = scores.cells[0, task], scores.cells[last, task]
        weights = np.full(len(first.ids), 1 / len(first.ids))
        sets[task] = ItemDeltas(_ANY_AREA, False, first.ids, now.values - first.values, weights)
    return replace(scores, sets=sets)


def _delta_verdict(results: Mapping[str, Any], scores: RunScores | str, area: str, name: str, meaning: str) -> Verdict:
    capability = mapping(results.get("capability"))
    found = mapping(capability.get(area))
    value = found.get("delta")
    judged = found.get("measure") == "judge"
    sets = mapping(capability.get("sets"))
    start = "the start model is its zero"
    if value is not None and not judged:
        own = [mapping(sets.get(one)) for one in found.get("sets") or ()]
        pairs = [(one["before"], one["after"]) for one in own if None not in (one.get("before"), one.get("after"))]
        if own and len(pairs) == len(own):
            before, after = (sum(values) / len(values) for values in zip(*pairs, strict=True))
            start = f"start model {number(before).text}, now {number(after).text}"
    why = "not measured (capability=none, or no set of this area)"
    if failed := mapping(capability.get("failed")):
        why += f"; failed: {plain('; '.join(f'{key}: {reason}' for key, reason in failed.items()), 300)}"
    unit = "win share - lose share" if judged else "points of 100"
    ends = bounds(results, scores, delta_number(area)).said(sign=True)
    return Verdict(f"delta_{area}", name, meaning, number(value, why, sign=True), ends, start, unit)


def cell_intervals(scores: RunScores | str) -> dict[tuple[int, str], tuple[float, float]]:
    """Give the 95 % interval of every scored cell; nothing where the answers could not be read."""
    if isinstance(scores, str):
        return {}
    found = {}
    for (row, task), cell in scores.cells.items():
        alone = RunScores(scores.name, scores.method, (task,), scores.order, scores.seed, {(1, task): cell})
        ends = of_run(alone, score_number(task))
        if ends.low is not None and ends.high is not None:
            found[row, task] = (ends.low, ends.high)
    return found


def exceptions(results: Mapping[str, Any]) -> list[str]:
    """Say where training was not as the configuration has it: smaller micro-batches, steps left out."""
    stages = results.get("stages") or ()
    found = []
    sizes = {stage.get("task"): stage.get("micro_batch_size") for stage in stages}
    if len(set(sizes.values())) > 1:
        found.append(f"Rows of a micro-batch: {', '.join(f'{task} {size}' for task, size in sizes.items())}.")
    skipped = {stage.get("task"): mapping(stage.get("effort")).get("skipped") for stage in stages}
    if any(skipped.values()):
        listed = ", ".join(f"{task} {steps}" for task, steps in skipped.items() if steps)
        found.append(f"Steps not taken for a value that was not finite: {listed}.")
    return found


def disclosures(results: Mapping[str, Any]) -> str:
    """List what the method uses that others do not."""
    said = {True: "yes", False: "no"}
    return ", ".join(
        f"{plain(key)}: {said.get(value, plain(value)) if isinstance(value, bool) else plain(value)}"
        for key, value in mapping(results.get("disclosures")).items()
    )
