"""Jobs through submitit that save, go back to the queue, and go on (`hydra/launcher=submitit_slurm|submitit_local`).

A signal has one owner. While a job runs, the program's own handlers (`trace_hydra.interrupt`) have all signals: the run
saves its stage and raises `Stopped`. That ends here, and submitit's handler, which the program's had replaced, is
called by hand: it counts time-outs, writes the job down again and asks for one requeue. From then on, or once a job is
done, its process hears no signal until it is gone: submitit's handler would requeue it again, and others would end it
before its result or exit code is out. Lightning requeues nothing: it leaves SIGUSR1 alone where somebody has it.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides

from hydra_plugins.trace_hydra_launchers.context import context_of_jobs
from hydra_plugins.trace_hydra_launchers.missing import Missing, installed

if TYPE_CHECKING or installed("hydra_plugins.hydra_submitit_launcher"):
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import BaseSubmititLauncher
else:
    BaseSubmititLauncher = Missing

log = logging.getLogger(__name__)

_LOOKS = 2
"""Times in a row that a job must be gone from the queue before it is taken for ended without a result."""


class RequeueLauncher(BaseSubmititLauncher):
    """What both launchers share. Parameters are those of the plugin's schema.

    Args:
        poll_s: Seconds between two looks at the queue.
        params: See `BaseQueueConf`.
    """

    def __init__(self, poll_s: float = 30.0, **params: Any):
        super().__init__(**params)
        self.poll_s = poll_s

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Keep what jobs are made of."""
        super().setup(hydra_context=context_of_jobs(hydra_context), task_function=task_function, config=config)

    def __call__(self, *arguments: Any, **keywords: Any) -> JobReturn:
        """Run one job in the process that submitit made for it; if a signal stops it, send it back to the queue."""
        import submitit

        from trace_hydra import job
        from trace_hydra.errors import Stopped
        from trace_hydra.interrupt import Interrupts

        requeue: Any = signal.getsignal(getattr(signal, f"SIG{submitit.JobEnvironment.USR_SIG}"))
        interrupts = Interrupts()
        with job.sent_back_when_stopped():
            try:
                try:
                    interrupts.install()  # and never taken back: submitit's handler is reached from here only
                    return super().__call__(*arguments, **keywords)
                finally:
                    interrupts.deaf = True  # before anything is called, for that is when Python runs handlers
                    interrupts.ignore()
            except Stopped as stop:
                from trace_hydra.__main__ import EXIT_STOPPED

                if job.sent_back():
                    self._send_back(signal.Signals[stop.signal], requeue)
                sys.exit(EXIT_STOPPED)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit jobs and wait until each has ended, however often it is requeued; none that fails ends the wait."""
        from trace_hydra import job

        jobs = self._submit(job_overrides, initial_job_idx)
        halt, stopped = job.halt_file(), False
        while left := [one for one in jobs if not (_has_result(one) or self._is_gone(one))]:
            if not stopped and halt is not None and halt.exists():
                stopped = True
                self._stop([one.job_id for one in left], running=halt.read_text() == "stopped")
            time.sleep(1)
        return [_returned(one) for one in jobs]

    def _submit(self, job_overrides: Sequence[Sequence[str]], start: int) -> list[Any]:
        import submitit

        assert self.config is not None
        given = {name: value for name, value in self.params.items() if value is not None}
        folder, timeouts = given.pop("submitit_folder"), given.pop("max_num_timeout")
        executor = submitit.AutoExecutor(
            folder, cluster=self._EXECUTOR, **{f"{self._EXECUTOR}_max_num_timeout": timeouts}
        )
        shared = BaseQueueConf.__dataclass_fields__
        executor.update_parameters(
            **{name if name in shared else f"{self._EXECUTOR}_{name}": value for name, value in given.items()}
        )
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        state = Singleton.get_state()
        calls = []
        for number, overrides in enumerate(job_overrides, start=start):
            log.info("\t#%d : %s", number, " ".join(filter_overrides(overrides)))
            calls.append((list(overrides), "hydra.sweep.dir", number, f"job_id_for_{number}", state))
        return executor.map_array(self, *zip(*calls, strict=True))

    def _send_back(self, number: signal.Signals, requeue: Callable[[int, Any], None]) -> None:
        """Have submitit requeue the job and end this process, unless somebody else has decided about the job.

        Raises:
            UncompletedJobError: If it timed out more than `max_num_timeout` times; submitit notes that as its result.
        """
        import submitit

        if number == signal.SIGINT or (number == signal.SIGTERM and not self._keeps_its_place()):
            return
        written = submitit.JobEnvironment().paths.submitted_pickle
        written.with_suffix(f"{written.suffix}.save_tmp").unlink(missing_ok=True)  # of a process killed while it wrote
        requeue(number, None)
        sys.exit(0)  # a rank but the first, which requeues for all; another status might kill that one before

    def _keeps_its_place(self) -> bool:
        """Whether a job that got SIGTERM is neither cancelled nor requeued already."""
        return True

    def _is_gone(self, job: Any) -> bool:
        """Whether a job without a result will never have one."""
        return job.done()

    def _stop(self, ids: Sequence[str], *, running: bool) -> None:
        """End jobs of a sweep that was halted: those that wait and, if it was stopped by a signal, those that run."""


class LocalLauncher(RequeueLauncher):
    """Jobs as processes of this machine. A sweep that is stopped reaches them by itself."""

    _EXECUTOR = "local"


class SlurmLauncher(RequeueLauncher):
    """Jobs as SLURM jobs. Asks `squeue` alone, so accounting (`sacct`) need not be there."""

    _EXECUTOR = "slurm"

    def __init__(self, **params: Any):
        super().__init__(**params)
        self._looked_at = -float("inf")
        self._missing: dict[str, int] = {}

    def _keeps_its_place(self) -> bool:
        """SLURM warns a job that it will preempt, and it stays RUNNING; cancelled ones, or requeued, are COMPLETING."""
        import submitit

        states = _squeue("--format=%T", f"--jobs={submitit.JobEnvironment().job_id}")
        return states is None or "RUNNING" in states

    def _is_gone(self, job: Any) -> bool:
        if time.monotonic() - self._looked_at >= self.poll_s:
            queued = _squeue("--array", "--format=%i", f"--user={os.getuid()}")
            self._looked_at = time.monotonic()
            if queued is None:
                return False
            known = {*self._missing, job.job_id}
            self._missing = {one: 0 if one in queued else self._missing.get(one, 0) + 1 for one in known}
        return self._missing.setdefault(job.job_id, 0) >= _LOOKS

    def _stop(self, ids: Sequence[str], *, running: bool) -> None:
        _call("scancel", "--state=PENDING", *ids)
        if running:
            _call("scancel", "--signal=TERM", *ids)


def _has_result(job: Any) -> bool:
    """Look into the folder: on a network file system, a listing is fresher than what was known of a file."""
    try:
        return job.paths.result_pickle.name in os.listdir(job.paths.folder)
    except OSError:
        return False


def _returned(job: Any) -> JobReturn:
    """What a job left, its failure included; how it went stands in its own folder too."""
    from submitit.core.utils import UncompletedJobError

    failed = JobReturn(status=JobStatus.FAILED)
    if not _has_result(job):
        log.error("SLURM or submitit job %s ended without a result; its log: %s", job.job_id, job.paths.stderr)
        failed.return_value = UncompletedJobError(f"job {job.job_id} ended without a result")
        return failed
    try:
        return job.results()[0]
    except UncompletedJobError as error:
        log.error("job %s: %s", job.job_id, error)
        failed.return_value = error
        return failed


def _squeue(*options: str) -> list[str] | None:
    """Ask for words about jobs in the queue; None if there is no answer."""
    output = _call("squeue", "--noheader", *options)
    return None if output is None else output.split()


def _call(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("%s: %s", command[0], error)
        return None
    if done.returncode:
        log.warning("%s: %s", " ".join(command), done.stderr.strip())
        return None
    return done.stdout
