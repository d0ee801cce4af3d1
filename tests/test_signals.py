"""Signals: save, leave with 75, and go on; a second Ctrl-C stops at once."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SETTINGS = [
    "debug=smoke", "logger=none", "callbacks.progress.interval_s=0", "task_order=[FOMC,Py150]", "data.rows.train=8",
    "evaluation=diagonal_last", "capability=none",
]  # fmt: skip


OTHERS = ("SIGINT", "SIGUSR1", "SIGUSR2")


def start(folder: Path, *extra: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "trace_hydra", *SETTINGS, f"paths.runs={folder / 'runs'}", *extra],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=ROOT,
        env={**os.environ, "TRACE_HYDRA_STORE": str(folder / "store"), "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def wait_for(process: subprocess.Popen, text: str) -> list[str]:
    said = []
    assert process.stderr is not None
    for line in process.stderr:
        said.append(line)
        if text in line:
            break
    return said


def results(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in (folder / "runs").rglob("results.json")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", *(pytest.param(one, marks=pytest.mark.long) for one in OTHERS)])
def test_a_signal_in_training_saves_and_the_same_command_goes_on(name, tmp_path):
    """150 epochs of two steps; the signal comes in the first stage, and the second start begins with its checkpoint."""
    process = start(tmp_path, "budget.default_epochs=150")
    said = wait_for(process, "stage 1/2")
    process.send_signal(getattr(signal, name))
    said += process.stderr.readlines()  # type: ignore[union-attr]
    assert process.wait() == 75, "".join(said)
    assert f"stopped by {name}; the same command goes on" in said[-1] and not results(tmp_path)
    (saved,) = (tmp_path / "store" / "partial").iterdir()
    at = int(json.loads((saved / "manifest.json").read_text())["facts"]["at"].split("step ")[1])
    process = start(tmp_path, "budget.default_epochs=150")
    said = process.stderr.readlines()  # type: ignore[union-attr]
    assert process.wait() == 0
    assert "goes on from its checkpoint" in next((tmp_path / "runs").rglob("trace_hydra.log")).read_text()
    first = next(line for line in said if "stage 1/2" in line)
    assert int(first.split("step ")[1].split("/")[0]) >= at > 0  # shown behind a micro-batch
    assert results(tmp_path)[0]["complete"] and not list((tmp_path / "store" / "partial").iterdir())


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(tmp_path):
    """Saving is made to take a minute by a method that never ends its stage; 130 and no results."""
    plugin = tmp_path / "slow_method.py"
    plugin.write_text(
        "import time\nfrom trace_hydra.methods.seqft import SeqFT\n\n\nclass Slow(SeqFT):\n"
        "    def end_stage(self, ctx):\n        print('ending', file=__import__('sys').stderr, flush=True)\n"
        "        for _ in range(600):\n            time.sleep(0.1)\n"
    )
    os.environ["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    try:
        process = start(tmp_path, "method._target_=slow_method.Slow", "trust.targets=[slow_method.]")
    finally:
        os.environ["PYTHONPATH"] = os.environ["PYTHONPATH"].split(os.pathsep, 1)[1]
    said = wait_for(process, "ending")
    process.send_signal(signal.SIGINT)
    said += wait_for(process, "saving, then stopping")
    process.send_signal(signal.SIGINT)
    said += process.stderr.readlines()  # type: ignore[union-attr]
    assert process.wait() == 130, "".join(said)
    assert "stopped at once" in said[-1] and not results(tmp_path)
