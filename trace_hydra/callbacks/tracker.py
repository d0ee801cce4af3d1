"""Where a run is and how long it still takes: what a progress line and status.json show."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trace_hydra.callbacks.base import RunCallback
from trace_hydra.callbacks.estimate import Estimate
from trace_hydra.metrics.score import TaskScore
from trace_hydra.plan import Effort, RunInfo, Stage


class Tracker(RunCallback):
    """Follows a run's events; subclasses hear `changed` behind each.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._run: RunInfo | None = None
        self.doing = "starting"
        """starting, training, answering, or measuring (capability)."""
        self.row, self.task = 0, ""
        self.done = self.planned = 0
        """Steps of the stage, or answers to the task."""
        self.loss: float | None = None

    def changed(self, boundary: bool = False) -> None:
        """Hear that something moved; `boundary`: a stage, row or cell began or ended."""

    def on_run_start(self, run: RunInfo, loggers: list) -> None:
        """Take the plan and start the clock."""
        self._run, self.estimate = run, Estimate(run)
        self._started = self._mark = self._clock()
        self._global_step, self._stage_started, self._in_steps = 0, self._started, 0.0
        self.changed(boundary=True)

    def on_stage_start(self, stage: Stage) -> None:
        """Note that all earlier training is over."""
        self.estimate.end_training(stage.index - 1)
        self.estimate.end_measuring(stage.index - 1)
        self._place("training", stage.index, stage.task, stage.steps)
        self._stage_started, self._in_steps, self._tokens = self._clock(), 0.0, stage.tokens

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock of a phase; what an earlier start of the run trained is not to do."""
        before = getattr(pl_module, "steps_before", 0)
        earlier = before + trainer.global_step
        if earlier and not self._in_steps and self.planned:
            self.estimate.skip_training(self.row, self._tokens * min(earlier / self.planned, 1))
        self._global_step = trainer.global_step
        self.done = earlier
        self._mark = self._clock()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count a step; the loss is what was last read from the device."""
        if self.doing != "training":
            return
        seconds = self._lap()
        self._in_steps += seconds
        self.estimate.add_training(self.row, pl_module.last_tokens * trainer.world_size, seconds)
        self.done += trainer.global_step - self._global_step
        self._global_step = trainer.global_step
        means = pl_module.readings.means
        self.loss = sum(means.values()) if means else None
        self.changed()

    def on_stage_end(self, stage: Stage, effort: Effort) -> None:
        """Note the end of a stage, and what it took beside its steps if it was trained here."""
        beside = self._clock() - self._stage_started - self._in_steps
        self.estimate.end_training(stage.index, beside if self._in_steps else None)
        self.changed(boundary=True)

    def on_scoring_start(self, row: int, task: str, num_examples: int) -> None:
        """Start the clock of a cell."""
        self.estimate.end_training(row)
        if not row:
            self.estimate.end_measuring(0)
        self._place("answering", row, task, num_examples)

    def on_scoring_batch_end(self, num_examples: int, num_tokens: int) -> None:
        """Count a batch of answers."""
        self.estimate.add_scoring(self.row, self.task, num_examples, self._lap())
        self.done += num_examples
        self.changed()

    def on_cell_scored(self, row: int, task: str, score: TaskScore) -> None:
        """Count a cell as done."""
        self.estimate.end_cell(row, task)

    def on_measuring_start(self, row: int) -> None:
        """Start the clock of a capability set."""
        self._place("measuring", row, "", 0)

    def on_measuring_end(self, row: int) -> None:
        """Count what a capability set took."""
        self.estimate.add_measuring(row, self._lap())

    def on_capability(self, row: int, deltas: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]]) -> None:
        """Count a row as measured."""
        self.estimate.end_measuring(row)

    @property
    def num_stages(self) -> int:
        """How many stages the run has; 0 before it started."""
        return len(self._run.stages) if self._run else 0

    @property
    def gone(self) -> float:
        """Seconds since the run started."""
        return self._clock() - self._started

    def percent(self) -> float | None:
        """Say how much of the run's time is over; None while the time left is not known."""
        left, gone = self.estimate.seconds_left(), self.gone
        if left is None:
            return None
        return 100 * gone / (gone + left) if gone + left > 0 else 100.0

    def _place(self, doing: str, row: int, task: str, planned: int) -> None:
        self.doing, self.row, self.task, self.done, self.planned, self.loss = doing, row, task, 0, planned, None
        self._mark = self._clock()
        self.changed(boundary=True)

    def _lap(self) -> float:
        now = self._clock()
        seconds, self._mark = now - self._mark, now
        return seconds
