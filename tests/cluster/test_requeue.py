"""A job's signals have one owner: however many come, until the process is gone, a stopped job is requeued once."""

import os
import signal
import time
from contextlib import suppress
from itertools import cycle

import pytest
from cluster_sweeps import ROOT, wait_for
from fake_slurm import FakeSlurm

pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
pytestmark = pytest.mark.slow

NUMBERS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR1)
"""Not Ctrl-C, of which the second ends a process that saves."""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    made = FakeSlurm(tmp_path / "slurm")
    for name, value in made.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    yield made
    made.shut_down()


def submit(cluster: str, folder, *given):
    import submitit
    from requeue_doubles import WaitingLocal, WaitingSlurm

    launcher = WaitingSlurm() if cluster == "slurm" else WaitingLocal()
    executor = submitit.AutoExecutor(folder / "jobs", cluster=cluster)
    settings = {"slurm_additional_parameters": {"requeue": True}} if cluster == "slurm" else {}
    executor.update_parameters(timeout_min=60, tasks_per_node=1, **settings)
    return executor.submit(launcher, str(folder), *given)


def signalled_till_it_is_gone(folder) -> None:
    """Send one signal after the other to the process that the job's first turn names, SIGUSR2 first."""
    pid = int(wait_for(lambda: (folder / "pid").exists() and (folder / "pid").read_text()))
    with suppress(ProcessLookupError):
        for number in cycle(NUMBERS):
            os.kill(pid, number)
            time.sleep(0.01)


@pytest.mark.parametrize("cluster", ["local", "slurm"])
@pytest.mark.parametrize("waits", [True, False], ids=["stopped", "done"])
def test_any_number_of_signals(cluster, waits, slurm, tmp_path):
    """Also while a stopped job leaves; one that was done when they came has its result, and is not started again."""
    job = submit(cluster, tmp_path, waits)
    signalled_till_it_is_gone(tmp_path)
    assert wait_for(lambda: job.paths.result_pickle.exists()) and job.result() == "done"
    turns = (tmp_path / "turns").read_text().split()
    said = job.paths.stdout.read_text() + job.paths.stderr.read_text()
    assert len(turns) == said.count("Starting with JobEnvironment") == 1 + waits, said
    assert said.count("Requeued job") == waits and "Traceback" not in said, said
    if cluster == "slurm":
        assert slurm.events("requeue") == [job.job_id] * waits
