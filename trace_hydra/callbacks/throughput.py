"""Loss terms and speed of training, against the optimizer steps of the whole run."""

import time
from collections.abc import Callable
from typing import Any

from trace_hydra.callbacks.base import RunCallback
from trace_hydra.callbacks.log import log_metrics
from trace_hydra.plan import Effort, RunInfo, Stage


class ThroughputCallback(RunCallback):
    """Logs every N optimizer steps, and what is left at the end of a phase.

    `train/loss` and `train/loss/<term>` are means over the steps since the last log; `train/tokens_per_s` counts prompt
    and answer tokens without padding, on all devices (rank 0's count times their number), over the time since the last
    log or the start of the phase. A log is the only thing in plain training that waits for the device.

    Args:
        every_n_steps: Optimizer steps between logs; at least 1.
        clock: Seconds, monotonic.
    """

    def __init__(self, *, every_n_steps: int, clock: Callable[[], float] = time.monotonic):
        self.every_n_steps = max(1, every_n_steps)
        self._clock = clock
        self._loggers: list = []
        self._stage = 0
        self._step = 0
        self._ended = 0
        self._reset()

    def on_run_start(self, run: RunInfo, loggers: list) -> None:
        """Take the loggers; counting starts at step 0."""
        self._loggers, self._stage, self._step, self._ended = loggers, 0, 0, 0

    def on_stage_start(self, stage: Stage) -> None:
        """Note the stage for `progress/stage`."""
        self._stage = stage.index

    def on_stage_end(self, stage: Stage, effort: Effort) -> None:
        """Log what the method costs: weights that train, what it keeps, seconds of a step, and relative to plain."""
        metrics: dict[str, float | None] = {
            "method/trainable_params": effort.trainable_params,
            "method/state_mb": effort.state_mb,
            "method/stored_examples": effort.stored_examples,
            "method/seconds_per_step": effort.seconds / effort.steps if effort.steps else None,
            "method/step_ratio": effort.step_ratio,
            "progress/stage": stage.index,
        }
        self._ended += effort.steps
        self._step = self._ended  # also where the stage was not trained here
        log_metrics(self._loggers, metrics, self._step)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock of a phase; `trainer.global_step` restarts with it."""
        self._step = self._ended + getattr(pl_module, "steps_before", 0) + trainer.global_step
        self._reset()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add an optimizer step, and log when there are enough."""
        self._tokens += pl_module.last_tokens
        self._step += 1
        self._steps += 1
        if self._steps >= self.every_n_steps:
            self._log(trainer.world_size, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Log what is left, so that a phase shorter than N steps is seen too."""
        if self._steps:
            self._log(trainer.world_size, pl_module)

    def _log(self, num_devices: int, module: Any) -> None:
        module.read()
        means = module.readings.means
        seconds = self._clock() - self._since
        metrics: dict[str, float | None] = {
            "train/loss": sum(means.values()),
            **{f"train/loss/{term}": mean for term, mean in means.items()},
            "train/tokens_per_s": self._tokens * num_devices / seconds if seconds > 0 else None,
            "progress/step": self._step,
            "progress/stage": self._stage,
        }
        log_metrics(self._loggers, metrics, self._step)
        self._reset()

    def _reset(self) -> None:
        self._tokens = self._steps = 0
        self._since = self._clock()
