"""joblib's launcher with a GPU for each of its processes (`hydra/launcher=joblib`)."""

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_plugins.trace_hydra_launchers.context import context_of_jobs
from hydra_plugins.trace_hydra_launchers.missing import Missing, installed

if TYPE_CHECKING or installed("hydra_plugins.hydra_joblib_launcher"):
    from hydra_plugins.hydra_joblib_launcher import joblib_launcher as plugin

    Base = plugin.JoblibLauncher
else:
    Base = Missing

_taken = ExitStack()
"""The device of this process, until it ends."""


class JoblibLauncher(Base):
    """Gives each process a device of its own, where there are several."""

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Keep what jobs are made of."""
        from trace_hydra.entry import gpus

        if len(devices := gpus()) > 1:
            task_function = _OnOneDevice(task_function, devices)
        super().setup(hydra_context=context_of_jobs(hydra_context), task_function=task_function, config=config)


class _OnOneDevice:
    """A job that sees one device. Its process keeps it for the jobs that come after."""

    def __init__(self, task: Callable[[Any], Any], devices: Sequence[str]):
        self.task, self.devices = task, devices

    def __call__(self, config: Any) -> Any:
        take_device(self.devices)
        return self.task(config)


def take_device(devices: Sequence[str], folder: Path | None = None) -> str:
    """Let this process see one device that no other process has taken in this way; with none left, share one.

    Args:
        devices: Their names, as CUDA_VISIBLE_DEVICES has them.
        folder: Where locks lie; by default one of this machine and user.
    """
    from trace_hydra.store import locks

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible in devices:
        return visible
    folder = folder or Path(tempfile.gettempdir()) / f"trace_hydra-{os.getuid()}"
    chosen = devices[os.getpid() % len(devices)]
    for device in devices:
        attempt = locks.hold(folder / f"gpu-{device}", what=device, poll_s=0.01, notify=_say_nothing, give_up=_at_once)
        if attempt.__enter__():
            _taken.push(attempt)
            chosen = device
            break
        attempt.__exit__(None, None, None)
    os.environ["CUDA_VISIBLE_DEVICES"] = chosen
    return chosen


def _at_once() -> bool:
    return True


def _say_nothing(message: str) -> None:
    """A device that another process has is no news."""
