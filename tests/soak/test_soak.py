"""The short form of the soak: five kills."""

import sys
from pathlib import Path

import pytest
from zygote import run_module

sys.path.insert(0, str(Path(__file__).parent))
from soak import soak


def fork(arguments: list[str], limit_s: float | None) -> int | None:
    """Run a command in a process that has imported everything, and kill it behind `limit_s`; returns the status."""
    done = run_module(*arguments[2:], limit_s=limit_s)
    if done.returncode > 0:
        print(done.stdout[-3000:], done.stderr[-3000:])
    return None if done.returncode == -9 else done.returncode


@pytest.mark.slow
def test_five_kills_and_the_same_bytes():
    run_module("trace_hydra", "--cfg", "job")  # imports everything, which does not belong to the time of a run
    row = soak("replay", 5, 1, [], run=fork, imports=0.0)
    assert row["kills"] == 5 and row["equal"] == row["runs"] >= 1
