"""How jobs and sweeps stand: plain records, as `--json` shows them."""

from dataclasses import dataclass, field

from trace_hydra.status.left import Left

STATES = ("running", "failed", "dead", "interrupted", "not started", "unknown", "waiting", "done")


@dataclass(frozen=True)
class Job:
    """A run, as its folder and its sweep's plan show it."""

    folder: str
    """Relative to what was asked for."""
    state: str
    """One of STATES."""
    number: int | None = None
    """Place in its sweep."""
    label: str = ""
    doing: str = ""
    stage: int | None = None
    stages: int | None = None
    task: str = ""
    done: int = 0
    planned: int = 0
    """Of steps or answers."""
    percent: float | None = None
    left_s: float | None = None
    uncounted: tuple[str, ...] = ()
    """What is to do and not part of `left_s`."""
    op: float | None = None
    bwt: float | None = None
    heard_s: float | None = None
    """Seconds since the last sign of life."""
    quiet_s: float | None = None
    """Seconds since it last got anywhere."""
    error: str = ""
    note: str = ""
    host: str = ""
    pid: int | None = None
    sweep: str | None = None
    arguments: tuple[str, ...] = ()
    directory: str = ""
    """Where its command was given."""


@dataclass(frozen=True)
class Sweep:
    """A sweep as its record shows it."""

    name: str
    state: str
    """running, dead, or ended."""
    code: int | None
    jobs: int
    host: str
    pid: int | None
    started: float
    command: tuple[str, ...]
    directory: str
    queued: bool
    finished: bool
    """Whether all of its jobs are done."""


@dataclass(frozen=True)
class Status:
    """How everything below a folder stands."""

    folder: str
    jobs: list[Job]
    sweeps: list[Sweep]
    left: Left
    """Time until the last job ends."""
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def open(self) -> bool:
        """Whether anything runs or is about to."""
        return any(job.state in ("running", "waiting") for job in self.jobs)
