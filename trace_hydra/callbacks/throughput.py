"""Loss terms, speed and memory of training, against the optimizer steps and the tokens of the whole run."""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from trace_hydra.callbacks.axes import STAGE, STEP, TOKENS
from trace_hydra.callbacks.base import RunCallback
from trace_hydra.callbacks.log import log_metrics
from trace_hydra.plan import Effort, RunInfo, Stage


class ThroughputCallback(RunCallback):
    """Logs every N optimizer steps, and what is left at the end of a phase.

    `train/loss` and `train/loss/<term>` are means over the steps since the last log; `train/tokens_per_s` counts prompt
    and answer tokens without padding, on all devices (rank 0's count times their number), over the time since the last
    log or the start of the phase. `train/host_memory_gb` and, on CUDA, `train/device_memory_gb` are the most that this
    process held so far, in 10^9 bytes. `progress/tokens` counts the tokens trained on in the run, so that curves of
    runs with other batch sizes can be laid over each other. A log is the only thing in plain training that waits for
    the device.

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
        self._ended, self._ended_tokens = 0, 0
        self._reset()

    def on_run_start(self, run: RunInfo, loggers: list) -> None:
        """Take the loggers; counting starts at step 0."""
        self._loggers, self._stage, self._step, self._ended, self._ended_tokens = loggers, 0, 0, 0, 0

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
            STAGE: stage.index,
        }
        self._ended, self._ended_tokens = self._ended + effort.steps, self._ended_tokens + effort.tokens
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
            **peak_memory(),
            STEP: self._step,
            TOKENS: self._ended_tokens + module.tokens_seen,
            STAGE: self._stage,
        }
        log_metrics(self._loggers, metrics, self._step)
        self._reset()

    def _reset(self) -> None:
        self._tokens = self._steps = 0
        self._since = self._clock()


def peak_memory() -> dict[str, float | None]:
    """Give the most memory that this process has held so far, in 10^9 bytes; without asking a device to wait."""
    most = None
    if sys.platform != "win32":
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    on_device = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "train/host_memory_gb": most,
        "train/device_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if on_device else None,
    }
