"""What SLURM does to the jobs of a sweep, done by the fake one, and what must come of it."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from cluster_sweeps import end, start
from fake_slurm import FakeSlurm

SITUATIONS = ("timeout", "preempt", "node_fail")
LAUNCHER = (
    "hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=5", "hydra.launcher.signal_delay_s=60",
    "hydra.launcher.gpus_per_node=null", "hydra.launcher.poll_s=1",
)  # fmt: skip


def disturbed(folder: Path, situation: str, due: Callable[[str], object], complete: bool = True) -> tuple[str, int]:
    """Run a sweep on a fake SLURM and let something happen to each of its jobs, once.

    Args:
        folder: Where everything goes.
        situation: Of `SITUATIONS`.
        due: Asked again and again of each job that runs, whether it is time.
        complete: Whether that surely comes while both jobs run, so that both must be hit.

    Returns:
        What the sweep said, and how many jobs were hit.
    """
    slurm = FakeSlurm(folder / "slurm")
    process = start(folder, *LAUNCHER, environment=slurm.environment())
    try:
        hit = set[str]()
        while process.poll() is None and len(hit) < 2:
            running = {name for name, one in slurm.jobs().items() if one["state"] == "RUNNING"}
            for job in filter(due, running - hit):
                slurm.ask(job, situation)
                hit.add(job)
            time.sleep(0.02)
        said = end(process)
        check(slurm, situation, folder, complete)
        return said, len({*slurm.events("requeue"), *slurm.events("node_fail")})
    finally:
        slurm.shut_down()


def check(slurm: FakeSlurm, situation: str, folder: Path, complete: bool) -> None:
    """Jobs that were hit were requeued once, by one owner, started twice, in the same folder."""
    jobs, starts, requeues = sorted(slurm.jobs()), slurm.events("start"), slurm.events("requeue")
    lost = slurm.events("node_fail")
    assert len(jobs) == 2 and not slurm.events("killed")  # none was still there when its time was over
    assert not (lost and requeues) and len({*requeues}) == len(requeues) and len({*lost}) == len(lost)
    assert sorted(starts) == sorted([*jobs, *requeues, *lost])
    if complete:
        assert sorted(lost if situation == "node_fail" else requeues) == jobs
    assert len(list((folder / "runs").glob("tiny-*"))) == 2
    states = [json.loads(path.read_text())["state"] for path in (folder / "runs").glob("*/status.json")]
    assert states == ["done"] * 2
