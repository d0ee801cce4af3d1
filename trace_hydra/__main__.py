"""`python -m trace_hydra`: Hydra composes, `run.run` does the rest."""

import logging
import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from trace_hydra import diagnose, entry, guard, job, ranks, schema, terminal
from trace_hydra.errors import Stopped, TraceHydraError

READ_ONCE = {"THP_MEM_ALLOC_ENABLE": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "256"}
"""Settings that libraries read once, unless the user has set them.

PyTorch takes large tensors from huge pages: without, page faults took a third of the time that a CPU trains on short
rows. oneDNN, and PyTorch before it, keep code for 256 shapes of products, which is more than a pass has, in place of
1,024, of some 0.3 MB each.
"""
EXIT_ERROR, EXIT_STOPPED, EXIT_INTERRUPTED = 2, 75, 130


def compose_and_run() -> float | None:
    """Let Hydra compose and launch; returns OP to sweepers."""
    schema.register()
    entry.register_resolvers()

    @hydra.main(version_base="1.3", config_path=str(entry.project_root() / "conf"), config_name="config")
    def task(config: DictConfig) -> float | None:
        hydra_config = HydraConfig.get()
        directory = Path(hydra_config.runtime.output_dir)
        run_job = run_in_sweep if hydra_config.mode == RunMode.MULTIRUN else run_alone
        return run_job(config, directory, list(hydra_config.overrides.task))

    return task()


def run_alone(config: DictConfig, directory: Path, overrides: list[str]) -> float | None:
    """Run the one job of a command; ends the process with a message and an exit code if it cannot be finished."""
    try:
        with job.watched(directory, overrides, fail_fast=False):
            result = _run(config, directory)
        if config.cost is not None:  # an estimate is no run that could be asked for
            (directory / job.STATUS).unlink(missing_ok=True)
        return result
    except TraceHydraError as error:
        diagnose.discard_empty(directory, job.ERROR, job.STATUS)  # the message says it all
        diagnose.fail(str(error), EXIT_ERROR, anyone=True)
    except ranks.FailedElsewhere as other:
        sys.exit(other.code)
    except Stopped as stop:
        diagnose.fail(f"{stop}; the same command goes on from there", EXIT_STOPPED, anyone=True)
    except KeyboardInterrupt:
        diagnose.fail("interrupted; the same command goes on from the last checkpoint", EXIT_INTERRUPTED, anyone=True)


def run_in_sweep(config: DictConfig, directory: Path, overrides: list[str]) -> float | None:
    """Run one job of a sweep, maybe in a process of a launcher.

    Raises:
        NotStarted: If the sweep was halted.
        JobEnded: If the job failed or, in a sweep that hears of it, was stopped. Its message is all that is left of the
            error: launchers pickle what a job raises, and one that raised `Stopped` would tear the others down.
    """
    terminal.soften()  # a launcher's process
    try:
        with job.watched(directory, overrides, fail_fast=config.sweep.fail_fast):
            return _run(config, directory)
    except job.NotStarted:
        diagnose.discard_empty(directory)
        raise
    except Stopped as stop:
        job.report_end(stop, directory)
        if job.halt_file() is None or job.sent_back():  # another sweeper; a launcher that requeues the job
            raise
        raise job.JobEnded(str(stop)) from None
    except Exception as error:  # noqa: BLE001 - it stands in error.txt; the others go on
        job.report_end(error, directory)
        raise job.JobEnded(str(error) or type(error).__name__) from None


def _run(config: DictConfig, directory: Path) -> float | None:
    guard.check_consent(config, HydraConfig.get().overrides.task)
    if config.cost is not None:
        from trace_hydra.cost import report  # these load torch; `--cfg job` must not

        return report(config, directory)
    from trace_hydra.run import run

    return run(config, directory)


def main() -> None:
    """Run the command line; exit codes: 0 done, 2 what a user can mend, 75 stopped by a signal, 130 interrupted
    twice, 1 anything else."""
    terminal.soften()
    entry.remember(sys.argv[1:])
    sys.argv[1:] = entry.rewrite_overrides(sys.argv[1:])
    for name, value in READ_ONCE.items():
        os.environ.setdefault(name, value)
    if ranks.size() > 1 and {"-m", "--multirun"} & set(sys.argv[1:]):
        diagnose.fail(
            f"a sweep (-m) is planned by one process, not {ranks.size()}; run its jobs one by one", EXIT_ERROR
        )
    if not ranks.is_first():
        sys.argv[1:] = follow(sys.argv[1:])
    with diagnose.composition_errors(sys.argv[1:]):
        try:
            guard.check_command_line(sys.argv[1:])
        except TraceHydraError as error:
            diagnose.fail(str(error), EXIT_ERROR)
        compose_and_run()


def follow(arguments: list[str]) -> list[str]:
    """Leave output and files of the run to rank 0; returns the command line of another rank."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    logging.disable(logging.CRITICAL)
    return [*arguments, "hydra.output_subdir=null", "hydra/job_logging=stdout"]


if __name__ == "__main__":
    main()
