"""Tables and pictures on their way to W&B, beside the training.

Logging a `wandb.Table` online asks the server about the artifact that is made of it, and waits: 20 s for each table
where the server is lost (measured, wandb 0.31). Numbers do not wait.
"""

import queue
import threading
from collections.abc import Callable
from typing import Any

_END = object()


class MediaQueue:
    """Logs entries in order in a thread of its own.

    Args:
        experiment: A wandb.Run that is online.
        answers: Ask whether the server answers; what is logged while it does not becomes a file of the run alone.
        attempt: Call a function and swallow what it raises.
    """

    def __init__(self, experiment: Any, answers: Callable[[], bool], attempt: Callable[[Callable[[], Any]], None]):
        self._experiment, self._answers, self._attempt = experiment, answers, attempt
        self._waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._at_hand: dict[str, Any] | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, daemon=True, name="trace_hydra-wandb-media")
        self._thread.start()

    def put(self, entry: dict[str, Any]) -> None:
        """Take an entry of `wandb.Run.log`; returns at once."""
        self._waiting.put(entry)

    def close(self, patience_s: float) -> None:
        """Log what is left: for `patience_s` as usual, then without the server."""
        self._waiting.put(_END)
        self._thread.join(patience_s)
        if not self._thread.is_alive():
            return
        self._closed = True
        left = [self._at_hand]
        while not self._waiting.empty():
            left.append(self._waiting.get())
        for entry in left:
            if isinstance(entry, dict):
                self._attempt(lambda entry=entry: self._experiment.log(_as_files(entry, self._experiment)))

    def _work(self) -> None:
        while (entry := self._waiting.get()) is not _END:
            self._at_hand = entry
            self._attempt(self._log)
            self._at_hand = None

    def _log(self) -> None:
        entry: Any = self._at_hand
        answers = self._answers()
        if self._closed:
            return
        try:
            self._experiment.log(entry if answers else _as_files(entry, self._experiment))
        except Exception:
            if not self._closed:  # else `close` has logged it, and the run is over
                raise


def _as_files(entry: dict[str, Any], experiment: Any) -> dict[str, Any]:
    """Replace tables by ones that are tied to the run already; wandb makes no artifact of these and asks nobody."""
    import wandb

    replaced = {}
    for name, value in entry.items():
        if isinstance(value, wandb.Table):
            rows: Any = value.data
            value = wandb.Table(columns=value.columns, data=rows, allow_mixed_types=True)
            value.bind_to_run(experiment, name, experiment.step)
        replaced[name] = value
    return replaced
