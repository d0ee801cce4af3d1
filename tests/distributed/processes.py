"""Starting the processes of a run, as a launcher would, and what the tests of them share."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from conftest import ROOT

SETTINGS = [
    "debug=smoke", "logger=none", "callbacks=none", "capability=none", "task_order=[FOMC,Py150]", "data.rows.train=13",
    "data.rows.test=5", "budget.batch_size=8", "budget.micro_batch_size=2", "evaluation=diagonal_last",
    "evaluation.bootstrap_samples=10",
]  # fmt: skip


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(arguments: Sequence[str], folder: Path, count: int = 2, **more: str) -> list[subprocess.Popen]:
    """Start a command `count` times, with what a launcher tells each; output goes to <folder>/out<rank>."""
    port = free_port()
    found = []
    for rank in range(count):
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "TRACE_HYDRA_STORE": str(folder / "store"), "PYTHONPATH": str(ROOT),
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), **more,
        }  # fmt: skip
        with (folder / f"out{rank}").open("wb") as out:
            found.append(
                subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=out, stderr=out, env=environment)
            )
    return found


def run(*arguments: str) -> list[str]:
    """The command line of a run."""
    return ["-m", "trace_hydra", *SETTINGS, *arguments]


def codes(processes: Sequence[subprocess.Popen], limit_s: float = 300) -> list[int]:
    """Wait for all; a hang is an error."""
    try:
        return [process.wait(limit_s) for process in processes]
    finally:
        for process in processes:
            process.kill()


def said(folder: Path, count: int = 2) -> str:
    return "".join((folder / f"out{rank}").read_text(errors="replace") for rank in range(count))
