"""Where a run is, for its status.json."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from trace_hydra.callbacks.tracker import Tracker

_INTERVAL_S = 1.0


class StatusCallback(Tracker):
    """Tells where the run is: at once where a stage begins or ends, at most once a second in between.

    Args:
        tell: Takes JSON values, and whether they are to be written now.
        clock: Seconds, monotonic.
    """

    def __init__(self, tell: Callable[[Mapping[str, Any], bool], None], clock: Callable[[], float] = time.monotonic):
        super().__init__(clock)
        self._tell, self._last, self._told_row = tell, -_INTERVAL_S, ("", -1)
        self._numbers: dict[str, Any] = {}

    def changed(self, boundary: bool = False) -> None:
        """Tell, unless it was told a moment ago."""
        now = self._clock()
        if not boundary and now - self._last < _INTERVAL_S:
            return
        place = (self.doing, self.row)
        moved, self._told_row, self._last = place != self._told_row, place, now
        self._tell(self.facts(), moved)

    def on_run_end(self, results: Mapping[str, Any]) -> None:
        """Tell the numbers."""
        self.doing = "done"
        self._numbers = {key: results.get(key) for key in ("op", "bwt")}
        self._tell(self.facts(), False)

    def facts(self) -> dict[str, Any]:
        """Give what status.json shows under `progress`."""
        run = self._run
        assert run is not None
        done = self.doing == "done"
        return {
            **{key: getattr(run, key) for key in ("model", "method", "tuning", "task_order", "seed")},
            "doing": self.doing,
            "stage": self.row,
            "stages": self.num_stages,
            "task": self.task,
            "done": self.done,
            "planned": self.planned,
            "percent": 100.0 if done else self.percent(),
            "left_s": 0.0 if done else self.estimate.seconds_left(),
            "uncounted": self.estimate.uncounted,
            "rates": self.estimate.rates(),
            **self._numbers,
        }
