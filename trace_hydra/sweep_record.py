"""What a sweep leaves in its folder about its plan, so that others see what waits: `.sweep-<host>-<pid>-<id>.json`.

No torch here. The file's time is touched while the sweep's process lives; jobs that ran say themselves how it went.
"""

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_hydra.errors import StoreError
from trace_hydra.files import as_json, write_bytes
from trace_hydra.store import locks

if TYPE_CHECKING:
    from trace_hydra.sweep import JobPlan

SCHEMA = 1
_PREFIX, _SUFFIX = ".sweep-", ".json"


@dataclass(frozen=True)
class PlannedJob:
    """One job of a sweep as its plan had it."""

    number: int
    label: str
    """The overrides that set it apart."""
    directory: Path
    plan: str
    """to run, done before, cannot run, or same as another."""
    group: tuple[str, ...]
    """Names of model, tuning and method: jobs that take about as long for as much."""
    pieces: tuple[int, ...]
    """What the store lacked, as places in `SweepRecord.pieces`; jobs may share them."""
    measured: int
    """Rows at which capability is measured."""


@dataclass(frozen=True)
class SweepRecord:
    """A sweep, as it was planned."""

    path: Path
    name: str
    """Of its halt file; jobs that it started name it."""
    process: Mapping[str, Any]
    command: tuple[str, ...]
    """Arguments of `python -m trace_hydra`."""
    folder: str
    """Where it was given."""
    slots: int | None
    """Jobs at once; None if the launcher does not say."""
    queued: bool
    """Whether jobs wait in a queue of their own, which outlives the sweep's process."""
    started: float
    touched: float
    """Time of the file, by the clock of its file system."""
    ended: int | None
    """Exit code; None while it runs, or if it was killed."""
    jobs: tuple[PlannedJob, ...]
    """In the order in which they are launched."""
    pieces: tuple[tuple[str, int], ...]
    """("trained", tokens) or ("answered", rows)."""


class RecordWriter:
    """Keeps the record of one sweep.

    Args:
        halt: The sweep's halt file; the record lies beside it.
        command: Arguments of the command line.
        slots: Jobs at once, if known.
        queued: Whether jobs wait in a queue of their own.
    """

    def __init__(self, halt: Path, command: Sequence[str], slots: int | None, queued: bool):
        self.path, self.name = halt.with_suffix(_SUFFIX), halt.name
        self._content: dict[str, Any] = {
            "schema": SCHEMA,
            "name": halt.name,
            "process": locks.this_process(),
            "command": list(command),
            "folder": os.getcwd(),
            "slots": slots,
            "queued": queued,
            "started": time.time(),
            "ended": None,
            "jobs": [],
            "pieces": [],
        }

    def write(
        self,
        plans: Sequence["JobPlan"],
        order: Sequence["JobPlan"],
        labels: Mapping[int, str],
        groups: Mapping[int, Any],
    ) -> None:
        """Write the plan. A disk that refuses it stops no sweep."""
        places: dict[str, int] = {}
        pieces: list[tuple[str, int]] = []
        ordered = [*order, *(plan for plan in plans if not plan.to_run)]
        for plan in ordered:
            wanted = []
            for kind, found in (("trained", plan.stages), ("answered", plan.cells)):
                for piece in found if plan.to_run else ():
                    if not piece.stored:
                        if piece.key not in places:
                            places[piece.key] = len(pieces)
                            pieces.append((kind, piece.amount))
                        wanted.append(places[piece.key])
            job = {
                "number": plan.number,
                "label": labels[plan.number],
                "directory": os.path.relpath(plan.directory, self.path.parent),
                "plan": _state(plan),
                "group": list(groups[plan.number]),
                "pieces": wanted,
                "measured": plan.measured,
            }
            self._content["jobs"].append(job)
        self._content["pieces"] = pieces
        self._put()

    def touch(self) -> None:
        """Show that the sweep's process lives."""
        with suppress(OSError):
            os.utime(self.path)

    def end(self, code: int) -> None:
        """Note how the sweep ended."""
        self._content["ended"] = code
        self._put()

    def _put(self) -> None:
        with suppress(StoreError):
            write_bytes(as_json(self._content, self.path, indent=None), self.path)


def read_records(folder: Path) -> list[SweepRecord]:
    """Read the records of all sweeps in a folder, the oldest first; what is no record is left out."""
    names: list[str] = []
    with suppress(OSError):
        names = [name for name in os.listdir(folder) if name.startswith(_PREFIX) and name.endswith(_SUFFIX)]
    found = (_read(folder / name) for name in names)
    return sorted((record for record in found if record is not None), key=lambda record: record.started)


def remove_superseded(folder: Path, own: Path, directories: Iterable[Path]) -> None:
    """Take away records of sweeps that are over and whose jobs are all part of a new one or done.

    Args:
        folder: The sweeps'.
        own: The new sweep's record.
        directories: Of the new sweep's jobs.
    """
    covered = {Path(os.path.abspath(one)) for one in directories}
    for record in read_records(folder):
        over = record.ended is not None or locks.alive(dict(record.process)) is False
        left = {Path(os.path.abspath(job.directory)) for job in record.jobs} - covered
        if record.path != own and over and all((one / "results.json").is_file() for one in left):
            with suppress(OSError):
                record.path.unlink()


def _state(plan: "JobPlan") -> str:
    if plan.same_as is not None:
        return "same as another"
    if plan.problem is not None:
        return "cannot run"
    return "done before" if plan.done else "to run"


def _read(path: Path) -> SweepRecord | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            return None
        jobs = tuple(
            PlannedJob(
                int(job["number"]), str(job["label"]), path.parent / job["directory"], str(job["plan"]),
                tuple(map(str, job["group"])), tuple(map(int, job["pieces"])), int(job["measured"]),
            )
            for job in content["jobs"]
        )  # fmt: skip
        return SweepRecord(
            path=path,
            name=str(content["name"]),
            process=dict(content["process"]),
            command=tuple(map(str, content["command"])),
            folder=str(content["folder"]),
            slots=None if content["slots"] is None else int(content["slots"]),
            queued=bool(content["queued"]),
            started=float(content["started"]),
            touched=path.stat().st_mtime,
            ended=None if content["ended"] is None else int(content["ended"]),
            jobs=jobs,
            pieces=tuple((str(kind), int(amount)) for kind, amount in content["pieces"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # half-written, or no record
        return None
