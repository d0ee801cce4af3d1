"""Writing to loggers, which may fail at any time and must never end a run."""

import io
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakSet

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger, WandbLogger

from trace_hydra.callbacks.axes import AXES, STAGE, axis_of
from trace_hydra.callbacks.table import row_label

_LOG = logging.getLogger(__name__)
_WARNED: "WeakSet[Logger]" = WeakSet()


def unlogged(logger: Logger, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what an earlier start of the run has logged.

    A run that goes on hears of every stage again, those from the store included. A logger that goes on too carries
    `logged`: metric -> how far it got. Nothing but axes left is nothing.
    """
    logged: Mapping[str, float] = getattr(logger, "logged", {})
    kept = {
        name: value
        for name, value in metrics.items()
        if name not in logged or (place := metrics.get(axis_of(name))) is None or place > logged[name]
    }
    return kept if set(kept) - set(AXES) else {}


def log_metrics(loggers: Iterable[Logger], metrics: Mapping[str, float | None], step: int) -> None:
    """Write numbers to every logger; None is left out. Does nothing on other ranks than 0.

    Args:
        loggers: Open Lightning loggers.
        metrics: Name -> value; `train/...` go with `progress/step` and `progress/tokens`, `score/...` with
            `progress/stage`.
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
        if isinstance(logger, WandbLogger) and unlogged(logger, {"matrix/table": rows, STAGE: stage}):
            attempt(logger, lambda logger=logger: _write_matrix(logger, tasks, rows, stage, draw))


def log_table(
    loggers: Iterable[Logger], name: str, columns: Sequence[str], data: Sequence[Sequence[Any]], stage: int
) -> None:
    """Write a table to W&B against `progress/stage`; the other loggers have no tables."""
    for logger in loggers if is_rank_zero() else ():
        if isinstance(logger, WandbLogger) and unlogged(logger, {name: data, STAGE: stage}):
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
    if metrics := unlogged(logger, metrics):
        # With a step, WandbLogger would add it as `trainer/global_step`, which restarts with every phase elsewhere.
        logger.log_metrics(metrics, None if isinstance(logger, WandbLogger) else step)


def _write_table(
    logger: WandbLogger, name: str, columns: Sequence[str], data: Sequence[Sequence[Any]], stage: int
) -> None:
    import wandb

    table = wandb.Table(columns=list(columns), data=[list(map(_storable, row)) for row in data], allow_mixed_types=True)
    _send(logger, {name: table, STAGE: stage})


def _storable(value: Any) -> Any:
    """Replace what no file in UTF-8 can hold: halves of surrogate pairs, which a model can generate."""
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value


def _write_matrix(
    logger: WandbLogger,
    tasks: Sequence[str],
    rows: Sequence[Sequence[float | None]],
    stage: int,
    draw: Callable[[], bytes] | None,
) -> None:
    import wandb

    data: list[Any] = [[row_label(tasks, index), *row] for index, row in enumerate(rows)]
    entry: dict[str, Any] = {"matrix/table": wandb.Table(columns=["row", *tasks], data=data), STAGE: stage}
    if draw is not None:
        from PIL import Image

        entry["matrix/heat_map"] = wandb.Image(Image.open(io.BytesIO(draw())))
    _send(logger, entry)


def _send(logger: WandbLogger, entry: dict[str, Any]) -> None:
    """Log what may wait for a server; a logger that has somewhere else to wait does so there."""
    send: Callable[[dict[str, Any]], None] = getattr(logger, "log_media", logger.experiment.log)
    send(entry)
