"""Loggers by `logger=`: W&B (default), CSV, TensorBoard. They never prompt and never end a run.

A run that is started again in its directory goes on where its loggers were: the same W&B run, the same CSV file.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from trace_hydra.callbacks.log import attempt, is_rank_zero, log_matrix, log_metrics, log_summary
from trace_hydra.credentials import secret_problems
from trace_hydra.csv_file import CsvFile
from trace_hydra.errors import ConfigError
from trace_hydra.plan import RunInfo
from trace_hydra.wandb_artifacts import KINDS, log_artifacts
from trace_hydra.wandb_labels import labels
from trace_hydra.wandb_link import FLUSH_S, finish_run, open_run, patience, server_answers
from trace_hydra.wandb_media import MediaQueue
from trace_hydra.wandb_pieces import UPLOADED, earlier, is_offline, is_uploaded, pieces, run_id, sync_command

__all__ = [
    "close_loggers",
    "csv_logger",
    "log_matrix",
    "log_metrics",
    "log_summary",
    "open_loggers",
    "tensorboard_logger",
    "wandb_logger",
]

log = logging.getLogger(__name__)

MODES = ("auto", "online", "offline", "disabled")
_TAG_LENGTH, _GROUP_LENGTH = 64, 128  # W&B refuses longer ones
_OPEN: "dict[str, RunLogger]" = {}  # W&B id -> its logger; wandb itself refuses an id that is in use


class RunLogger(WandbLogger):
    """One start of a W&B run.

    Args:
        experiment: A wandb.Run.
        directory: The run's.
        logged: What earlier starts logged, `callbacks.log.unlogged`.
        finish_timeout_s: Seconds that its end may take while the server answers.
        artifacts: Logs the artifacts of a finished run.
    """

    def __init__(
        self,
        *,
        experiment: Any,
        directory: Path,
        logged: Mapping[str, float],
        finish_timeout_s: float,
        artifacts: Callable[[Any], None] = lambda experiment: None,
    ):
        super().__init__(experiment=experiment, project=experiment.project)
        self._artifacts = artifacts
        self.directory, self.logged, self.finish_timeout_s = directory, logged, finish_timeout_s
        self.run_id, self.folder, self.started = experiment.id, Path(experiment.settings.sync_dir), time.monotonic()
        self._media: MediaQueue | None = None
        if not experiment.offline:
            answers = partial(server_answers, experiment)
            self._media = MediaQueue(experiment, answers, lambda write: attempt(self, write))
        _OPEN[self.run_id] = self

    def log_media(self, entry: dict[str, Any]) -> None:
        """Log an entry with tables or pictures without waiting for the server."""
        (self._media.put if self._media else self.experiment.log)(entry)

    def close(self, exit_code: int) -> None:
        """End it, and say how to upload what the server does not have."""
        _OPEN.pop(self.run_id, None)
        patience_s = min(self.finish_timeout_s, patience(time.monotonic() - self.started))
        if self._media:
            self._media.close(patience_s)
        experiment = self.experiment
        complete = finish_run(
            experiment,
            exit_code,
            patience_s=patience_s,
            timeout_s=self.finish_timeout_s,
            alone=not _OPEN,
            last=lambda: attempt(self, lambda: self._artifacts(experiment)) if exit_code == 0 else None,
        )
        if complete:
            attempt(self, (self.folder / UPLOADED).touch)
        found = [*(one for one in pieces(self.directory, self.run_id) if one != self.folder)]
        command = sync_command([*found, self.folder] if self.folder.is_dir() else found)
        if command:
            log.info("W&B: the run is on disk; upload it with\n  %s", command)


def open_loggers(factories: Iterable[Callable[[RunInfo], Logger | None]], run: RunInfo) -> list[Logger]:
    """Build the loggers of a run; one that cannot work is left out with a warning.

    Raises:
        ConfigError: If a logger is configured wrongly or needs a package that is not installed.
    """
    opened: list[Logger] = []
    try:
        for factory in factories:
            if (logger := factory(run)) is not None:
                opened.append(logger)
    except BaseException:
        close_loggers(opened, exit_code=1)
        raise
    return opened


def close_loggers(loggers: Iterable[Logger], exit_code: int) -> None:
    """Write out and close. `exit_code` is 0 for a finished run; W&B shows others as failed."""
    for logger in loggers:
        if isinstance(logger, RunLogger):
            attempt(logger, lambda logger=logger: logger.close(exit_code))
        else:
            status = "success" if exit_code == 0 else "failed"
            attempt(logger, lambda logger=logger, status=status: logger.finalize(status))


def csv_logger(run: RunInfo) -> CsvFile:
    """Log to `<run>/csv/metrics.csv`."""
    return CsvFile(run.directory / "csv" / "metrics.csv")


def tensorboard_logger(run: RunInfo) -> TensorBoardLogger:
    """Log event files to `<run>/tensorboard`, one for each start of the run.

    Raises:
        ConfigError: If the tensorboard package is missing.
    """
    try:
        return TensorBoardLogger(save_dir=run.directory, name="tensorboard", version="")
    except ModuleNotFoundError as error:
        raise ConfigError(
            "logger=tensorboard needs the tensorboard package: pip install 'trace-hydra[tensorboard]'."
        ) from error


def wandb_logger(
    run: RunInfo,
    *,
    project: str,
    entity: str | None,
    mode: str,
    group: str | None,
    job_type: str,
    tags: Sequence[str],
    probe_timeout_s: float,
    init_timeout_s: float,
    finish_timeout_s: float,
    artifacts: Sequence[str],
    settings: Mapping[str, Any],
) -> WandbLogger | None:
    """Open one W&B run for this job, online if a key is configured, offline otherwise or if that fails.

    A run directory is one W&B run however often it is started, by the id in its `wandb_id`; a start goes on with what
    the ones before have not logged. It stays offline while an earlier one is not uploaded.

    Args:
        run: The plan; its name, configuration and directory are the W&B run's.
        project: W&B project.
        entity: W&B user or team; None: the account's default.
        mode: "auto": what WANDB_MODE says, else online where a key is configured (environment, netrc or settings
            file), else offline. Or "online", "offline", "disabled".
        group: None: `<method>-<task order>-<model>`.
        job_type: W&B job type.
        tags: Beside method, model and protocol fingerprint.
        probe_timeout_s: Seconds the server has to answer a first question; then the run is offline.
        init_timeout_s: Seconds a server that answered has to take the run; then it is offline.
        finish_timeout_s: Seconds to wait at the end for what is not uploaded yet; it stays on disk. Less if the server
            does not answer: `wandb_link.patience`.
        artifacts: What to upload with a finished run, of `wandb_artifacts.KINDS`.
        settings: More fields of `wandb.Settings`.

    Returns:
        None if disabled or impossible; then a warning says why.

    Raises:
        ConfigError: If `mode`, one of `artifacts` or a field of `settings` is unknown.
    """
    if mode not in MODES:
        raise ConfigError(f"logger.wandb.mode={mode!r} is none of {', '.join(MODES)}.")
    if wrong := [one for one in artifacts if one not in KINDS]:
        raise ConfigError(f"logger.wandb.artifacts={list(artifacts)} has {wrong[0]!r}; there are {', '.join(KINDS)}.")
    try:
        import wandb
    except ImportError as error:
        log.warning("logger=wandb: %s. The run goes on without W&B.", error)
        return None
    if unknown := sorted(set(settings) - set(wandb.Settings.model_fields)):
        raise ConfigError(f"logger.wandb.settings has unknown keys {unknown}; see wandb.Settings.")
    if not is_rank_zero():
        return None
    name = os.environ.get("WANDB_RUN_ID") or run_id(run.directory)
    if name in _OPEN:
        _OPEN[name].close(exit_code=1)  # of a job that was not closed
    before = pieces(run.directory, name)
    arguments = {
        "id": name,
        "resume": "allow",
        "project": project,
        "entity": entity,
        "name": run.name,
        "group": (group or f"{run.method}-{run.task_order}-{run.model}")[:_GROUP_LENGTH],
        "job_type": job_type,
        "tags": [tag[:_TAG_LENGTH] for tag in dict.fromkeys([run.method, run.model, run.fingerprint, *tags]) if tag],
        "config": {**plain_config(run.config), **labels(run)},
        "dir": str(run.directory),
        "reinit": "create_new",  # a sweep has several jobs in one process
    }
    fixed = {
        **{"silent": True, "quiet": True, "console": "off", "save_code": False},
        **{"init_timeout": init_timeout_s, "finish_timeout": finish_timeout_s, "finish_timeout_raises": True},
        "x_transaction_log_flush_interval": FLUSH_S,
        **settings,
    }
    held_back = any(is_offline(piece) and not is_uploaded(piece) for piece in before)
    experiment = open_run(arguments, fixed, mode, probe_timeout_s=probe_timeout_s, held_back=held_back, alone=not _OPEN)
    if experiment is None:
        return None
    known = earlier(run.directory, name)
    if known.next_step > experiment.starting_step:
        experiment.log({}, step=known.next_step)
    return RunLogger(
        experiment=experiment,
        directory=run.directory,
        logged=known.logged,
        finish_timeout_s=finish_timeout_s,
        artifacts=partial(log_artifacts, run=run, kinds=tuple(artifacts)),
    )


def plain_config(value: Any) -> Any:
    """Turn a configuration into JSON values without periods in keys, which W&B would split at, and without secrets."""
    if isinstance(value, Mapping):
        return {
            str(key).replace(".", "_"): "(secret)" if _is_secret(key, one) else plain_config(one)
            for key, one in value.items()
        }
    if isinstance(value, list | tuple):
        return [plain_config(one) for one in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _is_secret(key: Any, value: Any) -> bool:
    # `build` refuses a configuration with a secret in it; this is for one that got past it.
    return not isinstance(value, Mapping) and bool(secret_problems({str(key): value}))
