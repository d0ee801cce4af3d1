"""joblib's launcher: how many processes fit, and what each has of the machine."""

import os
import signal
import subprocess
import sys

import pytest
from cluster_sweeps import ROOT, end, start

from trace_hydra import entry

pytest.importorskip("hydra_plugins.hydra_joblib_launcher")

TAKE = (
    "import sys, time; from pathlib import Path\n"
    "from hydra_plugins.trace_hydra_launchers.joblib_launcher import take_device\n"
    "print(take_device(['3', '5'], Path(sys.argv[1])), flush=True); time.sleep(100)"
)


def test_a_process_a_gpu_or_two_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(9)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert entry.processes_that_fit() == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {7})
    assert entry.processes_that_fit() == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2,3")
    assert entry.processes_that_fit() == 3


def test_processes_take_different_devices_and_give_them_back_when_they_end(tmp_path):
    """Two devices and three processes: the third shares; after the first was killed, a fourth gets its device."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    started = []

    def take() -> str:
        process = subprocess.Popen(
            [sys.executable, "-c", TAKE, tmp_path], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        return process.stdout.readline().strip()

    try:
        assert [take(), take()] == ["3", "5"] and take() in ("3", "5")
        started[0].send_signal(signal.SIGKILL)
        started[0].wait()
        assert take() == "3"
    finally:
        for process in started:
            process.kill()
            process.communicate()


@pytest.mark.long
def test_threads_are_divided_among_the_processes(tmp_path):
    """Two processes where the user says nothing of threads: each has half of the cores, one at least."""
    import joblib

    (tmp_path / "threads_method.py").write_text(
        "import os\nfrom pathlib import Path\n\nimport torch\nfrom trace_hydra.methods.seqft import SeqFT\n\n\n"
        "class Noting(SeqFT):\n    def setup(self, ctx):\n        super().setup(ctx)\n"
        f"        Path('{tmp_path}', f'{{os.getpid()}}.threads').write_text(str(torch.get_num_threads()))\n"
    )
    given = ("method._target_=threads_method.Noting", "trust.targets=[threads_method.]", "budget.default_epochs=1")
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    end(start(tmp_path, *launcher, *given, environment={"OMP_NUM_THREADS": None, "PYTHONPATH": path}))
    noted = [int(one.read_text()) for one in tmp_path.glob("*.threads")]
    assert noted == [max(joblib.cpu_count() // 2, 1)] * 2
