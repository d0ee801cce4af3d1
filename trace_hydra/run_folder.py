"""Finding and reading run directories, whole or not; loads neither torch nor pandas."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

NUMBERS = ("op", "bwt", "bwt_over_t", "bwt_clipped", "fwt", "forgetting")
# What may differ between runs that are averaged, or changes no score.
_NOT_SETTINGS = {
    "seed", "task_order", "paths", "logger", "callbacks", "trust", "progress", "cost", "store", "checkpoint", "sweep",
    "evaluation", "judge", "capability",
}  # fmt: skip
_INSIDE_A_RUN = {".hydra", "predictions", "test_rows", "capability", "rescored", "csv", "tensorboard", "wandb"}


def run_folders(folder: Path) -> Iterator[Path]:
    """Find folders that hold a run or what is left of one, in the order of their names."""
    for place, folders, files in os.walk(folder):
        if ".hydra" in folders or {"results.json", "error.txt"} & set(files):
            folders.clear()
            yield Path(place)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _INSIDE_A_RUN)


def read_run(path: Path) -> dict[str, Any] | str:
    """Read the results of a finished run, or say why it does not count."""
    try:
        results = json.loads((path / "results.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return _unfinished(path)
    except (OSError, ValueError) as error:
        return f"results.json cannot be read: {error}"
    if (problem := _problem(results)) is not None:
        return f"results.json {problem}"
    return results


def _problem(results: Any) -> str | None:
    if not isinstance(results, dict):
        return "is no JSON object"
    shapes = {
        **dict.fromkeys(("model", "method", "tuning", "data", "task_order"), str),
        "seed": dict, "protocol": dict, "tasks": list, "stages": list, "cells": list, "wall_clock_s": float | int,
    }  # fmt: skip
    if wrong := [key for key, kind in shapes.items() if not isinstance(results.get(key), kind)]:
        return f"lacks {', '.join(wrong)}"
    if not {"name", "fingerprint"} <= set(results["protocol"]) or "train" not in results["seed"]:
        return "lacks protocol.name, protocol.fingerprint or seed.train"
    if wrong := [key for key in NUMBERS if not isinstance(results.get(key), float | int | None)]:
        return f"has {', '.join(wrong)} that are no numbers"
    return None


def flaw(results: Mapping[str, Any]) -> str | None:
    """Say why the numbers of a run must not be averaged with others."""
    if results.get("complete") is not True:
        return "is incomplete: not every planned cell was scored"
    if results.get("non_finite"):
        return f"has numbers that are not finite: {', '.join(map(str, results['non_finite'][:3]))}"
    return None


def _unfinished(path: Path) -> str:
    try:
        first = (path / "error.txt").read_text(encoding="utf-8").split("\n", 1)[0]
    except (OSError, ValueError):
        return "no results.json: it runs, was stopped, or was killed"
    return f"no results.json: {first}"


def settings_of(directory: Path) -> dict[str, Any]:
    """Read the leaves of a run's configuration that its group depends on; {} where it is not there."""
    path = directory / ".hydra" / "config.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # both safe; the first is ten times faster
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    leaves: dict[str, Any] = {}
    for key, node in config.items() if isinstance(config, dict) else ():
        if key not in _NOT_SETTINGS:
            _flatten(str(key), node, leaves)
    return leaves


def _flatten(path: str, node: Any, leaves: dict[str, Any]) -> None:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            _flatten(f"{path}.{key}", value, leaves)
    else:
        leaves[path] = node
