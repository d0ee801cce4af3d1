"""Reading the rows of a finished run, and what is said of one that does not fit together."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_tiny

from trace_hydra import collect
from trace_hydra.errors import DataError, StoreError
from trace_hydra.statistics import (
    NUMBERS,
    ExampleScores,
    across_runs,
    compare,
    delta_number,
    of_run,
    read_scores,
    score_number,
)

SCORES = {
    (0, "A"): [0, 0],
    (1, "A"): [100, 50],
    (0, "B"): [0, 0],
    (2, "A"): [50, 50],
    (1, "B"): [0, 10],
    (2, "B"): [80, 90],
}


def write_run(folder: Path, *, changes=None, **results) -> Path:
    """A run directory as far as statistics read it; `changes`: record by (row, task, number)."""
    for (row, task), values in SCORES.items():
        records = [
            {"id": f"test-{n}", "prompt_sha256": f"{task}{n}", "scores": {"score": value}}
            for n, value in enumerate(values)
        ]
        for (r, t, n), change in (changes or {}).items():
            if (r, t) == (row, task):
                records[n] = change if not isinstance(change, dict) else {**records[n], **change}
        place = folder / "predictions" / str(row) / f"{task}.jsonl"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = {
        "name": "run", "method": "one", "tasks": ["A", "B"], "task_order": "custom", "seed": {"train": 3},
        "carried": {}, "matrix": [[float(np.mean(SCORES[row, task])) for task in "AB"] for row in range(3)], **results,
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(found))
    return folder


def test_cells_are_read_row_by_row(tmp_path):
    found = read_scores(write_run(tmp_path))
    assert (found.method, found.tasks, found.seed, found.order) == ("one", ("A", "B"), 3, "custom")
    assert {cell: scores.values.tolist() for cell, scores in found.cells.items()} == SCORES
    assert found.cells[1, "A"].ids == ("test-0", "test-1")
    assert of_run(found, "bwt").value == -25


def test_carried_cells_take_the_rows_they_carry(tmp_path):
    write_run(tmp_path, carried={"2,A": 1}, matrix=[[0, 0], [75, 5], [75, 85]])
    (tmp_path / "predictions" / "2" / "A.jsonl").unlink()
    found = read_scores(tmp_path)
    assert found.cells[2, "A"] is found.cells[1, "A"]


@pytest.mark.parametrize(
    ("changes", "results", "message"),
    [
        ({(1, "A", 1): {"scores": {}}}, {}, "1/A.jsonl:2: scores.score must be a finite number, not None"),
        ({(1, "A", 0): {"scores": {"score": float("nan")}}}, {}, "1/A.jsonl:1"),
        ({(1, "A", 0): "no object"}, {}, "1/A.jsonl:1"),
        ({(2, "B", 1): {"scores": {"score": 10.0}}}, {}, "2/B.jsonl: its 2 rows score 45.0"),
        ({(2, "B", 1): {"id": "test-0"}}, {}, "'test-0' is there twice"),
        ({(2, "B", 1): {"id": "test-7"}}, {}, "B.jsonl:2: these are not the test rows"),
        ({(2, "B", 1): {"prompt_sha256": "other"}}, {}, "B.jsonl:2: these are not the test rows"),
        ({}, {"seed": {"train": "x"}}, "seed.train='x'"),
        ({}, {"tasks": None}, "needs 'tasks' and 'matrix'"),
        ({}, {"matrix": [[1]]}, "results.json"),
        ({}, {"method": 3}, "method must be text"),
        ({}, {"tasks": ["A", "../../B"]}, "cannot be the name of a file"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, changes, results, message):
    with pytest.raises(StoreError) as caught:
        read_scores(write_run(tmp_path, changes=changes, **results))
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    write_run(tmp_path)
    (tmp_path / "predictions" / "1" / "B.jsonl").unlink()
    with pytest.raises(StoreError, match=r"B\.jsonl"):
        read_scores(tmp_path)


def test_cells_that_were_not_scored_are_no_error(tmp_path):
    found = read_scores(write_run(tmp_path, matrix=[[None, None], [75, None], [50, 85]]))
    assert set(found.cells) == {(1, "A"), (2, "A"), (2, "B")}
    assert of_run(found, "fwt").value is None and "R[0,B]" in of_run(found, "fwt").note


def test_ids_and_scores_must_match():
    with pytest.raises(DataError, match="2 ids"):
        ExampleScores(("a", "b"), np.zeros(3))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    overrides = ["capability=mini", "task_order=[C-STANCE,FOMC]"]
    return run_tiny(tmp_path_factory.mktemp("statistics"), overrides)


@pytest.mark.slow
def test_a_real_run_gives_the_numbers_of_its_results(tiny):
    found, results = read_scores(tiny.directory), tiny.results
    for number in NUMBERS:
        assert of_run(found, number).value == results[number]
    for task, score in zip(results["tasks"], results["matrix"][-1], strict=True):
        assert of_run(found, score_number(task)).value == score
    areas = [area for area in ("general", "instruction", "safety") if area in results["capability"]]
    assert areas
    for name, said in [
        *((area, results["capability"][area]) for area in areas),
        *results["capability"]["sets"].items(),
    ]:
        estimate = of_run(found, delta_number(name))
        assert estimate.value == pytest.approx(said["delta"])
        low, high = said["interval"]  # a percentile bootstrap, narrower where there are few items
        assert estimate.low <= said["delta"] <= estimate.high  # type: ignore[operator]  # not None here
        assert estimate.high - estimate.low >= 0.8 * (high - low)  # type: ignore[operator]  # not None here


@pytest.mark.slow
def test_a_run_does_not_differ_from_itself(tiny):
    run = read_scores(tiny.directory)
    found = compare({"one": [run], "again": [run]}, "op").differences[0]
    assert found.difference == 0 and found.p == 1


def test_collect_gives_intervals_over_rows(tmp_path, capsys):
    fields = {
        "schema": 1, "model": "tiny", "tuning": "full", "data": "smoke", "wall_clock_s": 1.0, "complete": True,
        "protocol": {"name": "greedy", "fingerprint": "aa"}, "stages": [], "cells": [], "op": 67.5, "bwt": -25.0,
    }  # fmt: skip
    for seed in range(2):
        write_run(tmp_path / str(seed), seed={"train": seed}, **fields)
    assert collect.main([str(tmp_path), "--rows"]) == 0
    (group,) = json.loads((tmp_path / "collect.json").read_text())["groups"]
    expected = across_runs([read_scores(tmp_path / str(seed)) for seed in range(2)], "op")
    assert (group["numbers"]["op"]["low"], group["numbers"]["op"]["high"]) == (expected.low, expected.high)
    assert "2 seeds" in group["numbers"]["op"]["note"]
    shown = capsys.readouterr().out
    assert f"67.50 [{expected.low:.2f}, {expected.high:.2f}]" in shown and "intervals: 95 % over test rows" in shown


def test_collect_says_why_there_is_no_interval(tmp_path):
    run = collect.Run("gone", {}, {})
    numbers = {"op": {"mean": 1.0, "margin": None, "n": 1}}
    collect._add_intervals(numbers, [run], tmp_path)
    assert numbers["op"]["low"] is None and "results.json" in numbers["op"]["note"]


def test_importing_loads_neither_torch_nor_scipy_stats():
    code = "import sys, trace_hydra.statistics; print('torch' in sys.modules, 'scipy.stats' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["False", "False"]
