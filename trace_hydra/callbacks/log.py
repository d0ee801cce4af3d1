"""Writing to loggers, which may fail at any time and must never end a run."""

import io
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakSet

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger, WandbLogger

from trace_hydra.callbacks.table import row_label

_LOG = logging.getLogger(__name__)
_WARNED: "WeakSet[Logger]" = WeakSet()


def log_metrics(loggers: Iterable[Logger], metrics: Mapping[str, float | None], step: int) -> None:
    """Write numbers to every logger; None is left out. Does nothing on other ranks than 0.

    Args:
        loggers: Open Lightning loggers.
        metrics: Name -> value; `train/...` go with `progress/step`, `score/...` with `progress/stage`.
        step: The axis of CSV and TensorBoard: `progress/step` or `progress/stage`, whichever `metrics` go with. W&B
            gets its axes from `metrics`.
    """
    known = {key: float(value) for key, value in metrics.items() if value is not None}
    for logger in loggers if is_rank_zero() else ():
        attempt(logger, lambda logger=logger: _write(logger, known, step))


def log_summary(loggers: Iterable[Logger], metrics: Mapping[str, float | None], step: int) -> None:
    """Write the run's final numbers: to the W&B summary, and as ordinary metrics to the others."""
    known = {key: float(value) for key, value in metrics.items() if value is not None}
    for logger in loggers if is_rank_zero() else ():
        if isinstance(logger, WandbLogger):
            attempt(logger, lambda logger=logger: logger.experiment.summary.update(known))
        else:
            attempt(logger, lambda logger=logger: _write(logger, known, step))


def log_matrix(
    loggers: Iterable[Logger],
    tasks: Sequence[str],
    rows: Sequence[Sequence[float | None]],
    stage: int,
    draw: Callable[[], bytes] | None,
) -> None:
    """Write the matrix as a table, and `draw`'s PNG as a picture, to W&B; the other loggers have no tables."""
    for logger in loggers if is_rank_zero() else ():
        if isinstance(logger, WandbLogger):
            attempt(logger, lambda logger=logger: _write_matrix(logger, tasks, rows, stage, draw))


def log_table(
    loggers: Iterable[Logger], name: str, columns: Sequence[str], data: Sequence[Sequence[Any]], stage: int
) -> None:
    """Write a table to W&B against `progress/stage`; the other loggers have no tables."""
    for logger in loggers if is_rank_zero() else ():
        if isinstance(logger, WandbLogger):
            attempt(logger, lambda logger=logger: _write_table(logger, name, columns, data, stage))


def attempt(logger: Logger, write: Callable[[], Any]) -> None:
    """Call `write`; what it raises becomes one warning a logger, whatever it is."""
    try:
        write()
    except Exception as error:  # noqa: BLE001 - a logger talks to disks and servers; no error of it is worth a run
        if logger not in _WARNED:
            _WARNED.add(logger)
            _LOG.warning(
                "%s cannot log: %s: %s. The run goes on; further errors of this logger are not shown.",
                type(logger).__name__,
                type(error).__name__,
                error,
            )


def is_rank_zero() -> bool:
    """Say whether this process is the one that logs and prints."""
    return not getattr(rank_zero_only, "rank", 0)


def _write(logger: Logger, metrics: dict[str, float], step: int) -> None:
    # With a step, WandbLogger would add it as `trainer/global_step`, an axis that restarts with every phase elsewhere.
    logger.log_metrics(metrics, None if isinstance(logger, WandbLogger) else step)


def _write_table(
    logger: WandbLogger, name: str, columns: Sequence[str], data: Sequence[Sequence[Any]], stage: int
) -> None:
    import wandb

    table = wandb.Table(columns=list(columns), data=[list(row) for row in data], allow_mixed_types=True)
    logger.experiment.log({name: table, "progress/stage": stage})


def _write_matrix(
    logger: WandbLogger,
    tasks: Sequence[str],
    rows: Sequence[Sequence[float | None]],
    stage: int,
    draw: Callable[[], bytes] | None,
) -> None:
    import wandb

    data: list[Any] = [[row_label(tasks, index), *row] for index, row in enumerate(rows)]
    entry: dict[str, Any] = {"matrix/table": wandb.Table(columns=["row", *tasks], data=data), "progress/stage": stage}
    if draw is not None:
        from PIL import Image

        entry["matrix/heat_map"] = wandb.Image(Image.open(io.BytesIO(draw())))
    logger.experiment.log(entry)
