"""Finished runs made up from random scores: every file that a report reads, and no model."""

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from trace_hydra.metrics.bootstrap import bootstrap
from trace_hydra.metrics.continual import ScoreMatrix, summary

TASKS = ("C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten")
PROTOCOL = {"name": "greedy", "fingerprint": "0123456789ab", "scoring": "corrected"}


def write_run(
    folder: Path, *, method: str = "plain", seed: int = 0, tasks: Sequence[str] = TASKS, **changes: Any
) -> dict:
    """Write a run directory; gives its results.

    Args:
        folder: Of the run.
        method: Its name; scores depend on it and the seed.
        seed: Of training.
        tasks: In training order.
        changes: rows (test rows a task), level and loss (scores at the own stage, points lost a stage), row0,
            answer (what every prediction is), capability, curves, overrides, protocol, config, data, order.
    """
    rows = changes.pop("rows", 12)
    cells = _cells(random.Random(f"{method} {seed}".encode("utf-8", "surrogatepass")), tasks, rows, changes)
    matrix = ScoreMatrix(list(tasks))
    for (row, task), scores in cells.items():
        matrix.set(row, task, sum(scores) / rows)
        _write_lines(
            folder / "predictions" / str(row) / f"{task}.jsonl",
            [_answer(row, task, place, score, changes) for place, score in enumerate(scores)],
        )
    for task in tasks:
        lines = [{"id": f"test-{n}", "prompt": f"{task}: which is right, {n}?", "answer": "A"} for n in range(rows)]
        _write_lines(folder / "test_rows" / f"{task}.jsonl", lines)
    results = _results(folder.name, method, seed, tasks, rows, matrix, cells, changes)
    _write(folder / "results.json", json.dumps(results, indent=1))
    _write(folder / "audit.json", json.dumps({task: {"rows": {"test": rows}, "warnings": []} for task in tasks}))
    protocol = {**changes.get("protocol", PROTOCOL), **changes.get("config", {})}
    protocol.pop("fingerprint")
    config = {"protocol": protocol, "method": {"name": method, "strength": 1.5}, "seed": {"train": seed}}
    _write(folder / ".hydra" / "config.yaml", yaml.safe_dump(config))
    _write(folder / ".hydra" / "overrides.yaml", yaml.safe_dump(changes.get("overrides", [f"seed='{seed}'"])))
    if changes.get("curves", True):
        lines = ["progress/stage,progress/step,step,train/loss,train/loss/lm,train/loss/extra"]
        lines += [
            f"{1 + n // 10},{n + 1},{n + 1},{3 / (n + 1)},{2 / (n + 1)},{1 / (n + 1)}" for n in range(10 * len(tasks))
        ]
        _write(folder / "csv" / "metrics.csv", "\n".join(lines) + "\n")
    return results


def _cells(draw: random.Random, tasks: Sequence[str], rows: int, changes: dict) -> dict[tuple[int, str], list[float]]:
    level, loss = changes.get("level", 0.8), changes.get("loss", 0.04)
    cells = {}
    for row in range(0 if changes.get("row0", True) else 1, len(tasks) + 1):
        for column, task in enumerate(tasks, start=1):
            if row and column > row + 1:
                continue
            share = 0.15 if column > row else level - loss * (row - column)
            cells[row, task] = [100.0 * (draw.random() < share) for _ in range(rows)]
    return cells


def _answer(row: int, task: str, place: int, score: float, changes: dict) -> dict[str, Any]:
    text = changes.get("answer") or ("A" if score else "B")
    return {
        "id": f"test-{place}",
        "prompt_sha256": hashlib.sha256(f"{task} {place}".encode()).hexdigest(),
        "raw": text,
        "prediction": text,
        "reference": "A",
        "scores": {"score": score, "accuracy": score},
        "new_tokens": 1,
        "stopped": True,
    }


def _results(
    name: str, method: str, seed: int, tasks: Sequence[str], rows: int, matrix, cells, changes
) -> dict[str, Any]:
    effort = {
        "tokens": 900,
        "steps": 10,
        "seconds": 4.5,
        "trainable_params": 1000,
        "state_mb": 1.25,
        "stored_examples": 3,
    }
    return {
        "schema": 1,
        "name": name,
        "model": "tiny",
        "method": method,
        "tuning": "full",
        "data": changes.get("data", "mini"),
        "task_order": changes.get("order", "trace"),
        "seed": {"train": seed, "data": 0, "generation": seed},
        "protocol": changes.get("protocol", PROTOCOL),
        **matrix.to_json(),
        **summary(matrix),
        "confidence": bootstrap(list(tasks), cells, samples=50, seed=0),
        "capability": changes.get("capability", {}),
        "published": {},
        "cells": [
            {"row": row, "task": task, "protocol": "greedy", "metric": "accuracy", "n": rows, "score": score}
            | {"metrics": {"accuracy": score}}
            for row, task in cells
            for score in [matrix.get(row, task)]
        ],
        "carried": {},
        "wall_clock_s": 61.5,
        "tokens": {"train": [900] * len(tasks), "evaluate": [50] * (len(tasks) + 1)},
        "truncated": {task: {"train": 0, "test": 0} for task in tasks},
        "task_specs": {},
        "disclosures": {"sees_task_id": True, "cells": "all"},
        "stages": [
            {"task": task, "key": f"{method}-{seed}-{n}", "rows": 8, "epochs": 1, "steps": 10, "micro_batch_size": 8}
            | {"effort": {**effort, "step_ratio": 1.1, "skipped": 0}}
            for n, task in enumerate(tasks)
        ],
        "versions": {"torch": "2"},
        "complete": True,
        "non_finite": [],
    }


def capability(*, failed: bool = False) -> dict[str, Any]:
    """Give what a run of three areas, one of them judged, says of its abilities."""
    scored = {"measure": "score", "n": 50, "unscored": 0, "macro": False, "differs": False, "categories": {}}
    sets = {
        "quiz": {**scored, "area": "general", "before": 45.0, "after": 41.5, "delta": -3.5, "interval": [-8.0, 1.0]},
        "orders": {
            **scored,
            "area": "instruction",
            "before": 60.0,
            "after": 50.0,
            "delta": -10.0,
            "interval": [-15.5, -4.0],
        },
        "harm": {**scored, "area": "safety", "measure": "judge", "before": None, "after": None, "delta": -12.0}
        | {"interval": [-20.0, -3.0], "win": 30.0, "tie": 28.0, "lose": 42.0},
    }
    areas = {
        one["area"]: {"delta": one["delta"], "interval": one["interval"], "differs": False, "n": 50, "sets": [name]}
        | {"measure": one["measure"]}
        for name, one in sets.items()
    }
    found = {**areas, "sets": sets, "row": 8, "fingerprint": "abcdef012345", "tokens": 1234, "config": {}, "stages": {}}
    return {**found, "failed": {"8/mmlu": "no file"} if failed else {}, "bootstrap": {"samples": 10, "seed": 0}}


def _write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode("utf-8", "backslashreplace"))


def _write_lines(path: Path, records: Sequence[dict]) -> None:
    _write(path, "".join(json.dumps(record) + "\n" for record in records))
