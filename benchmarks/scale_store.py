"""Service times of what many runs share: the store's operations, locks, plans and tables, measured in a folder.

All of it is the package's own code on this machine's disk. A shared file system answers slower: what waits for the disk
(publishing, beats) is a lower bound there, what computes (scans, plans, tables) is not.
"""

import io
import json
import os
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from benchmarks.scale_cost import Planner
from trace_hydra import collect, keys
from trace_hydra.run import quiet
from trace_hydra.store import __main__ as command
from trace_hydra.store.entries import Store
from trace_hydra.store.manifest import MANIFEST, SCHEMA, sealed
from trace_hydra.store.survey import survey
from trace_hydra.store.tensors import write_tensors
from trace_hydra.sweep import Job, plan_jobs

CELLS = 52
"""Cells of a run of eight tasks with row 0 and the next task."""
_ENTRIES_A_RUN = 8 + CELLS


def measure(folder: Path, *, size: int = 2400, megabytes: int = 512, jobs: int = 41) -> dict:
    """Measure every operation once, or the median of some turns; seconds, and bytes a second.

    Args:
        folder: Empty; on the disk that is measured.
        size: Entries of the store that is scanned.
        megabytes: Of the large entry.
        jobs: Of the sweep that is planned.
    """
    with quiet():
        planner = Planner(("debug=smoke", "logger=none", "callbacks=none", f"paths.store={folder / 'own'}"))
        manifest = _plan(planner, folder).pop("inputs")
        found = {**_publishing(folder / "published", manifest, megabytes), **_locks(folder / "locked")}
        found |= _scans(folder, manifest, size) | _planning(planner, folder, jobs)
        return found | _collecting(planner, folder / "runs", 60)


def _plan(planner: Planner, folder: Path) -> dict[str, Any]:
    """Take a stage's inputs, so that manifests are as long as real ones."""
    from trace_hydra import build
    from trace_hydra.prepare import prepare

    config = planner.config()
    found = prepare(config, build.validate(config), folder / "a-run")
    return {"inputs": next(value for name, value in found.entries.items() if name.startswith("stages/"))}


def _publishing(root: Path, inputs: Mapping[str, Any], megabytes: int) -> dict[str, float]:
    store = Store(root)

    def small(folder: Path) -> None:
        (folder / "answers.jsonl").write_text('{"raw": "A", "new_tokens": 2, "stopped": true}\n')

    def large(folder: Path) -> dict[str, str]:
        tensors = {"weight": torch.zeros(megabytes, 1_000_000, dtype=torch.uint8).random_()}
        before.append(time.perf_counter())
        return {"weights.safetensors": write_tensors(tensors, folder / "weights.safetensors")}

    def publish(number: int, write: Callable[[Path], Any]) -> None:
        store.publish("answers", f"{number:016x}", write, inputs=inputs, versions={})

    before: list[float] = []
    entry_s = [_seconds(lambda number=number: publish(number, small)) for number in range(20)]
    publish(100, large)
    write_s = time.perf_counter() - before[0] - statistics.median(entry_s)
    entry = next(entry for entry in store.entries("answers") if entry.size >= megabytes * 1e6)
    read_s = _seconds(entry.problems)
    find_s = statistics.median(_seconds(lambda: store.find("answers", f"{5:016x}")) for _ in range(20))
    size = megabytes * 1e6
    return {
        "publish_s": statistics.median(entry_s),
        "find_s": find_s,
        "write_bytes_s": size / write_s,
        "hash_bytes_s": size / read_s,
    }


def _locks(root: Path) -> dict[str, float]:
    store = Store(root)

    def take() -> None:
        with store.lock("stages", "a" * 16, "a stage"):
            pass

    def beat() -> None:  # as the holder of a lock does: read, write in place, to disk
        with place.open("r+b", buffering=0) as stream:
            record = stream.read(4096)
            stream.seek(0)
            stream.write(record)
            os.fsync(stream.fileno())

    place = root / "beat"
    place.write_bytes(b" " * 300)
    return {
        "lock_s": statistics.median(_seconds(take) for _ in range(20)),
        "beat_s": statistics.median(_seconds(beat) for _ in range(20)),
    }


def _scans(folder: Path, inputs: Mapping[str, Any], size: int) -> dict[str, float]:
    """Time `ls` and `gc`, which read every manifest, and see what those take in memory."""
    root = folder / "scanned"
    _fill(root, inputs, size)
    found = {}
    for name, arguments in (("ls", ["ls", "--json"]), ("gc", ["gc", "--unused", "--keep", "last"])):
        times = [_seconds(lambda: _say_nothing([*arguments, "--store", str(root)])) for _ in range(3)]  # noqa: B023
        found[f"{name}_entry_s"] = min(times) / size
    tracemalloc.start()
    kept = survey(root)
    found["scan_entry_bytes"] = tracemalloc.get_traced_memory()[0] / len(kept.items)
    tracemalloc.stop()
    return found


def _fill(root: Path, inputs: Mapping[str, Any], size: int) -> None:
    """Make a store of finished runs: stages and answers with whole manifests and small files."""
    Store(root)
    for number in range(size):
        place = number % _ENTRIES_A_RUN
        kind = "stages" if place < 8 else "answers"
        key, start = f"{number:016x}", number - place
        folder = root / kind / key
        folder.mkdir(parents=True)
        files = {name: {"size": 1, "sha256": "0" * 64} for name in _FILES[kind]}
        for name in files:
            (folder / name).write_bytes(b"0")
        before = start + (place - 1 if kind == "stages" else (place - 8) * 8 // CELLS)
        facts = {"task": "FOMC", "row": 1, "parameters": 2, "effort": {"trainable_params": 2}}
        manifest = {
            "schema": SCHEMA, "kind": kind, "key": key, "inputs": dict(inputs), "facts": facts, "files": files,
            "uses": [f"stages/{before:016x}"] if place else [], "versions": {},
        }  # fmt: skip
        (folder / MANIFEST).write_bytes(sealed(manifest))
        if place == _ENTRIES_A_RUN - 1:
            run = root.parent / "run-directories" / str(start)
            run.mkdir(parents=True, exist_ok=True)
            names = [f"{'stages' if one < 8 else 'answers'}/{start + one:016x}" for one in range(_ENTRIES_A_RUN)]
            Store(root).note_run(run, names, finished=True)


_FILES = {"stages": ("weights.safetensors", "state.safetensors", "state.json"), "answers": ("answers.jsonl",)}


def _planning(planner: Planner, folder: Path, jobs: int) -> dict[str, float]:
    """Time a sweep's plan for one job and for many, composed beforehand, and the imports before it."""
    planned = []
    for number in range(jobs):
        config = planner.config(f"seed.train={number}")
        planned.append(Job(number, (), folder / "jobs" / str(number), OmegaConf.to_container(config, resolve=True)))  # type: ignore[arg-type]
    one = _seconds(lambda: plan_jobs(planned[:1]))
    many = _seconds(lambda: plan_jobs(planned))
    code = "import trace_hydra.run, trace_hydra.sweep, transformers, lightning"
    imports = _seconds(lambda: subprocess.run([sys.executable, "-c", code], check=True, capture_output=True))
    return {"plan_sweep_s": imports + one, "plan_job_s": max(many - one, 0.0) / (jobs - 1)}


def _collecting(planner: Planner, root: Path, runs: int) -> dict[str, float]:
    config = planner.config()
    cells = [{"row": 1, "task": "FOMC", "metric": "accuracy", "n": 496, "score": 50.0} for _ in range(CELLS)]
    for number in range(runs):
        folder = root / str(number)
        (folder / ".hydra").mkdir(parents=True)
        OmegaConf.save(config, folder / ".hydra" / "config.yaml")
        results = {
            "model": "m", "method": "m", "tuning": "t", "data": "d", "task_order": "o", "complete": True,
            "seed": {"train": number}, "protocol": {"name": "greedy", "fingerprint": "f"}, "tasks": ["FOMC"],
            "stages": [{"key": keys.digest([number, stage])} for stage in range(8)], "cells": cells,
            "wall_clock_s": 1.0, **dict.fromkeys(collect.NUMBERS, 1.0),
        }  # fmt: skip
        (folder / "results.json").write_text(json.dumps(results))
    with redirect_stdout(io.StringIO()):
        return {"collect_run_s": _seconds(lambda: collect.main([str(root)])) / runs}


def _say_nothing(arguments: list[str]) -> None:
    with redirect_stdout(io.StringIO()):
        code = command.main(arguments)
    if code:
        raise RuntimeError(f"trace_hydra.store {' '.join(arguments)} ended with {code}")


def _seconds(do: Callable[[], object]) -> float:
    begun = time.perf_counter()
    do()
    return time.perf_counter() - begun
