"""Processes of a run stop, fail and go on together."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from processes import SETTINGS, codes, run, said, start
from safetensors.torch import load_file

sys.path.insert(0, str(ROOT / "tests" / "soak"))
from soak import outcome  # type: ignore[attr-defined]  # a script, found by the path above

FAILING = str(Path(__file__).with_name("failing.py"))

LONG = partial(pytest.param, marks=pytest.mark.long)
WITH_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
DEEPSPEED = pytest.param("deepspeed", marks=WITH_DEEPSPEED)


def places(folder: Path) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    return [f"paths.runs={folder / 'runs'}", f"paths.store={folder / 'store'}"]


def wait_for_checkpoint(folder: Path, processes: list[subprocess.Popen]) -> None:
    until = time.monotonic() + 60
    while not list((folder / "store" / "partial").glob("*/manifest.json")):
        assert time.monotonic() < until and all(one.poll() is None for one in processes), said(folder)
        time.sleep(0.02)


def results(folder: Path) -> dict:
    (path,) = (folder / "runs").glob("*/results.json")
    return json.loads(path.read_text())


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", DEEPSPEED])
def test_killed_within_a_stage_and_taken_up_to_the_same_bytes(strategy, tmp_path):
    """With dropout, so that each process draws, and the number of processes is in the key."""
    settings = [f"trainer={strategy}", "tuning=lora", "budget.default_epochs=12", "checkpoint.every_steps=3"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    processes = start(run(*settings, *places(whole), "trainer.precision=32-true", "trainer.accelerator=cpu"), whole)
    assert codes(processes) == [0, 0], said(whole)
    command = run(*settings, *places(cut), "trainer.precision=32-true", "trainer.accelerator=cpu")
    processes = start(command, cut)
    wait_for_checkpoint(cut, processes)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    codes(processes)
    assert not list((cut / "runs").glob("*/results.json"))
    assert codes(start(command, cut)) == [0, 0], said(cut)
    log = next((cut / "runs").glob("*/trace_hydra.log")).read_text()
    assert log.count("goes on from its checkpoint") == 1
    assert outcome(whole) == outcome(cut)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["fsdp", DEEPSPEED])
def test_a_signal_to_one_stops_all_and_one_process_goes_on(strategy, tmp_path):
    """What two processes saved of split weights and optimizer is one process's checkpoint, and the run is the same."""
    settings = ["budget.default_epochs=40", "trainer.precision=32-true", "trainer.accelerator=cpu"]
    command = run(f"trainer={strategy}", *settings, "checkpoint.every_steps=3", *places(tmp_path))
    processes = start(command, tmp_path)
    wait_for_checkpoint(tmp_path, processes)
    processes[1].send_signal(signal.SIGTERM)
    assert codes(processes) == [75, 75], said(tmp_path)
    assert said(tmp_path).count("stopped by SIGTERM; the same command goes on") == 1
    (saved,) = (tmp_path / "store" / "partial").iterdir()
    at = json.loads((saved / "manifest.json").read_text())["facts"]["at"]
    command = [sys.executable, *run(*settings, *places(tmp_path)), "hydra.run.dir=" + str(tmp_path / "runs" / "alone")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "runs" / "alone" / "trace_hydra.log").read_text()
    assert f"goes on from its checkpoint at {at}" in log
    straight = tmp_path / "straight"
    command = [sys.executable, *run(*settings, *places(straight))]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    for path in (straight / "store" / "stages").iterdir():
        first, second = (
            load_file(one / "weights.safetensors") for one in (path, tmp_path / "store/stages" / path.name)
        )
        for name in first:
            torch.testing.assert_close(first[name], second[name], rtol=1e-2, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "strategy"),
    [
        ("error", "ddp"),
        LONG("kill", "ddp"),
        LONG("error", "fsdp"),
        pytest.param("error", "deepspeed", marks=[WITH_DEEPSPEED, pytest.mark.long]),
    ],
)
def test_a_fault_of_one_ends_all_with_one_message(how, strategy, tmp_path):
    settings = [*SETTINGS, f"trainer={strategy}", "trainer.precision=32-true", "trainer.accelerator=cpu"]
    processes = start([FAILING, how, "1", "4", *settings, *places(tmp_path)], tmp_path)
    found = codes(processes)
    text = said(tmp_path)
    if how == "kill":
        assert found == [2, -signal.SIGKILL] and text.count("another process of this run is gone") == 1, text
    else:
        assert found == [1, 1] and text.count("ValueError: a fault of this process") == 1, text
        assert "ValueError: a fault" in next((tmp_path / "runs").glob("*/error.txt")).read_text()
        assert (tmp_path / "out0").read_text().count("Traceback") == 0


@pytest.mark.long
def test_memory_that_runs_out_in_one_halves_the_micro_batch_of_all(tmp_path):
    settings = [*SETTINGS, "trainer=ddp", "trainer.precision=32-true", "trainer.accelerator=cpu", "on_oom=halve"]
    processes = start([FAILING, "memory", "1", "4", *settings, *places(tmp_path)], tmp_path)
    assert codes(processes) == [0, 0], said(tmp_path)
    log = next((tmp_path / "runs").glob("*/trace_hydra.log")).read_text()
    assert log.count("the micro-batch is 1 rows") == 1
    assert results(tmp_path)["complete"]


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["fsdp", DEEPSPEED])
def test_a_gradient_that_is_not_finite_in_one_is_a_step_of_none(strategy, tmp_path):
    settings = [*SETTINGS, f"trainer={strategy}", "trainer.precision=32-true", "trainer.accelerator=cpu"]
    arguments = [FAILING, "nan", "1", "4", *settings, "on_nonfinite=skip_batch", *places(tmp_path)]
    assert codes(start(arguments, tmp_path)) == [0, 0], said(tmp_path)
    log = next((tmp_path / "runs").glob("*/trace_hydra.log")).read_text()
    assert log.count("the gradient is nan") == log.count("no step is taken") == 1
    assert results(tmp_path)["complete"]


@pytest.mark.long
def test_torchrun_runs_and_says_once_what_is_wrong(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    given = {
        "good": ["trainer=ddp", "logger=csv"],
        "no method for shards": ["method=ewc", "trainer=fsdp"],
        "no such key": ["trainer=ddp", "trainer.stratgy=ddp"],
    }
    for name, more in given.items():
        folder = tmp_path / name.replace(" ", "_")
        arguments = [*run(*more, "trainer.precision=32-true", "trainer.accelerator=cpu"), *places(folder)]
        done = subprocess.run([*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == (name != "good"), done.stderr
        if name == "good":
            assert results(folder)["complete"] and done.stdout.count("cells,") == 1
        else:
            assert done.stderr.count("trace_hydra: ") == 1, done.stderr
