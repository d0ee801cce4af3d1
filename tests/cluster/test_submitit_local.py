"""submitit's launcher of this machine: a job that is out of time or is told to end goes on by itself."""

import json
import os
import signal
from pathlib import Path

import pytest
from cluster_sweeps import both_saved, end, outcome, start, wait_for

pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The same two runs, one after the other and undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    end(start(folder))
    return folder


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_job_that_is_stopped_goes_on_by_itself(number, whole, tmp_path):
    """SIGUSR2 is what submitit's watcher sends before the limit; SIGTERM what a machine sends that goes down."""
    process = start(tmp_path, "hydra/launcher=submitit_local")
    wait_for(lambda: both_saved(tmp_path))
    paths = list((tmp_path / "runs").glob("*/status.json"))
    for one in [json.loads(path.read_text())["process"]["pid"] for path in paths]:
        os.kill(one, number)
    said = end(process)
    assert "2 done" in said and outcome(tmp_path) == outcome(whole)
    turns = [path.read_text() for path in (tmp_path / "runs").glob(".submitit/*/*.out")]
    assert [turn.count("Starting with JobEnvironment") for turn in turns] == [2, 2]
    logs = [path.read_text() for path in (tmp_path / "runs").glob("*/trace_hydra.log")]
    assert any("goes on from its checkpoint" in log for log in logs)


def test_its_own_watcher_ends_a_job_before_its_limit_and_starts_it_again(tmp_path):
    """Two minutes' limit, SIGUSR2 30 s before it: too much for one turn, whatever the machine. Twice and no more."""
    given = ("hydra.launcher.timeout_min=2", "hydra.launcher.max_num_timeout=1", "budget.default_epochs=100000")
    process = start(tmp_path, "hydra/launcher=submitit_local", *given, seeds="'0'")
    said, _ = process.communicate(timeout=500)
    assert process.returncode == 75 and "1 stopped" in said, said
    (log,) = (tmp_path / "runs").glob("*/trace_hydra.log")
    assert log.read_text().count("goes on from its checkpoint") == 1
