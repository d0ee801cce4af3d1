"""Jobs of a sweep as tasks of a Ray cluster (`hydra/launcher=ray`).

A job whose process or machine is lost is run again by Ray (`max_retries`) and goes on from its checkpoint.
"""

import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf, open_dict

from hydra_plugins.trace_hydra_launchers.context import context_of_jobs

log = logging.getLogger(__name__)

_PASSED_ON = ("TRACE_", "WANDB_", "HF_")
"""Beginnings of the variables that jobs take from the sweep: a running cluster has an environment of its own."""


class RayLauncher(Launcher):
    """Runs each job as one Ray task, as many at once as the cluster has room for.

    Args:
        address: Of a running cluster, `auto` for that of this machine; None starts one that ends with the sweep.
        num_cpus: What a job needs; also the threads that it computes with.
        num_gpus: Likewise.
        resources: Likewise, by name.
        max_retries: How often a job is run again whose process was lost.
        init: Further arguments of `ray.init`.
    """

    def __init__(self, address: str | None, max_retries: int, init: Any, **needs: Any):
        self.address, self.max_retries = address, max_retries
        self.init, self.needs = _plain(init), {name: _plain(value) for name, value in needs.items()}
        self.config: Any = None

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Keep what jobs are made of."""
        self.hydra_context, self.task_function, self.config = context_of_jobs(hydra_context), task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run jobs and wait until each has ended; none that fails ends the wait."""
        ray: Any = import_module("ray")  # an extra; not where types are checked
        with _own_signals():
            if started := not ray.is_initialized():
                os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine unasked
                alone = {} if self.address else {"include_dashboard": False}
                ray.init(**{"address": self.address or "local", **alone, **self.init})
        try:
            task: Any = ray.remote(max_retries=self.max_retries, retry_exceptions=False, **self.needs)(_run)
            state, environment = Singleton.get_state(), _inherited()
            waiting = []
            for number, overrides in enumerate(job_overrides, start=initial_job_idx):
                log.info("\t#%d : %s", number, " ".join(filter_overrides(overrides)))
                waiting.append(task.remote(self, list(overrides), number, state, environment))
            return [_returned(ray, one) for one in waiting]
        finally:
            if started:
                with _own_signals():
                    ray.shutdown()

    def run(self, overrides: Sequence[str], number: int) -> JobReturn:
        """Run one job in this process."""
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = str(number)
            config.hydra.job.num = number
        HydraConfig.instance().set_config(config)
        return run_job(
            hydra_context=self.hydra_context,
            task_function=self.task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )


def _run(
    launcher: RayLauncher, overrides: list[str], number: int, state: Any, environment: dict[str, str]
) -> JobReturn:
    """Run one job in a worker, which may have run another before."""
    os.environ.update(environment)
    setup_globals()
    Singleton.set_state(state)
    return launcher.run(overrides, number)


def _inherited() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}


def _returned(ray: Any, waiting: Any) -> JobReturn:
    try:
        return ray.get(waiting)
    except ray.exceptions.RayError as error:
        log.error("a job's process was lost: %s", error)
        failed = JobReturn(status=JobStatus.FAILED)
        failed.return_value = error
        return failed


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the handlers of signals that Ray replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
