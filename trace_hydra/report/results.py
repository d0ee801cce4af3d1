"""What stays of a run: results.json for programs, report.html, report.md and matrix.png for people."""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trace_hydra.callbacks.picture import heat_map_png, heat_map_title
from trace_hydra.errors import StoreError
from trace_hydra.files import write_bytes, write_json
from trace_hydra.metrics.continual import ScoreMatrix, summary
from trace_hydra.metrics.score import TaskScore
from trace_hydra.plan import Effort, RunInfo
from trace_hydra.report.text import render

SCHEMA = 1
"""Raised when a key of results.json changes its meaning or goes."""

WRITTEN = ("results.json", "report.html", "report.md", "matrix.png", "audit.json")
WRITTEN_FOLDERS = ("predictions", "capability", "test_rows", "rescored")
"""What `clear` takes away; W&B's folder stays, it may hold runs that were not uploaded yet."""


def build_results(
    *,
    run: RunInfo,
    matrix: ScoreMatrix,
    scores: Mapping[tuple[int, str], TaskScore],
    carried: Mapping[str, int],
    intervals: Mapping[str, Any] | None,
    wall_clock_s: float,
    tokens: Mapping[str, Sequence[int]],
    truncated: Mapping[str, Mapping[str, int]],
    task_specs: Mapping[str, Mapping[str, Any]],
    seeds: Any,
    scoring: str,
    versions: Mapping[str, str],
    efforts: Sequence[Effort] = (),
    capability: Mapping[str, Any] | None = None,
    published: Mapping[str, str | None] | None = None,
    engine: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Put results.json together; scores 0-100, full precision.

    Args:
        run: The plan.
        matrix: T+1 rows.
        scores: Cell (row, task) -> its score, carried ones included.
        carried: "<row>,<task>" -> the row whose answers stand there.
        intervals: `metrics.bootstrap.bootstrap`, 95 %.
        wall_clock_s: Seconds from the start of the run.
        tokens: `train`: by stage; `evaluate`: by row, prompt and generated tokens.
        truncated: Task -> split -> rows that the length limits cut.
        task_specs: Task -> metric, instruction, stop strings: what re-scoring needs.
        seeds: The `seed` node: train, data, generation.
        scoring: "official" or "corrected".
        versions: Package -> version.
        efforts: What each stage cost, in order.
        capability: `CapabilityBoard.results`.
        published: What `model` and `method` are called in the tables of the TRACE paper, None for not there.
        engine: What of the engine decided answers, None for not known.

    Returns:
        JSON values without NaN or infinity: such a value becomes None and its key path stands under `non_finite`.
    """
    results = {
        "schema": SCHEMA,
        "name": run.name,
        "model": run.model,
        "method": run.method,
        "tuning": run.tuning,
        "data": run.data,
        "task_order": run.task_order,
        "seed": seeds,
        "protocol": {"name": run.protocol, "fingerprint": run.fingerprint, "scoring": scoring}
        | ({"engine": engine} if engine else {}),
        **matrix.to_json(),
        **summary(matrix),
        "confidence": intervals,
        "capability": capability or {},
        "published": published or {},
        "cells": [_cell(row, score) for (row, _), score in sorted(scores.items(), key=lambda item: item[0][0])],
        "carried": carried,
        "wall_clock_s": wall_clock_s,
        "tokens": tokens,
        "truncated": truncated,
        "task_specs": task_specs,
        "disclosures": run.disclosures,
        "stages": [
            {"task": stage.task, "key": stage.key, "rows": stage.rows, "epochs": stage.epochs, "steps": stage.steps}
            | {"micro_batch_size": stage.micro_batch or run.config.get("budget", {}).get("micro_batch_size")}
            | ({"effort": _effort(efforts[stage.index - 1])} if efforts else {})
            for stage in run.stages
        ],
        "versions": versions,
        "complete": all((row, task) in scores for row, task, _ in run.cells),
    }
    bad: list[str] = []
    return {**_json(results, "", bad), "non_finite": bad}


def write_results(results: Mapping[str, Any], directory: Path) -> None:
    """Write matrix.png, report.md, report.html and, last, results.json: where it is, the others are.

    Raises:
        StoreError: If a file cannot be written; what was there before is unchanged.
    """
    from trace_hydra.report.page import page_of_run  # takes a while to load, and a run comes here once

    protocol = results["protocol"]
    title = heat_map_title(
        results["model"], results["method"], results["task_order"], protocol["name"], protocol["fingerprint"]
    )
    write_bytes(heat_map_png(results["tasks"], results["matrix"], title), directory / "matrix.png")
    write_bytes(render(results, directory).encode("utf-8", "backslashreplace"), directory / "report.md")
    page = page_of_run(results, directory)
    write_bytes(page.encode("utf-8", "backslashreplace"), directory / "report.html")
    write_json(results, directory / "results.json")


def clear(directory: Path) -> None:
    """Take away what an earlier run left in a run directory; everything else in it stays.

    Raises:
        StoreError: If something cannot be removed, or a folder of the run is a link, through which results would be
            written elsewhere.
    """
    for name in (*WRITTEN_FOLDERS, "wandb", ".hydra"):
        if (directory / name).is_symlink():
            raise StoreError(
                f"{directory / name} is a link; results are not written through links. Remove it, or set paths.runs to "
                "where they should be."
            )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name in WRITTEN:
            (directory / name).unlink(missing_ok=True)
        for name in WRITTEN_FOLDERS:
            if (directory / name).is_dir():
                shutil.rmtree(directory / name)
    except OSError as error:
        raise StoreError(
            f"cannot clear {error.filename or directory} of an earlier run: {error.strerror or error}. Give write "
            "access or change paths.runs."
        ) from error


def _effort(effort: Effort) -> dict[str, Any]:
    return {**asdict(effort), "step_ratio": effort.step_ratio}


def _cell(row: int, score: TaskScore) -> dict[str, Any]:
    return {
        "row": row,
        "task": score.task,
        "protocol": score.protocol,
        "metric": score.metric,
        "n": score.n,
        "score": score.score,
        "metrics": score.metrics,
    }


def _json(value: Any, path: str, bad: list[str]) -> Any:
    """Copy to plain JSON types; adds the key paths of numbers that are not finite to `bad`."""
    if isinstance(value, Mapping):
        return {str(key): _json(one, f"{path}.{key}" if path else str(key), bad) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_json(one, f"{path}[{index}]", bad) for index, one in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        bad.append(path)
        return None
    return value
