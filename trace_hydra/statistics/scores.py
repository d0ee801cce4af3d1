"""What a finished run scored, test row by test row."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from trace_hydra.errors import DataError, StoreError
from trace_hydra.metrics.continual import ScoreMatrix
from trace_hydra.metrics.records import json_rows, located, read_json
from trace_hydra.names import inside

_ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class ExampleScores:
    """Scores of one cell's test rows."""

    ids: tuple[str, ...]
    """Of the rows; in every cell of a task and in every run that shares its test rows the same, in the same order."""
    values: np.ndarray
    """Points, 0-100, (row,), float64."""
    prompts: tuple[str, ...] = ()
    """Hashes of the rows' prompts: generated rows of other seeds have the same ids and other prompts."""

    def __post_init__(self):
        if not len(self.ids) or self.values.shape != (len(self.ids),):
            raise DataError(f"a cell needs a score for each of its rows: {len(self.ids)} ids, {self.values.shape}.")

    @cached_property
    def mean(self) -> float:
        """The cell's score, to the last bit what scoring wrote."""
        return math.fsum(self.values.tolist()) / len(self.values)

    @cached_property
    def zero_or_all(self) -> bool:
        """Whether no row scored anything but 0 or 100."""
        return bool(np.isin(self.values, (0.0, 100.0)).all())


@dataclass(frozen=True, eq=False)
class ItemDeltas:
    """What became of each item of a capability set since before training."""

    area: str
    judged: bool
    """Whether a judge compared the answers; else both were scored."""
    ids: tuple[str, ...]
    """Category and id of the items that have a delta."""
    values: np.ndarray
    """Points, (item,)."""
    weights: np.ndarray
    """Of the items in the set's delta, (item,); their sum is 1."""


@dataclass(frozen=True, eq=False)
class RunScores:
    """One run's cells and what belongs to telling it from others."""

    name: str
    method: str
    tasks: tuple[str, ...]
    """In training order."""
    order: str
    """Name of the order."""
    seed: int
    """Of training."""
    cells: Mapping[tuple[int, str], ExampleScores]
    """By (row, task), carried cells included."""
    sets: Mapping[str, ItemDeltas] = field(default_factory=dict)
    """Capability sets, behind the last row that was measured."""

    @cached_property
    def matrix(self) -> ScoreMatrix:
        """The cells' means."""
        matrix = ScoreMatrix(self.tasks)
        for (row, task), scores in self.cells.items():
            matrix.set(row, task, scores.mean)
        return matrix


def read_scores(folder: Path, results: Mapping[str, Any] | None = None) -> RunScores:
    """Read the rows of a finished run out of its predictions and capability folders.

    Args:
        folder: The run directory.
        results: Its results.json, if it was read already.

    Raises:
        StoreError: If a file is missing, damaged, or does not fit results.json; names file and row.
    """
    place = folder / "results.json"
    found: Any = read_json(place, StoreError) if results is None else results
    tasks, matrix = _matrix(found, place)
    carried = found.get("carried") if isinstance(found.get("carried"), Mapping) else {}
    cells: dict[tuple[int, str], ExampleScores] = {}
    known: dict[str, ExampleScores] = {}
    for row in range(len(tasks) + 1):
        for task in tasks:
            if (expected := matrix.get(row, task)) is None:
                continue
            source = carried.get(f"{row},{task}")
            if source is not None and (source, task) in cells:
                cells[row, task] = cells[source, task]
                continue
            path = inside(folder, "predictions", str(row), f"{task}.jsonl")
            scores = known[task] = _cell(path, known.get(task))
            if abs(scores.mean - expected) > _ROUNDING:
                raise StoreError(
                    f"{path}: its {len(scores.ids)} rows score {scores.mean:.6f} on average, but {place} says "
                    f"{expected:.6f}; one of them was changed or cut short."
                )
            cells[row, task] = scores
    seed = found.get("seed")
    seed = seed.get("train") if isinstance(seed, Mapping) else seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise StoreError(f"{place}: seed.train={seed!r} is no integer.")
    names = {key: found.get(key) for key in ("name", "method", "task_order")}
    if wrong := [key for key, value in names.items() if not isinstance(value, str)]:
        raise StoreError(f"{place}: {', '.join(wrong)} must be text.")
    name, method, order = (str(value) for value in names.values())
    return RunScores(name, method, tuple(tasks), order, seed, cells, _sets(folder, found, place))


def _matrix(results: Any, place: Path) -> tuple[list[str], ScoreMatrix]:
    tasks = results.get("tasks") if isinstance(results, Mapping) else None
    if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
        raise StoreError(f"{place} needs 'tasks' and 'matrix'. Name the folder of a finished run.")
    with located(place, StoreError):
        return tasks, ScoreMatrix(tasks, results.get("matrix"))


def _cell(path: Path, before: ExampleScores | None) -> ExampleScores:
    """Read a predictions file, whose rows must be those of the task's cells `before`."""
    ids, prompts, values = [], [], []
    for place, record in json_rows(path, StoreError):
        scores = record.get("scores") if isinstance(record, Mapping) else None
        value = scores.get("score") if isinstance(scores, Mapping) else None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise StoreError(f"{place}: scores.score must be a finite number, not {value!r}.")
        if not isinstance(record.get("id"), str) or not isinstance(record.get("prompt_sha256"), str):
            raise StoreError(f"{place}: 'id' and 'prompt_sha256' must be text.")
        ids.append(record["id"])
        prompts.append(record["prompt_sha256"])
        values.append(float(value))
    if not ids:
        raise StoreError(f"{path} holds no answers.")
    if len(set(ids)) < len(ids):
        raise StoreError(f"{path}: id {next(one for one in ids if ids.count(one) > 1)!r} is there twice.")
    array, rows, hashes = np.array(values, dtype=np.float64), tuple(ids), tuple(prompts)
    if before is None:
        return ExampleScores(rows, array, hashes)
    if (rows, hashes) != (before.ids, before.prompts):
        own, known = zip(rows, hashes, strict=True), zip(before.ids, before.prompts, strict=True)
        odd = next((n for n, pair in enumerate(zip(own, known, strict=False), 1) if pair[0] != pair[1]), None)
        where = f"{path}:{odd}" if odd else f"{path}"
        raise StoreError(f"{where}: these are not the test rows that an earlier row of the matrix has for this task.")
    return ExampleScores(before.ids, array, before.prompts)  # the same objects, which compare in no time


def _sets(folder: Path, results: Mapping[str, Any], place: Path) -> dict[str, ItemDeltas]:
    """Read the pairs behind the capability deltas of results.json."""
    found = results.get("capability")
    if not isinstance(found, Mapping) or not isinstance(found.get("sets"), Mapping) or found.get("row") is None:
        return {}
    row, sets = found["row"], found["sets"]
    if isinstance(row, bool) or not isinstance(row, int):
        raise StoreError(f"{place}: capability.row={row!r} is no row of the matrix.")
    own: dict[str, list[tuple[str, str, float]]] = {}
    for path in sorted(inside(folder, "capability", str(row)).glob("*.pairs.jsonl")):
        for where, pair in json_rows(path, StoreError):
            if not isinstance(pair, Mapping) or not {"set", "category", "id", "delta"} <= set(pair):
                raise StoreError(f"{where}: a pair needs 'set', 'category', 'id' and 'delta'.")
            if (delta := pair["delta"]) is None:
                continue
            if isinstance(delta, bool) or not isinstance(delta, int | float) or not math.isfinite(delta):
                raise StoreError(f"{where}: 'delta' must be a finite number or null, not {delta!r}.")
            own.setdefault(str(pair["set"]), []).append((str(pair["category"]), str(pair["id"]), float(delta)))
    return {name: _items(rows, sets[name]) for name, rows in own.items() if isinstance(sets.get(name), Mapping)}


def _items(rows: Sequence[tuple[str, str, float]], said: Mapping[str, Any]) -> ItemDeltas:
    rows = sorted(rows)
    categories = [category for category, _, _ in rows]
    sizes = {category: categories.count(category) for category in set(categories)}
    even = np.full(len(rows), 1 / len(rows))
    macro = np.array([1 / sizes[category] / len(sizes) for category in categories])
    return ItemDeltas(
        str(said.get("area")),
        said.get("before") is None,
        tuple(f"{category}/{item}" for category, item, _ in rows),
        np.array([delta for *_, delta in rows], dtype=np.float64),
        macro if said.get("macro") else even,
    )
