"""`python -m trace_hydra.collect`: what counts, what is averaged with what, and by which formula."""

import csv
import json
import math
import subprocess
import sys

import pytest
from conftest import ROOT
from omegaconf import OmegaConf

from trace_hydra import collect
from trace_hydra.metrics.spread import mean_and_margin, t_quantile


def write_run(
    folder, *, op=50.0, seed=0, method="seqft", tasks=("FOMC", "Py150"), fingerprint="aa", keep=(), **changes
):
    """A finished run, as small as `collect` needs it; `keep`: overrides of its configuration."""
    results = {
        "schema": 1, "name": folder.name, "model": "tiny", "method": method, "tuning": "full", "data": "smoke",
        "task_order": "custom", "seed": {"train": seed, "data": seed, "generation": seed},
        "protocol": {"name": "greedy", "fingerprint": fingerprint, "scoring": "corrected"}, "tasks": list(tasks),
        "op": op, "bwt": -1.0, "bwt_over_t": -0.5, "bwt_clipped": -0.5, "fwt": None, "forgetting": 1.0,
        "capability": {"general": {"delta": 2.0}}, "wall_clock_s": 1.0, "complete": True, "non_finite": [],
        "stages": [{"task": task, "key": f"{method}-{seed}-{'-'.join(tasks)}-{task}"} for task in tasks],
        "cells": [{"row": 1, "task": task, "metric": "accuracy", "n": 4, "score": 50.0} for task in tasks],
    }  # fmt: skip
    config = {"method": {"name": method, "strength": 1}, "seed": {"train": seed}, "paths": {"runs": str(folder)}}
    (folder / ".hydra").mkdir(parents=True)
    config = OmegaConf.merge(config, OmegaConf.from_dotlist(list(keep)))
    (folder / ".hydra" / "config.yaml").write_text(OmegaConf.to_yaml(config))
    (folder / "results.json").write_text(json.dumps({**results, **changes}))


def groups(folder) -> list[dict]:
    return collect.summarise(collect.collect(folder).runs)


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (10, 2.228), (120, 1.980)]
)
def test_t_quantiles_are_those_of_the_tables(freedom, expected):
    """Two-sided 95 %, Abramowitz and Stegun 1964, table 26.10 (p = 0.975)."""
    assert t_quantile(0.95, freedom) == pytest.approx(expected, abs=5e-4)


def test_t_quantile_in_closed_form():
    """One degree of freedom: tan(pi p / 2); two: p sqrt(2 / (1 - p^2))."""
    assert t_quantile(0.9, 1) == pytest.approx(math.tan(0.45 * math.pi), rel=1e-12)
    assert t_quantile(0.9, 2) == pytest.approx(0.9 * math.sqrt(2 / 0.19), rel=1e-12)


def test_mean_and_interval_by_hand():
    """40, 50, 60: mean 50, s = 10, t = 4.303 at 2 degrees: 4.30265 * 10 / sqrt(3) = 24.8414."""
    assert mean_and_margin([40, 50, 60]) == pytest.approx((50, 24.8414), abs=1e-4)
    assert mean_and_margin([40.0]) == (40.0, None) and mean_and_margin([]) == (None, None)


def test_seeds_and_orders_are_averaged(tmp_path):
    """Two seeds by two orders; OP 40, 50, 60, 70: mean 55, s = 12.9099, t(3) = 3.18245: half width 20.5426."""
    for number, op in enumerate((40, 50, 60, 70)):
        tasks = ("FOMC", "Py150") if number % 2 else ("Py150", "FOMC")
        write_run(tmp_path / "deep" / str(number), op=op, seed=number // 2, tasks=tasks)
    (group,) = groups(tmp_path)
    assert (group["runs"], group["seeds"], len(group["orders"])) == (4, [0, 1], 2)
    assert group["numbers"]["op"] == pytest.approx({"mean": 55, "margin": 20.5426, "n": 4}, abs=1e-4)
    assert group["numbers"]["fwt"] == {"mean": None, "margin": None, "n": 0}
    assert group["numbers"]["delta_general"]["mean"] == 2.0 and group["numbers"]["delta_safety"]["n"] == 0


def test_other_fingerprints_methods_and_settings_are_not_averaged(tmp_path):
    write_run(tmp_path / "a", seed=0)
    write_run(tmp_path / "b", seed=1, fingerprint="bb")
    write_run(tmp_path / "c", seed=2, method="replay")
    write_run(tmp_path / "d", seed=3, keep=["method.strength=5"])
    found = groups(tmp_path)
    assert [group["runs"] for group in found] == [1] * 4
    assert {group["settings"] for group in found if group["method"] == "seqft"} == {
        "method.strength=1",
        "method.strength=5",
    }


def test_paths_and_loggers_do_not_keep_runs_apart(tmp_path):
    write_run(tmp_path / "a", seed=0, keep=["logger.name=csv", "evaluation.batch_tokens=4"])
    write_run(tmp_path / "b", seed=1, keep=["store.keep=none"])
    assert [group["runs"] for group in groups(tmp_path)] == [2]


def test_the_same_run_twice_counts_once(tmp_path):
    """A copy would make the interval narrower than the evidence."""
    write_run(tmp_path / "a")
    write_run(tmp_path / "copy" / "a")
    found = collect.collect(tmp_path)
    assert len(found.runs) == 1
    assert found.left_out == [{"folder": "copy/a", "reason": "the same run as a"}]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "cannot be read"),
        ("[]", "no JSON object"),
        ('{"model": "tiny"}', "lacks method"),
        (None, "no results.json"),
    ],
)
def test_damaged_results_are_listed_and_not_counted(tmp_path, content, reason):
    write_run(tmp_path / "good")
    write_run(tmp_path / "bad", seed=1)
    (tmp_path / "bad" / "results.json").unlink()
    if content is not None:
        (tmp_path / "bad" / "results.json").write_text(content)
    found = collect.collect(tmp_path)
    assert [run.folder for run in found.runs] == ["good"]
    assert found.left_out[0]["folder"] == "bad" and reason in found.left_out[0]["reason"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"complete": False}, "incomplete"), ({"non_finite": ["bwt"]}, "bwt"), ({"op": "high"}, "op that are no numbers")],
)
def test_results_that_do_not_answer_the_question_are_listed(tmp_path, changes, reason):
    write_run(tmp_path / "bad", **changes)
    found = collect.collect(tmp_path)
    assert not found.runs and reason in found.left_out[0]["reason"]


def test_a_failed_run_is_listed_with_its_error(tmp_path):
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed" / "error.txt").write_text("MethodError: the loss is nan\n\ncommand: ...")
    assert collect.collect(tmp_path).left_out[0]["reason"] == "no results.json: MethodError: the loss is nan"


def command(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "trace_hydra.collect", *map(str, arguments)], capture_output=True, text=True, cwd=ROOT
    )


def test_the_command_writes_csv_json_and_cells(tmp_path):
    write_run(tmp_path / "runs" / "a", seed=0, op=40.0)
    write_run(tmp_path / "runs" / "b", seed=1, op=60.0)
    (tmp_path / "runs" / "c" / ".hydra").mkdir(parents=True)
    done = command(tmp_path / "runs", "--out", tmp_path / "out", "--cells")
    assert done.returncode == 0, done.stderr
    # s = sqrt(200), t(1) = 12.7062: 12.7062 * 14.1421 / sqrt(2) = 127.06
    assert "50.00 ± 127.06" in done.stdout and "left out: c" in done.stdout
    rows = list(csv.DictReader((tmp_path / "out" / "collect.csv").open()))
    assert [(row["folder"], row["op"], row["seed_train"], row["fingerprint"]) for row in rows] == [
        ("a", "40.0", "0", "aa"),
        ("b", "60.0", "1", "aa"),
    ]
    assert rows[0]["fwt"] == "" and rows[0]["delta_general"] == "2.0"
    assert len(list(csv.DictReader((tmp_path / "out" / "collect_cells.csv").open()))) == 4
    saved = json.loads((tmp_path / "out" / "collect.json").read_text())
    assert len(saved["runs"]) == 2 and saved["groups"][0]["runs"] == 2 and saved["left_out"][0]["folder"] == "c"


def test_nothing_to_collect_is_an_error(tmp_path):
    done = command(tmp_path / "nowhere")
    assert done.returncode == 2 and "nowhere" in done.stderr and "Traceback" not in done.stderr


def test_collecting_loads_no_torch():
    code = "import sys, trace_hydra.collect; print('torch' in sys.modules, 'pandas' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["False", "False"]
