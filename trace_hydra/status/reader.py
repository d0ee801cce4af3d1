"""One look at everything below a folder.

Files may be half-written or vanish while it reads; clocks of other machines may be off. A process of this machine is
asked for; one of another counts as dead only when its sign of life is old by the clock of its machine and by that of
the file system. Between two looks, what moves lives whatever the clocks say.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from trace_hydra import terminal
from trace_hydra.heartbeat import BEAT_S, STATUS
from trace_hydra.job import ERROR
from trace_hydra.status import left as sweep_left
from trace_hydra.status.files import (
    RESULTS,
    absolute,
    first_line,
    mapping,
    number,
    read_object,
    run_folders,
    text,
    texts,
    whole,
)
from trace_hydra.status.left import Left, Work
from trace_hydra.status.model import STATES, Job, Status, Sweep
from trace_hydra.store import locks
from trace_hydra.sweep_record import PlannedJob, SweepRecord, read_records

SKEW_S = 240.0
"""Further silence granted to a process that cannot be asked for: two clocks may differ by that."""
_BEATS = 6
_BLANK: dict[str, Any] = {"note": "", "error": "", "doing": "", "left_s": None, "percent": None, "heard_s": None}
"""Of a job that has not begun: what an earlier sweep left in its folder is not shown."""


class Reader:
    """Reads how things stand, as often as it is asked; remembers what it has heard of whom.

    Args:
        folder: Of a run, a sweep, or both.
        only: Name of the one sweep to look at; None: all sweeps and runs.
        wall: Seconds since the epoch.
        monotonic: Seconds.
    """

    def __init__(
        self,
        folder: Path,
        only: str | None = None,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ):
        self.folder, self.only, self._wall, self._monotonic = folder, only, wall, monotonic
        self._heard: dict[Path, tuple[Any, float, bool]] = {}

    def read(self) -> Status:
        """Look at everything once.

        Raises:
            OSError: If the folder cannot be read.
        """
        os.listdir(self.folder)
        self._now = self._wall()
        records = [record for record in read_records(self.folder) if self.only in (None, record.name)]
        alive = {record.name: self._sweep_lives(record) for record in records}
        planned: dict[Path, tuple[PlannedJob, SweepRecord]] = {}
        for record in records:
            for job in record.jobs:
                if job.plan != "same as another":
                    planned.pop(absolute(job.directory), None)  # the latest sweep is the one whose order counts
                    planned[absolute(job.directory)] = job, record
        found = [self._planned(path, job, record, alive[record.name]) for path, (job, record) in planned.items()]
        for directory in run_folders(self.folder) if self.only is None else ():
            if absolute(directory) not in planned:
                found.append(self._run(directory, None, None))
        jobs = [job for job, _ in found]
        return Status(
            folder=str(self.folder),
            jobs=jobs,
            sweeps=[_summary(record, alive[record.name], jobs) for record in records],
            left=_left(found, records),
            counts={state: count for state in STATES if (count := sum(job.state == state for job in jobs))},
        )

    def _planned(self, directory: Path, planned: PlannedJob, record: SweepRecord, alive: bool) -> tuple[Job, Work]:
        """Read a job of a sweep, which may not have begun."""
        job, work = self._run(directory, planned, record)
        status = read_object(directory / STATUS) or {}
        begun = status.get("sweep") == record.name or number(status.get("started"), 0.0) > record.started
        if planned.plan != "to run" or begun:
            return job, work
        if alive:
            return replace(job, state="waiting", **_BLANK), work
        if job.state == "unknown":
            note = "its sweep's process is gone; what was queued may still start" if record.queued else ""
            return replace(job, state="not started", **{**_BLANK, "note": note}), work
        return job, work

    def _run(self, directory: Path, planned: PlannedJob | None, record: SweepRecord | None) -> tuple[Job, Work]:
        """Read a run's folder."""
        path = directory / STATUS
        status = read_object(path) or {}
        progress, process = mapping(status.get("progress")), mapping(status.get("process"))
        age, known = self._age(path, status, process)
        state, note = self._state(directory, status, age, known)
        running, done = state == "running", state == "done"
        quiet = number(status.get("quiet_s"), 0.0) + (age or 0.0)
        left = number(progress.get("left_s"))
        op, bwt = self._numbers(directory, progress) if done else (None, None)
        job = Job(
            folder=os.path.relpath(directory, self.folder),
            state=state,
            number=planned.number if planned else None,
            label=planned.label if planned else directory.name or str(directory),
            **_place(progress),
            percent=100.0 if done else number(progress.get("percent")),
            left_s=max(0.0, left - quiet) if running and left is not None else None,
            uncounted=texts(progress.get("uncounted")) if running else (),
            op=op,
            bwt=bwt,
            heard_s=age,
            quiet_s=quiet if running else None,
            error=first_line(directory / ERROR) if state == "failed" else "",
            note=note,
            host=text(process.get("host")),
            pid=whole(process.get("pid")),
            sweep=record.name if record else None,
            arguments=texts(status.get("arguments")),
            directory=text(status.get("folder")),
        )
        return job, _work(job, status, progress, planned)

    def _numbers(self, directory: Path, progress: Mapping[str, Any]) -> tuple[float | None, float | None]:
        """OP and BWT of a finished run; runs of before did not put them into status.json."""
        found: Mapping[str, Any] = progress
        if not {"op", "bwt"} <= set(progress):
            found = read_object(directory / RESULTS) or {}
        return number(found.get("op")), number(found.get("bwt"))

    def _state(
        self, directory: Path, status: Mapping[str, Any], age: float | None, known: bool | None
    ) -> tuple[str, str]:
        """Tell state and note of a run."""
        said = status.get("state")
        if said == "running":
            silent = age is not None and age > self._patience(status, known)
            if known is False:
                return "dead", f"its process is gone; last sign of life {_ago(age)}"
            if silent and known is None:
                return "dead", f"no heartbeat {_since(age)}; its machine cannot be asked from here"
            return "running", f"no heartbeat {_since(age)}, but its process exists" if silent else ""
        if said == "stopped":
            return "interrupted", "back in its queue" if status.get("sent_back") else ""
        if said == "failed":
            return "failed", ""
        if said == "done":
            return "done", "" if (
                directory / RESULTS
            ).is_file() else "no results.json: an estimate (debug=cost), or it was removed"
        return self._state_without(directory)

    def _state_without(self, directory: Path) -> tuple[str, str]:
        """Tell the state of a run that left no status.json: of an older version, or one that cannot be read."""
        if (directory / ERROR).is_file():
            return "failed", ""
        results = read_object(directory / RESULTS)
        if results is not None and results.get("complete") is True:
            return "done", ""
        there = (directory / STATUS).exists()
        return "unknown", "status.json cannot be read" if there else "no status.json"

    def _age(
        self, path: Path, status: Mapping[str, Any], process: Mapping[str, Any]
    ) -> tuple[float | None, bool | None]:
        """Seconds since the last sign of life, and whether the process is known to run."""
        if not status:
            return None, None
        known = locks.alive(dict(process)) if status.get("state") == "running" else None
        clocks = [self._now - number(status.get("at"), 0.0)]
        with suppress(OSError):
            clocks.append(self._now - path.stat().st_mtime)
        return self._listen(path, (status.get("beat"), status.get("at")), max(0.0, min(clocks))), known

    def _listen(self, path: Path, sign: Any, by_clocks: float) -> float:
        """Trust the own clock where it has heard a change, or has waited longer than the clocks tell."""
        now = self._monotonic()
        before = self._heard.get(path)
        if before is None:
            self._heard[path] = (sign, now, False)
            return by_clocks
        changed = sign != before[0]
        self._heard[path] = (sign, now if changed else before[1], before[2] or changed)
        waited = now - self._heard[path][1]
        return waited if self._heard[path][2] else max(waited, by_clocks)

    def _patience(self, status: Mapping[str, Any], known: bool | None) -> float:
        beat = number(status.get("beat_s"), BEAT_S)
        return _BEATS * beat + (SKEW_S if known is None else 0.0)

    def _sweep_lives(self, record: SweepRecord) -> bool:
        if record.ended is not None:
            return False
        known = locks.alive(dict(record.process))
        age = self._listen(record.path, record.touched, max(0.0, self._now - record.touched))
        return known if known is not None else age <= _BEATS * BEAT_S + SKEW_S


def _place(progress: Mapping[str, Any]) -> dict[str, Any]:
    """Where a run is, as fields of `Job`."""
    return {
        "doing": text(progress.get("doing")),
        "stage": whole(progress.get("stage")),
        "stages": whole(progress.get("stages")),
        "task": text(progress.get("task")),
        "done": whole(progress.get("done")) or 0,
        "planned": whole(progress.get("planned")) or 0,
    }


def _work(job: Job, status: Mapping[str, Any], progress: Mapping[str, Any], planned: PlannedJob | None) -> Work:
    """What a job has measured, and what it still has to do."""
    rates, gone = mapping(progress.get("rates")), number(status.get("gone_s"))
    names = tuple(str(progress.get(key)) for key in ("model", "tuning", "method"))
    return Work(
        group=planned.group if planned else names,
        left_s=job.left_s,
        pieces=planned.pieces if planned else (),
        measured=max(planned.measured - 1, 0) if planned else 0,  # the start model's answers are shared
        rates=rates,
        beside_s=sweep_left.beside(gone, rates) if job.state == "done" and rates and gone is not None else None,
    )


def _left(found: Sequence[tuple[Job, Work]], records: Sequence[SweepRecord]) -> Left:
    """Put sweeps and single runs together: the last to end decides."""
    seconds, uncounted = 0.0, set[str]()
    for record in [*records, None]:
        name = record.name if record else None
        states: dict[str, list[Work]] = {}
        for job, work in found:
            if job.sweep == name:
                states.setdefault(job.state, []).append(work)
                uncounted |= set(job.uncounted)
        running, waiting = states.get("running", []), states.get("waiting", [])
        if not running and not waiting:
            continue
        ended = [work for state, works in states.items() if state not in ("running", "waiting") for work in works]
        left = sweep_left.time_left(
            ended, running, waiting, record.pieces if record else (), record.slots if record else None
        )
        if left.seconds is None:
            return left
        seconds, uncounted = max(seconds, left.seconds), uncounted | set(left.uncounted)
    return Left(seconds, uncounted=tuple(sorted(uncounted)))


def _summary(record: SweepRecord, alive: bool, jobs: Sequence[Job]) -> Sweep:
    own = [job for job in jobs if job.sweep == record.name]
    return Sweep(
        name=record.name,
        state="running" if alive else "ended" if record.ended is not None else "dead",
        code=record.ended,
        jobs=len(record.jobs),
        host=text(record.process.get("host")),
        pid=whole(record.process.get("pid")),
        started=record.started,
        command=record.command,
        directory=record.folder,
        queued=record.queued,
        finished=all(job.state == "done" for job in own),
    )


def _ago(age: float | None) -> str:
    return "at an unknown time" if age is None else f"{terminal.clock_time(age)} ago"


def _since(age: float | None) -> str:
    return "" if age is None else f"for {terminal.clock_time(age)}"
