"""status.json of a run directory: how the run stands and that it lives, for people and sweeps. No torch here.

One process writes it (rank 0's), at what it is told at once and otherwise every `BEAT_S` seconds. It decides nothing
about a run: a disk that refuses it stops nothing.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trace_hydra import ranks
from trace_hydra.errors import StoreError
from trace_hydra.files import as_json, put_bytes
from trace_hydra.store import locks

STATUS = "status.json"
SCHEMA = 1
BEAT_S = 10.0
"""Seconds between two signs of life. A thousand jobs on one file system write a hundred small files a second."""
_current: list["Heartbeat"] = []


class Heartbeat:
    """Keeps status.json while a run goes on; as a context manager it beats in a thread of its own.

    Args:
        directory: The run's.
        arguments: Of the command that goes on with this run alone.
        sweep: Name of the sweep that it belongs to; None outside of sweeps.
        beat_s: Seconds between writes while nothing is told.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        directory: Path,
        arguments: Sequence[str],
        sweep: str | None,
        *,
        beat_s: float = BEAT_S,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.path, self.beat_s, self._clock = directory / STATUS, beat_s, clock
        self._fixed = {
            "schema": SCHEMA,
            "sweep": sweep,
            "process": locks.this_process(),
            "arguments": list(arguments),
            "folder": str(Path.cwd()),
            "started": time.time(),
            "beat_s": beat_s,
        }
        self._state, self._beat, self._progress = "running", 0, dict[str, Any]()
        self._began = self._told = clock()
        self._stop, self._lock = threading.Event(), threading.Lock()

    def __enter__(self) -> "Heartbeat":
        self._write()
        self._thread = threading.Thread(target=self._run, name=STATUS, daemon=True)
        if ranks.is_first():
            self._thread.start()
        _current.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _current.remove(self)
        self._stop.set()

    def tell(self, progress: Mapping[str, Any], now: bool = False) -> None:
        """Take news of the run, JSON values; written with the next beat, or now."""
        self._progress, self._told = dict(progress), self._clock()
        if now:
            self._write()

    def end(self, state: str, **facts: Any) -> None:
        """Write how the run ended: done, failed or stopped. Nothing is written after that."""
        self._stop.set()
        self._state = state
        self._fixed |= facts
        self._write()

    def _run(self) -> None:
        while not self._stop.wait(self.beat_s):
            self._write(beating=True)

    def _write(self, beating: bool = False) -> None:
        if not ranks.is_first():
            return
        with self._lock, suppress(StoreError, OSError, RuntimeError):  # at the interpreter's end threads cannot start
            if beating and self._stop.is_set():
                return
            now, self._beat = self._clock(), self._beat + 1
            changing = {
                "state": self._state,
                "beat": self._beat,
                "at": time.time(),
                "gone_s": round(now - self._began, 3),
                "quiet_s": round(now - self._told, 3),
                "progress": self._progress,
            }
            # Not brought to disk: a sign of life is worth nothing after a crash of the machine.
            put_bytes(as_json({**self._fixed, **changing}, self.path), self.path, durable=self._state != "running")


def current() -> Heartbeat | None:
    """Give the heartbeat of the run that this process works for, if it has one."""
    return _current[-1] if _current else None
