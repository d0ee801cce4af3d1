"""A sweeper that plans first, skips what is done, and goes on when a job fails (`hydra/sweeper=trace`)."""

import logging
import os
import platform
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

if TYPE_CHECKING:
    from trace_hydra.sweep import Job, JobPlan
    from trace_hydra.sweep_record import RecordWriter

log = logging.getLogger(__name__)

EXIT_INTERRUPTED = 130
_QUIET_S = 20
"""How long jobs that did not show themselves are waited for once a launcher has given up."""


@dataclass
class TraceSweeperConf:
    """hydra/sweeper=trace; the basic sweeper's settings."""

    _target_: str = "hydra_plugins.trace_hydra_sweeper.sweeper.TraceSweeper"
    max_batch_size: int | None = None
    params: dict[str, str] | None = None


ConfigStore.instance().store(group="hydra/sweeper", name="trace", node=TraceSweeperConf, provider="trace_hydra")


class TraceSweeper(BasicSweeper):
    """Expands values as Hydra's basic sweeper does; prints a plan, launches what is to run, prints how it ended.

    Exits with 0 if all jobs are done, 1 if one failed, 2 if none could run, 75 if stopped by a signal, 130 if
    interrupted twice.
    """

    config: Any
    hydra_context: Any
    launcher: Any

    def sweep(self, arguments: list[str]) -> Any:
        """Run the sweep."""
        from trace_hydra import sweep, sweep_text
        from trace_hydra.sweep_progress import SweepProgress

        jobs = self._jobs(arguments)  # a mistake in an override ends the sweep here
        folder = Path(str(self.config.hydra.sweep.dir)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        plans, interrupted, record = list["JobPlan"](), False, None
        with _halt_file(folder) as halt:
            try:
                with _signals(halt) as heard:
                    plans = sweep.plan_jobs(jobs, lambda: bool(heard))
                    order = sweep.in_order(plans)
                    if self._progress == "quiet":
                        logging.getLogger("hydra").setLevel(logging.WARNING)
                    else:
                        sweep_text.show_plan(plans, order)
                    self._leave_problems(plans, halt)
                    heard.watch(order)
                    record = self._record(jobs, plans, order, halt)
                    with SweepProgress(folder, record, self._progress, isinstance(self.launcher, BasicLauncher)):
                        self._launch(order, halt)
            except KeyboardInterrupt:
                interrupted = True
            ended = sweep_text.outcomes(plans, halt)
            halted_by = halt.read_text() if halt.exists() else ""
        sweep_text.show_outcomes(ended, folder)
        code = sweep_text.exit_code(ended, stopped=halted_by == "stopped")
        if record is not None:
            record.end(EXIT_INTERRUPTED if interrupted else code)
        if code or interrupted:
            sys.exit(EXIT_INTERRUPTED if interrupted else code)
        return [one.op for one in ended]

    @property
    def _progress(self) -> str:
        return str(self.config.get("progress", "auto"))

    def _record(
        self, jobs: Sequence["Job"], plans: Sequence["JobPlan"], order: Sequence["JobPlan"], halt: Path
    ) -> "RecordWriter":
        """Write down what this sweep is about to do."""
        from trace_hydra import entry
        from trace_hydra.sweep_record import RecordWriter, remove_superseded
        from trace_hydra.sweep_text import label_jobs

        launcher = self.config.hydra.launcher
        slots = launcher.get("n_jobs", launcher.get("array_parallelism"))
        if isinstance(self.launcher, BasicLauncher):
            slots = 1
        record = RecordWriter(
            halt,
            entry.typed() or sys.argv[1:],
            slots if isinstance(slots, int) and slots > 0 else None,
            queued="submitit" in type(self.launcher).__module__,
        )
        groups = {job.number: [_name(job.config[node]) for node in ("model", "tuning", "method")] for job in jobs}
        record.write(plans, order, label_jobs(plans), groups)
        remove_superseded(halt.parent, record.path, [plan.directory for plan in plans])
        return record

    def _jobs(self, arguments: list[str]) -> list["Job"]:
        """Expand the values and compose every job, as the launcher will."""
        from trace_hydra.expand import Composer
        from trace_hydra.sweep import Job

        loader = self.hydra_context.config_loader
        parser = OverridesParser.create(config_loader=loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        (combinations,) = self.split_arguments(overrides, None)
        composed = Composer(loader, self.config).jobs(combinations)
        return [
            Job(number, (*given, *self._pinned(one.subdir)), one.folder / one.subdir, one.config)
            for number, (given, one) in enumerate(zip(combinations, composed, strict=True))
        ]

    def _pinned(self, subdir: str) -> list[str]:
        """Fix a job's folder if it depends on Hydra's own values: numbers change once jobs are skipped or reordered."""
        raw = OmegaConf.to_container(self.config.hydra.sweep, resolve=False)
        if "hydra" not in str(raw["subdir"]):  # type: ignore[index,call-overload]
            return []
        quoted = subdir.replace("\\", "\\\\").replace("'", "\\'")
        return [f"hydra.sweep.subdir='{quoted}'"]

    def _launch(self, order: Sequence["JobPlan"], halt: Path) -> None:
        """Launch jobs until each has ended or the sweep is halted."""
        if isinstance(self.launcher, BasicLauncher):
            for plan in order:
                if halt.exists():
                    return
                self.launcher.launch([plan.overrides], initial_job_idx=plan.number)
            return
        size = self.max_batch_size or max(len(order), 1)
        for start in range(0, len(order), size):
            self._launch_together(order[start : start + size], halt, start)

    def _launch_together(self, plans: Sequence["JobPlan"], halt: Path, start: int) -> None:
        """Launch jobs side by side. If one's process dies, joblib takes the others along; they get a second chance."""
        from trace_hydra.job import status

        waiting, chances = list(plans), {plan.number: 2 for plan in plans}
        while waiting and not halt.exists():
            try:
                self.launcher.launch([plan.overrides for plan in waiting], initial_job_idx=start)
                return
            except Exception as error:  # noqa: BLE001 - whatever a launcher raises when it loses a job's process
                log.error("the launcher gave up: %s: %s", type(error).__name__, error)
            if "joblib" not in type(self.launcher).__module__:
                _wait(waiting, halt)
                return
            states = {plan.number: status(plan.directory, halt).get("state") for plan in waiting}
            for number, state in states.items():
                chances[number] -= state == "stopped"
            left = [plan for plan in waiting if states[plan.number] in (None, "stopped") and chances[plan.number]]
            if len(left) == len(waiting) and not any(states.values()):
                return  # nothing can be started at all
            waiting = left

    def _leave_problems(self, plans: Sequence["JobPlan"], halt: Path) -> None:
        """Write error.txt for jobs that cannot run; with fail_fast nothing else starts then."""
        from trace_hydra import job
        from trace_hydra.errors import ConfigError

        for plan in plans:
            if plan.problem is not None:
                job.write_error(plan.directory, ConfigError(plan.problem), plan.overrides)
                if self.config.sweep.fail_fast:
                    job.put_up(halt, "failed")


class _Heard(list[int]):
    """Signals that came; passes SIGTERM on to jobs that run in other processes."""

    def __init__(self, halt: Path):
        super().__init__()
        self._halt, self._jobs = halt, list["JobPlan"]()

    def watch(self, jobs: Sequence["JobPlan"]) -> None:
        self._jobs = list(jobs)

    def hear(self, number: int, frame: FrameType | None) -> None:
        from trace_hydra import job

        self.append(number)
        if len(self) > 1:
            raise KeyboardInterrupt
        print("trace_hydra: stopping; jobs that run save their state. Once more: stop at once.", file=sys.stderr)
        job.put_up(self._halt, "stopped")
        if number == signal.SIGINT:
            return  # Ctrl-C reaches the other processes from the terminal
        for plan in self._jobs:
            job.send(plan.directory, self._halt, number)


@contextmanager
def _signals(halt: Path) -> Iterator[_Heard]:
    """Let the first signal halt the sweep and the second end it at once."""
    from trace_hydra.interrupt import SIGNALS

    heard = _Heard(halt)
    if threading.current_thread() is not threading.main_thread():
        yield heard
        return
    before = {number: signal.signal(number, heard.hear) for number in SIGNALS}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _halt_file(folder: Path) -> Iterator[Path]:
    """Name the file that halts this sweep, and tell the jobs; nothing of it stays, nor of sweeps that were killed."""
    from trace_hydra.job import HALT

    for old in folder.glob(f".sweep-{platform.node()}-*.halt"):
        if not _runs(int(old.name.split("-")[-2])):
            old.unlink(missing_ok=True)
    halt = folder / f".sweep-{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.halt"
    before = os.environ.get(HALT)
    os.environ[HALT] = str(halt)
    try:
        yield halt
    finally:
        halt.unlink(missing_ok=True)
        if before is None:
            del os.environ[HALT]
        else:
            os.environ[HALT] = before


def _name(node: Any) -> str:
    """Name a part as `keys.name_of` does, from plain values too."""
    return str(node.get("name") or node.get("_target_")).split(".")[-1] if hasattr(node, "get") else ""


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _wait(plans: Sequence["JobPlan"], halt: Path) -> None:
    """Wait for jobs that go on without their launcher, and a little for those about to start."""
    from trace_hydra.job import status

    quiet = 0
    while quiet < _QUIET_S:
        states = [status(plan.directory, halt).get("state") for plan in plans]
        if "running" not in states:
            if None not in states:
                return
            quiet += 1
        time.sleep(1)
