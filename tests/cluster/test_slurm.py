"""Sweeps on SLURM (played by `fake_slurm`): what happens to a job leaves no trace in its results."""

import json
import signal
import subprocess
from pathlib import Path

import pytest
from cluster_sweeps import both_saved, checkpoints, end, outcome, start, wait_for
from fake_slurm import FakeSlurm
from slurm_sweeps import LAUNCHER, SITUATIONS, disturbed

pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
pytestmark = pytest.mark.slow
LONG = pytest.mark.long


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The same two runs, one after the other and undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    end(start(folder))
    return folder


@pytest.fixture
def slurm(tmp_path):
    made = FakeSlurm(tmp_path / "slurm")
    yield made
    made.shut_down()


@LONG
@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_requeued_job_goes_on_to_the_same_bytes(situation, whole, tmp_path):
    """Each of two jobs is hit when there are checkpoints, is requeued once, and all ends as if undisturbed."""
    said, _ = disturbed(tmp_path, situation, lambda _: both_saved(tmp_path))
    assert outcome(tmp_path) == outcome(whole)
    assert "2 done" in said
    logs = [path.read_text() for path in (tmp_path / "runs").glob("tiny-*/trace_hydra.log")]
    assert any("goes on from its checkpoint" in log for log in logs)


@LONG
def test_a_signal_of_lightnings_requeues_once(slurm, whole, tmp_path):
    """SIGUSR1, by which Lightning would requeue, is the program's too; the same for two signals at once."""
    process = start(tmp_path, *LAUNCHER, environment=slurm.environment())
    wait_for(lambda: both_saved(tmp_path))
    jobs = [name for name, one in slurm.jobs().items() if one["state"] == "RUNNING"]
    for job in jobs:
        slurm.ask(job, "signal:USR1")
        slurm.ask(job, "signal:TERM")
    end(process)
    assert sorted(slurm.events("requeue")) == sorted(jobs) and outcome(tmp_path) == outcome(whole)


@LONG
def test_a_job_is_not_requeued_for_ever(slurm, tmp_path):
    """max_num_timeout=0: the first time-out ends the job, saved; the sweep ends with 75."""
    process = start(
        tmp_path, *LAUNCHER, "hydra.launcher.max_num_timeout=0", seeds="'0'", environment=slurm.environment()
    )
    wait_for(lambda: checkpoints(tmp_path))
    (job,) = slurm.jobs()
    slurm.ask(job, "timeout")
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 75 and "stopped" in said and not slurm.events("requeue"), said
    assert checkpoints(tmp_path)


@LONG
def test_a_cancelled_job_stays_cancelled_and_the_others_go_on(slurm, tmp_path):
    """`scancel` sends SIGTERM as a preemption does."""
    process = start(tmp_path, *LAUNCHER, environment=slurm.environment())
    wait_for(lambda: both_saved(tmp_path))
    first = min(slurm.jobs())
    subprocess.run([slurm.folder / "bin" / "scancel", first], env=slurm.environment(), check=True)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 75 and "1 stopped, 1 done" in said, said
    assert not slurm.events("requeue") and slurm.jobs()[first]["state"] == "CANCELLED"
    again = start(tmp_path)
    assert "1 done before, 1 to run" in end(again)


@LONG
def test_a_stopped_sweep_stops_its_jobs(slurm, tmp_path):
    """One runs and saves, the other never starts."""
    process = start(tmp_path, *LAUNCHER, "hydra.launcher.array_parallelism=1", environment=slurm.environment())
    wait_for(lambda: checkpoints(tmp_path))
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 75 and "1 stopped, 1 not started" in said, said
    assert not slurm.events("requeue") and len(slurm.events("start")) == 1 and checkpoints(tmp_path)


@LONG
def test_a_job_that_is_lost_ends_the_wait(slurm, tmp_path):
    """A job killed for its memory leaves no result, and SLURM does not run it again."""
    process = start(tmp_path, *LAUNCHER, seeds="'0'", environment=slurm.environment())
    wait_for(lambda: checkpoints(tmp_path))
    (status,) = (tmp_path / "runs").glob("*/status.json")
    subprocess.run(["kill", "-9", str(json.loads(status.read_text())["process"]["pid"])], check=True)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 75 and "ended without a result" in said, said


@pytest.mark.long
def test_the_batch_file_asks_for_what_the_preset_says(slurm, tmp_path):
    given = ("hydra/launcher=submitit_slurm", "hydra.launcher.gpus_per_node=2", "hydra.launcher.poll_s=1")
    end(start(tmp_path, *given, "budget.default_epochs=1", seeds="'0'", environment=slurm.environment()))
    lines = next(slurm.folder.glob("batch-*.sh")).read_text().splitlines()
    for line in ("--time=1440", "--signal=USR2@300", "--requeue", "--gpus-per-node=2", "--cpus-per-task=8"):
        assert f"#SBATCH {line}" in lines
