"""Small sweeps in processes of their own, and what they leave, for the tests of launchers."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = (
    "debug=smoke", "callbacks=none", "logger=none", "capability=none", "task_order=[FOMC,Py150]", "data.rows.train=8",
    "data.rows.test=2", "budget.default_epochs=150", "checkpoint.every_steps=10", "evaluation=diagonal_last",
)  # fmt: skip
CLOCKS = ("wall_clock_s", "seconds", "plain_step_s", "step_ratio")
"""Fields of results.json that a clock decides."""
Found = TypeVar("Found")


def start(
    folder: Path, *given: str, seeds: str = "0,1", environment: Mapping[str, str | None] | None = None
) -> subprocess.Popen:
    """Start a sweep over seeds whose runs and store lie in a folder."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    places = (f"paths.runs={folder / 'runs'}", f"paths.store={folder / 'store'}")
    return subprocess.Popen(
        [sys.executable, "-m", "trace_hydra", "-m", *SETTINGS, f"seed={seeds}", *places, *given],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={name: value for name, value in variables.items() if value is not None},
    )  # fmt: skip


def end(process: subprocess.Popen, timeout_s: float = 400) -> str:
    """Wait for a sweep that must succeed; returns what it said."""
    said, _ = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, said
    return said


def wait_for(what: Callable[[], Found], timeout_s: float = 200.0) -> Found:
    """Ask until there is an answer."""
    deadline = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)
    return found


def checkpoints(folder: Path) -> set[str]:
    """Keys of the stages under way that were saved; for a moment a stage may have two checkpoints (8 digits behind)."""
    return {path.parent.name[:-8] for path in (folder / "store" / "partial").glob("*/manifest.json")}


def both_saved(folder: Path) -> bool:
    """Whether each of two jobs has saved its stage; before, one may not even hear signals."""
    return len(checkpoints(folder)) == 2


def outcome(folder: Path) -> dict[str, Any]:
    """Hash all that a sweep leaves: stages and answers of the store; predictions and results of the runs."""
    found: dict[str, Any] = {}
    for manifest in sorted((folder / "store").glob("*/*/manifest.json")):
        described = json.loads(manifest.read_text())
        assert described["kind"] != "partial", "a checkpoint was left"
        found |= {f"{described['key']}/{name}": one["sha256"] for name, one in described["files"].items()}
    runs = folder / "runs"
    for path in sorted(runs.glob("*/predictions/**/*.jsonl")):
        found[str(path.relative_to(runs))] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(runs.glob("*/results.json")):
        found[path.parent.name] = _without_clocks(json.loads(path.read_text()))
    return found


def _without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_clocks(one) for key, one in value.items() if key not in CLOCKS}
    return [_without_clocks(one) for one in value] if isinstance(value, list) else value
