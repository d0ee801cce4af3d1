"""One line that says where a run is and how long it still takes."""

import logging
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from trace_hydra.callbacks.base import RunCallback
from trace_hydra.callbacks.estimate import Estimate
from trace_hydra.callbacks.log import is_rank_zero
from trace_hydra.metrics.continual import ScoreMatrix
from trace_hydra.metrics.score import TaskScore
from trace_hydra.plan import RunInfo, Stage

_TTY_INTERVAL_S = 0.2
_ERASE = "\r\x1b[2K"


class ProgressCallback(RunCallback):
    """Shows stage, step, loss and time left of the whole run, scoring included, on stderr.

    On a terminal the line is updated in place; elsewhere a line is added every `interval_s` seconds.

    Args:
        interval_s: Seconds between lines where stderr is no terminal.
        enabled: False shows nothing.
        clock: Seconds, monotonic.
        stream: Where to write; None: `sys.stderr` as it is when the run starts.
    """

    def __init__(
        self,
        *,
        interval_s: float,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
        stream: TextIO | None = None,
    ):
        self.interval_s, self.enabled = interval_s, enabled
        self._clock, self._given_stream = clock, stream
        self._run: RunInfo | None = None
        self._stage: Stage | None = None
        self._shown = False
        self._handlers: list[logging.Handler] = []

    def on_run_start(self, run: RunInfo, loggers: list) -> None:
        """Take the plan and start the clock."""
        self._run, self.estimate = run, Estimate(run)
        self._stream = self._given_stream or sys.stderr
        self._tty = self._stream.isatty()
        self._active = self.enabled and is_rank_zero()
        self._started = self._mark = self._last_line = self._clock()
        self._stage, self._step, self._global_step = None, 0, 0
        self._cell: tuple[int, str, int, int] = (0, "", 0, 0)
        if self._active and self._tty:
            self._watch_log()

    def on_stage_start(self, stage: Stage) -> None:
        """Note that all earlier training is over."""
        self._stage, self._step = stage, 0
        self.estimate.end_training(stage.index - 1)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock of a phase."""
        self._global_step = trainer.global_step
        self._step = getattr(pl_module, "steps_before", 0) + trainer.global_step
        self._mark = self._clock()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count a step; the loss shown is what was last read from the device."""
        if self._stage is None:
            return
        tokens = pl_module.last_tokens * trainer.world_size
        self.estimate.add_training(self._stage.index, tokens, self._lap())
        self._step += trainer.global_step - self._global_step
        self._global_step = trainer.global_step
        means = pl_module.readings.means
        loss = f" loss {sum(means.values()):.2f}" if means else ""
        place = f"stage {self._stage.index}/{self._num_stages} {self._stage.task}"
        self._show(f"[{place}] step {self._step}/{self._stage.steps}{loss}")

    def on_scoring_start(self, row: int, task: str, num_examples: int) -> None:
        """Start the clock of a cell."""
        self.estimate.end_training(row)
        self._cell = (row, task, num_examples, 0)
        self._mark = self._clock()
        self._show_scoring()

    def on_scoring_batch_end(self, num_examples: int, num_tokens: int) -> None:
        """Count a batch of answers."""
        row, task, planned, done = self._cell
        self.estimate.add_scoring(row, task, num_examples, self._lap())
        self._cell = (row, task, planned, done + num_examples)
        self._show_scoring()

    def on_cell_scored(self, row: int, task: str, score: TaskScore) -> None:
        """Count a cell as done."""
        self.estimate.end_cell(row, task)

    def on_row_scored(self, row: int, matrix: ScoreMatrix) -> None:
        """Leave the terminal line free for whoever prints the row."""
        self._erase()

    def on_run_end(self, results: Any) -> None:
        """Take the line away."""
        self._close()

    def on_run_error(self, error: BaseException) -> None:
        """Take the line away."""
        self._close()

    @property
    def _num_stages(self) -> int:
        return len(self._run.stages) if self._run else 0

    def _lap(self) -> float:
        now = self._clock()
        seconds, self._mark = now - self._mark, now
        return seconds

    def _show_scoring(self) -> None:
        row, task, planned, done = self._cell
        self._show(f"[scoring row {row}/{self._num_stages} {task}] answer {done}/{planned}")

    def _show(self, place: str) -> None:
        now = self._clock()
        wait = _TTY_INTERVAL_S if self._tty else self.interval_s
        if not self._active or now - self._last_line < wait:
            return
        self._last_line = now
        line = f"{place} · {self._times(now - self._started)}"
        if self._tty:
            # A line as wide as the terminal would wrap, and could not be erased again.
            width = shutil.get_terminal_size().columns
            self._stream.write(_ERASE + (line if len(line) < width else line[: width - 2] + "…"))
            self._shown = True
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def _times(self, gone: float) -> str:
        left = self.estimate.seconds_left()
        if left is None:
            return f"{clock_time(gone)} gone · time left not known yet"
        percent = 100 * gone / (gone + left) if gone + left > 0 else 100
        return f"run {percent:.0f} % · {clock_time(gone)} gone · about {clock_time(left)} left"

    def _watch_log(self) -> None:
        # Log records go to the terminal past this line; each erases it first, and the next update draws it again.
        for handler in logging.getLogger().handlers:
            stream = getattr(handler, "stream", None)
            if isinstance(handler, logging.StreamHandler) and stream is not None and stream.isatty():
                handler.addFilter(self._before_record)
                self._handlers.append(handler)

    def _before_record(self, record: logging.LogRecord) -> bool:
        self._erase()
        return True

    def _erase(self) -> None:
        if self._shown:
            self._stream.write(_ERASE)
            self._stream.flush()
            self._shown = False

    def _close(self) -> None:
        self._erase()
        self._active = False
        for handler in self._handlers:
            handler.removeFilter(self._before_record)
        self._handlers = []


def clock_time(seconds: float) -> str:
    """Write seconds as m:ss, from an hour on as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
