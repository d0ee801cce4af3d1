"""Loss terms of a finished run, read back from what its loggers left in the run directory."""

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trace_hydra.callbacks.axes import STAGE, STEP, TOKENS

LOSS = "train/loss"
MEMORY = {"train/device_memory_gb": "device", "train/host_memory_gb": "host"}
_POINTS = 400
"""Of a curve; more are averaged, so that a page of a long run stays small."""


@dataclass(frozen=True)
class Curves:
    """Loss over the optimizer steps of the whole run."""

    source: str
    """The file it was read from, relative to the run."""
    steps: list[float] = field(default_factory=list)
    stages: list[int] = field(default_factory=list)
    """Stage of each point, from 1."""
    terms: dict[str, list[float]] = field(default_factory=dict)
    """Term -> value of each point, NaN where it was not logged; the total first, as `loss`."""
    averaged: int = 1
    """Logged points that make one."""
    tokens: list[float] = field(default_factory=list)
    """Trained tokens of the run up to each point; empty where they were not logged."""
    memory: dict[int, tuple[float, str]] = field(default_factory=dict)
    """Stage -> the most memory of the process up to its end, in 10^9 bytes, and whether of `device` or `host`."""


def read_curves(directory: Path) -> Curves | str:
    """Read the curves of a run from `csv/metrics.csv`, else from W&B's files, or say why there are none."""
    for name, read in (("csv/metrics.csv", _csv_rows), ("wandb", _wandb_rows)):
        try:
            rows = list(_training(read(directory)))
        except (OSError, ValueError, ImportError) as error:
            return f"{directory / name} cannot be read: {error}"
        if rows:
            return _curves(name, rows)
    return (
        "No logger left the losses of its steps in the run directory (logger=csv and logger=wandb do), or every stage "
        "came from the store and nothing was trained here."
    )


def _training(rows: Iterator[Mapping[str, Any]]) -> Iterator[dict[str, float]]:
    """Take the finite numbers of rows that hold a loss and its place."""
    for row in rows:
        numbers = {name: value for name, text in row.items() if (value := _number(text)) is not None}
        if {LOSS, STEP, STAGE} <= set(numbers):
            yield numbers


def _curves(source: str, rows: Sequence[Mapping[str, float]]) -> Curves:
    ordered = sorted({row[STEP]: row for row in rows}.values(), key=lambda row: row[STEP])
    names = sorted({name for row in ordered for name in row if name.startswith(f"{LOSS}/")})
    names = [LOSS, *names] if len(names) > 1 else [LOSS]
    size = math.ceil(len(ordered) / _POINTS)
    stages = sorted({int(row[STAGE]) for row in ordered})
    parts = [
        own[start : start + size]
        for stage in stages  # an average never spans two stages
        for own in [[row for row in ordered if int(row[STAGE]) == stage]]
        for start in range(0, len(own), size)
    ]
    terms = {name.removeprefix("train/").removeprefix("loss/"): [_mean(part, name) for part in parts] for name in names}
    tokens = [part[-1][TOKENS] for part in parts] if all(TOKENS in row for row in ordered) else []
    steps, stages = [part[-1][STEP] for part in parts], [int(part[0][STAGE]) for part in parts]
    return Curves(source, steps, stages, terms, size, tokens, _memory(ordered))


def _memory(rows: Sequence[Mapping[str, float]]) -> dict[int, tuple[float, str]]:
    """Take the most memory of each stage, of the device where it was logged."""
    name = next((name for name in MEMORY if any(name in row for row in rows)), "")
    found: dict[int, tuple[float, str]] = {}
    for row in rows:
        if name in row:
            stage = int(row[STAGE])
            found[stage] = (max(row[name], found.get(stage, (0.0, ""))[0]), MEMORY[name])
    return found


def _mean(rows: Sequence[Mapping[str, float]], name: str) -> float:
    values = [row[name] for row in rows if name in row]
    return math.fsum(values) / len(values) if values else math.nan


def _csv_rows(directory: Path) -> Iterator[Mapping[str, Any]]:
    path = directory / "csv" / "metrics.csv"
    if path.is_file():
        text = path.read_bytes().decode("utf-8", "replace")
        yield from csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))  # a kill may cut a line


def _wandb_rows(directory: Path) -> Iterator[Mapping[str, Any]]:
    if any(directory.glob("wandb/*run-*/run-*.wandb")):
        from trace_hydra.wandb_pieces import history

        yield from history(directory)


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
