"""Sweeps on a Ray cluster of this machine; left out where Ray is not installed."""

import json
import os
import signal
from pathlib import Path

import pytest
from cluster_sweeps import checkpoints, end, outcome, start, wait_for

pytest.importorskip("ray", reason="Ray is not installed (extra: ray)")
pytestmark = pytest.mark.slow

LAUNCHER = ("hydra/launcher=ray", "hydra.launcher.num_cpus=1", "+hydra.launcher.init.num_cpus=2")
ORDERS = "task_order=[FOMC,Py150],[FOMC,NumGLUE-cm],[FOMC],[Py150,FOMC]"
"""Seven stages, five of them distinct."""


def test_four_jobs_train_each_stage_once(tmp_path):
    """A stage's seconds are measured where it is trained; all runs that use it report the same, to the last bit."""
    said = end(start(tmp_path, *LAUNCHER, ORDERS, "budget.default_epochs=2", seeds="'0'"))
    results = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/results.json")]
    stages = [(one["key"], one["effort"]["seconds"]) for run in results for one in run["stages"]]
    assert len(results) == 4 and len(stages) == 7 and len(set(stages)) == 5 and "4 done" in said


def running(folder: Path) -> list[int]:
    found = [json.loads(path.read_text()) for path in (folder / "runs").glob("*/status.json")]
    return [one["process"]["pid"] for one in found if one["state"] == "running"]


def test_a_job_whose_process_is_lost_runs_again_and_goes_on(tmp_path):
    end(start(tmp_path / "whole"))
    process = start(tmp_path / "killed", *LAUNCHER)
    wait_for(lambda: checkpoints(tmp_path / "killed"))
    killed = running(tmp_path / "killed")
    for one in killed:
        os.kill(one, signal.SIGKILL)
    end(process)
    assert killed and outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_a_stopped_sweep_saves_and_goes_on(tmp_path):
    process = start(tmp_path, *LAUNCHER)
    wait_for(lambda: checkpoints(tmp_path))
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 75 and "stopped" in said, said
    end(start(tmp_path, *LAUNCHER))
