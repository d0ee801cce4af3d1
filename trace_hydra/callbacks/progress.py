"""One line that says where a run is and how long it still takes."""

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from trace_hydra.callbacks.log import is_rank_zero
from trace_hydra.callbacks.tracker import Tracker
from trace_hydra.metrics.continual import ScoreMatrix
from trace_hydra.plan import RunInfo
from trace_hydra.terminal import MARGIN, Line, clock_time, fitting, mode_of, plain, sweep_note, width_of

_BAR_INTERVAL_S = 0.2


class ProgressCallback(Tracker):
    """Shows stage, step, loss and time left of the whole run on stderr, and of the sweep that it belongs to.

    Args:
        mode: "bar" updates one line in place, "lines" adds a line every `interval_s` seconds, "quiet" shows nothing,
            "auto" chooses (`terminal.mode_of`).
        interval_s: Seconds between lines.
        clock: Seconds, monotonic.
        stream: Where to write; None: `sys.stderr` as it is when the run starts.
    """

    def __init__(
        self,
        *,
        interval_s: float,
        mode: str = "auto",
        clock: Callable[[], float] = time.monotonic,
        stream: TextIO | None = None,
    ):
        super().__init__(clock)
        self.interval_s, self.mode = interval_s, mode
        self._given_stream = stream
        self._active = False
        self._line: Line | None = None

    def on_run_start(self, run: RunInfo, loggers: list) -> None:
        """Take the plan and start the clock."""
        self._stream = self._given_stream or sys.stderr
        mode = mode_of(self.mode, self._stream)
        self._bar = mode == "bar"
        self._active = mode != "quiet" and is_rank_zero()
        self._last_line = self._clock()
        super().on_run_start(run, loggers)
        if self._active and self._bar:
            self._line = Line(self._stream)
            self._line.watch_log()

    def changed(self, boundary: bool = False) -> None:
        """Draw the line again, at once where something begins or ends; or add one, if the last is old enough."""
        now = self._clock()
        begins = boundary and self.doing == "training"  # a line in a file is about work done
        if self.doing == "starting" or not self._active or (begins and self._line is None):
            return
        due = boundary and self._bar  # else a short stage would pass between two draws
        if not due and now - self._last_line < (_BAR_INTERVAL_S if self._bar else self.interval_s):
            return
        self._last_line = now
        if self._line is not None:
            self._line.draw(fitting(self._parts(), width_of() - MARGIN, gap=""))
        else:
            self._stream.write("".join(text for _, text in self._parts()) + "\n")
            self._stream.flush()

    def on_row_scored(self, row: int, matrix: ScoreMatrix) -> None:
        """Leave the terminal line free for whoever prints the row."""
        if self._line is not None:
            self._line.erase()

    def on_run_end(self, results: Any) -> None:
        """Take the line away."""
        self._active = False
        if self._line is not None:
            self._line.close()

    def on_run_error(self, error: BaseException) -> None:
        """Take the line away."""
        self._active = False
        if self._line is not None:
            self._line.close()

    def _parts(self) -> list[tuple[int, str]]:
        """Write the line; each part with the rank at which it goes when there is no room."""
        task = f" {plain(self.task)}" if self.task else ""
        if self.doing == "training":
            place, detail = f"[stage {self.row}/{self.num_stages}{task}]", f" step {self.done}/{self.planned}"
        elif self.doing == "answering":
            place, detail = f"[scoring row {self.row}/{self.num_stages}{task}]", f" answer {self.done}/{self.planned}"
        else:
            place, detail = f"[capability after stage {self.row}/{self.num_stages}]", ""
        loss = "" if self.loss is None else f" loss {self.loss:.2f}"
        left, percent = self.estimate.seconds_left(), self.percent()
        more = "".join(f" + {one}" for one in self.estimate.uncounted)
        note = sweep_note()
        return [
            (0, place),
            (3, detail),
            (6, loss),
            (4, "" if percent is None or more else f" · run {percent:.0f} %"),
            (5, f" · {clock_time(self.gone)} gone"),
            (1, " · time left not known yet" if left is None else f" · about {clock_time(left)}{more} left"),
            (2, f" · {note}" if note else ""),
        ]
