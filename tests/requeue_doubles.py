"""Jobs of submitit that do nothing but wait for signals, for the tests of who owns these."""

import atexit
import os
import threading
import time
from pathlib import Path
from typing import Any

from hydra_plugins.hydra_submitit_launcher.submitit_launcher import BaseSubmititLauncher

from hydra_plugins.trace_hydra_launchers.submitit_launcher import LocalLauncher, SlurmLauncher
from trace_hydra.interrupt import Interrupts

LEAVES_S = 1.0
"""How long a process takes to end, as one does that has threads and files to close."""


class Waiting(BaseSubmititLauncher):
    """Stands where Hydra's plugin runs a job."""

    def __call__(self, folder: str, waits: bool) -> Any:  # type: ignore[override]
        """Note the turn; the first one waits for a signal, takes its time and stops, or is done and slow to leave."""
        pid, first = Path(folder, "pid"), not Path(folder, "turns").exists()
        with Path(folder, "turns").open("a") as turns:
            turns.write(f"{os.getpid()}\n")
        if not first:
            return "done"
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()  # it may get the process's signals
        if not waits:
            atexit.register(lambda: (_write(pid, str(os.getpid())), time.sleep(LEAVES_S)))
            return "done"
        atexit.register(time.sleep, LEAVES_S)
        with Interrupts() as interrupts, interrupts.hold():
            _write(pid, str(os.getpid()))
            while interrupts.requested is None:
                time.sleep(0.01)
            time.sleep(0.2)


class WaitingLocal(LocalLauncher, Waiting):
    """Its `__call__` is the launcher's, around that of `Waiting`."""


class WaitingSlurm(SlurmLauncher, Waiting):
    """Likewise."""


def _write(path: Path, text: str) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(text)
    draft.rename(path)
