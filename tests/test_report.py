"""results.json, report.md and matrix.png of a finished run."""

import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from doubles import two_tasks
from PIL import Image

from trace_hydra import files
from trace_hydra.errors import StoreError
from trace_hydra.metrics.continual import ScoreMatrix
from trace_hydra.metrics.score import TaskScore
from trace_hydra.plan import Stage
from trace_hydra.report import results as report

CELLS = {(1, "A"): 60.0, (2, "A"): 40.0 + 1 / 3, (2, "B"): 80.0}


def build(directory: Path, **changes):
    run = replace(
        two_tasks(directory),
        seed=3,
        stages=(Stage(1, "A", 8, 1, 2, 100, "key-a"), Stage(2, "B", 9, 5, 4, 300, "key-b")),
        cells=tuple((row, task, 2) for row, task in changes.pop("planned", CELLS)),
        disclosures={"sees_task_id": True, "cells": "all"},
    )
    matrix = ScoreMatrix(["A", "B"])
    scores = {}
    for (row, task), value in CELLS.items():
        matrix.set(row, task, value)
        scores[row, task] = TaskScore(task, "greedy", "accuracy", 2, value, {"accuracy": value, "other": 12.5}, [])
    arguments = {
        "run": run,
        "matrix": matrix,
        "scores": scores,
        "carried": {},
        "intervals": {"op": [50.25, 70.75], "fwt": None, "tasks": {"B": {"score": [75.0, 85.0]}, "A": {"score": None}}},
        "wall_clock_s": 61.5,
        "tokens": {"train": [1040, 2080], "evaluate": [0, 11, 22]},
        "truncated": {"A": {"train": 7, "test": 3}, "B": {"train": 0, "test": 0}},
        "task_specs": {"A": {"metric": "accuracy", "instruction": "", "stop": ("x",)}},
        "seeds": {"train": 3, "data": 4, "generation": 5},
        "scoring": "corrected",
        "versions": {"torch": "2"},
    }
    return report.build_results(**{**arguments, **changes})


@pytest.fixture
def results(tmp_path):
    return build(tmp_path)


def test_results_hold_the_run(results):
    """OP = (40 1/3 + 80) / 2 = 60 1/6; BWT = 40 1/3 - 60 = -19 2/3; over T half of it; FWT lacks R[0,B] and R[1,B]."""
    assert results["schema"] == 1 and results["complete"] and results["non_finite"] == []
    assert results["op"] == pytest.approx(60 + 1 / 6, rel=1e-12)
    assert results["bwt"] == pytest.approx(-19 - 2 / 3, rel=1e-12)
    assert results["bwt_over_t"] == pytest.approx(-9 - 5 / 6, rel=1e-12)
    assert results["forgetting"] == pytest.approx(19 + 2 / 3, rel=1e-12)
    assert results["fwt"] is None and results["missing"] == {"fwt": ["R[0,B]", "R[1,B]"]}
    assert results["matrix"] == [[None, None], [60.0, None], [40.0 + 1 / 3, 80.0]]
    assert results["seed"] == {"train": 3, "data": 4, "generation": 5}
    assert results["protocol"] == {"name": "greedy", "fingerprint": "0123456789ab", "scoring": "corrected"}
    assert [stage["key"] for stage in results["stages"]] == ["key-a", "key-b"]
    assert results["confidence"]["op"] == [50.25, 70.75] and results["capability"] == {}
    assert results["cells"][-1] == {
        "row": 2,
        "task": "B",
        "protocol": "greedy",
        "metric": "accuracy",
        "n": 2,
        "score": 80.0,
        "metrics": {"accuracy": 80.0, "other": 12.5},
    }
    assert results["task_specs"]["A"]["stop"] == ["x"]


def test_a_planned_cell_without_score_makes_it_incomplete(tmp_path):
    results = build(tmp_path, planned=[*CELLS, (1, "B")])
    assert not results["complete"]
    report.write_results(results, tmp_path)
    assert "**incomplete**" in (tmp_path / "report.md").read_text()


def test_full_precision_survives_the_file(results, tmp_path):
    report.write_results(results, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_what_is_not_finite_becomes_null_and_is_named(tmp_path):
    results = build(tmp_path, intervals={"op": [math.nan, math.inf]}, wall_clock_s=1.0)
    assert results["confidence"]["op"] == [None, None]
    assert results["non_finite"] == ["confidence.op[0]", "confidence.op[1]"]
    report.write_results(results, tmp_path)
    assert "NaN" not in (tmp_path / "results.json").read_text()
    assert "confidence.op[0]" in (tmp_path / "report.md").read_text()


def test_report_gives_every_number_with_its_protocol(results, tmp_path):
    """Each summary row holds value, interval and protocol; each table of scores stands under a heading with it."""
    report.write_results(results, tmp_path)
    text = (tmp_path / "report.md").read_text()
    tag = "greedy [0123456789ab]"
    assert f"| OP | 60.17 | 50.25 to 70.75 | {tag} | mean score after the last stage |" in text
    assert f"| BWT | -19.67 | – | {tag} |" in text
    assert f"| FWT | – | – | {tag} | not known: R[0,B], R[1,B] |" in text
    sections = re.split(r"^## ", text, flags=re.M)
    scores = [section for section in sections if section.startswith(("Summary", "Scores", "After the last"))]
    assert len(scores) == 3 and all(tag in section.splitlines()[0] for section in scores)
    assert "| 2 B | 40.33 | **80.00** |" in text
    assert "| B | 80.00 | 75.00 to 85.00 | accuracy | 2 | accuracy 80.00, other 12.50 |" in text
    assert "| 1 A | 8 | 1 | 1,040 | 11 | – | 7 | 3 |" in text
    assert "- sees_task_id: yes" in text and "seeds: train 3, data 4, generation 5" in text
    assert f"python -m trace_hydra.score {tmp_path} protocol=official" in text


def test_tables_of_the_report_are_rectangular(results, tmp_path):
    """Every line of a table has as many cells as its header."""
    report.write_results(results, tmp_path)
    for table in re.findall(r"(?:^\|.*\|\n)+", (tmp_path / "report.md").read_text(), flags=re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_heat_map_is_written_with_its_size(results, tmp_path):
    """T = 2: 4.8 x 3.6 in at 150 dpi."""
    report.write_results(results, tmp_path)
    assert Image.open(tmp_path / "matrix.png").size == (720, 540)


def test_results_come_last_and_whole(results, tmp_path, monkeypatch):
    """Killed before the final rename: the old file stands unchanged and no partial file is left."""
    (tmp_path / "results.json").write_text("old")
    replace, order = os.replace, []

    def stop_at_results(source, target):
        order.append(Path(target).name)
        if Path(target).name == "results.json":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop_at_results)
    with pytest.raises(StoreError, match=r"results\.json: No space left on device"):
        report.write_results(results, tmp_path)
    assert order == ["matrix.png", "report.md", "report.html", "results.json"]
    assert (tmp_path / "results.json").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "matrix.png",
        "report.html",
        "report.md",
        "results.json",
    ]


def test_a_folder_that_cannot_be_made_is_named(results, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file/run/matrix\.png"):
        report.write_results(results, tmp_path / "file" / "run")


def test_json_that_cannot_be_is_refused(tmp_path):
    with pytest.raises(StoreError, match=r"x\.json: Out of range"):
        files.write_json({"a": math.nan}, tmp_path / "x.json")
    assert list(tmp_path.iterdir()) == []


def test_lone_surrogates_are_escaped(tmp_path):
    files.write_json({"a": "ü\ud800"}, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"a": "ü\ud800"}


def test_clear_takes_only_what_a_run_writes(results, tmp_path):
    """What was not uploaded to W&B yet, Hydra's files and files of the user stay."""
    report.write_results(results, tmp_path)
    for name in ("predictions/1/A.jsonl", "wandb/offline-run-1/run.wandb", ".hydra/config.yaml", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    report.clear(tmp_path)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == [".hydra/config.yaml", "notes.txt", "wandb/offline-run-1/run.wandb"]
    report.clear(tmp_path / "new")
    assert (tmp_path / "new").is_dir()
