"""Loggers by `logger=`: W&B (default), CSV, TensorBoard. They never prompt and never end a run."""

import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from trace_hydra.callbacks.log import attempt, is_rank_zero, log_matrix, log_metrics, log_summary
from trace_hydra.errors import ConfigError
from trace_hydra.plan import RunInfo

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
        if isinstance(logger, WandbLogger):
            _finish(logger, exit_code)
        else:
            status = "success" if exit_code == 0 else "failed"
            attempt(logger, lambda logger=logger, status=status: logger.finalize(status))


def csv_logger(run: RunInfo) -> CSVLogger:
    """Log to `<run>/csv/metrics.csv`."""
    return CSVLogger(save_dir=run.directory, name="csv", version="", flush_logs_every_n_steps=1)


def tensorboard_logger(run: RunInfo) -> TensorBoardLogger:
    """Log event files to `<run>/tensorboard`.

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
    init_timeout_s: float,
    finish_timeout_s: float,
    settings: Mapping[str, Any],
) -> WandbLogger | None:
    """Open one W&B run for this job, online if a key is configured, offline otherwise or if that fails.

    Args:
        run: The plan; its name, configuration and directory are the W&B run's.
        project: W&B project.
        entity: W&B user or team; None: the account's default.
        mode: "auto": what WANDB_MODE says, else online where a key is configured (environment, netrc or settings
            file), else offline. Or "online", "offline", "disabled".
        group: None: `<method>-<task order>-<model>`.
        job_type: W&B job type.
        tags: Beside method, model and protocol fingerprint.
        init_timeout_s: Seconds to wait for the server before going offline.
        finish_timeout_s: Seconds to wait at the end for what is not uploaded yet; it stays on disk.
        settings: More fields of `wandb.Settings`.

    Returns:
        None if disabled or impossible; then a warning says why.

    Raises:
        ConfigError: If `mode` or a field of `settings` is unknown.
    """
    if mode not in MODES:
        raise ConfigError(f"logger.wandb.mode={mode!r} is none of {', '.join(MODES)}.")
    try:
        import wandb
    except ImportError as error:
        log.warning("logger=wandb: %s. The run goes on without W&B.", error)
        return None
    if unknown := sorted(set(settings) - set(wandb.Settings.model_fields)):
        raise ConfigError(f"logger.wandb.settings has unknown keys {unknown}; see wandb.Settings.")
    if not is_rank_zero():
        return None
    arguments = {
        "project": project,
        "entity": entity,
        "name": run.name,
        "group": (group or f"{run.method}-{run.task_order}-{run.model}")[:_GROUP_LENGTH],
        "job_type": job_type,
        "tags": [tag[:_TAG_LENGTH] for tag in dict.fromkeys([run.method, run.model, run.fingerprint, *tags]) if tag],
        "config": {**plain_config(run.config), "protocol_fingerprint": run.fingerprint},
        "dir": str(run.directory),
        "reinit": "create_new",  # a sweep has several jobs in one process
    }
    quiet = {"silent": True, "quiet": True, "console": "off", "save_code": False}
    limits = {"init_timeout": init_timeout_s, "finish_timeout": finish_timeout_s, "finish_timeout_raises": True}
    experiment = _open_run(arguments, {**quiet, **limits, **settings}, mode)
    return None if experiment is None else WandbLogger(experiment=experiment, project=project)


def plain_config(value: Any) -> Any:
    """Turn a configuration into JSON values without periods in keys, which W&B would split at."""
    if isinstance(value, Mapping):
        return {str(key).replace(".", "_"): plain_config(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain_config(one) for one in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _open_run(arguments: dict[str, Any], settings: dict[str, Any], mode: str) -> Any:
    """Try the wanted mode, then offline; returns a wandb.Run or None."""
    with _contained():
        try:
            wanted, reason = _resolve_mode(mode)
        except Exception as error:  # noqa: BLE001 - a broken netrc or settings file must not end a run
            wanted, reason = "offline", f"{type(error).__name__}: {error}"
    if wanted == "disabled":
        return None
    for attempted in dict.fromkeys([wanted, "offline"]):
        before = _run_folders(arguments["dir"])
        try:
            with _contained():
                experiment = _init(arguments, {**settings, "mode": attempted})
        except Exception as error:  # noqa: BLE001 - wandb raises errors of all kinds, and none is worth a run
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            _remove(_run_folders(arguments["dir"]) - before)
            continue
        if attempted == "online":
            log.info("W&B: %s", experiment.url)
        else:
            log.info("W&B: offline (%s)", reason)
        return experiment
    log.warning("W&B cannot start (%s). The run goes on without it.", reason)
    return None


def _resolve_mode(mode: str) -> tuple[str, str]:
    """Decide the mode without asking anyone; with the reason for offline."""
    import wandb
    from wandb.sdk.lib import wbauth

    if mode in ("offline", "disabled"):
        return mode, f"logger.wandb.mode={mode}"
    settings = wandb.setup().settings  # environment and settings files
    if mode == "auto" and settings.mode not in ("online", "run", "shared"):
        return settings.mode.replace("dryrun", "offline"), f"WANDB_MODE or wandb's settings say {settings.mode}"
    # `wandb.init` would ask on a terminal, so it only goes online with a key.
    found = wbauth.authenticate_session(
        host=settings.base_url, source="trace_hydra", prompt=False, update_session=False
    )
    return ("online", "") if found else ("offline", "no API key is configured")


def _init(arguments: dict[str, Any], settings: dict[str, Any]) -> Any:
    import wandb

    experiment = wandb.init(**arguments, settings=wandb.Settings(**settings))
    experiment.define_metric("progress/step", hidden=True)
    experiment.define_metric("progress/stage", hidden=True)
    experiment.define_metric("train/*", step_metric="progress/step")
    for name in ("score/*", "matrix/*", "method/*", "capability/*", "progress/op", "progress/bwt"):
        experiment.define_metric(name, step_metric="progress/stage")
    return experiment


def _finish(logger: WandbLogger, exit_code: int) -> None:
    experiment = logger.experiment
    folder, incomplete = experiment.settings.sync_dir, experiment.offline
    try:
        with _contained():
            experiment.finish(exit_code=exit_code)
    except Exception as error:  # noqa: BLE001 - as in _open_run; the data is on disk
        incomplete = True
        log.warning("W&B did not finish: %s: %s", type(error).__name__, error)
    if incomplete:
        log.info("W&B: the run is on disk; upload it with\n  wandb sync %s", folder)


def _run_folders(directory: str) -> set[Path]:
    return {path for path in Path(directory).glob("wandb/*run-*") if path.is_dir() and not path.is_symlink()}


def _remove(folders: Iterable[Path]) -> None:
    """Take away what a failed start left: a run folder without a run in it."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _contained() -> Iterator[None]:
    """Keep wandb's messages off stderr, and put its environment variables (its service's address) back afterwards."""
    before = {key: value for key, value in os.environ.items() if key.startswith("WANDB")}
    with redirect_stderr(StringIO()):
        try:
            yield
        finally:
            for key in [key for key in os.environ if key.startswith("WANDB") and key not in before]:
                del os.environ[key]
            os.environ.update(before)
