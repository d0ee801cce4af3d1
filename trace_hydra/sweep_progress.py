"""A sweep's own progress, from what its jobs write: a line for all of them, or a note in the line of the one that runs.

Jobs in other processes would draw over each other's lines, so on a terminal they draw none (`terminal.SWEEP_LINE`).
"""

import logging
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from trace_hydra import terminal
from trace_hydra.status.model import Job, Status
from trace_hydra.status.reader import Reader
from trace_hydra.sweep_record import RecordWriter
from trace_hydra.terminal import Line, clock_time, fitting, plain

log = logging.getLogger(__name__)

LOOK_S, LINES_S = 2.0, 15.0
"""Seconds between looks at the jobs' files at least, and between lines where there is no bar."""
_SHARE = 20
"""A look takes at most this fraction of the time."""


class SweepProgress:
    """Shows how a sweep stands while the block lasts, and keeps its record alive; an error of it stops nothing.

    Args:
        folder: The sweep's.
        record: Its record, written.
        mode: As `progress`.
        serial: Whether jobs run in this process, one after the other.
        stream: Where to write; None: stderr.
    """

    def __init__(self, folder: Path, record: RecordWriter, mode: str, serial: bool, stream: Any = None):
        self._stream = stream or sys.stderr
        self._mode, self._serial, self._record = terminal.mode_of(mode, self._stream), serial, record
        self._reader = Reader(folder, only=record.name)
        self._line = Line(self._stream)
        self._states: dict[str, str] = {}
        self._said = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweep progress", daemon=True)
        self._before: str | None = None

    def __enter__(self) -> "SweepProgress":
        self._before = os.environ.get(terminal.SWEEP_LINE)
        if not self._serial:
            os.environ[terminal.SWEEP_LINE] = str(os.getpid())
            self._line.watch_log()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=5 * LOOK_S)
        self._line.close()
        terminal.set_sweep_note("")
        if self._before is None:
            os.environ.pop(terminal.SWEEP_LINE, None)
        else:
            os.environ[terminal.SWEEP_LINE] = self._before

    def _run(self) -> None:
        wait = LOOK_S
        while not self._stop.wait(wait):
            began = time.monotonic()
            self._record.touch()
            try:
                self.look()
            except Exception:  # whatever a file system or a terminal does
                log.warning("the sweep's progress cannot be shown any more; the sweep goes on.", exc_info=True)
                return
            wait = max(LOOK_S, _SHARE * (time.monotonic() - began))

    def look(self) -> None:
        """Read how the jobs stand and show it."""
        status = self._reader.read()
        if self._serial:
            terminal.set_sweep_note("" if self._mode == "quiet" else _note(status))
            return
        if self._mode == "quiet":
            return
        for job in status.jobs:
            if job.state == "done" and self._states.get(job.folder) in ("running", "waiting"):
                self._line.above(_done(job))
        self._states = {job.folder: job.state for job in status.jobs}
        if self._mode == "bar":
            self._line.draw(fitting(_parts(status), terminal.width_of() - terminal.MARGIN, gap=""))
        elif time.monotonic() - self._said >= LINES_S:
            self._said = time.monotonic()
            self._line.above("".join(part for _, part in _parts(status)))


def _parts(status: Status) -> list[tuple[int, str]]:
    total = len(status.jobs)
    counts = status.counts
    more = [
        f"{counts[state]} {state}"
        for state in ("running", "waiting", "failed", "dead", "interrupted")
        if state in counts
    ]
    running = [job for job in status.jobs if job.state == "running"]
    first = f" · {plain(running[0].label)}: stage {running[0].stage}/{running[0].stages}" if _placed(running) else ""
    return [
        (0, f"[sweep {counts.get('done', 0)}/{total} done]"),
        (2, f" {', '.join(more)}" if more else ""),
        (1, f" · {_left(status)}"),
        (3, first),
    ]


def _placed(running: list[Job]) -> bool:
    return bool(running) and running[0].stage is not None


def _note(status: Status) -> str:
    return f"sweep {status.counts.get('done', 0)}/{len(status.jobs)} done, {_left(status)}"


def _left(status: Status) -> str:
    seconds = status.left.seconds
    more = "".join(f" + {one}" for one in status.left.uncounted)
    return "time left not known yet" if seconds is None else f"about {clock_time(seconds)}{more} left"


def _done(job: Job) -> str:
    numbers = [f"{name} {value:.2f}" for name, value in (("OP", job.op), ("BWT", job.bwt)) if value is not None]
    return plain(f"done: #{job.number} {job.label}  {'  '.join(numbers)}")
